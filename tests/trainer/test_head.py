"""Hidden states and head of real architectures: the model's own logits, aligned with the completion, or a refusal."""

import pytest
import torch
import transformers
from rlvr_trainer.head import Head, UnsupportedArchitectureError, completion_hidden_states, last_hidden_state
from torch import nn

import rlvr_ops

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
    head = Head.of(model)
    ids = torch.randint(3, 53, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    ids[0, :3] = 0
    scores = rlvr_ops.token_logps(
        hidden_states=completion_hidden_states(model, ids, mask, 4), completion_ids=ids[:, -4:], **head.arguments()
    )
    alone = model(input_ids=ids[:1, 3:]).logits.log_softmax(-1)  # the padded row without its padding
    expected = alone[0, -5:-1].gather(-1, ids[0, -4:, None])[:, 0]
    torch.testing.assert_close(scores.logps[0], expected, rtol=1e-4, atol=1e-5)


def test_scale_softcap_and_bias_are_found():
    assert Head.of(build(*MODELS["softcap"])).softcap == 0.5
    assert Head.of(build(*MODELS["multiplied"])).logit_scale == 0.25
    assert Head.of(build(*MODELS["divided"])).logit_scale == 0.125
    assert Head.of(build(*MODELS["bias"])).bias is not None
    assert Head.of(build(*MODELS["llama"])).bias is None


def test_a_tied_head_shares_its_weight_with_the_embedding():
    model = build(*MODELS["tied"])
    assert Head.of(model).weight is model.get_input_embeddings().weight


def test_logits_that_cannot_be_rebuilt_are_refused(monkeypatch):
    model = build(*MODELS["llama"])
    own = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: _changed(own(**k), lambda z: 1.01 * z))
    with pytest.raises(UnsupportedArchitectureError, match=r"cannot vouch for LlamaForCausalLM.*not the model's own"):
        Head.of(model)
    monkeypatch.setattr(model, "forward", lambda **k: _changed(own(**k), lambda z: z[..., :50]))
    with pytest.raises(UnsupportedArchitectureError, match=r"shape \(1, 8, 53\) against its \(1, 8, 50\)"):
        Head.of(model)


def _changed(output, change):
    output.logits = change(output.logits)
    return output


def test_a_recurrent_model_that_reads_padding_is_refused():
    model = build("Rwkv", {"vocab_size": 53, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32})
    with pytest.raises(UnsupportedArchitectureError, match="padding on the left changes its hidden states"):
        Head.of(model)


def test_an_encoder_decoder_is_refused():
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=53, d_model=32, num_layers=1))
    with pytest.raises(UnsupportedArchitectureError, match="T5ForConditionalGeneration is an encoder-decoder"):
        Head.of(model)


def test_an_output_layer_that_is_not_linear_is_refused():
    model = build(*MODELS["llama"])
    model.lm_head = nn.Sequential(nn.Linear(32, 53))
    with pytest.raises(UnsupportedArchitectureError, match=r"output layer of LlamaForCausalLM is Sequential"):
        Head.of(model)


def test_a_model_without_a_body_is_refused():
    body = build(*MODELS["llama"]).model
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(UnsupportedArchitectureError, match="no body apart from its head"):
        last_hidden_state(body, ids, ids)


@pytest.mark.parametrize("length", [0, 9, 10])
def test_a_completion_needs_a_token_before_it(length):
    model = build(*MODELS["llama"])
    ids = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match=r"length must be in 1\.\.8"):
        completion_hidden_states(model, ids, ids, length)
