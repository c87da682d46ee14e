"""OpenRLHF: ACE and our surrogates in its policy actor. A script of yours, train_ace.py, stands in for its command:

    import runpy
    from rlvr_ops.integrations.openrlhf import install
    install(alpha=1.0)  # surrogate="cispo" replaces OpenRLHF's PolicyLoss by ours
    runpy.run_module("openrlhf.cli.train_ppo_ray", run_name="__main__")

    python train_ace.py --algo.kl.use_loss --algo.kl.init_coef 1e-8 ...

OpenRLHF loads a reference only with init_coef above 0, and hands its log-probabilities to training only with use_loss.

Read in the package openrlhf 0.11.2.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlvr_ops.integrations.settings import Settings
from rlvr_ops.objectives.real import Real
from rlvr_ops.rollouts import Rollouts

HOW = "give --algo.kl.use_loss and --algo.kl.init_coef above 0 (1e-8 adds no term to speak of)"


def install(**settings: Any) -> None:
    """Put ACE into the PolicyModelActor that OpenRLHF's command line is about to import."""
    import ray
    from openrlhf.trainer.ray import ppo_actor

    Settings(**settings)
    ppo_actor.PolicyModelActor = ray.remote(num_gpus=1)(ace_actor(_class_of(ppo_actor.PolicyModelActor), **settings))


def ace_actor(actor: Any, **settings: Any) -> type:
    """A subclass of OpenRLHF's policy actor whose trainer has ACE; `attach` says how."""

    class ACEPolicyModelActor(actor):
        def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
            super().init_model_from_pretrained(*args, **kwargs)
            attach(self.trainer, **settings)

    return ACEPolicyModelActor


def attach(trainer: Any, **settings: Any) -> None:
    """Make an ActorPPOTrainer's loss `ace_policy_loss` around its own.

    Raises:
        TypeError, ValueError: a bad setting, a surrogate that OpenRLHF's shuffling breaks, or no reference in training.
    """
    chosen, own, step = Settings(**settings), trainer.actor_loss_fn, trainer.training_step
    kl = trainer.args.algo.kl
    if chosen.alpha > 0 and not (kl.use_loss and kl.init_coef > 0):
        raise ValueError(f"no reference reaches training: {HOW}, or alpha=0 to leave ACE out")
    if isinstance(chosen.surrogate, Real):
        raise ValueError(f"surrogate={chosen.surrogate!r} compares the rollouts of a group, and OpenRLHF shuffles them")
    if chosen.surrogate is not None and own.is_correction_level != "off":
        raise ValueError(
            "--algo.advantage.is_correction_level changes OpenRLHF's own loss, which the surrogate replaces: leave it off and "
            "set sampling_correction"
        )

    def training_step(experience: Any, *args: Any, **kwargs: Any) -> Any:
        trainer.actor_loss_fn = partial(ace_policy_loss, chosen, own, experience)
        return step(experience, *args, **kwargs)

    trainer.training_step = training_step


def ace_policy_loss(
    chosen: Settings, own: Any, experience: Any, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor,
    action_mask: Tensor, rollout_log_probs: Tensor | None = None, dp_size: int = 1,
    batch_num_tokens: Tensor | None = None, global_batch_size: Tensor | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """What OpenRLHF's PolicyLoss returns for (B, T) tensors: (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio).

    own: its PolicyLoss, which runs on ACE's advantages, or, if the surrogate is ours, on zeros and for its statistics. Ours has
    its denominators: batch_num_tokens for token-mean, else global_batch_size, both over dp_size. experience: the micro-batch,
    of which base_action_log_probs is read, and whose `info`, which OpenRLHF logs, gets `ace/*`.

    Raises:
        ValueError: base_action_log_probs is missing.
    """
    rollouts = Rollouts(
        None, advantages, experience.base_action_log_probs, old_log_probs, rollout_log_probs, action_mask
    )
    chosen.check_reference("base_action_log_probs", rollouts, log_probs, HOW)
    experience.info.update(chosen.metrics(log_probs, rollouts))
    ours, weighted = chosen.surrogate is not None, chosen.advantages(log_probs, rollouts)
    loss, *statistics = own(
        log_probs, old_log_probs, torch.zeros_like(weighted) if ours else weighted, action_mask=action_mask,
        rollout_log_probs=rollout_log_probs, dp_size=dp_size, batch_num_tokens=batch_num_tokens,
        global_batch_size=global_batch_size,
    )  # fmt: skip
    if ours:
        count = batch_num_tokens if own.token_level_loss else global_batch_size
        seen = replace(rollouts, advantages=weighted)
        loss, found, _ = chosen.loss(log_probs, *_averaged(seen, action_mask, own.token_level_loss, dp_size, count))
        statistics[0] = found["clip_ratio/region_mean"]
    return loss, *statistics


def _averaged(
    rollouts: Rollouts, mask: Tensor, token_level: bool, dp_size: int, count: Tensor | None
) -> tuple[Rollouts, str]:
    """The rollouts with OpenRLHF's denominator, and the aggregation that it belongs to."""
    if count is None:  # a mean over the micro-batch
        dp_size, count = 1, mask.sum() if token_level else (mask.sum(-1) > 0).sum()
    return replace(rollouts, num_items_in_batch=count / dp_size), "dapo" if token_level else "grpo"


def _class_of(remote: Any) -> type:
    """The class behind a Ray actor class."""
    return remote.__ray_metadata__.modified_class
