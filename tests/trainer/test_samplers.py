"""What `GenerateSampler` promises: the policy's own distribution, a seed per completion, weights that follow."""

import random

import pytest
import torch
from rlvr_trainer.rollouts import sample
from rlvr_trainer.sampling import Completion, SamplerError, Sampling
from rlvr_trainer.sampling.generate import Draw, GenerateSampler
from rlvr_trainer.scoring import scores_of
from rlvr_trainer.tasks import Problem

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def chi_square(counts, probabilities):
    """In standard deviations above its mean, tokens of which fewer than five are expected counted as one."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1e-9)])
    freedom = len(expected) - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


def logits_after(model, prompt):
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt])).logits[0, -1].float()


def ids_of(completions):
    return [completion.token_ids for completion in completions]


def changed(model):
    """The weights of a model, and others that write something else."""
    own = {name: value.clone() for name, value in model.state_dict().items()}
    return own, {name: value.flip(0) for name, value in own.items()}


@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_tokens_follow_the_softmax_at_their_temperature(untrained, temperature):
    found = untrained.sampler.sample([PROMPTS[0]], Sampling(1, temperature, n=4000, seed=3))
    counts = torch.bincount(torch.tensor(ids_of(found))[:, 0], minlength=101)
    logits = logits_after(untrained.model, PROMPTS[0])
    assert abs(chi_square(counts, (logits / temperature).softmax(-1))) < 4
    assert chi_square(counts, (logits / temperature / 3).softmax(-1)) > 10


def test_the_tokens_of_a_completion_are_drawn_independently():
    scores = torch.tensor([1.0, 0.0, 0.5, -1.0]).expand(20000, 4)
    draw = Draw(Sampling(3), 11, len(scores), torch.device("cpu"))
    first, second, third = (draw(torch.empty(0), scores).argmax(1) for _ in range(3))
    p = scores[0].softmax(0)
    for left, right in ((first, second), (second, third), (first, third), (first[1:], first[:-1])):
        assert abs(chi_square(torch.bincount(4 * left + right, minlength=16), torch.outer(p, p).flatten())) < 4


def test_a_token_without_probability_is_never_drawn():
    none = -torch.inf
    scores = torch.tensor([[none, 0.0, none, 1.0, none]]).expand(2000, 5)
    draw = Draw(Sampling(2), 0, len(scores), torch.device("cpu"))
    draw.draws[:2, 0] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)  # the least and the largest that can come
    tokens = draw(torch.empty(0), scores).argmax(1)
    assert tokens[:2].tolist() == [1, 3]
    assert set(tokens.tolist()) == {1, 3}
    torch.testing.assert_close(draw.logps[0][:2].exp(), scores[0, [1, 3]].softmax(0))


def test_a_completion_depends_on_its_seed_alone(untrained):
    """Not on the batch that it is in, nor on what is sampled beside it."""
    together = untrained.sampler.sample(PROMPTS, Sampling(12, n=4, seed=7))
    assert len({tuple(ids) for ids in ids_of(together)}) == 12
    for batch_size in (1, 5):
        sampler = GenerateSampler(untrained.model, untrained.tokenizer, untrained.eos_ids, batch_size=batch_size)
        split = sampler.sample(PROMPTS, Sampling(12, n=4, seed=7))
        assert ids_of(split) == ids_of(together)
        for one, other in zip(split, together, strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-5)
    for i, completion in enumerate(together):  # n = 4 with seed 7 is seeds 7, 8, 9, 10 for the first prompt, and so on
        alone = untrained.sampler.sample([PROMPTS[i // 4]], Sampling(12, seed=7 + i))
        assert ids_of(alone) == [completion.token_ids]


def test_temperature_zero_takes_the_likeliest_token(untrained):
    (found,) = untrained.sampler.sample([PROMPTS[0]], Sampling(6, temperature=0.0))
    written = list(PROMPTS[0])
    for token in found.token_ids:
        assert token == logits_after(untrained.model, written).argmax()
        written.append(token)
    assert ids_of(untrained.sampler.sample([PROMPTS[0]], Sampling(6, 0.0, n=2, seed=9))) == [found.token_ids] * 2


@pytest.mark.parametrize(("precision", "least", "most"), [("full", 0.0, 1e-5), ("mixed", 1e-5, 0.05)])
def test_log_probabilities_are_the_trainers_up_to_the_precision(small, ready, precision, least, most):
    config = small(f"policy.precision={precision}", "rollout.max_new_tokens=20", "rollout.temperature=0.7")
    policy = ready(config)
    rollouts = sample(policy, [Problem("1 + 1", "2"), Problem("a longer one", "?")], config, 8, 0.7, seed=0)
    mask = rollouts.completion_mask.bool()
    gap = (scores_of(policy, rollouts, 0.7) - rollouts.sampling_logps)[mask].abs()
    assert least <= gap.max() < most
    assert rollouts.sampling_logps[~mask].isnan().all()


def test_a_rounded_copy_knows_its_positions_exactly(small, ready):
    """Rotary frequencies in bf16 would be off by a radian after a thousand tokens."""
    policy = ready(small("policy.precision=mixed", "policy.warm_start_steps=0"))
    assert policy.sampler.model.dtype == torch.bfloat16
    for own, copied in zip(policy.model.buffers(), policy.sampler.model.buffers(), strict=True):
        assert torch.equal(own, copied)


def test_the_global_generators_are_left_alone(untrained, small):
    before = torch.get_rng_state(), random.getstate()
    untrained.sampler.sample(PROMPTS, Sampling(5, n=2, seed=1))
    sample(untrained, [Problem("a", "x")], small(), 2, 1.0, seed=5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_without_a_seed_one_number_is_drawn_and_decides(untrained, small):
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        found.append(sample(untrained, [Problem("a", "x")], small(), 4, 1.0).completion_ids)
        after = torch.get_rng_state()
    assert torch.equal(*found)
    torch.manual_seed(4)
    torch.randint(2**31, ())
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(
    ("ids", "stopped", "kept", "reason"),
    [
        ([20, 2, 0, 0], 0, 2, "end"),
        ([20, 21, 22, 23], 0, 4, "length"),
        ([20, 21, 22, 2], 0, 4, "end"),
        ([20, 21, 0, 0], 2, 2, "stop"),
        ([20, 21, 2, 2], 2, 2, "stop"),  # behind it are pads, which may be end tokens
        ([20, 2, 21, 0], 3, 2, "end"),
        ([2, 0, 0, 0], 0, 1, "end"),
    ],
)
def test_a_completion_says_why_it_is_over(untrained, ids, stopped, kept, reason):
    logps = [-1.0, -2.0, -3.0, -4.0]
    assert untrained.sampler._cut(ids, logps, stopped) == Completion(ids[:kept], logps[:kept], reason)


def test_finish_reasons_are_those_of_the_tokens(untrained):
    found = untrained.sampler.sample(PROMPTS, Sampling(40, n=40, stop=("7", "8")))
    assert {completion.finish_reason for completion in found} == {"end", "stop", "length"}
    for completion in found:
        text = untrained.tokenizer.decode(completion.token_ids)
        assert (completion.finish_reason == "end") == (completion.token_ids[-1] == 2)
        assert (completion.finish_reason == "stop") == (text[-1] in "78")
        assert not set("78") & set(text[:-1])
        assert len(completion.logps) == len(completion.token_ids) <= 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("lm_head.weight"), r"^weights: lm_head\.weight is missing; the sampler goes on"),
        (lambda weights: weights.update(extra=torch.zeros(2)), r"^weights: the policy has none called extra;"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.zeros(95)}),
            r"^weights: model\.norm\.weight has shape \(95,\), and the policy's \(96,\);",
        ),
    ],
)
def test_weights_of_another_model_are_refused_by_name_and_change_nothing(untrained, change, message):
    sampler = GenerateSampler(untrained.model, untrained.tokenizer, untrained.eos_ids, dtype=torch.float32)
    own, others = changed(sampler.model)
    change(others)
    with pytest.raises(SamplerError, match=message):
        sampler.update(others)
    assert all(torch.equal(value, own[name]) for name, value in sampler.model.state_dict().items())


@pytest.mark.parametrize("override", ["policy.precision=mixed", "rollout.asynchronous=true"])
def test_a_copy_samples_with_the_weights_of_the_last_update(small, ready, override):
    policy = ready(small(override, "policy.warm_start_steps=0"))
    asked = Sampling(10, n=4, seed=2)
    before = policy.sampler.sample(PROMPTS, asked)
    policy.model.load_state_dict(changed(policy.model)[1])
    assert policy.sampler.sample(PROMPTS, asked) == before
    policy.refresh_sampler()
    after = policy.sampler.sample(PROMPTS, asked)
    fresh = GenerateSampler(policy.model, policy.tokenizer, policy.eos_ids, dtype=policy.sampler.model.dtype)
    assert after == fresh.sample(PROMPTS, asked) != before


def test_a_model_that_is_shared_needs_no_update(small, ready):
    policy = ready(small("policy.warm_start_steps=0"))
    assert policy.sampler.model is policy.model
    before = policy.sampler.sample(PROMPTS, Sampling(10))
    own, others = changed(policy.model)
    policy.model.load_state_dict(others)
    assert policy.sampler.sample(PROMPTS, Sampling(10)) != before
    policy.sampler.update(own)  # of which it takes nothing
    assert all(torch.equal(value, others[name]) for name, value in policy.model.state_dict().items())


def test_a_sampler_can_be_closed_twice(small, ready):
    policy = ready(small("policy.warm_start_steps=0"))
    policy.close()
    policy.close()
