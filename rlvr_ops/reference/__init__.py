"""The losses in the most obvious PyTorch: the truth that everything else is tested against. Give float64 for the truth."""

from rlvr_ops.reference.losses import (
    ReferenceLoss,
    ReferenceScores,
    reference_ace_advantages,
    reference_policy_loss,
    reference_policy_loss_from_logps,
    reference_token_logps,
)

__all__ = [
    "ReferenceLoss",
    "ReferenceScores",
    "reference_ace_advantages",
    "reference_policy_loss",
    "reference_policy_loss_from_logps",
    "reference_token_logps",
]
