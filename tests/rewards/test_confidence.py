"""Confidence of a whole rollout: read from its text, averaged over its tokens, and put to the vote."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import SMALL, make_batch, pack

import rlvr_ops
from rlvr_ops import borda_vote, mean_self_certainty, mean_token_probability, stated_confidence, stated_confidences

few = settings(max_examples=60, deadline=None, derandomize=True)
NAN = float("nan")


def tagged(inside):
    return f"The answer is 4. <confidence>{inside}</confidence>"


@pytest.mark.parametrize(
    ("inside", "value"),
    [("0.8", 0.8), (" .5\n", 0.5), ("1", 1.0), ("0", 0.0), ("1.", 1.0), ("80%", 0.8), ("80 %", 0.8), ("100%", 1.0)],
)
def test_a_decimal_or_a_percentage_is_read(inside, value):
    assert stated_confidence(tagged(inside)) == value


@pytest.mark.parametrize(
    "inside",
    [
        "80",
        "1.01",
        "101%",
        "-0.1",
        "+0.5",
        "",
        "high",
        "nan",
        "inf",
        "8/10",
        "0,8",
        "1e-1",
        "0.8 0.9",
        "٠.٨",
        "<b>0.8</b>",
    ],
)
def test_anything_else_is_unreadable_and_not_guessed(inside):
    assert stated_confidence(tagged(inside)) is None


@pytest.mark.parametrize("text", ["", "0.8", "<confidence>0.8", "0.8</confidence>", "</confidence>0.8<confidence>"])
def test_without_a_closed_tag_nothing_is_read(text):
    assert stated_confidence(text) is None


def test_the_last_tag_counts_even_if_only_an_earlier_one_can_be_read():
    assert stated_confidence(tagged("0.1") + tagged("0.9") + " <confidence>0.2") == 0.9
    assert stated_confidence(tagged("0.1") + tagged("sure")) is None
    assert stated_confidence("<confidence>" + tagged("0.3")) == 0.3


@few
@given(st.text())
def test_any_text_gives_a_confidence_in_range_or_none(text):
    for completion in (text, tagged(text)):
        value = stated_confidence(completion)
        assert value is None or 0 <= value <= 1


def test_unreadable_confidences_are_nan_not_zero():
    got = stated_confidences([tagged("0"), tagged("?"), tagged("25%")])
    assert got.dtype == torch.float32
    assert got.isnan().tolist() == [False, True, False]
    assert got[[0, 2]].tolist() == [0.0, 0.25]
    assert stated_confidences([]).shape == (0,)


def test_the_mean_token_probability_is_not_the_geometric_mean():
    logps = torch.tensor([[0.9, 0.1, 0.5], [1.0, 0.25, 0.5]]).log()
    got = mean_token_probability(logps, torch.tensor([[1, 1, 0], [1, 1, 1]]))
    torch.testing.assert_close(got, torch.tensor([0.5, 1.75 / 3]))
    assert bool(mean_token_probability(logps, torch.tensor([[0, 0, 0], [1, 0, 0]]))[0].isnan())
    assert float(mean_token_probability(torch.tensor([[1e-6]]))) == 1.0  # rounding above 0 leaves no confidence above 1


def test_self_certainty_of_a_rollout_is_the_mean_over_its_active_tokens_padded_or_packed():
    batch = make_batch(SMALL, 17, 5)
    scores = rlvr_ops.token_logps(
        batch.hidden, batch.weight, batch.ids, completion_mask=batch.mask, with_self_certainty=True
    ).self_certainty
    padded = mean_self_certainty(scores, batch.mask)
    for i, row in enumerate(batch.mask):
        # KL(uniform || p) = mean_j -log(V p_j), from the whole distribution
        logp = (batch.hidden[i][row] @ batch.weight.T).log_softmax(1)
        expected = (-logp.mean(1) - math.log(17)).mean()
        torch.testing.assert_close(padded[i], expected, equal_nan=True)
    assert padded.isnan().tolist() == [length == 0 for length in SMALL]
    flat = pack(batch)
    packed = rlvr_ops.token_logps(
        flat.hidden, flat.weight, flat.ids, completion_mask=flat.mask, with_self_certainty=True
    ).self_certainty
    torch.testing.assert_close(mean_self_certainty(packed, flat.mask, flat.cu_seqlens), padded, equal_nan=True)


def test_a_uniform_distribution_has_no_self_certainty():
    scores = rlvr_ops.token_logps(
        torch.zeros(1, 3, 4), torch.randn(8, 4), torch.zeros(1, 3, dtype=torch.long), with_self_certainty=True
    )
    assert mean_self_certainty(scores.self_certainty).tolist() == pytest.approx([0.0], abs=1e-6)


def test_means_over_tokens_name_wrong_inputs():
    with pytest.raises(ValueError, match=r"completion_mask must have shape \(1, 2\) like self_certainty, got \(2, 1\)"):
        mean_self_certainty(torch.zeros(1, 2), torch.ones(2, 1))
    with pytest.raises(
        ValueError, match=r"self_certainty must not be NaN where completion_mask is 1, got NaN at \(0, 0\)"
    ):
        mean_self_certainty(torch.tensor([[NAN]]))
    with pytest.raises(TypeError, match=r"per_token_logps must be a torch\.Tensor, got list"):
        mean_token_probability([0.0])


ANSWERS = ["a", "b", "a", None, "c"]
CERTAINTY = torch.tensor([1.0, 4.0, 2.0, 5.0, 3.0])


def test_a_rollout_of_rank_r_casts_its_power_of_votes():
    # Ranks 5 2 4 1 3 of 5: votes 1 4 2 (5 by None, not cast) 3, each to the power p.
    assert borda_vote(ANSWERS, CERTAINTY, p=1) == ("b", {"b": 4.0, "c": 3.0, "a": 3.0})
    assert borda_vote(ANSWERS, CERTAINTY, p=2) == ("b", {"b": 16.0, "c": 9.0, "a": 5.0})
    root = borda_vote(ANSWERS, CERTAINTY)
    assert root.answer == "a"
    assert root.votes["a"] == pytest.approx(1 + 2**0.5)


def test_with_p_zero_it_is_the_majority_vote():
    assert borda_vote(ANSWERS, CERTAINTY, p=0) == ("a", {"a": 2.0, "b": 1.0, "c": 1.0})


def test_with_a_large_p_the_most_certain_readable_rollout_decides():
    assert borda_vote(ANSWERS, CERTAINTY, p=20.0).answer == "b"


def test_equally_certain_rollouts_share_their_votes():
    # The lower three ranks have 1, 2 and 3 votes, 2 each.
    got = borda_vote(["x", "y", "x", "y"], torch.tensor([0.5, 0.5, 0.5, 0.9]), p=1)
    assert got == ("y", {"y": 6.0, "x": 4.0})


@few
@given(st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 3)), min_size=1, max_size=6), st.data())
def test_the_order_of_the_rollouts_changes_no_votes(rollouts, data):
    shuffled = data.draw(st.permutations(rollouts))

    def vote(given):
        answers, certainty = zip(*given, strict=True)
        return borda_vote(answers, torch.tensor(certainty, dtype=torch.float32), p=0.7)

    assert vote(rollouts).votes == vote(shuffled).votes


def test_of_equal_votes_the_answer_of_the_most_certain_rollout_wins_then_the_first():
    for order in permutations([("x", 1.0), ("y", 2.0), ("y", 3.0), ("x", 4.0)]):
        answers, certainty = zip(*order, strict=True)
        assert borda_vote(answers, torch.tensor(certainty), p=1).answer == "x"  # 1 + 4 against 2 + 3
    assert borda_vote(["y", "x"], torch.tensor([1.0, 1.0])).answer == "y"


def test_an_unreadable_answer_wins_only_if_there_is_no_other():
    assert borda_vote([None, None, "z"], torch.tensor([9.0, 8.0, 1.0]), p=3).answer == "z"
    assert borda_vote([None, None], torch.tensor([9.0, NAN])) == (None, {})


def test_answers_may_be_anything_hashable():
    assert borda_vote([(1, 2), 1.0, 1], torch.tensor([3.0, 2.0, 1.0]), p=0).answer == 1


def test_a_vote_names_wrong_inputs():
    with pytest.raises(ValueError, match=r"self_certainty must have shape \(n,\) = \(2,\), one per answer, got \(3,\)"):
        borda_vote(["a", "b"], torch.zeros(3))
    with pytest.raises(ValueError, match="answers must hold at least one answer, got none"):
        borda_vote([], torch.zeros(0))
    with pytest.raises(ValueError, match="must not be NaN for a readable answer, got NaN for answer 1"):
        borda_vote([None, "b"], torch.tensor([NAN, NAN]))
    with pytest.raises(ValueError, match="p must be at least 0 and finite, got -1"):
        borda_vote(["a"], torch.zeros(1), p=-1)
    with pytest.raises(TypeError, match=r"answers must be hashable or None, got \[1\]: turn each into text or a tuple"):
        borda_vote([[1]], torch.zeros(1))


def test_a_power_beyond_floats_is_refused_by_name():
    answers, certainty = ["a"] * 10, torch.arange(10.0)
    assert borda_vote(answers, certainty, p=280.0).votes["a"] > 1e280
    with pytest.raises(ValueError, match=r"p must be small enough for 10\^p to be a float, got 400"):
        borda_vote(answers, certainty, p=400)
