"""ProGRPO's shift of advantages by confidence."""

import math

import pytest
import torch

import rlvr_ops


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


ANSWERS = logs([0.9, 0.25, 0.8, 1.0, 0.5], [0.6, 0.6, 0.6, 0.6, 0.6])
PROMPTS = logs([0.3, 0.7], [0.3, 0.7])
CORRECT = torch.tensor([1, 0])
A = torch.tensor([1.0, -1.0], dtype=torch.float64)


def arm(advantages=A, answers=ANSWERS, mask=None, **changed):
    arguments = {"prompt_logps": PROMPTS, "correct": CORRECT, "group_size": 2, "alpha": 2.0} | changed
    return rlvr_ops.arm_advantages(advantages, answers, mask, **arguments)


def check(got, *expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_the_confidence_is_that_of_the_least_likely_tokens():
    # 20 % of 5 answer tokens is one: 1/4 and 3/5; of 2 prompt tokens one: 3/10
    check(arm(), 1 + 2 * (0.3 - 0.25), -1 + 2 * (0.3 - 0.6))


def test_the_confidence_is_a_geometric_mean():
    # 40 % of 5 are two: sqrt(1/4 1/2), and of 2 prompt tokens one
    check(arm(fraction=0.4), 1 + 2 * (0.3 - math.sqrt(0.125)), -1 + 2 * (0.3 - 0.6))


def test_with_all_tokens_it_is_the_length_normalised_probability():
    expected = A + 2 * (PROMPTS.mean(1).exp() - ANSWERS.mean(1).exp())
    torch.testing.assert_close(arm(fraction=1.0), expected)


def test_a_share_of_tokens_is_rounded_up():
    # 20 % of 6 are two
    answers = logs([0.25, 0.5, 1, 1, 1, 1], [0.6] * 6)
    check(arm(answers=answers), 1 + 2 * (0.3 - math.sqrt(0.125)), -1 + 2 * (0.3 - 0.6))


def test_a_share_that_is_whole_is_not_rounded_up_by_float32():
    # 30 % of 50 are 15, but 50 times the float32 nearest to 0.3 lies above
    answers = torch.zeros(2, 50, dtype=torch.float64)
    answers[:, :16] = torch.linspace(-16, -1, 16, dtype=torch.float64)
    expected = A + 2 * (0.3 - answers[:, :15].mean(1).exp())
    torch.testing.assert_close(arm(answers=answers, fraction=0.3), expected)


def test_groups_without_a_correct_rollout_are_left_alone():
    advantages = torch.tensor([0.3, -0.1, 1.0, -1.0], dtype=torch.float64)
    got = arm(advantages, ANSWERS.repeat(2, 1), prompt_logps=PROMPTS.repeat(2, 1), correct=torch.tensor([0, 0, 1, 0]))
    assert torch.equal(got[:2], advantages[:2])
    torch.testing.assert_close(got[2:], arm())


def test_groups_may_be_ragged():
    order = torch.tensor([2, 0, 1])
    answers, prompts = ANSWERS[[0, 1, 0]], PROMPTS[[0, 1, 0]]
    ids, correct, advantages = torch.tensor([4, 4, 1]), torch.tensor([1, 0, 0]), torch.tensor([1.0, -1.0, 0.5]).double()
    got = arm(
        advantages[order], answers[order], prompt_logps=prompts[order], correct=correct[order],
        group_size=None, group_ids=ids[order],
    )  # fmt: skip
    torch.testing.assert_close(got, torch.cat([arm(), advantages[2:]])[order])


def test_masked_tokens_do_not_count_whatever_they_hold():
    padded = torch.nn.functional.pad(ANSWERS, (0, 3), value=math.nan)
    prompts = torch.nn.functional.pad(PROMPTS, (2, 0), value=-math.inf)
    got = arm(answers=padded, mask=~padded.isnan(), prompt_logps=prompts, prompt_mask=(~prompts.isinf()).long())
    assert torch.equal(got, arm())


def test_advantages_per_token_get_their_rollouts_shift():
    got = arm(A[:, None].expand(2, 5))
    assert torch.equal(got, arm()[:, None].expand(2, 5))


def test_an_empty_answer_and_an_impossible_one():
    # no token: confidence 1; a token of probability 0: confidence 0
    answers = torch.tensor([[0.0], [-math.inf]], dtype=torch.float64)
    got = arm(answers=answers, mask=torch.tensor([[0], [1]]))
    check(got, 1 + 2 * (0.3 - 1), -1 + 2 * 0.3)


def test_the_shift_is_a_constant_and_keeps_the_dtype():
    got = arm(A.bfloat16().requires_grad_(), ANSWERS.float().requires_grad_())
    assert not got.requires_grad
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"alpha": -1.0}, "alpha must be at least 0, got -1"),
        ({"fraction": 0.0}, "fraction must lie above 0 and at most at 1, got 0"),
        ({"advantages": torch.zeros(3)}, r"advantages must have shape \(B,\) = \(2,\) or \(B, T\) = \(2, 5\).*got \(3,\)"),
        ({"answers": ANSWERS[0]}, r"per_token_logps must have shape \(B, tokens\), got \(5,\)"),
        ({"mask": torch.ones(2, 7)}, r"completion_mask must have shape \(2, 5\) like per_token_logps, got \(2, 7\)"),
        ({"prompt_logps": PROMPTS[:1]}, r"prompt_logps must have a row for each of B = 2 rollouts.*got \(1, 2\)"),
        ({"correct": torch.tensor([0.5, 0.0])}, "correct must hold only 0 and 1"),
        ({"correct": torch.tensor([1])}, r"correct must have shape \(B,\) = \(2,\) like the rollouts, got \(1,\)"),
        ({"group_size": None}, "group_size .* or group_ids .* is needed, got neither"),
        ({"answers": ANSWERS * math.nan}, r"per_token_logps must not be NaN where completion_mask is 1, got NaN at \(0, 0\)"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        arm(**changed)


def test_no_rollouts_have_no_advantages():
    got = arm(torch.zeros(0), torch.zeros(0, 4), prompt_logps=torch.zeros(0, 3), correct=torch.zeros(0))
    assert got.shape == (0,)


@pytest.mark.parametrize(("tokens", "fraction", "kept"), [(100, 0.07, 7), (10**6, 1.0, 10**6), (10**6, 0.2, 200_000)])
def test_a_share_of_tokens_is_exact_however_many_there_are(tokens, fraction, kept):
    answers = torch.zeros(2, tokens, dtype=torch.float64)
    answers[:, : kept - 1] = -1.0  # and one 0 belongs to the share
    expected = A + 2 * (0.3 - math.exp(-(kept - 1) / kept))
    got = arm(answers=answers.flip(1), prompt_logps=PROMPTS[:, :1], fraction=fraction)
    torch.testing.assert_close(got, expected)


def test_the_least_share_is_one_token():
    torch.testing.assert_close(arm(fraction=1e-9), arm())


def test_probabilities_in_the_place_of_logs_are_refused():
    with pytest.raises(ValueError, match=r"per_token_logps must be at most 0, got 0\.9 at \(0, 0\): give log-prob"):
        arm(answers=ANSWERS.exp())
    torch.testing.assert_close(arm(answers=torch.full((2, 5), 1e-6), prompt_logps=torch.zeros(2, 2)), A)
