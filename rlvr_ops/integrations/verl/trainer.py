"""verl's synchronous trainer with ACE, chosen by `trainer.v1.trainer_mode=ace`.

Where the policy loss is one of ours (`loss_mode=ace...`), the loss applies ACE, and is given the reference: that allows the
confidence of the policy in training. Under any other loss ACE weights the advantages, by the confidence of the policy that sampled.
"""

import copy
from functools import partial
from typing import Any

import transfer_queue as tq
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.distillation import is_distillation_enabled
from verl.trainer.ppo.utils import need_reference_policy
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.padding import response_to_nested

from rlvr_ops import Ace, Rollouts
from rlvr_ops.integrations.settings import Settings
from rlvr_ops.integrations.verl.losses import NAMES, SCORE_IT
from rlvr_ops.integrations.verl.reference import ppo_loss
from rlvr_ops.integrations.verl.settings import read_ace, say_once

FIELDS = ("advantages", "old_log_probs", "ref_log_prob", "response_mask")


@register_trainer("ace")
class ACETrainer(PPOTrainerSync):
    """`PPOTrainerSync` with ACE. Its numbers are the configuration's section `ace`: `++ace.alpha=1.0`.

    Raises:
        ValueError: no reference is scored, a confidence that the loss cannot have, or distillation under a loss of ours.
    """

    def __init__(self, config: Any) -> None:
        actor = config.actor_rollout_ref.actor
        loss_mode = actor.policy_loss.get("loss_mode", "vanilla")
        self.ace_in_loss = loss_mode in NAMES and loss_mode.startswith("ace")
        self.ace = read_ace(config.get("ace"), confidence="current" if self.ace_in_loss else "old")
        if self.ace.alpha > 0 and not need_reference_policy(config):
            raise ValueError(f"ACE compares the policy with a reference, and none is scored: set {SCORE_IT}")
        if not self.ace_in_loss and self.ace.confidence != "old":
            raise ValueError(
                f"ace.confidence={self.ace.confidence} needs a policy loss that applies ACE: set "
                f"actor_rollout_ref.actor.policy_loss.loss_mode=ace, got {loss_mode}"
            )
        if self.ace_in_loss and is_distillation_enabled(config.get("distillation")):
            raise ValueError(
                f"loss_mode={loss_mode} replaces the loss that distillation uses: set another, and ace.confidence=old"
            )
        place = f"the loss {loss_mode}" if self.ace_in_loss else f"the advantages of the loss {loss_mode}"
        say_once(f"{self.ace} in {place}")
        config = copy.deepcopy(config)
        config.trainer.v1.trainer_mode = "sync"  # verl's parts ask for the mode by name
        super().__init__(config)

    def _setup(self) -> None:
        super()._setup()
        if self.ace_in_loss:
            actor = omega_conf_to_dataclass(self.config.actor_rollout_ref.actor)
            self.actor_rollout_wg.set_loss_fn(partial(ppo_loss, config=actor, ace=self.ace))

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._compute_advantage(batch, metrics)
        if self.ace_in_loss or self.ace.alpha == 0:
            return batch
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=list(FIELDS))
        padded = data.to_padded_tensor()
        advantages, found = weighed(*(padded[name] for name in FIELDS), ace=self.ace)
        metrics.update(found)
        fields = {"advantages": response_to_nested(advantages, data["response_mask"])}
        return tq.kv_batch_put(
            keys=batch.keys, partition_id=batch.partition_id, fields=TensorDict(fields, batch_size=len(batch))
        )


def weighed(advantages: Tensor, old: Tensor, ref: Tensor, mask: Tensor, *, ace: Ace) -> tuple[Tensor, dict[str, float]]:
    """ACE's advantages (B, T) by the confidence of the policy that sampled, and its metrics under verl's prefix.

    Raises:
        ValueError: a reference of zeros.
    """
    chosen = Settings(ace.alpha, "old", ace.reduction, ace.shape)
    rollouts = Rollouts(None, advantages, ref, completion_mask=mask.bool())
    chosen.check_reference("ref_log_prob", rollouts, old, f"set {SCORE_IT}")
    metrics = {f"actor/{name}": float(value) for name, value in chosen.metrics(old, rollouts).items()}
    return chosen.advantages(old, rollouts), metrics
