"""A batch of TRL whose advantages become ACE's once the policy's log-probabilities are known."""

from typing import Any

from torch import Tensor

from rlvr_ops import Ace, ace_advantages


class Reweighted(dict[str, Any]):
    """A copy of a batch: TRL buffers its batches and uses them again, and ACE on top of ACE would compound."""

    def __init__(self, inputs: dict[str, Any], ace: Ace, trainer: str):
        super().__init__(inputs)
        self.ace, self.trainer = ace, trainer
        self.plain: Tensor = inputs["advantages"]
        self.logps: Tensor | None = None

    def weigh(self, per_token_logps: Tensor) -> None:
        """Take the policy's log-probabilities (B, T); the old policy's instead if ACE's confidence is theirs."""
        if self.logps is not None:
            raise TypeError(
                f"{self.trainer} scores the policy twice in its loss: ACE cannot tell whose confidence counts"
            )
        self.logps = per_token_logps.detach()
        confident = confident_logps(self.ace, self, self.logps)
        super().__setitem__(
            "advantages",
            ace_advantages(
                self.plain, confident, self["ref_per_token_logps"], completion_mask_of(self), alpha=self.ace.alpha,
                confidence_reduction=self.ace.reduction, shape=self.ace.shape,
            ),
        )  # fmt: skip

    def __getitem__(self, name: str) -> Any:
        if name == "advantages" and self.logps is None:
            raise TypeError(
                f"{self.trainer} reads its advantages before it has log-probabilities: ACE cannot re-weight them there"
            )
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As in a dict, but by way of `[]`."""
        try:
            return self[name]
        except KeyError:
            return default


def completion_mask_of(inputs: dict[str, Any]) -> Tensor:
    """The tokens (B, T) that the policy wrote itself: completions without padding and without what tools answered."""
    mask: Tensor = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def confident_logps(ace: Ace, inputs: dict[str, Any], logps: Tensor) -> Tensor:
    """The log-probabilities (B, T) whose distance from the reference is ACE's confidence; on policy old is current."""
    old = inputs.get("old_per_token_logps") if ace.confidence == "old" else None
    return logps if old is None else old
