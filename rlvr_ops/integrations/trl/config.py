"""ACE's settings among TRL's."""

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from rlvr_ops import Ace


@dataclass
class ACEArguments:
    """What ACE adds to a configuration of TRL: mix it into that of a `GRPOTrainer` subclass.

    >>> from trl.experimental.gmpo import GMPOConfig
    >>> @dataclass
    ... class ACEGMPOConfig(ACEArguments, GMPOConfig):
    ...     pass

    ace_alpha: strength of ACE; 0 is the trainer as it was, without a reference.
    ace_confidence: whose log-probabilities are compared with the reference, the "current" policy's or the "old" one's.
    ace_confidence_reduction: "mean" divides the confidence shift by the completion's tokens, "sum" does not.
    ace_shape: "softplus" or "relu".
    fused_loss: compute the loss from hidden states by `rlvr_ops.policy_loss` instead of from TRL's log-probabilities.

    Raises:
        TypeError, ValueError: naming the setting, what came and what is wanted.
    """

    ace_alpha: float = field(default=1.0, metadata={"help": "Strength of ACE. 0 leaves ACE out."})
    ace_confidence: str = field(
        default="current",
        metadata={"help": "Whose confidence counts: 'current' or 'old'.", "choices": ["current", "old"]},
    )
    ace_confidence_reduction: str = field(
        default="mean", metadata={"help": "'mean' or 'sum' over a completion's tokens.", "choices": ["mean", "sum"]}
    )
    ace_shape: str = field(
        default="softplus", metadata={"help": "'softplus' or 'relu'.", "choices": ["softplus", "relu"]}
    )
    fused_loss: bool = field(default=False, metadata={"help": "Compute the loss from hidden states by rlvr_ops."})

    def __post_init__(self) -> None:
        ace_of(self)
        if not isinstance(self.fused_loss, bool):
            raise TypeError(f"fused_loss must be a bool, got {self.fused_loss!r}")
        super().__post_init__()  # type: ignore[misc]


@dataclass
class ACEGRPOConfig(ACEArguments, GRPOConfig):
    """TRL's `GRPOConfig` with ACE's settings."""


def ace_of(args: Any) -> Ace:
    """ACE as a configuration sets it. One without the settings of `ACEArguments` has their defaults."""
    given = {name: getattr(args, f"ace_{name}", getattr(ACEArguments, f"ace_{name}")) for name in SETTINGS}
    try:
        return Ace(given["alpha"], given["confidence"], given["confidence_reduction"], given["shape"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"ace_{error}") from None


SETTINGS = ("alpha", "confidence", "confidence_reduction", "shape")
