"""Pass@k on held-out problems, and what may be said about a difference."""

import pytest
import torch
from rlvr_trainer.evaluation import Evaluation, compare, evaluate, powers_of_two


def counts(*correct, samples=4):
    return Evaluation(samples=samples, correct=list(correct), verifier_errors=0, mean_length=3.0)


@pytest.mark.parametrize(("n", "ks"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_k_doubles_up_to_the_number_of_samples(n, ks):
    assert powers_of_two(n) == ks


def test_pass_at_k_is_the_unbiased_estimate():
    values = counts(2, 0).metrics()
    # 1 - C(2, k) / C(4, k) for the first problem: 1/2, 5/6, 1; nothing for the second.
    assert [values[f"eval/pass@{k}"] for k in (1, 2, 4)] == pytest.approx([1 / 4, 5 / 12, 1 / 2])
    assert (values["eval/pass@1/low"], values["eval/pass@1/high"]) == (0.0, 0.5)


def test_a_problem_with_a_verifier_error_is_neither_solved_nor_missed(untrained, small, digits):
    found = evaluate(untrained, digits(broken=("held out 1",)), small())
    assert found.correct[1] is None
    assert found.verifier_errors == 2
    assert len(found.per_problem(1)) == 3
    assert counts(4, None).metrics()["eval/pass@1"] == 1.0
    assert "eval/pass@1" not in counts(None).metrics()


def test_evaluation_repeats_itself_and_leaves_the_random_state_of_training_alone(untrained, small, digits):
    state = torch.get_rng_state()
    first, second = (evaluate(untrained, digits(), small()) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_a_difference_is_called_an_improvement_only_outside_its_interval():
    better = compare(counts(*[0] * 20), counts(*[2] * 20))
    assert better["improved"]
    assert (better["difference_low"], better["difference_high"]) == (0.5, 0.5)
    assert "rose from 0.000 to 0.500: +0.500, 95 % interval [+0.500, +0.500]" in better["sentence"]
    noise = compare(counts(0, 4, 2, 2), counts(4, 0, 2, 3))
    assert not noise["improved"]
    assert noise["sentence"].endswith("no difference that these problems can show.")
    worse = compare(counts(*[2] * 20), counts(*[0] * 20))
    assert not worse["improved"]
    assert "fell" in worse["sentence"]
    assert worse["sentence"].endswith("a loss.")


def test_only_problems_judged_both_times_are_compared():
    assert "over 1 problems" in compare(counts(0, None, 1), counts(4, 4, None))["sentence"]
