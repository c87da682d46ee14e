"""How far confidences can be trusted, a loss that trains them, and a vote that weighs answers by them."""

from rlvr_ops.calibration.metrics import (
    ReliabilityBins,
    auroc,
    brier_score,
    expected_calibration_error,
    reliability_bins,
)
from rlvr_ops.calibration.tokenised_brier import tokenised_brier_loss
from rlvr_ops.calibration.voting import BordaVote, borda_vote

__all__ = [
    "BordaVote",
    "ReliabilityBins",
    "auroc",
    "borda_vote",
    "brier_score",
    "expected_calibration_error",
    "reliability_bins",
    "tokenised_brier_loss",
]
