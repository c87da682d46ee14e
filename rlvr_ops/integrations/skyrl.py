"""SkyRL: ACE and our surrogates in its Ray trainer.

In an entry point of yours, whose experiment is a BasePPOExp:

    from rlvr_ops.integrations.skyrl import ace_trainer

    class ACEExp(BasePPOExp):
        def get_trainer(self, **parts):
            return ace_trainer(RayPPOTrainer, alpha=1.0)(**parts)  # surrogate="cispo" replaces SkyRL's loss by ours

with `trainer.algorithm.use_kl_loss=true`, which makes SkyRL score the reference, also with `kl_loss_coef=0`.

Read in the package skyrl 0.3.0. The workers are those of the strategy `fsdp`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from rlvr_ops.integrations.settings import Settings
from rlvr_ops.rollouts import Rollouts

HOW = "set trainer.algorithm.use_kl_loss=true (with kl_loss_coef=0 it adds no term)"


def ace_trainer(trainer: Any, **settings: Any) -> type:
    """A subclass of `trainer`, SkyRL's RayPPOTrainer or one of yours, with ACE.

    confidence="old" weights the advantages once they are computed; "current", and a surrogate, need a policy worker of
    `ace_worker`, which the subclass puts in. SkyRL's loss sums over advantages that `loss_reduction` has scaled, and so do ours:
    a surrogate that is a function must be linear in its advantages.

    Raises:
        TypeError, ValueError: at once for a bad setting; when models are built for a configuration that does not go.
    """
    chosen = Settings(**settings)
    chosen.refuse_whole_batches("SkyRL's advantages carry its denominators")
    in_worker = chosen.confidence == "current" or chosen.surrogate is not None

    class ACETrainer(trainer):
        def build_models(self, PolicyWorker: Any, CriticWorker: Any, RefWorker: Any) -> Any:
            _check(self.cfg, chosen)
            worker = _remote(PolicyWorker, chosen) if in_worker else PolicyWorker
            return super().build_models(worker, CriticWorker, RefWorker)

        def compute_advantages_and_returns(self, data: Any) -> Any:
            data = super().compute_advantages_and_returns(data)
            if in_worker:
                return data
            logps = data["action_log_probs"] if data["action_log_probs"] is not None else data["rollout_logprobs"]
            rollouts = _rollouts(data["advantages"], data["base_action_log_probs"], logps, None, data["loss_mask"])
            chosen.check_reference("base_action_log_probs", rollouts, logps, HOW)
            data["advantages"] = chosen.advantages(logps, rollouts)
            found = chosen.metrics(logps, rollouts)
            self.all_metrics.update({name: float(value) for name, value in found.items()})
            return data

    return ACETrainer


def ace_worker(worker: Any, chosen: Settings) -> type:
    """A subclass of SkyRL's policy worker whose policy loss sees the reference: `ace_policy_loss` around the registered one."""

    class ACEPolicyWorker(worker):
        policy_loss_fn: Any

        def _forward_backward_micro(self, experience: Any, *args: Any, **kwargs: Any) -> Any:
            own = self.policy_loss_fn
            self.policy_loss_fn = partial(ace_policy_loss, chosen, own, experience)
            try:
                return super()._forward_backward_micro(experience, *args, **kwargs)
            finally:
                self.policy_loss_fn = own

    return ACEPolicyWorker


def ace_policy_loss(
    chosen: Settings, own: Callable[..., Any], experience: Any, log_probs: Tensor, old_log_probs: Tensor | None,
    advantages: Tensor, config: Any, loss_mask: Tensor | None = None, rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
    """What `register_policy_loss` wants after the first three: (B, T) tensors to (the summed loss, metrics).

    own: SkyRL's loss, which runs on ACE's advantages unless the surrogate is ours. experience: the micro-batch, of which
    base_action_log_probs is read.

    Raises:
        ValueError: base_action_log_probs is missing.
    """
    old = rollout_logprobs if old_log_probs is None else old_log_probs
    rollouts = _rollouts(advantages, experience.base_action_log_probs, old, rollout_logprobs, loss_mask)
    chosen.check_reference("base_action_log_probs", rollouts, log_probs, HOW)
    metrics = {name: float(value) for name, value in chosen.metrics(log_probs, rollouts).items()}
    weighted = chosen.advantages(log_probs, rollouts)
    if chosen.surrogate is None:
        loss, found = own(
            log_probs, old_log_probs, weighted, config=config, loss_mask=loss_mask, rollout_logprobs=rollout_logprobs
        )
        return loss, found | metrics
    loss, ours, _ = chosen.loss(log_probs, replace(rollouts, advantages=weighted), "dapo")
    return loss, {name: float(value) for name, value in ours.items()} | metrics


def _rollouts(
    advantages: Tensor, ref: Tensor | None, old: Tensor | None, sampling: Tensor | None, mask: Tensor | None
) -> Rollouts:
    """SkyRL sums its loss: its advantages carry the denominators."""
    return Rollouts(None, advantages, ref, old, sampling, mask, None, 1)


def _check(cfg: Any, chosen: Settings) -> None:
    """Refuse what would undo ACE or be ignored."""
    algorithm = cfg.trainer.algorithm
    if chosen.alpha > 0 and not (algorithm.use_kl_loss or algorithm.use_kl_in_reward):
        raise ValueError(f"no reference is scored: {HOW}, or alpha=0 to leave ACE out")
    if chosen.confidence == "old" and chosen.surrogate is None and algorithm.advantage_batch_normalize:
        raise ValueError(
            "trainer.algorithm.advantage_batch_normalize would shift what ACE has weighted: set it to false, or take "
            "confidence='current'"
        )
    if cfg.generator.step_wise_trajectories:
        raise ValueError("generator.step_wise_trajectories cuts a rollout into rows, and ACE needs its tokens together")
    if cfg.trainer.strategy != "fsdp":
        raise ValueError(f"trainer.strategy must be 'fsdp', got {cfg.trainer.strategy!r}")
    correction = algorithm.off_policy_correction
    if chosen.surrogate is not None and any(
        getattr(correction, name) is not None
        for name in ("tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low",
                     "outlier_token_is_threshold_high", "token_mask_is_threshold_low")
    ):  # fmt: skip
        raise ValueError(
            "trainer.algorithm.off_policy_correction changes SkyRL's own loss, which the surrogate replaces: set "
            "sampling_correction instead"
        )


def _remote(PolicyWorker: Any, chosen: Settings) -> Any:
    """The Ray actor class of `ace_worker`, from that of SkyRL's worker."""
    import ray

    return ray.remote(num_gpus=1)(ace_worker(PolicyWorker.__ray_metadata__.modified_class, chosen))
