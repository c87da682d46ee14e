"""What a loss is given and does not differentiate: checked, flattened, and folded into the advantages if it multiplies them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlvr_ops import arguments
from rlvr_ops.hyperparameters import Hyperparameters
from rlvr_ops.layout import Layout
from rlvr_ops.sampling import geometric_mean, sampling_metrics

LEAST_LOG_WEIGHT = math.log(1e-8)  # of a sampling weight inside VESPO's product, as in the authors' code


class Constants(NamedTuple):
    """The flat constants of a loss, each (R,). advantages have the sampling correction in them."""

    advantages: Tensor
    old: Tensor | None
    ref: Tensor | None
    sampling: Tensor | None
    metrics: dict[str, Tensor]

    @staticmethod
    def collect(
        layout: Layout, advantages: Tensor, old: Tensor | None, ref: Tensor | None, sampling: Tensor | None,
        hyper: Hyperparameters, device: torch.device, dtype: torch.dtype, like: str,
    ) -> "Constants":  # fmt: skip
        """Check the arguments and flatten them."""
        _check_presence(old, ref, sampling, hyper)
        given = Constants(
            arguments.per_rollout_or_token("advantages", advantages, layout, device, dtype),
            arguments.per_token("old_per_token_logps", old, layout, like, device, dtype),
            arguments.per_token("ref_per_token_logps", ref, layout, like, device, dtype),
            arguments.per_token("sampling_per_token_logps", sampling, layout, like, device, dtype),
            {},
        )
        return given if hyper.sampling is None else given._corrected(layout, hyper)

    def _corrected(self, layout: Layout, hyper: Hyperparameters) -> "Constants":
        """With the sampling correction in the advantages, or for VESPO in the ratio."""
        assert hyper.sampling is not None
        assert self.old is not None
        assert self.sampling is not None
        weights = hyper.sampling.weights(self.old, self.sampling, layout)
        metrics = sampling_metrics(weights, layout)
        form = hyper.spec.surrogate.form
        if form == "vespo" and hyper.function is None:
            return self._replace(old=self.old - weights.log().clamp(min=LEAST_LOG_WEIGHT), metrics=metrics)
        if form == "gmpo" and not hyper.sampling.per_rollout:
            weights = geometric_mean(weights, layout)
        return self._replace(advantages=self.advantages * weights, metrics=metrics)

    def behaviour(self, hyper: Hyperparameters) -> Tensor | None:
        """The sampler's log-probabilities (R,) where something besides the correction reads them."""
        wanted = hyper.function is not None or hyper.spec.off_policy_mask_threshold is not None
        return self.sampling if wanted else None

    def alive(self, layout: Layout, hyper: Hyperparameters) -> Tensor | None:
        """The rows (R,) that can have a gradient, None meaning all."""
        if hyper.spec.beta > 0 or hyper.entropy_coef > 0 or hyper.function is not None:
            return layout.mask
        alive = self.advantages != 0
        return alive if layout.mask is None else alive & layout.mask

    @staticmethod
    def worth_scoring(layout: Layout, alive: Tensor | None) -> Tensor | None:
        """The counting rows (R,) of every rollout that has an alive one: its confidence shift needs them all."""
        if alive is None or alive is layout.mask:
            return layout.mask
        rows = (layout.per_rollout(alive.long()) > 0)[layout.rollout()]
        return rows if layout.mask is None else rows & layout.mask


class Loss(NamedTuple):
    """What the head is to compute: the constants of the batch, each rollout's weight (B,), and how."""

    layout: Layout
    given: Constants
    weights: Tensor
    hyper: Hyperparameters

    def row_weights(self, *where: Tensor | None) -> Tensor:
        """The aggregation's weight of each row (R,), 0 outside any of the masks (R,) given."""
        rows = self.weights[self.layout.rollout()]
        for mask in where:
            rows = rows if mask is None else rows.masked_fill(~mask, 0)
        return rows


def _check_presence(old: Tensor | None, ref: Tensor | None, sampling: Tensor | None, hyper: Hyperparameters) -> None:
    if hyper.spec.needs_reference and ref is None:
        reason = (
            "ACE compares the policy with it: pass it, or alpha=0"
            if hyper.spec.alpha > 0
            else "the KL term needs it: pass it, or beta=0"
        )
        raise ValueError(f"ref_per_token_logps is missing, and {reason}")
    if hyper.sampling is not None:
        for name, values in (("sampling_per_token_logps", sampling), ("old_per_token_logps", old)):
            if values is None:
                raise ValueError(
                    f"{name} is missing, and sampling_correction={hyper.sampling.kind!r} weighs by exp(old - sampling): pass both, "
                    "old_per_token_logps scored by token_logps before the first update"
                )
    elif sampling is not None and hyper.function is None and hyper.spec.off_policy_mask_threshold is None:
        raise ValueError(
            "sampling_per_token_logps is given and nothing reads it: choose a sampling_correction or an off_policy_mask_threshold"
        )
