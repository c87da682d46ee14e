"""`Mismatch`: what is logged about sampler and trainer, against the same in float64 token by token."""

import math

import pytest
import torch
from rlvr_trainer.sampling.mismatch import Mismatch

from rlvr_ops import SamplingCorrection
from rlvr_ops.objectives.sampling import CORRECTIONS, sampling_metrics
from rlvr_ops.rollouts import make_layout

NAN = math.nan
OLD = torch.tensor([[-1.0, -2.0, -0.5, 9.0], [-0.1, -3.0, -2.0, -1.0], [-1.5, 7.0, 7.0, 7.0]])
SAMPLING = torch.tensor([[-1.5, -0.8, -0.5, NAN], [-0.2, NAN, -4.0, -0.5], [-1.25, NAN, 7.0, -7.0]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
# old - sampling of the eight tokens that count, 0 where the sampler gave no log-probability:
GAPS = [[0.5, -1.2, 0.0], [0.1, 0.0, 2.0, -0.5], [-0.25]]


def by_hand(kind, clip_max, clip_min):
    """Every token's weight, and whether it was outside the bounds."""
    low, high = clip_min or 0.0, math.inf if clip_max is None else clip_max
    shared = kind.startswith("sequence")
    ratios = [math.exp(sum(row) if shared else gap) for row in GAPS for gap in row]
    outside = [not low <= ratio <= high for ratio in ratios]
    kept = [
        min(max(r, low), high) if kind.endswith("truncate") else 0.0 if out else r
        for r, out in zip(ratios, outside, strict=True)
    ]
    return kept, sum(outside) / len(outside)


def measured(correction, rows=3):
    mismatch = Mismatch(correction)
    for start in range(0, 3, rows):
        mismatch.add(*(part[start : start + rows] for part in (OLD, SAMPLING, MASK)))
    return mismatch.metrics()


def test_the_distance_is_that_of_tokens_with_a_log_probability():
    assert measured(None) == {
        "sampling/frac_without_logp": pytest.approx(1 / 8),
        "sampling/sampling_logp_difference/mean": pytest.approx((0.5 + 1.2 + 0.0 + 0.1 + 2.0 + 0.5 + 0.25) / 7),
        "sampling/sampling_logp_difference/max": pytest.approx(2.0),
    }


@pytest.mark.parametrize("kind", CORRECTIONS)
@pytest.mark.parametrize(("clip_max", "clip_min"), [(3.0, None), (1.4, 0.5), (None, 0.7), (100.0, None)])
def test_truncation_and_effective_sample_size_are_those_of_the_weights(kind, clip_max, clip_min):
    weights, outside = by_hand(kind, clip_max, clip_min)
    found = measured(SamplingCorrection(kind, clip_max, clip_min))
    assert found["sampling/frac_truncated"] == pytest.approx(outside)
    assert found["sampling/effective_sample_size"] == pytest.approx(
        sum(weights) ** 2 / (8 * sum(w * w for w in weights)), rel=1e-5
    )
    assert measured(None).items() <= found.items()


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_the_weights_are_those_of_the_loss(kind):
    """By the library's own weights: their mean is the loss's metric, their effective sample size is this one's."""
    correction = SamplingCorrection(kind, 1.4, 0.5)
    layout = make_layout("old", OLD, MASK, None)
    weights = correction.weights(OLD.flatten(), SAMPLING.flatten(), layout)
    active = weights[MASK.flatten().bool()].double()
    assert active.tolist() == pytest.approx(by_hand(kind, 1.4, 0.5)[0], rel=1e-6)
    found = measured(correction)["sampling/effective_sample_size"]
    assert found == pytest.approx(float(active.sum() ** 2 / (8 * active.square().sum())))
    ratio = sampling_metrics(weights, layout)["sampling/importance_sampling_ratio/mean"]
    assert float(ratio) == pytest.approx(float(active.mean()))


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_micro_batches_change_nothing(kind):
    correction = SamplingCorrection(kind, 1.4, 0.5)
    assert measured(correction, rows=1) == pytest.approx(measured(correction))


def test_weights_that_agree_are_a_whole_sample():
    mismatch = Mismatch(SamplingCorrection("token_truncate"))
    mismatch.add(OLD, OLD, MASK)
    assert mismatch.metrics() == {
        "sampling/frac_without_logp": 0.0,
        "sampling/sampling_logp_difference/mean": 0.0,
        "sampling/sampling_logp_difference/max": 0.0,
        "sampling/frac_truncated": 0.0,
        "sampling/effective_sample_size": 1.0,
    }


def test_when_every_weight_is_masked_away_nothing_is_left_of_the_sample():
    found = measured(SamplingCorrection("token_mask", 1e-6))
    assert (found["sampling/frac_truncated"], found["sampling/effective_sample_size"]) == (1.0, 0.0)


def test_an_engine_without_log_probabilities_has_no_distance():
    mismatch = Mismatch(SamplingCorrection("token_truncate"))
    mismatch.add(OLD, torch.full_like(OLD, NAN), MASK)
    assert mismatch.metrics() == {
        "sampling/frac_without_logp": 1.0,
        "sampling/frac_truncated": 0.0,
        "sampling/effective_sample_size": 1.0,
    }


def test_without_a_token_nothing_is_logged():
    mismatch = Mismatch(SamplingCorrection("sequence_mask"))
    assert mismatch.metrics() == {}
    mismatch.add(OLD, SAMPLING, torch.zeros_like(MASK))
    assert mismatch.metrics() == {}


@pytest.mark.parametrize("kind", ["token_truncate", "sequence_truncate"])
def test_weights_without_a_bound_do_not_overflow(kind):
    """exp(60) and exp(110) are beyond float32, or their squares are."""
    mismatch = Mismatch(SamplingCorrection(kind, clip_max=None))
    mismatch.add(torch.tensor([[50.0, 60.0], [0.0, 0.0]]), torch.zeros(2, 2), torch.ones(2, 2))
    assert 0.2 < mismatch.metrics()["sampling/effective_sample_size"] <= 0.51
