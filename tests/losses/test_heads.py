"""Head.of: the weight that an lm_head module multiplies by, or a refusal that says why there is none."""

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import rlvr_ops
from rlvr_ops import Head

B, T, H, V = 3, 5, 8, 40


class Model(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.body, self.lm_head = nn.Linear(H, H), nn.Linear(H, V, bias=bias)

    def forward(self, x):
        return self.lm_head(self.body(x))


def adapted(bias=False, dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["lm_head"], r=2, lora_alpha=6, **options)
    model = peft.get_peft_model(Model(bias).to(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # peft begins with 0, where an ignored adapter would not be seen
            nn.init.normal_(parameter)
    return model.base_model.model.lm_head


def rollouts():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=g, dtype=torch.float64)
    return (
        hidden,
        torch.randint(V, (B, T), generator=g),
        torch.tensor([1.0, -1.0, 0.5]),
        -3 - torch.rand(B, T, generator=g),
    )


def loss_of(head, hidden, ids, advantages, ref):
    out = rlvr_ops.ace_loss(hidden, head.weight, ids, advantages, ref_per_token_logps=ref, lm_head_bias=head.bias)
    return out.loss


def loss_by_logits(module, hidden, ids, advantages, ref):
    logps = module(hidden).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return rlvr_ops.ace_loss_from_logps(logps, advantages, ref_per_token_logps=ref).loss


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_an_adapter_on_the_head_is_in_the_loss_and_gets_its_gradient(bias, rank_stabilised):
    module = adapted(bias, use_rslora=rank_stabilised)
    assert Head.of(module).weight is not module.weight, "which is the frozen base"
    trained = [p for n, p in module.named_parameters() if "lora_" in n]
    loss, truth = loss_of(Head.of(module), *rollouts()), loss_by_logits(module, *rollouts())
    torch.testing.assert_close(loss, truth, rtol=1e-6, atol=1e-7)
    for found, expected in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(truth, trained), strict=True):
        assert bool(expected.any())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_two_active_adapters_add_up_and_a_disabled_or_merged_one_is_left_to_the_base():
    module = adapted()
    module.update_layer("other", r=3, lora_alpha=3, config=peft.LoraConfig(r=3, lora_alpha=3))
    nn.init.normal_(module.lora_B["other"].weight)
    module.set_adapter(["default", "other"])
    states = rollouts()[0]

    def check():
        head = Head.of(module)
        torch.testing.assert_close(nn.functional.linear(states, head.weight, head.bias), module(states))

    check()
    module.set_adapter("other")
    check()
    module.enable_adapters(False)
    check()
    assert Head.of(module).weight is module.base_layer.weight
    module.enable_adapters(True)
    module.merge()
    check()


def test_a_low_precision_base_keeps_the_adapters_precision():
    module = adapted(dtype=torch.bfloat16)
    assert module.lora_A["default"].weight.dtype == torch.float32
    weight = Head.of(module).weight
    assert weight.dtype == torch.float32
    exact = module.weight.double() + 3 * (module.lora_B["default"].weight @ module.lora_A["default"].weight).double()
    torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_plain_head_is_its_own_parameter_and_takes_numbers():
    module = nn.Linear(H, V)
    head = Head.of(module, softcap=30.0, temperature=0.7)
    assert head.weight is module.weight
    assert head.bias is module.bias
    assert (head.softcap, head.temperature) == (30.0, 0.7)


def test_a_parametrised_weight_is_what_it_computes():
    module = parametrizations.weight_norm(nn.Linear(H, V))
    (Head.of(module).weight.sum()).backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if "weight" in n)


def test_modules_to_save_are_the_copies_that_are_trained():
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["lm_head"], r=2)
    wrapper = peft.get_peft_model(Model(), config).base_model.model.lm_head
    assert Head.of(wrapper).weight is wrapper.modules_to_save["default"].weight
    assert Head.of(wrapper).weight is not wrapper.original_module.weight


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def dropping():
    return adapted(lora_dropout=0.1).train()


def quantised():
    module = nn.Linear(H, V)
    module.weight = nn.Parameter(torch.zeros(H * V // 2, 1, dtype=torch.uint8), requires_grad=False)
    return module


def hooked():
    module = nn.Linear(H, V)
    module.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return module


def replaced():
    module = nn.Linear(H, V)
    module.forward = lambda x: 2 * x
    return module


def hooked_adapter():
    module = adapted()
    module.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],))
    return module


def hooked_wrapper(module):
    module.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return module


def saved_copy():
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["lm_head"])
    return peft.get_peft_model(Model(), config).base_model.model.lm_head


def replaced_wrapper():
    module = saved_copy()
    module.forward = lambda x: 2 * x
    return module


def hooked_part():
    module = adapted()
    module.lora_B["default"].register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return module


def gathered_elsewhere():
    module = nn.Linear(H, V)
    module.weight = nn.Parameter(torch.zeros(0))
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Embedding(V, H), "lm_head must be an nn.Linear or peft's LoRA around one, got Embedding"),
        (lambda: Scaled(H, V), "got Scaled with a forward of its own"),
        (lambda: prune.l1_unstructured(nn.Linear(H, V), "weight", 0.5), "got Linear whose hooks compute it"),
        (lambda: adapted(use_dora=True), "is more than W \\+ scaling B A \\(DoRA or another variant\\)"),
        (lambda: adapted(lora_bias=True, bias=True), "has a bias"),
        (dropping, "drops inputs at random"),
        (quantised, "lm_head.weight must have a floating dtype, got torch.uint8"),
        (hooked, "got Linear with forward hooks"),
        (replaced, "got Linear whose forward was replaced"),
        (hooked_adapter, "got Linear with forward hooks"),
        (lambda: hooked_wrapper(torch.compile(nn.Linear(H, V), backend="eager")), "got OptimizedModule with forward hooks"),
        (replaced_wrapper, "got ModulesToSaveWrapper whose forward was replaced"),
        (hooked_part, "got Linear with forward hooks"),
        (lambda: hooked_wrapper(saved_copy()), "got ModulesToSaveWrapper with forward hooks"),
        (gathered_elsewhere, "must have shape \\(40, 8\\), got \\(0,\\): gather it first"),
        (lambda: peft.get_peft_model(Model(), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
         .base_model.model.lm_head, "got the adapter Linear: merge it first"),
    ],
)  # fmt: skip
def test_a_module_whose_weight_does_not_say_what_it_computes_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        Head.of(make())


def test_dropout_that_is_off_is_no_obstacle():
    module = adapted(lora_dropout=0.1).eval()
    states = rollouts()[0]
    torch.testing.assert_close(nn.functional.linear(states, Head.of(module).weight), copy.deepcopy(module)(states))
