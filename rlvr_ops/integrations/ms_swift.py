"""ms-swift: ACE and our surrogates in its GRPOTrainer. In a file of yours, ace.py:

    from rlvr_ops.integrations.ms_swift import register
    register(alpha=1.0)  # surrogate="cispo" replaces ms-swift's loss by ours

and on the command line

    swift rlhf --rlhf_type grpo --external_plugins ace.py --beta 1e-8 ...

ms-swift scores a reference only with `--beta` above 0; 1e-8 adds no KL term to speak of.

Read in the package ms-swift 4.6.0. Its Megatron and Ray trainers are others.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rlvr_ops.integrations.settings import Settings
from rlvr_ops.rollouts import Rollouts

HOW = "give --beta above 0 (1e-8 adds no term to speak of)"
AGGREGATION = {
    "grpo": "grpo", "sapo": "grpo", "bnpo": "bnpo", "dr_grpo": "dr_grpo", "dapo": "dapo", "cispo": "dapo", "fipo": "dapo",
}  # fmt: skip
"""How ms-swift averages under each `--loss_type`; "real" has no average of tokens."""
OWN = {
    "importance_sampling_level": "token", "rollout_importance_sampling_mode": None, "off_policy_sequence_mask_delta": None,
    "top_entropy_quantile": 1.0, "chord_sft_iterator": None,
}  # fmt: skip
"""What changes ms-swift's own loss, and what it must be where a surrogate replaces that."""

_settings = Settings()


def register(**settings: Any) -> None:
    """Make `--rlhf_type grpo` train by ms-swift's GRPOTrainer with ACE.

    Raises:
        TypeError, ValueError: a bad setting.
    """
    from swift.trainers.trainer_factory import TrainerFactory

    global _settings
    _settings = Settings(**settings)
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.ACEGRPOTrainer"


def __getattr__(name: str) -> Any:
    """ACEGRPOTrainer, made when ms-swift asks for it."""
    if name != "ACEGRPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from swift.rlhf_trainers import GRPOTrainer

    return ace_trainer(GRPOTrainer, _settings)


def ace_trainer(trainer: Any, chosen: Settings) -> type:
    """A subclass of ms-swift's GRPOTrainer that weights advantages by ACE in every loss, from the log-probabilities computed there.

    The batch is copied, so several iterations over it do not compound. With a surrogate, ms-swift's loss runs on zero advantages,
    which leaves its KL term and metrics, and ours is added with the denominator of `--loss_type`.

    Raises:
        ValueError: at construction, for arguments that do not go together with ACE or the surrogate.
    """

    class ACEGRPOTrainer(trainer):
        _ace_batch: Any = None  # the copy whose loss is being computed

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            check(self, chosen)

        def _compute_loss_and_metrics(self, model: Any, model_inputs: Any, grpo_batch: Any) -> tuple[Tensor, Any]:
            batch = self._ace_batch = copy.copy(grpo_batch)
            loss, metrics = super()._compute_loss_and_metrics(model, model_inputs, batch)
            self._ace_batch = None
            if chosen.surrogate is None:
                return loss, metrics
            logps, weighted = batch.scored
            return loss + our_loss(
                self, chosen, batch, replace(rollouts_of(batch), advantages=weighted), logps
            ), metrics

        def _get_per_token_logps_and_entropies(
            self, model: Any, model_inputs: Any, grpo_batch: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            logps, entropies = super()._get_per_token_logps_and_entropies(model, model_inputs, grpo_batch, **kwargs)
            if grpo_batch is self._ace_batch:
                rollouts = rollouts_of(grpo_batch)
                chosen.check_reference("ref_per_token_logps", rollouts, logps, HOW)
                for name, value in chosen.metrics(logps, rollouts).items():
                    self._metrics["train" if self.model.training else "eval"][name].append(float(value))
                weighted = chosen.advantages(logps, rollouts)
                grpo_batch.scored = logps, weighted
                grpo_batch.advantages = weighted if chosen.surrogate is None else torch.zeros_like(weighted)
            return logps, entropies

    return ACEGRPOTrainer


def check(trainer: Any, chosen: Settings) -> None:
    """Refuse arguments that do not go with ACE or with a surrogate of ours."""
    if chosen.alpha > 0 and trainer.beta == 0:
        raise ValueError(f"--beta is 0, so no reference is scored: {HOW}, or alpha=0 to leave ACE out")
    if chosen.alpha > 0 and chosen.surrogate is None and trainer.loss_type == "real":
        raise ValueError(
            "--loss_type real reads the advantages' signs alone, which ACE leaves as they are: take another, or alpha=0"
        )
    if trainer.use_liger_loss:
        raise ValueError("--use_liger_kernel takes the loss out of ms-swift's hands, and ACE with it: drop it")
    if chosen.surrogate is None:
        return
    for name, neutral in OWN.items():
        if getattr(trainer, name) != neutral:
            raise ValueError(
                f"{name}={getattr(trainer, name)!r} changes ms-swift's own loss, which the surrogate replaces: leave it at "
                f"{neutral!r}"
            )
    if trainer.loss_type not in AGGREGATION:
        raise ValueError(
            f"--loss_type must be one of {', '.join(AGGREGATION)} for a surrogate, got {trainer.loss_type!r}"
        )


def our_loss(trainer: Any, chosen: Settings, batch: Any, rollouts: Rollouts, logps: Tensor) -> Tensor:
    """Our surrogate, averaged as ms-swift averages under its loss_type."""
    mask, aggregation = batch.completion_mask, AGGREGATION[trainer.loss_type]
    if trainer.overlong_filter:
        mask = mask & ~batch.truncated_mask[:, None]
    count = batch.num_items_in_batch / trainer.accelerator.num_processes if aggregation == "dapo" else None
    rollouts = replace(rollouts, completion_mask=mask, num_items_in_batch=count)
    length = trainer.max_completion_length if aggregation == "dr_grpo" else None
    return trainer._undo_gradient_accumulation_scaling(chosen.loss(logps, rollouts, aggregation, length).loss)


def rollouts_of(batch: Any) -> Rollouts:
    """ms-swift's GRPOBatch, (B, T), under our names."""
    return Rollouts(
        None, batch.advantages, batch.ref_per_token_logps, batch.old_per_token_logps, batch.rollout_per_token_logps,
        batch.completion_mask,
    )  # fmt: skip
