"""verl's `ppo_loss` with its own ActorConfig: registered policy loss, aggregation, entropy bonus and KL term in one call."""

import os
from dataclasses import fields
from functools import cache
from types import ModuleType

import pytest
import torch
from parity_cases import Batch, Outcome, differentiate

os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # the peer is verl alone, without the losses that we register in it


@cache
def losses() -> ModuleType:
    """verl's module of worker losses; imported once."""
    pytest.importorskip("verl")
    from verl.workers.utils import losses

    return losses


def ppo_loss(batch: Batch, loss_mode: str = "vanilla", *, weights=None, counts=None, **config) -> Outcome:
    """`verl.workers.utils.losses.ppo_loss` of the batch, and its gradients.

    `weights` are the rollout correction's; `counts` is verl's global batch info (dp_size, batch_num_tokens,
    global_batch_size); the rest are fields of ActorConfig or of its PolicyLossConfig.
    """
    module = losses()
    from tensordict import TensorDict
    from verl.workers.config import ActorConfig, PolicyLossConfig

    policy = {field.name: config.pop(field.name) for field in fields(PolicyLossConfig) if field.name in config}
    actor = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, **policy),
        **config,
    )
    counts = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None} | (counts or {})
    b, t = batch.mask.shape
    lengths = torch.where(batch.mask, torch.arange(1, t + 1), 0).amax(dim=1)
    data = TensorDict(
        {
            "prompts": torch.ones(b, 1, dtype=torch.long),
            "responses": torch.ones(b, t, dtype=torch.long),
            "attention_mask": (torch.arange(t + 1) <= lengths[:, None]).long(),
            "response_mask": batch.mask,
            "old_log_probs": batch.old,
            "ref_log_prob": batch.ref,
            "advantages": (
                batch.advantages if batch.advantages.ndim == 2 else batch.advantages[:, None].expand(b, t)
            ).clone(),
            **({} if weights is None else {"rollout_is_weights": weights}),
        },
        batch_size=[b],
    )
    for name, value in counts.items():
        data.set_non_tensor(name, value)

    def unpadded(values):
        """Prompt and response in one row without padding, each value one place before the token it belongs to."""
        return torch.cat(
            [torch.cat([row[:n], row.new_zeros(1)]) for row, n in zip(values, lengths.tolist(), strict=True)]
        )

    def loss(logps, entropies):
        output = {"log_probs": unpadded(logps)} | ({"entropy": unpadded(entropies)} if actor.entropy_coeff else {})
        return module.ppo_loss(actor, output, data)[0]

    return differentiate(loss, batch)


def correction_weights(batch: Batch, level: str, threshold: float | str) -> torch.Tensor:
    """`compute_rollout_correction_weights`: truncated for a number, masked for a "lower_upper" string."""
    losses()
    from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights

    return compute_rollout_correction_weights(
        batch.old - batch.sampling, batch.mask, rollout_is=level, rollout_is_threshold=threshold
    )[0]
