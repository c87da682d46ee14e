"""Policies: `tiny` speaks in characters, is the same for the same seed, and can be saved and found again."""

import pytest
import torch
import transformers
from rlvr_trainer import tiny
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.policies import load_policy
from rlvr_trainer.prompts import PromptFormat

from rlvr_ops import hidden_states_of


def weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])


def test_the_tokenizer_gives_every_character_back():
    tokenizer = tiny.make_tokenizer(["What is 1 + 1?", "What is 2 + 3?"])
    text = 'What is {"a"} - 12\n~ ?'
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) - len("What is ") + 1  # the shared beginning is one token
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id]


def test_a_long_shared_end_is_one_token_too_and_a_short_one_is_left():
    tokenizer = tiny.make_tokenizer(["Add 1 and 2. Give only the sum.", "Add 3 and 44. Give only the sum."])
    ids = tokenizer("Add 3 and 1. Give only the sum.").input_ids
    assert len(ids) == len("3 and 1") + 2
    assert tokenizer.decode(ids) == "Add 3 and 1. Give only the sum."
    assert len(tiny.make_tokenizer(["Add 1 =", "Add 2 ="])("Add 3 =").input_ids) == len("3 =") + 1
    assert tiny.make_tokenizer(["all alike"] * 2)("all alike").input_ids == [100]


def test_the_same_seed_makes_the_same_tiny_and_leaves_the_random_state_alone(small, digits):
    state = torch.get_rng_state()
    first, second = (load_policy(small(), digits()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(load_policy(small("run.seed=1"), digits())))


def test_a_warm_start_teaches_the_answers(small, digits):
    policy = load_policy(small("policy.warm_start_steps=0"), digits())
    steps = [tiny.warm_start(policy.model, policy.tokenizer, digits(), steps=n, noise=0.0, seed=0) for n in (1, 30)]
    assert steps[1] < 0.5 * steps[0]


def test_a_saved_policy_is_loaded_by_its_path(small, digits, tmp_path):
    policy = load_policy(small(), digits())
    policy.save(tmp_path / "model")
    again = load_policy(small(f"policy.name={tmp_path / 'model'}"), digits())
    assert torch.equal(weights(policy), weights(again))
    assert again.tokenizer.decode(again.tokenizer("1 + 1").input_ids) == "1 + 1"
    assert again.eos_ids == policy.eos_ids


def test_left_padding_changes_no_hidden_state(untrained):
    ids = torch.randint(4, 90, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    alone = hidden_states_of(untrained.model, ids, torch.ones_like(ids))
    torch.testing.assert_close(hidden_states_of(untrained.model, padded, mask)[:, 3:], alone, rtol=1e-4, atol=1e-5)


def test_mixed_precision_samples_from_a_bf16_copy_that_follows_the_weights(small, ready):
    policy = ready(small("policy.precision=mixed"))
    assert policy.head.weight.dtype == torch.float32
    assert policy.sampler.model.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad():
        policy.model.lm_head.weight.add_(1.0)
    policy.refresh_sampler()
    assert torch.equal(policy.sampler.model.lm_head.weight, policy.model.lm_head.weight.bfloat16())
    assert policy.autocast().fast_dtype == torch.bfloat16


def test_a_frozen_copy_does_not_follow(small, digits):
    policy = load_policy(small(), digits())
    reference = policy.frozen()
    before = weights(reference)
    with torch.no_grad():
        policy.model.lm_head.weight.add_(1.0)
    assert torch.equal(weights(reference), before)
    assert not reference.head.weight.requires_grad


def test_a_models_own_sampling_defaults_are_forgotten(small, digits, tmp_path):
    policy = load_policy(small(), digits())
    policy.generation_defaults = transformers.GenerationConfig(
        do_sample=True, top_k=3, repetition_penalty=1.3, temperature=0.2, eos_token_id=[2, 5], pad_token_id=0
    )
    policy.save(tmp_path / "model")
    again = load_policy(small(f"policy.name={tmp_path / 'model'}"), digits())
    kept = again.model.generation_config
    assert again.eos_ids == [2, 5]
    assert (kept.top_k, kept.repetition_penalty, kept.temperature) == tuple(
        getattr(transformers.GenerationConfig(), name) for name in ("top_k", "repetition_penalty", "temperature")
    )


def test_a_chat_template_is_used_with_the_system_prompt_asked_for(small, digits, tmp_path):
    policy = load_policy(small("policy.warm_start_steps=0"), digits())
    assert policy.texts(["hello"]) == ["hello"]
    policy.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    assert policy.texts(["hello"]) == ["[user]hello[assistant]"]
    policy.prompts = PromptFormat("Be brief.")
    assert policy.texts(["hello"]) == ["[system]Be brief.[user]hello[assistant]"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.name=smollm2-135", r"cannot load policy\.name 'smollm2-135': did you mean 'smollm2-135m'\?"),
        ("policy.name=/nowhere/at/all", r"cannot load policy\.name '/nowhere/at/all'"),
        ("policy.device=tpu9", r"policy\.device 'tpu9' cannot be used here"),
    ],
)
def test_a_policy_that_cannot_be_had_is_named(small, digits, override, message):
    with pytest.raises(ConfigError, match=message):
        load_policy(small("policy.warm_start_steps=0", override), digits())


def test_a_model_that_is_no_causal_language_model_is_refused(small, digits, untrained, tmp_path):
    sizes = {"vocab_size": 101, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).save_pretrained(tmp_path / "model")
    untrained.tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"cannot load policy\.name .*T5Config"):
        load_policy(small(f"policy.name={tmp_path / 'model'}"), digits())
