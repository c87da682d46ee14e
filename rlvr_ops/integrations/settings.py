"""Settings: what a user of a framework sets, under the names of `ace_loss`, and what it does to the framework's batch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rlvr_kernels.objective import Ace
from torch import Tensor

from rlvr_ops.advantages.ace import ace_advantages
from rlvr_ops.losses.ace import SurrogateLike, resolve
from rlvr_ops.losses.policy_loss_from_logps import policy_loss_from_logps
from rlvr_ops.objectives.objective import LossOutput, Objective, correction
from rlvr_ops.rollouts import Rollouts
from rlvr_ops.surrogates import SURROGATES, Clip

# In nats over the batch: zeros everywhere mean that the reference was skipped, unless the policy is that certain too.
LEAST_LIKELY = -1.0


@dataclass(frozen=True)
class Settings:
    """ACE, and which loss it goes into. The names and defaults are those of `ace_loss`.

    surrogate: None, the default, keeps the framework's own loss and hands it advantages that ACE has weighted. A name, a record
        or a function replaces the loss by one of ours, averaged as the framework averages.
    surrogate_parameters: the numbers of a surrogate that is a name, for configuration files: {"epsilon_high": 0.28}.

    The others belong to our surrogates, and need one.

    Raises:
        TypeError, ValueError: naming the setting, what came and what is wanted.

    >>> Settings(alpha=0.5, surrogate="sapo", surrogate_parameters={"tau_negative": 1.1}).objective("dapo").surrogate
    Sapo(tau_positive=1.0, tau_negative=1.1)
    """

    alpha: float = 1.0
    confidence: str = "current"
    confidence_reduction: str = "mean"
    shape: str = "softplus"
    surrogate: SurrogateLike | None = None
    surrogate_parameters: Mapping[str, Any] = field(default_factory=dict)
    importance_sampling_level: str = "token"
    sampling_correction: str | None = None
    sampling_clip_max: float | None = 3.0
    sampling_clip_min: float | None = None
    off_policy_mask_threshold: float | None = None

    def __post_init__(self) -> None:
        ace, objective = self.ace, self.objective("dapo")  # both raise for what is wrong
        if ace.alpha > 0 and getattr(objective.function, "signs_only", False):
            raise ValueError(
                f"alpha={self.alpha} does nothing with surrogate={self.surrogate!r}, which reads the advantages' signs alone: "
                "set alpha=0"
            )
        if self.surrogate is not None:
            return
        for name, default in (
            ("surrogate_parameters", {}), ("importance_sampling_level", "token"), ("sampling_correction", None),
            ("off_policy_mask_threshold", None),
        ):  # fmt: skip
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to one of our surrogates, and surrogate=None keeps the "
                    "framework's own loss: set it there, or choose a surrogate"
                )

    @property
    def ace(self) -> Ace:
        """ACE's record."""
        return Ace(self.alpha, self.confidence, self.confidence_reduction, self.shape)

    def objective(self, aggregation: str, max_completion_length: int | None = None) -> Objective:
        """Our loss without ACE, whose weight is in the advantages; PPO's clip with surrogate=None."""
        if self.surrogate_parameters and isinstance(self.surrogate, str):
            resolve(self.surrogate)  # names what is unknown
            surrogate = SURROGATES[self.surrogate](**self.surrogate_parameters)
        else:
            surrogate = Clip() if self.surrogate is None else resolve(self.surrogate)  # type: ignore[assignment]
        return Objective(
            surrogate, importance_sampling_level=self.importance_sampling_level,
            off_policy_mask_threshold=self.off_policy_mask_threshold,
            sampling=correction(self.sampling_correction, self.sampling_clip_max, self.sampling_clip_min),
            aggregation=aggregation, max_completion_length=max_completion_length,
        )  # fmt: skip

    def advantages(self, per_token_logps: Tensor, rollouts: Rollouts) -> Tensor:
        """A (1 + alpha f(c)) where A < 0 and A elsewhere, shaped like the advantages; a constant. alpha=0 returns them as given."""
        if self.alpha == 0:
            return rollouts.advantages
        assert rollouts.ref_per_token_logps is not None, "adapters check the reference first"
        return ace_advantages(
            rollouts.advantages, self._whose(per_token_logps, rollouts), rollouts.ref_per_token_logps,
            rollouts.completion_mask, cu_seqlens=rollouts.cu_seqlens, alpha=self.alpha,
            confidence_reduction=self.confidence_reduction, shape=self.shape,
        )  # fmt: skip

    def loss(
        self, per_token_logps: Tensor, rollouts: Rollouts, aggregation: str, max_completion_length: int | None = None
    ) -> LossOutput:
        """Our surrogate of advantages that ACE has weighted already."""
        objective = self.objective(aggregation, max_completion_length)
        if objective.function is None:  # a user's function sees all that there is
            rollouts = replace(rollouts, ref_per_token_logps=None)
            if objective.sampling is None and objective.off_policy_mask_threshold is None:
                rollouts = replace(rollouts, sampling_per_token_logps=None)
        return policy_loss_from_logps(per_token_logps, rollouts, objective)

    def metrics(self, per_token_logps: Tensor, rollouts: Rollouts) -> dict[str, Tensor]:
        """The `ace/*` metrics, detached 0-d tensors (docs/metrics.md); none with alpha=0."""
        if self.alpha == 0:
            return {}
        whose = self._whose(per_token_logps, rollouts).detach()
        seen = replace(rollouts, old_per_token_logps=None, sampling_per_token_logps=None, num_items_in_batch=None)
        found = policy_loss_from_logps(whose, seen, Objective(Clip(), ace=self.ace)).metrics
        return {name: value for name, value in found.items() if name.startswith("ace/")}

    def check_reference(self, name: str, rollouts: Rollouts, per_token_logps: Tensor, how: str) -> None:
        """Raise ValueError if ACE is on and the reference is missing, or only zeros that the policy contradicts.

        name: what the framework calls the reference's log-probabilities. how: the setting that makes it score them.
        """
        if self.alpha > 0:
            wanted = f"ACE compares the policy with the reference: {how}, or alpha=0 to leave ACE out"
            check_reference(name, rollouts, per_token_logps, wanted)

    def refuse_whole_batches(self, because: str) -> None:
        """Raise ValueError if the surrogate compares a batch's tokens with one another, where `because` keeps it from that."""
        if getattr(self.objective("dapo").surrogate, "whole_batch", False):
            raise ValueError(f"surrogate={self.surrogate!r} compares the tokens of a whole batch, and {because}")

    def _whose(self, per_token_logps: Tensor, rollouts: Rollouts) -> Tensor:
        """The log-probabilities of the policy whose confidence counts."""
        old = rollouts.old_per_token_logps
        return old if self.confidence == "old" and old is not None else per_token_logps


def ace_factor(advantages: Tensor, weighted: Tensor) -> Tensor:
    """What ACE has multiplied each advantage by, 1 where A >= 0; shaped like them."""
    return torch.where(advantages < 0, weighted / advantages, 1)


def check_reference(name: str, rollouts: Rollouts, per_token_logps: Tensor, wanted: str) -> None:
    """Raise ValueError if the reference is missing, or only zeros where the policy is not certain. One host sync or two.

    name: what the framework calls the reference's log-probabilities. wanted: the end of the message, what to do.
    """
    if rollouts.ref_per_token_logps is None:
        raise ValueError(f"{name} is missing, and {wanted}")
    ref, logps = rollouts.ref_per_token_logps, per_token_logps.detach()
    if rollouts.completion_mask is not None:
        ref, logps = (values.masked_fill(rollouts.completion_mask == 0, 0) for values in (ref, logps))
    if not bool(ref.any()) and bool(logps.sum() < LEAST_LIKELY):
        raise ValueError(f"{name} holds only zeros, what is there when no reference was scored, and {wanted}")
