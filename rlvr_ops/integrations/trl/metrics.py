"""What is logged: `ace/*`, and for the fused loss what TRL's own loss logs. Every mean is over all processes."""

import math
from typing import Any

import torch
from torch import Tensor

from rlvr_ops import Ace
from rlvr_ops.integrations.trl.reweighting import completion_mask_of, confident_logps
from rlvr_ops.objectives.objective import EXPLORATORY_BAND


def log_ace(trainer: Any, ace: Ace, inputs: dict[str, Any], logps: Tensor) -> None:
    """Append the `ace/*` metrics of a batch with its plain advantages; docs/metrics.md explains them.

    Rollouts that were not scored are NaN in logps (B, T) and do not count.
    """
    counts = completion_mask_of(inputs).bool() & ~logps.isnan()
    wrong = ((_per_token(inputs["advantages"]) < 0) & counts).any(1)
    gap = confident_logps(ace, inputs, logps) - inputs["ref_per_token_logps"]
    gap = torch.where(counts & wrong[:, None], gap, 0).sum(1)
    shift = ace.shift(gap, counts.sum(1))
    columns = torch.stack([wrong.float(), shift.float(), ace.weight(shift).float()], 1)
    wrong, shift, weight = trainer.accelerator.gather(columns).unbind(1)
    shift, weight = shift[wrong > 0], weight[wrong > 0]
    if not shift.numel():
        return  # TRL averages what is logged, and a 0 here would dilute it
    found = {"ace/shift/mean": shift.mean(), "ace/weight/mean": weight.mean(), "ace/weight/max": weight.amax()}
    parts = {
        "ace/frac_overconfident": shift > EXPLORATORY_BAND,
        "ace/frac_exploratory": shift.abs() <= EXPLORATORY_BAND,
        "ace/frac_self_correcting": shift < -EXPLORATORY_BAND,
    }
    log(trainer, found | {name: part.float().mean() for name, part in parts.items()})


def log(trainer: Any, metrics: dict[str, Tensor]) -> None:
    """Append 0-d metrics under their names, but not a mean of nothing (NaN). One host sync."""
    mode = "train" if trainer.model.training else "eval"
    for name, value in zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True):
        if not math.isnan(value):
            trainer._metrics[mode][name].append(value)


def log_like_trl(trainer: Any, inputs: dict[str, Any], call: Any, logps: Tensor, entropy: Tensor) -> None:
    """Append what TRL's loss logs: entropy, KL and how often ratios were clipped.

    logps (B, T) are NaN in rollouts that were not scored, because nothing in them could have a gradient. Their ratio counts
    as 1. entropy () is the mean over the tokens that were scored.
    """
    rollouts, mask = call.rollouts, call.rollouts.completion_mask.bool()
    scored = ~logps.isnan() & mask
    mean = _GlobalMean(trainer.accelerator)
    metrics = {"entropy": mean(entropy * scored.sum(), scored.sum(), nothing=math.nan)}
    logps, old = logps.nan_to_num(), rollouts.old_per_token_logps
    old = logps if old is None else old
    if call.objective.kl.beta:
        estimate, _ = call.objective.kl.terms(logps, old, rollouts.ref_per_token_logps)
        metrics["kl"] = mean((estimate * mask).sum(), mask.sum())
    ratio = torch.where(scored, logps - old, 0)
    if trainer.loss_type == "vespo":
        metrics |= _vespo(trainer, inputs, ratio, mask, scored, mean)
    elif trainer.loss_type != "sapo":
        metrics |= _clipped(trainer, _per_token(rollouts.advantages), ratio, mask, mean)
    log(trainer, metrics)


class _GlobalMean:
    def __init__(self, accelerator: Any):
        self.accelerator = accelerator

    def __call__(self, total: Tensor, count: Tensor, nothing: float = 0.0) -> Tensor:
        """The ratio of two sums over all processes, or `nothing` where the count is 0."""
        total, count = self.accelerator.reduce(torch.stack([total.float(), count.float()]), reduction="sum")
        return torch.where(count > 0, total / count.clamp(min=1), nothing)


def _clipped(trainer: Any, advantages: Tensor, ratio: Tensor, mask: Tensor, mean: _GlobalMean) -> dict[str, Tensor]:
    if trainer.importance_sampling_level == "sequence":
        ratio = ((ratio * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None]
        mask = mask if advantages.shape[1] > 1 else torch.ones_like(ratio, dtype=torch.bool)
    ratio = ratio.exp()
    high = (ratio > (1 if trainer.loss_type != "cispo" else 0) + trainer.epsilon_high) & (advantages > 0) & mask
    if trainer.loss_type == "cispo":
        return {"cispo_clip_ratio": mean(high.sum(), mask.sum())}
    low = (ratio < 1 - trainer.epsilon_low) & (advantages < 0) & mask
    gathered = trainer.accelerator.gather(torch.stack([(x * mask).sum(1) / mask.sum(1) for x in (low, high)], 1))
    lows, highs = gathered[~gathered.isnan().any(1)].unbind(1)
    nothing = gathered.new_tensor(math.nan)
    return {
        "clip_ratio/low_mean": mean(low.sum(), mask.sum()),
        "clip_ratio/high_mean": mean(high.sum(), mask.sum()),
        "clip_ratio/region_mean": mean((low | high).sum(), mask.sum()),
        "clip_ratio/low_min": lows.amin() if lows.numel() else nothing,
        "clip_ratio/high_max": highs.amax() if highs.numel() else nothing,
    }


def _vespo(
    trainer: Any, inputs: dict[str, Any], ratio: Tensor, mask: Tensor, scored: Tensor, mean: _GlobalMean
) -> dict[str, Tensor]:
    args = trainer.args
    weights = trainer.get_gamma_weights(
        advantages=_per_token(inputs["advantages"]), log_ratio_per_token=ratio, mask=mask,
        importance_sampling_ratio=inputs.get("importance_sampling_ratio"),
        k_pos=args.vespo_k_pos, lambda_pos=args.vespo_lambda_pos, k_neg=args.vespo_k_neg, lambda_neg=args.vespo_lambda_neg,
    )  # fmt: skip
    counts = scored.any(1, keepdim=True).expand(weights.shape)
    return {"vespo/phi_seq_mean": mean((weights * counts).sum(), counts.sum(), nothing=math.nan)}


def _per_token(advantages: Tensor) -> Tensor:
    return advantages[:, None] if advantages.ndim == 1 else advantages
