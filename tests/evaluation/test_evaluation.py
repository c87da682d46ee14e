import itertools
import math

import pytest
import torch

from rlvr_ops.evaluation import bootstrap_interval, paired_bootstrap_interval, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_counts_the_subsets_that_hold_a_correct_answer(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations(range(n), k))
        hits = sum(any(answer < c for answer in draw) for draw in draws)
        assert pass_at_k(n, c, k) == pytest.approx(hits / len(draws), abs=1e-14)


def test_pass_at_k_is_stable_for_many_answers():
    n, c, k = 100_000, 3, 1000
    exact = (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)
    assert pass_at_k(n, c, k) == pytest.approx(exact, rel=1e-12)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-12)


def test_pass_at_k_takes_tensors_lists_and_numbers():
    c = torch.tensor([0, 1, 2, 4])
    got = pass_at_k(4, c, 2)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor([0.0, 0.5, 5 / 6, 1.0], dtype=torch.float64))
    assert torch.equal(pass_at_k([4, 4, 4, 4], c.tolist(), 2), got)
    assert torch.equal(pass_at_k(torch.full((4,), 4), c.double(), 2), got)
    assert isinstance(pass_at_k(4, 1, 2), float)
    different_n = pass_at_k(torch.tensor([2, 4]), torch.tensor([1, 1]), 2)
    torch.testing.assert_close(different_n, torch.tensor([1.0, 0.5], dtype=torch.float64))


def test_pass_at_1_is_the_mean_and_pass_at_n_is_whether_any():
    c = torch.arange(17)
    torch.testing.assert_close(pass_at_k(16, c, 1), c.double() / 16)
    assert torch.equal(pass_at_k(16, c, 16), (c > 0).double())


@pytest.mark.parametrize(("n", "k"), [(4, 4), (4, 1), (7, 3)])
def test_without_a_correct_answer_pass_at_k_is_a_positive_zero(n, k):
    assert math.copysign(1.0, pass_at_k(n, 0, k)) == 1.0
    assert not pass_at_k(n, torch.tensor([0, 1]), k).signbit().any()


def test_pass_at_k_refuses_impossible_counts():
    with pytest.raises(ValueError, match=r"n must be at least k = 5.*got 4"):
        pass_at_k(4, 1, 5)
    with pytest.raises(ValueError, match=r"c must not be above n.*got 9 for problem 1"):
        pass_at_k(4, torch.tensor([1, 9]), 2)
    with pytest.raises(ValueError, match="c must not be negative, got -1"):
        pass_at_k(4, -1, 2)
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, got 0"):
        pass_at_k(4, 1, 0)
    with pytest.raises(ValueError, match=r"c must hold whole numbers, got 0\.25"):
        pass_at_k(4, 0.25, 1)
    with pytest.raises(ValueError, match="n must hold whole numbers"):
        pass_at_k(torch.tensor([True]), torch.tensor([1]), 1)


def test_the_bootstrap_agrees_with_the_normal_interval_on_many_problems():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = bootstrap_interval(values, resamples=2000)
    half = 1.96 * values.std().item() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean().item() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean().item() + half, abs=0.1 * half)


def test_the_bootstrap_repeats_itself_and_widens_with_the_level():
    values = [0.0, 0.25, 0.5, 0.5, 1.0]
    assert bootstrap_interval(values, seed=3, resamples=500) == bootstrap_interval(values, seed=3, resamples=500)
    narrow, wide = (bootstrap_interval(values, level=level, resamples=2000) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_the_bootstrap_of_every_resample_is_the_enumerated_distribution():
    # Two problems with values 0 and 1: the mean is 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0], level=0.4, resamples=4000) == (0.5, 0.5)
    assert bootstrap_interval([0.0, 1.0], level=0.6, resamples=4000) == (0.0, 1.0)


def test_pairing_removes_what_the_problems_have_in_common():
    generator = torch.Generator().manual_seed(1)
    before = torch.rand(100, generator=generator, dtype=torch.float64)
    after = before + 0.1
    low, high = paired_bootstrap_interval(before, after, resamples=500)
    assert low == pytest.approx(0.1)
    assert high == pytest.approx(0.1)
    unpaired = bootstrap_interval(after, resamples=500)
    assert unpaired[1] - unpaired[0] > 0.05


def test_the_bootstrap_names_bad_arguments():
    with pytest.raises(ValueError, match=r"values must have shape \(problems,\) with at least one problem, got \(0,\)"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="values must be finite, got nan"):
        bootstrap_interval([0.0, float("nan")])
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 95"):
        bootstrap_interval([0.0], level=95)
    with pytest.raises(ValueError, match="resamples must be 1 or more, got 0"):
        bootstrap_interval([0.0], resamples=0)
    with pytest.raises(ValueError, match=r"same problems, got \(2,\) and \(3,\)"):
        paired_bootstrap_interval([0.0, 1.0], [0.0, 1.0, 1.0])
