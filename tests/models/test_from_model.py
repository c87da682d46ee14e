"""Hidden states and head of real architectures: the model's own logits, aligned with the completion, or a refusal."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from rlvr_ops import Head, ace_loss, hidden_states_of, token_logps
from rlvr_ops.head.from_model import unwrapped

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 53,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": ("Llama", SIZES),
    "tied": ("Qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SIZES),
    "softcap": ("Gemma2", {**SIZES, "final_logit_softcapping": 0.5}),
    "gemma3": ("Gemma3", {**SIZES, "final_logit_softcapping": 0.7}),
    "multiplied": ("Cohere", {**SIZES, "logit_scale": 0.25}),
    "divided": ("Granite", {**SIZES, "logits_scaling": 8.0}),
    "multiplied by a divisor's name": ("HyperCLOVAX", {**SIZES, "logits_scaling": 0.125}),
    "bias": ("Phi", SIZES),
    "absolute positions": ("GPT2", GPT2),
}


def build(family, sizes):
    config_class = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_token_logps_from_the_head_are_those_of_the_models_own_logits(name):
    model = build(*MODELS[name])
    head = Head.from_model(model)
    ids = torch.randint(3, 53, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 0
    scores = token_logps(hidden_states_of(model, ids, mask, 4), head, ids[:, -4:])
    alone = model(input_ids=ids[:1, 3:]).logits.log_softmax(-1)  # the padded row without its padding
    expected = alone[0, -5:-1].gather(-1, ids[0, -4:, None])[:, 0]
    torch.testing.assert_close(scores.logps[0], expected, rtol=1e-4, atol=1e-5)


def test_scale_softcap_and_bias_are_found():
    assert Head.from_model(build(*MODELS["softcap"])).softcap == 0.5
    assert Head.from_model(build(*MODELS["multiplied"])).logit_scale == 0.25
    assert Head.from_model(build(*MODELS["divided"])).logit_scale == 0.125
    assert Head.from_model(build(*MODELS["bias"])).bias is not None
    assert Head.from_model(build(*MODELS["llama"])).bias is None


def test_a_tied_head_shares_its_weight_with_the_embedding():
    model = build(*MODELS["tied"])
    assert Head.from_model(model).weight is model.get_input_embeddings().weight


def test_logits_that_cannot_be_rebuilt_are_refused(monkeypatch):
    model = build(*MODELS["llama"])
    own = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: _changed(own(**k), lambda z: 1.01 * z))
    with pytest.raises(TypeError, match=r"cannot vouch for LlamaForCausalLM.*not the model's own"):
        Head.from_model(model)
    monkeypatch.setattr(model, "forward", lambda **k: _changed(own(**k), lambda z: z[..., :50]))
    with pytest.raises(TypeError, match=r"shape \(1, 8, 53\) against its \(1, 8, 50\)"):
        Head.from_model(model)


def _changed(output, change):
    output.logits = change(output.logits)
    return output


def test_a_recurrent_model_that_reads_padding_is_refused():
    model = build("Rwkv", {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32})
    with pytest.raises(TypeError, match="padding on the left changes its hidden states"):
        Head.from_model(model)


def test_an_encoder_decoder_is_refused():
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=53, d_model=32, num_layers=1))
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        Head.from_model(model)


def test_an_output_layer_that_is_not_linear_is_refused():
    model = build(*MODELS["llama"])
    model.lm_head = nn.Sequential(nn.Linear(32, 53))
    with pytest.raises(
        TypeError, match=r"cannot vouch for LlamaForCausalLM: lm_head must be an nn.Linear .* got Sequential"
    ):
        Head.from_model(model)


def test_a_model_without_a_body_is_refused():
    body = build(*MODELS["llama"]).model
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(TypeError, match="LlamaModel has no body apart from its head"):
        hidden_states_of(body, ids, ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.ones(9, dtype=torch.long)}, r"input_ids must have shape \(B, S\), got \(9,\)"),
        ({"input_ids": [[1, 2]]}, "input_ids must be a torch.Tensor, got list"),
        (
            {"attention_mask": torch.ones(1, 4)},
            r"attention_mask must have shape \(B, S\) = \(1, 9\) like input_ids, .* \(1, 4\)",
        ),
        ({"attention_mask": 5}, "attention_mask must be a torch.Tensor, got int"),
        ({"length": 5.0}, "length must be an int, got 5.0"),
        ({"length": True}, "length must be an int, got True"),
    ],
)
def test_wrong_inputs_are_named(arguments, message):
    given = {"input_ids": torch.ones(1, 9, dtype=torch.long)} | arguments
    with pytest.raises((TypeError, ValueError), match=message):
        hidden_states_of(build(*MODELS["llama"]), **given)


@pytest.mark.parametrize("length", [0, 9, 10])
def test_a_completion_needs_a_token_before_it(length):
    model = build(*MODELS["llama"])
    ids = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match=r"length must be in 1\.\.8"):
        hidden_states_of(model, ids, ids, length)


def with_lora(name, targets, **config):
    return get_peft_model(build(*MODELS[name]), LoraConfig(target_modules=targets, init_lora_weights=False, **config))


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["body", "body and head"])
def test_lora_applies_in_the_body_and_on_the_head(targets):
    model = with_lora("softcap" if len(targets) == 1 else "llama", targets)
    ids = torch.randint(3, 53, (2, 9))
    scores = token_logps(hidden_states_of(model, ids, length=4), Head.from_model(model), ids[:, -4:])
    own = model(input_ids=ids).logits.log_softmax(-1)[:, -5:-1].gather(-1, ids[:, -4:, None])[..., 0]
    torch.testing.assert_close(scores.logps, own, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(scores.logps.sum(), [p for p in model.parameters() if p.requires_grad])
    theirs = torch.autograd.grad(own.sum(), [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    with model.disable_adapter():
        base = token_logps(hidden_states_of(model, ids, length=4), Head.from_model(model), ids[:, -4:])
    assert (base.logps - scores.logps).abs().max() > 1e-3


def test_dropout_on_the_heads_adapter_is_refused_while_training_and_prompt_tuning_always():
    model = with_lora("llama", ["lm_head"], lora_dropout=0.1).train()
    with pytest.raises(TypeError, match="drops inputs at random"):
        Head.from_model(model)
    tuned = get_peft_model(
        build(*MODELS["llama"]),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, tokenizer_name_or_path=None),
    )
    with pytest.raises(TypeError, match="adds to the prompt"):
        Head.from_model(tuned)
    with pytest.raises(TypeError, match="adds to the prompt"):
        hidden_states_of(tuned, torch.ones(1, 4, dtype=torch.long))


def test_the_comparison_is_made_once_without_dropout_and_leaves_the_mode_alone(monkeypatch):
    model = build("Llama", {**SIZES, "attention_dropout": 0.5}).train()
    model.model.norm.eval()
    Head.from_model(model)
    assert model.training
    assert not model.model.norm.training
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("compared again"))
    assert Head.from_model(model, temperature=0.7).temperature == 0.7


def test_wrappers_are_looked_into():
    model = build(*MODELS["llama"])
    ids = torch.randint(3, 53, (1, 6))
    expected = hidden_states_of(model, ids)
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert Head.from_model(wrapped).weight is model.lm_head.weight
        torch.testing.assert_close(hidden_states_of(wrapped, ids), expected)


class Forwarding(nn.Module):
    """As DeepSpeed's engine and FSDP: a module around a module, that has all of its attributes."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def test_a_wrapper_that_forwards_attributes_is_looked_into():
    model = build(*MODELS["llama"])
    assert Forwarding(model).config is model.config
    assert unwrapped(Forwarding(model)) is model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_of_three_percent_is_seen_in_every_dtype(dtype, monkeypatch):
    model = build(*MODELS["llama"]).to(dtype)
    Head.from_model(copy.deepcopy(model))
    own = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: _changed(own(**k), lambda z: 1.03 * z))
    with pytest.raises(TypeError, match="not the model's own"):
        Head.from_model(model)


