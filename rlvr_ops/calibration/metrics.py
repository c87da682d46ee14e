"""How far confidences can be trusted: Brier score, expected calibration error, AUROC, reliability bins. O(B), or B log B.

All take `confidences` (B,) in [0, 1] and `correct` (B,) of 0 and 1. No answers are an error: a score of nothing would read
as a perfect one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from rlvr_kernels.logits import sum_dtype
from torch import Tensor

from rlvr_ops.advantages.groups import Groups
from rlvr_ops.rewards.judged import check_confidences, check_correct


class ReliabilityBins(NamedTuple):
    """Per bin (bins,): how many answers it holds, their mean confidence, and the share that is correct. NaN means if empty."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


def brier_score(confidences: Tensor, correct: Tensor) -> Tensor:
    """Mean of (confidence - correct)^2: 0 is perfect, 0.25 is what always saying 0.5 gets, 1 the worst.

    A proper scoring rule: calibration and discrimination in one number. A constant to any gradient, in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> brier_score(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1, 0, 0]))
    tensor(0.0833)
    """
    q, y, dtype = _check(confidences, correct)
    return (q - y).square().mean().to(dtype)


def expected_calibration_error(confidences: Tensor, correct: Tensor, *, bins: int = 10) -> Tensor:
    """Mean over answers of the distance between their bin's accuracy and its mean confidence (arXiv 1706.04599).

    The bins are those of `reliability_bins`. The value depends on their number and is biased upwards where a bin holds few
    answers: compare only equal `bins` over similar numbers of answers. 0 does not mean useful: always stating the base rate
    reaches it. A constant to any gradient, in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> expected_calibration_error(torch.tensor([0.9, 0.9, 0.2, 0.2]), torch.tensor([1, 0, 0, 0]))
    tensor(0.3000)
    """
    counts, confidence, accuracy = reliability_bins(confidences, correct, bins=bins)
    gaps = torch.where(counts > 0, (accuracy - confidence).abs(), 0)
    return (counts * gaps).sum() / counts.sum()


def auroc(confidences: Tensor, correct: Tensor) -> Tensor:
    """Probability that a correct answer has a higher confidence than a wrong one, a tie counting half.

    0.5 is chance, 1 separates perfectly. Only the order matters, not calibration. NaN where all answers are correct or all
    are wrong, for there is no pair to compare. A constant to any gradient, in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> auroc(torch.tensor([0.9, 0.6, 0.6, 0.1]), torch.tensor([1, 1, 0, 0]))
    tensor(0.8750)
    """
    q, y, dtype = _check(confidences, correct)
    _, place, counts = torch.unique(q, return_inverse=True, return_counts=True)
    counts = counts.to(y.dtype)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]  # 1 is the lowest; equal confidences share their mean rank
    positives = y.sum()
    above = (y * ranks).sum() - positives * (positives + 1) / 2
    return (above / (positives * (len(y) - positives))).to(dtype)


def reliability_bins(confidences: Tensor, correct: Tensor, *, bins: int = 10) -> ReliabilityBins:
    """What a reliability plot draws: `bins` bins of equal width over [0, 1], and what they hold.

    Bin i is (i / bins, (i + 1) / bins], as in arXiv 1706.04599, so a stated 0.9 is in the bin that ends at 0.9, whatever its
    rounding. Exactly 0, which that definition leaves out, is in the first bin. A constant to any gradient, in float32 or
    wider; counts are int64.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> reliability_bins(torch.tensor([0.0, 0.5, 0.75, 1.0]), torch.tensor([0, 1, 1, 0]), bins=2)
    ReliabilityBins(counts=tensor([2, 2]), confidence=tensor([0.2500, 0.8750]), accuracy=tensor([0.5000, 0.5000]))
    """
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 1:
        raise ValueError(f"bins must be a whole number of at least 1, got {bins!r}")
    q, y, dtype = _check(confidences, correct)
    edges = torch.arange(1, bins, device=q.device, dtype=q.dtype) / bins
    bin_of = torch.bucketize(q, edges.to(confidences.dtype).to(q.dtype))  # edges rounded as the confidences are
    in_bins = Groups(bin_of, bins)
    counts = in_bins.size_each()
    confidence, accuracy = ((in_bins.sum_each(x) / counts).to(dtype) for x in (q, y))  # 0 / 0 = NaN
    return ReliabilityBins(counts, confidence, accuracy)


def _check(confidences: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Confidences and verdicts in the dtype of the sums, and the dtype of the result."""
    q = check_confidences(confidences, may_be_nan=False)
    if not len(q):
        raise ValueError("confidences must hold at least one answer, got none")
    wide = sum_dtype(q.device)
    return q.to(wide), check_correct(correct, "confidences", q).to(wide), q.dtype
