"""Calibration metrics against numbers worked out by hand, and against their definitions in plain loops."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlvr_ops import auroc, brier_score, expected_calibration_error, reliability_bins

few = settings(max_examples=60, deadline=None, derandomize=True)
NAN = float("nan")
METRICS = [brier_score, expected_calibration_error, auroc, reliability_bins]

answers = st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=40)


def tensors(pairs):
    """Confidences in steps of 1/20, so that ties and bin edges are common, and verdicts."""
    confidences, correct = zip(*pairs, strict=True)
    return torch.tensor(confidences, dtype=torch.float64) / 20, torch.tensor(correct)


def test_the_brier_score_is_the_mean_squared_distance_to_the_verdict():
    got = brier_score(torch.tensor([0.9, 0.4, 0.0]), torch.tensor([1, 0, 1]))
    assert float(got) == pytest.approx((0.01 + 0.16 + 1.0) / 3)


def test_ece_weighs_the_gap_of_each_bin_by_its_share():
    # Two bins. Lower: 0.2 0.4 with one right, gap |1/2 - 0.3|. Upper: 0.6 0.8 1.0 all right, gap |1 - 0.8|.
    q, y = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0]), torch.tensor([1, 0, 1, 1, 1])
    assert float(expected_calibration_error(q, y, bins=2)) == pytest.approx(0.4 * 0.2 + 0.6 * 0.2)
    # One bin: |4/5 - 0.6|. Gaps of opposite sign cancel within a bin, so fewer bins hide more.
    assert float(expected_calibration_error(q, y, bins=1)) == pytest.approx(0.2)
    # One each: 0.8 + 0.4 + 0.4 + 0.2 + 0
    assert float(expected_calibration_error(q, y, bins=10)) == pytest.approx(1.8 / 5)


def test_confidences_of_exactly_zero_and_one_are_in_the_first_and_the_last_bin():
    got = reliability_bins(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 1, 1]), bins=4)
    assert got.counts.tolist() == [2, 0, 0, 1]
    assert got.accuracy[[0, 3]].tolist() == [0.5, 1.0]
    assert got.confidence[[0, 3]].tolist() == [0.0, 1.0]


def test_an_empty_bin_has_no_means_and_no_part_in_the_error():
    got = reliability_bins(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]), bins=5)
    assert got.confidence.isnan().tolist() == got.accuracy.isnan().tolist() == [False, True, True, True, False]
    assert float(expected_calibration_error(torch.tensor([0.1, 0.9]), torch.tensor([0, 1]), bins=5)) == pytest.approx(
        0.1
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_confidence_on_an_edge_is_in_the_bin_below_it_whatever_its_rounding(dtype):
    q = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=dtype)
    assert reliability_bins(q, torch.ones(10)).counts.tolist() == [1] * 10
    above = torch.nextafter(q[:-1], torch.ones(9, dtype=dtype))
    assert reliability_bins(above, torch.ones(9)).counts.tolist() == [0] + [1] * 9


def test_auroc_counts_ties_half_and_only_the_order():
    # Right 0.9 0.5, wrong 0.5 0.1: of four pairs three are won and one is tied.
    q, y = torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([1, 1, 0, 0])
    assert float(auroc(q, y)) == 0.875
    assert float(auroc(q.square(), y)) == 0.875
    assert float(auroc(1 - q, y)) == 0.125
    assert float(auroc(torch.full((4,), 0.3), y)) == 0.5


def test_auroc_is_undefined_with_one_class():
    for verdict in (0, 1):
        assert bool(auroc(torch.tensor([0.2, 0.7]), torch.tensor([verdict, verdict])).isnan())


@few
@given(answers)
def test_auroc_is_the_share_of_pairs_in_the_right_order(pairs):
    q, y = tensors(pairs)
    won = [(float(r > w) + float(r >= w)) / 2 for r, w in product(q[y].tolist(), q[~y].tolist())]
    assert float(auroc(q, y)) == pytest.approx(math.fsum(won) / len(won) if won else NAN, nan_ok=True)


@few
@given(answers, st.integers(1, 12))
def test_the_bins_hold_every_answer_once_and_ece_is_their_mean_gap(pairs, bins):
    q, y = tensors(pairs)
    counts, confidence, accuracy = reliability_bins(q, y, bins=bins)
    expected = 0.0
    for i in range(bins):
        inside = [
            (a, b) for a, b in zip(q.tolist(), y.tolist(), strict=True) if min(i, 1) * i / bins < a <= (i + 1) / bins
        ]
        inside += [(a, b) for a, b in zip(q.tolist(), y.tolist(), strict=True) if i == a == 0]
        assert int(counts[i]) == len(inside)
        if inside:
            means = [math.fsum(column) / len(inside) for column in zip(*inside, strict=True)]
            assert [float(confidence[i]), float(accuracy[i])] == pytest.approx(means)
            expected += len(inside) / len(q) * abs(means[1] - means[0])
    assert float(expected_calibration_error(q, y, bins=bins)) == pytest.approx(expected)


@few
@given(answers, st.randoms())
def test_the_order_of_the_answers_changes_nothing(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    for metric in METRICS[:3]:
        torch.testing.assert_close(metric(*tensors(pairs)), metric(*tensors(shuffled)), equal_nan=True)


@few
@given(answers)
def test_perfect_and_opposite_confidences_are_the_ends_of_the_scales(pairs):
    _, y = tensors(pairs)
    assert float(brier_score(y.double(), y)) == float(expected_calibration_error(y.double(), y)) == 0
    assert float(brier_score(1 - y.double(), y)) == float(expected_calibration_error(1 - y.double(), y)) == 1


def test_metrics_are_detached_scalars_of_the_confidences_precision():
    y = torch.tensor([1, 0])
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        q = torch.tensor([0.75, 0.25], dtype=dtype, requires_grad=True)
        for metric in METRICS[:3]:
            got = metric(q, y)
            assert (got.ndim, got.dtype, got.requires_grad) == (0, wide, False)


@pytest.mark.parametrize("metric", METRICS)
def test_wrong_inputs_are_named(metric):
    q, y = torch.tensor([0.5, 0.5]), torch.tensor([1, 0])
    with pytest.raises(ValueError, match=r"confidences must lie in \[0, 1\], got 1\.01 at 1"):
        metric(torch.tensor([0.5, 1.01]), y)
    with pytest.raises(
        ValueError, match="confidences must not be NaN, got NaN at 0: leave answers without a confidence out"
    ):
        metric(torch.tensor([NAN, 0.5]), y)
    with pytest.raises(ValueError, match="confidences must hold at least one answer, got none"):
        metric(torch.zeros(0), torch.zeros(0))
    with pytest.raises(
        ValueError, match=r"correct must have shape \(2,\) like confidences, one verdict for each, got \(1,\)"
    ):
        metric(q, y[:1])
    with pytest.raises(ValueError, match=r"correct must hold only 0 and 1, got 0\.3"):
        metric(q, torch.tensor([1.0, 0.3]))
    with pytest.raises(TypeError, match=r"confidences must be a torch\.Tensor, got list"):
        metric([0.5, 0.5], y)


@pytest.mark.parametrize("bins", [0, -3, 2.0, True])
def test_the_number_of_bins_is_a_whole_number_of_at_least_one(bins):
    with pytest.raises(ValueError, match=f"bins must be a whole number of at least 1, got {bins!r}"):
        expected_calibration_error(torch.tensor([0.5]), torch.tensor([1]), bins=bins)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_confidence_on_an_edge_is_in_the_bin_below_it_in_half_precision_too(dtype):
    q = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=dtype)
    assert reliability_bins(q, torch.ones(10)).counts.tolist() == [1] * 10
