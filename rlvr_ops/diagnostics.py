"""Metrics of a policy loss, from the statistics of its rollouts. Detached 0-d tensors; docs/metrics.md explains each."""

from rlvr_kernels.weigh import STATISTICS
from torch import Tensor

from rlvr_ops.constants import Loss

EXPLORATORY_BAND = 0.05
"""|c| up to which a wrong rollout counts as exploratory rather than overconfident or self-correcting. The paper says c ~ 0
and gives no width, so this one is ours."""


def policy_metrics(statistics: Tensor, loss: Loss, entropy: Tensor | None, scored: Tensor | None) -> dict[str, Tensor]:
    """Metrics over the scored rows: statistics (B, 9) of `rlvr_kernels.weigh`, entropy (R,) that is 0 elsewhere."""
    column = dict(zip(STATISTICS, statistics.detach().unbind(1), strict=True))
    tokens = column["tokens"].sum().clamp(min=1)
    low, high = column["clipped_low"].sum() / tokens, column["clipped_high"].sum() / tokens
    metrics = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    if loss.given.ref is not None:
        metrics["kl"] = column["kl"].sum() / tokens
        metrics |= _confidence_metrics(column)
    if entropy is not None:
        metrics["entropy"] = (entropy if scored is None else entropy.masked_fill(~scored, 0)).sum() / tokens
    if loss.hyper.spec.off_policy_mask_threshold is not None:
        metrics["off_policy/frac_dropped"] = (column["dropped"] * column["wrong"]).sum() / column["wrong"].sum().clamp(
            min=1
        )
    return metrics | loss.given.metrics


def _confidence_metrics(column: dict[str, Tensor]) -> dict[str, Tensor]:
    """The confidence shifts of the wrong rollouts and what ACE made of them."""
    wrong = column["wrong"]
    count = wrong.sum().clamp(min=1)
    shift, weight = column["shift"], column["weight"]

    def share(which: Tensor) -> Tensor:
        return (wrong * which).sum() / count

    return {
        "ace/shift/mean": share(shift),
        "ace/weight/mean": share(weight),
        "ace/weight/max": weight.masked_fill(wrong == 0, 0).amax() if weight.numel() else wrong.sum(),
        "ace/frac_overconfident": share(shift > EXPLORATORY_BAND),
        "ace/frac_exploratory": share(shift.abs() <= EXPLORATORY_BAND),
        "ace/frac_self_correcting": share(shift < -EXPLORATORY_BAND),
    }