def test_the_models_own_positions_count_with_further_inputs():
    model = build(*MODELS["absolute positions"])
    ids, positions = torch.randint(3, 53, (1, 6)), torch.arange(3, 9)[None]
    expected = model(input_ids=ids, position_ids=positions, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden_states_of(model, ids, position_ids=positions), expected)


def test_something_else_than_a_model_is_refused():
    with pytest.raises(
        TypeError, match=r"model must be a causal language model of transformers, got Linear: Head.of takes a layer"
    ):
        Head.from_model(nn.Linear(2, 3))
    config = transformers.LlamaConfig(**SIZES)
    with pytest.raises(TypeError, match="LlamaModel has no output layer"):
        Head.from_model(transformers.LlamaModel(config))


def a_batch():
    return torch.randn(2, 3, 8), torch.randint(16, (2, 3)), torch.tensor([1.0, -1.0]), torch.full((2, 3), -3.0)


def test_a_head_stands_for_all_its_keywords():
    hidden, ids, advantages, ref = a_batch()
    head = Head(torch.randn(16, 8), torch.randn(16), 0.5, 3.0, 0.7)
    keywords = {"lm_head_bias": head.bias, "logit_scale": 0.5, "softcap": 3.0, "temperature": 0.7}
    ours = ace_loss(hidden, head, ids, advantages, ref_per_token_logps=ref)
    assert ours.loss == ace_loss(hidden, head.weight, ids, advantages, ref_per_token_logps=ref, **keywords).loss
    torch.testing.assert_close(
        token_logps(hidden, head, ids).logps, token_logps(hidden, head.weight, ids, **keywords).logps
    )


def test_a_temperature_beside_a_head_is_that_of_whichever_has_one():
    head, warm = Head(torch.randn(16, 8), softcap=3.0), torch.tensor([0.5, 2.0])
    assert Head(head, temperature=0.7).temperature == 0.7
    assert Head(Head(head, temperature=warm)).temperature is warm
    assert Head(head, temperature=0.7).softcap == 3.0
    with pytest.raises(ValueError, match="temperature is given beside a Head, which has its own"):
        Head(Head(head, temperature=warm), temperature=0.7)


@pytest.mark.parametrize("name", ["lm_head_bias", "softcap", "logit_scale"])
def test_what_a_head_has_is_not_given_twice(name):
    hidden, ids, advantages, ref = a_batch()
    given = torch.zeros(16) if name == "lm_head_bias" else 2.0
    with pytest.raises(ValueError, match=f"{name} is given beside a Head, which has its own"):
        ace_loss(hidden, Head(torch.randn(16, 8)), ids, advantages, ref_per_token_logps=ref, **{name: given})
