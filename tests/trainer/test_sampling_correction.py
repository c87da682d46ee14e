"""The trainer's loss carries the weights exp(old - sampling), and a run logs how far sampler and trainer are apart."""

import pytest
import torch
from rlvr_trainer import loop
from rlvr_trainer.console import read_jsonl
from rlvr_trainer.rollouts import collect

PLAIN = [
    "policy.precision=mixed",
    "algorithm.name=grpo",
    "algorithm.beta=0",
    "optim.micro_batch=12",
    "policy.warm_start_steps=0",
]
LOGGED = [
    "sampling/sampling_logp_difference/mean",
    "sampling/sampling_logp_difference/max",
    "sampling/frac_without_logp",
    "sampling/frac_truncated",
    "sampling/effective_sample_size",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/max",
]


@pytest.fixture
def batch_of(small, ready, digits):
    """A batch that a bf16 copy sampled, as if by an engine that is far from it and gave one token no log-probability."""

    def make(*overrides):
        config = small(*PLAIN, *overrides)
        policy = ready(config)
        torch.manual_seed(2)
        batch, _ = collect(policy, digits(), 0, config)
        logps = batch.rollouts.sampling_logps
        logps += 0.8 * torch.randn(logps.shape)
        logps[0, 0] = float("nan")
        batch.advantages = torch.linspace(-1.0, 2.0, 12)
        return policy, config, batch

    return make


def weights_by_hand(kind, gap):
    """With bounds of 0.5 and 2, from old - sampling (B, T)."""
    ratio = (gap.sum(1, keepdim=True).expand_as(gap) if kind.startswith("sequence") else gap).exp()
    inside = (ratio >= 0.5) & (ratio <= 2)
    return ratio.clamp(0.5, 2) if kind.endswith("truncate") else ratio * inside


@pytest.mark.parametrize("kind", ["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_the_loss_is_that_of_each_token_times_its_weight(batch_of, kind):
    bounds = [] if kind == "none" else ["algorithm.sampling_clip_max=2", "algorithm.sampling_clip_min=0.5"]
    policy, config, batch = batch_of(f"algorithm.sampling_correction={kind}", *bounds)
    (part,) = loop.micro_batches(policy, policy.frozen(), batch, config)
    output = loop.loss_of(policy, part, config, items=12.0)

    mask, sampling = part.rollouts.completion_mask.double(), part.rollouts.sampling_logps.double()
    logps = output.per_token_logps.double()
    weights = torch.ones_like(mask)
    if kind != "none":
        old = part.old_per_token_logps.double()
        weights = weights_by_hand(kind, (old - sampling).nan_to_num(nan=0.0) * mask)
        assert (old - logps).abs().max() < 1e-5  # nothing moved yet: ratios are 1
        assert (weights[mask.bool()] - 1).abs().max() > 0.3
    per_rollout = (weights * part.advantages.double()[:, None] * mask).sum(1) / mask.sum(1)
    assert float(output.loss.detach()) == pytest.approx(-float(per_rollout.sum()) / 12, rel=1e-5)


def test_a_correction_changes_the_update_and_its_absence_does_not(batch_of):
    found = {}
    for kind in ("auto", "token_truncate", "none"):
        policy, config, batch = batch_of(f"algorithm.sampling_correction={kind}", "optim.learning_rate=1")
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
        values = loop.update(policy, policy.frozen(), optimizer, batch, config, 0)
        found[kind] = values, policy.head.weight.detach().clone()
    assert torch.equal(found["auto"][1], found["token_truncate"][1])
    assert (found["auto"][1] - found["none"][1]).abs().max() > 1e-3
    assert found["auto"][0]["loss"] == found["token_truncate"][0]["loss"] != found["none"][0]["loss"]
    assert found["auto"][0]["sampling/importance_sampling_ratio/max"] == pytest.approx(3.0)


def test_a_run_in_mixed_precision_logs_how_far_its_sampler_is(small, tmp_path):
    loop.train(small("policy.precision=mixed", "run.steps=1"), quiet=True)
    (row,) = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    values = {name: row[name] for name in LOGGED}
    assert values["sampling/frac_without_logp"] == values["sampling/frac_truncated"] == 0.0
    mean, largest = (values[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "max"))
    assert 0 < mean < largest < 0.1
    assert 0.99 < values["sampling/effective_sample_size"] < 1.0
    assert values["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=0.02)


def test_a_run_in_full_precision_samples_what_it_scores(small, tmp_path):
    loop.train(small("run.steps=1"), quiet=True)
    (row,) = [row for row in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert row["sampling/sampling_logp_difference/max"] < 1e-5
    assert row["sampling/frac_without_logp"] == 0.0
    assert not {*LOGGED[3:]} & set(row)  # there are no weights
