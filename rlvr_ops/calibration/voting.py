"""borda_vote: one answer out of n, the more certain rollouts having more votes. On the host, n log n."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from rlvr_kernels.checks import check_tensor
from torch import Tensor


class BordaVote(NamedTuple):
    """The answer that won, and the votes of every distinct answer, the winner's first."""

    answer: Hashable | None
    votes: dict[Hashable, float]


def borda_vote(answers: Sequence[Hashable | None], self_certainty: Tensor, *, p: float = 0.5) -> BordaVote:
    """The answer with the most votes, where the rollout of rank 1, 2, ..., n by self-certainty casts (n - rank + 1)^p.

    Best-of-n by self-certainty (arXiv 2502.18581). `answers` are extracted from the n rollouts of one prompt and compared by
    ==, so bring them into one form first. `self_certainty` (n,) is that of `mean_self_certainty`, or any score that grows
    with certainty. p = 0 is the majority vote, and a larger p gives the most certain rollout more say. 0.5 is the default
    of the authors' script; the paper's recommendation for each n is not verified.

    None is an answer that could not be read. As in the authors' script it keeps its rank but casts no vote. If no answer
    could be read, the result is None without votes. Ties do not depend on the order: equally certain rollouts each cast the
    mean of the votes of their ranks (the script gives the earlier one more), and of answers with equal votes the one with
    the most certain rollout wins, then the one given first. Votes are floats, a constant to any gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted; no answers; NaN for a readable answer.

    >>> borda_vote(["4", "5", "4", None], torch.tensor([1.0, 2.0, 3.0, 9.0]), p=1.0)
    BordaVote(answer='4', votes={'4': 4.0, '5': 2.0})
    """
    scores = _check(answers, self_certainty, p)
    votes_cast = _votes_by_rank(scores, p)
    ballots: dict[Hashable, list[tuple[float, float]]] = {}
    for answer, score, vote in zip(answers, scores, votes_cast, strict=True):
        if answer is not None:
            ballots.setdefault(answer, []).append((vote, score))
    # fsum rounds once, so the totals do not depend on the order of the rollouts.
    votes = {answer: math.fsum(vote for vote, _ in cast) for answer, cast in ballots.items()}
    surest = {answer: max(score for _, score in cast) for answer, cast in ballots.items()}
    order = sorted(votes, key=lambda answer: (-votes[answer], -surest[answer]))
    return BordaVote(order[0] if order else None, {answer: votes[answer] for answer in order})


def _votes_by_rank(scores: list[float], p: float) -> list[float]:
    """Each rollout's (n - rank + 1)^p, shared among equals."""
    shared: dict[float, list[float]] = {}
    for place, score in enumerate(sorted(scores), start=1):
        shared.setdefault(score, []).append(float(place) ** p)
    mean = {score: math.fsum(votes) / len(votes) for score, votes in shared.items()}
    return [mean[score] for score in scores]


def _check(answers: Sequence[Hashable | None], self_certainty: Tensor, p: float) -> list[float]:
    """The scores of the rollouts, -inf where neither answer nor score could be read."""
    check_tensor("self_certainty", self_certainty)
    if self_certainty.shape != (len(answers),):
        raise ValueError(
            f"self_certainty must have shape (n,) = ({len(answers)},), one per answer, got {tuple(self_certainty.shape)}"
        )
    if not len(answers):
        raise ValueError("answers must hold at least one answer, got none")
    if not 0 <= p < math.inf:
        raise ValueError(f"p must be at least 0 and finite, got {p}")
    if p * math.log(len(answers)) > 650:  # a float ends at exp(709), and votes are added up
        raise ValueError(f"p must be small enough for {len(answers)}^p to be a float, got {p}")
    unhashable = next((a for a in answers if not isinstance(a, Hashable)), None)
    if unhashable is not None:
        raise TypeError(f"answers must be hashable or None, got {unhashable!r}: turn each into text or a tuple")
    unread = torch.tensor([answer is None for answer in answers], device=self_certainty.device)
    scores = self_certainty.detach().masked_fill(unread & self_certainty.isnan(), -math.inf).tolist()
    bad = next((i for i, score in enumerate(scores) if math.isnan(score)), None)
    if bad is not None:
        raise ValueError(f"self_certainty must not be NaN for a readable answer, got NaN for answer {bad}")
    return scores
