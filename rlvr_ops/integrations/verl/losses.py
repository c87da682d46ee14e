"""Our losses in verl's registry: `rlvr-<name>` is the plain loss, `ace-<name>` the loss with ACE, `ace` is `ace-ppo-clip`.

Clip ranges, temperatures and the aggregation are those of verl's actor configuration, so that a run keeps its numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import register_policy_loss

from rlvr_ops import Ace, Objective, Rollouts, SamplingCorrection, policy_loss_from_logps, surrogates
from rlvr_ops.integrations.settings import check_reference
from rlvr_ops.integrations.verl import reference
from rlvr_ops.integrations.verl.settings import read_ace, say_once
from rlvr_ops.objectives.custom import SurrogateFunction, SurrogateRows

WEIGHTED = SamplingCorrection("token_truncate", clip_max=None)  # verl has made and bounded the weights
SCORE_IT = "actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0"


@dataclass(frozen=True)
class Method:
    """A surrogate made from verl's ActorConfig, its level, and the loss_agg_mode that the name stands for, if any."""

    surrogate: Callable[[Any], Any]
    level: str = "token"
    aggregation: str | None = None


def _range(config: Any) -> tuple[float, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (config.clip_ratio if low is None else low), (config.clip_ratio if high is None else high)


def _dual_clip(config: Any) -> surrogates.Surrogate:
    return surrogates.Clip(*_range(config), delta=config.get("clip_ratio_c", 3.0))


def _clip(config: Any) -> surrogates.Surrogate:
    return surrogates.Clip(*_range(config))


@dataclass(frozen=True)
class WeighedTokens:
    """A surrogate of a whole batch whose token losses are multiplied by the rollout correction's weights, as verl does it.

    In the advantages they would also choose other tokens, and leave a penalty unweighted.
    """

    surrogate: SurrogateFunction
    whole_batch: ClassVar[bool] = True

    def __call__(self, per_token_logps: Tensor, rows: SurrogateRows) -> Tensor:
        """The token losses, weighted."""
        weights = (rows.old_per_token_logps - rows.sampling_per_token_logps).exp()  # type: ignore[operator]
        return self.surrogate(per_token_logps, rows) * weights


def _clip_cov(config: Any) -> surrogates.ClipCov:
    numbers = config.policy_loss
    return surrogates.ClipCov(numbers.clip_cov_ratio, numbers.clip_cov_lb, numbers.clip_cov_ub, *_range(config))


FROM_CONFIG: dict[str, Callable[[Any], Any]] = {
    "ppo_clip": _dual_clip,
    "cispo_two_sided": lambda config: surrogates.CispoTwoSided(*_range(config)),
    "gmpo": lambda config: surrogates.Gmpo(*_range(config)),
    "sapo": lambda config: surrogates.Sapo(config.tau_pos, config.tau_neg),
    "clip_cov": _clip_cov,
    "kl_cov": lambda config: surrogates.KLCov(config.policy_loss.kl_cov_ratio, config.policy_loss.ppo_kl_coef),
    "fipo": lambda config: surrogates.Fipo(*_range(config)),
}


def _defaults(record: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda config: record()


METHODS = {name: Method(FROM_CONFIG.get(name, _defaults(record))) for name, record in surrogates.SURROGATES.items()} | {
    "grpo": Method(_dual_clip, aggregation="seq-mean-token-mean"),
    "dapo": Method(_dual_clip, aggregation="token-mean"),
    "dr_grpo": Method(_dual_clip, aggregation="seq-mean-token-sum-norm"),
    "gspo": Method(_clip, "sequence"),
    "gspo_token": Method(_clip, "sequence_token"),
    "luspo": Method(_clip, "sequence", "seq-mean-token-sum"),
}


@dataclass(frozen=True)
class PolicyLoss:
    """A loss as verl's registry wants it: (log-probabilities, advantages, mask, ...) -> (loss, metrics)."""

    name: str
    method: Method
    with_ace: bool

    def __call__(
        self,
        old_log_prob: Tensor,
        log_prob: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss over tensors (B, T), in verl's denominators, and its metrics as numbers.

        Raises:
            ValueError: ACE without a reference or with one of zeros, or an aggregation other than the one that the name stands for.
        """
        objective = self._objective(loss_agg_mode, config)
        if rollout_is_weights is not None:
            objective = _corrected(objective)
        mask = response_mask.bool()
        rollouts = Rollouts(
            None,
            advantages,
            ref_per_token_logps=reference.current().per_token_logps if self.with_ace else None,
            old_per_token_logps=old_log_prob,
            sampling_per_token_logps=None if rollout_is_weights is None else old_log_prob - rollout_is_weights.log(),
            completion_mask=mask,
            num_items_in_batch=_items(loss_agg_mode, mask, config.global_batch_info),
        )
        if objective.ace.alpha > 0:
            wanted = (
                f"loss_mode={self.name} compares the policy with its reference, which verl hands to no policy loss: set "
                f"trainer.v1.trainer_mode=ace (or VERL_ENGINE_VENDOR=rlvr_ops), and {SCORE_IT} so that it is scored"
            )
            check_reference("ref_log_prob", rollouts, log_prob, wanted)
        out = policy_loss_from_logps(log_prob, rollouts, objective)
        moved = (old_log_prob - log_prob.detach()).masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
        metrics = out.metrics | {"actor/pg_clipfrac": out.metrics["clip_ratio/region_mean"], "actor/ppo_kl": moved}
        return out.loss, dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))

    def _objective(self, mode: str, config: Any) -> Objective:
        if self.method.aggregation not in (None, mode):
            raise ValueError(
                f"loss_mode={self.name} averages {self.method.aggregation}, and so must verl's KL and entropy terms: set "
                f"actor_rollout_ref.actor.loss_agg_mode={self.method.aggregation}, got {mode}"
            )
        objective = Objective(
            self.method.surrogate(config),
            ace=self._ace(),
            importance_sampling_level=self.method.level,
            aggregation="token-mean" if mode == "token-sum" else mode,
            max_completion_length=config.loss_scale_factor if mode == "seq-mean-token-sum-norm" else None,
        )
        say_once(f"loss_mode={self.name}: {objective.surrogate}, {objective.ace}, {self.method.level} level, {mode}")
        return objective

    def _ace(self) -> Ace:
        if not self.with_ace:
            return Ace(alpha=0.0)
        ace = reference.current().ace
        if ace is None:
            ace = read_ace()
            say_once(
                f"{ace} from the environment or by default: trainer.v1.trainer_mode=ace alone reads the section ace"
            )
        return ace


def _corrected(objective: Objective) -> Objective:
    """The objective with the rollout correction's weights: of the advantages, or of a whole batch's token losses."""
    corrected = replace(objective, sampling=WEIGHTED)  # raises for a surrogate that takes no correction
    if getattr(objective.function, "whole_batch", False):
        return replace(objective, surrogate=WeighedTokens(objective.function))  # type: ignore[arg-type]
    return corrected


def _items(mode: str, mask: Tensor, batch: dict[str, Any]) -> Any:
    """num_items_in_batch: this rank's share of verl's global count, since verl's ranks are averaged."""
    ranks = batch.get("dp_size") or 1
    if mode == "token-sum":
        return 1 / ranks
    if mode == "token-mean":
        tokens = batch.get("batch_num_tokens")
        return None if tokens is None else tokens / ranks
    rollouts = batch.get("global_batch_size")
    return mask.any(dim=-1).sum() if rollouts is None else rollouts / ranks  # verl leaves out rollouts without tokens


def _register() -> tuple[str, ...]:
    names = {"ace": PolicyLoss("ace", METHODS["ppo_clip"], with_ace=True)}
    for method, prefix in ((method, prefix) for method in METHODS for prefix in ("ace", "rlvr")):
        name = f"{prefix}-{method.replace('_', '-')}"
        names[name] = PolicyLoss(name, METHODS[method], with_ace=prefix == "ace")
    for name, loss in names.items():
        register_policy_loss(name)(loss)
    return tuple(names)


NAMES = _register()
