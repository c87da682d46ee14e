"""Parameters that exist only while a module runs, as under ZeRO-3: freed after forward, gathered again for backward."""

import pytest
import torch
from machinery_cases import gradients, make_batch, make_policy

import rlvr_ops

both = pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
kinds = pytest.mark.parametrize("freed", ["replaced", "resized"])


class Gathered:
    """Keeps a parameter's numbers elsewhere: ZeRO-3 replaces the data by an empty tensor, FSDP resizes the storage."""

    def __init__(self, parameter, freed):
        self.parameter, self.freed, self.kept = parameter, freed, parameter.detach().clone()
        self.free()

    def free(self):
        if self.freed == "replaced":
            self.parameter.data = torch.empty(0, dtype=self.kept.dtype)
        else:
            self.parameter.untyped_storage().resize_(0)

    def gather(self):
        if self.freed == "replaced":
            self.parameter.data = self.kept.clone()
            return
        self.parameter.untyped_storage().resize_(self.kept.untyped_storage().nbytes())
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(self.parameter):
            self.parameter.copy_(self.kept)


def shard(module, freed):
    """Gather a module's parameters for its forward and its backward, and free them after each."""
    parts = [Gathered(parameter, freed) for parameter in module.parameters(recurse=False)]

    def each(what):
        def hook(*_arguments):
            for part in parts:
                getattr(part, what)()

        return hook

    if parts:
        module.register_forward_pre_hook(each("gather"))
        module.register_forward_hook(each("free"))
        module.register_full_backward_pre_hook(each("gather"))
        for part in parts:
            part.parameter.register_post_accumulate_grad_hook(lambda _parameter, part=part: part.free())
    return parts


def call_in_the_head(policy):
    """Make the lm_head compute the loss, so that whatever gathers its weight for its forward has gathered it for the loss."""
    head = policy.lm_head

    def loss(hidden, ids, advantages, **given):
        return rlvr_ops.ace_loss(hidden, head.weight, ids, advantages, **policy.loss, **given).loss

    head.forward = loss
    policy.forward = lambda ids, advantages, **given: head(policy.hidden_states(ids), ids, advantages, **given)


@both
@kinds
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the embedding's, whose inputs are ids
def test_a_loss_in_the_heads_forward_has_the_gradients_of_parameters_that_stay(schedule, freed):
    policy, batch = make_policy(schedule=schedule, beta=0.1), make_batch()
    call_in_the_head(policy)
    parts = [part for module in policy.modules() for part in shard(module, freed)]
    loss = policy(**batch)
    assert all(part.parameter.untyped_storage().nbytes() == 0 for part in parts)
    loss.backward()
    plain = make_policy(schedule=schedule, beta=0.1)
    truth = gradients(plain, plain(**batch))
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter.grad, truth[name]), name
        assert parameter.untyped_storage().nbytes() == 0


def head_and_losses():
    """A head's weight and bias, and each loss of them by name."""
    batch = make_batch()
    ids, advantages = batch.pop("ids"), batch.pop("advantages")
    hidden = torch.randn(4, 8, 16, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((61, 16), (61,)))

    def loss(schedule):
        given = {"lm_head_bias": bias, "schedule": schedule, **batch}
        return rlvr_ops.ace_loss(hidden, weight, ids, advantages, **given).loss

    losses = {
        "two passes": lambda: loss("two_pass"),
        "token_logps": lambda: rlvr_ops.token_logps(hidden, weight, ids, lm_head_bias=bias).logps.sum(),
        "a single pass": lambda: loss("single_pass"),
    }
    return {"lm_head_weight": weight, "lm_head_bias": bias}, losses


@kinds
@pytest.mark.parametrize("name", ["lm_head_weight", "lm_head_bias"])
@pytest.mark.parametrize("loss", ["two passes", "token_logps"])
def test_a_parameter_that_is_not_gathered_again_is_refused_and_never_read(loss, name, freed):
    parameters, losses = head_and_losses()
    part = Gathered(parameters[name], freed)
    part.gather()
    value = losses[loss]()
    part.free()
    with pytest.raises(RuntimeError, match=f"{name} was freed between forward and backward: gather it again"):
        value.backward()


def test_a_single_pass_reads_no_parameter_in_backward_and_pytorch_refuses_a_gradient_of_another_shape():
    parameters, losses = head_and_losses()
    weight = parameters["lm_head_weight"]
    truth = torch.autograd.grad(losses["a single pass"](), weight)[0]
    for freed in ("resized", "replaced"):
        part = Gathered(weight, freed)
        part.gather()
        value = losses["a single pass"]()
        part.free()
        if freed == "replaced":
            with pytest.raises(RuntimeError, match=r"shape|size"):
                value.backward()
        else:
            assert torch.equal(torch.autograd.grad(value, weight)[0], truth)
            part.gather()


def test_an_empty_weight_is_refused_with_the_way_out():
    batch = make_batch()
    policy = make_policy()
    Gathered(policy.lm_head.weight, "replaced")
    with pytest.raises(ValueError, match=r"lm_head_weight must have shape \(V, H\) .*, got \(0,\): gather it first"):
        policy(**batch)
