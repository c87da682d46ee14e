"""ACELoss: `ace_loss` as an nn.Module that holds its hyper-parameters."""

from typing import Any

from rlvr_kernels.backend import BACKENDS
from rlvr_kernels.logits import Head
from rlvr_kernels.spec import choose
from torch import Tensor, nn

from rlvr_ops.aggregation import canonical
from rlvr_ops.hyperparameters import SurrogateLike, make_hyperparameters
from rlvr_ops.presets import ace_loss
from rlvr_ops.schedules import SCHEDULES, LossOutput


class ACELoss(nn.Module):
    """ACE from hidden states and the lm_head's weight, with hyper-parameters fixed once; see `ace_loss`.

    Shapes: hidden states (B, T, H), weight (V, H), ids (B, T), advantages (B,) or (B, T).

    Raises:
        TypeError, ValueError: at construction for a bad hyper-parameter, in forward for a bad tensor.

    >>> import torch
    >>> loss = ACELoss(alpha=1.0, loss_type="dapo", epsilon_high=0.28)
    >>> hidden, weight, ids = torch.randn(2, 3, 8), torch.randn(16, 8), torch.zeros(2, 3, dtype=torch.long)
    >>> loss(hidden, weight, ids, torch.tensor([1.0, -1.0]), ref_per_token_logps=torch.zeros(2, 3)).loss.shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        confidence: str = "current",
        confidence_reduction: str = "mean",
        shape: str = "softplus",
        surrogate: SurrogateLike = "ppo_clip",
        importance_sampling_level: str = "token",
        epsilon_low: float = 0.2,
        epsilon_high: float | None = None,
        delta: float | None = None,
        loss_type: str = "grpo",
        beta: float = 0.0,
        kl_estimator: str = "k3",
        use_bias_correction_kl: bool = False,
        entropy_coef: float = 0.0,
        top_entropy_quantile: float = 1.0,
        off_policy_mask_threshold: float | None = None,
        sampling_correction: str | None = None,
        sampling_clip_max: float | None = 3.0,
        sampling_clip_min: float | None = None,
        temperature: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        max_completion_length: int | None = None,
        schedule: str = "auto",
        workspace_bytes: int | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        policy: dict[str, Any] = {
            "alpha": alpha, "confidence": confidence, "confidence_reduction": confidence_reduction, "shape": shape,
            "surrogate": surrogate, "importance_sampling_level": importance_sampling_level, "epsilon_low": epsilon_low,
            "epsilon_high": epsilon_high, "delta": delta, "beta": beta, "kl_estimator": kl_estimator,
            "use_bias_correction_kl": use_bias_correction_kl, "entropy_coef": entropy_coef,
            "top_entropy_quantile": top_entropy_quantile, "off_policy_mask_threshold": off_policy_mask_threshold,
            "sampling_correction": sampling_correction, "sampling_clip_max": sampling_clip_max,
            "sampling_clip_min": sampling_clip_min,
        }  # fmt: skip
        make_hyperparameters(**policy)
        canonical(loss_type)
        Head(logit_scale, softcap)
        choose("schedule", schedule, SCHEDULES)
        choose("backend", backend, BACKENDS)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
        self.hyperparameters: dict[str, Any] = policy | {
            "loss_type": loss_type, "temperature": temperature, "softcap": softcap, "logit_scale": logit_scale,
            "max_completion_length": max_completion_length, "schedule": schedule, "workspace_bytes": workspace_bytes,
            "backend": backend,
        }  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        completion_ids: Tensor,
        advantages: Tensor,
        *,
        ref_per_token_logps: Tensor,
        old_per_token_logps: Tensor | None = None,
        sampling_per_token_logps: Tensor | None = None,
        completion_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        lm_head_bias: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> LossOutput:
        """The loss of one batch."""
        return ace_loss(
            hidden_states, lm_head_weight, completion_ids, advantages, ref_per_token_logps=ref_per_token_logps,
            old_per_token_logps=old_per_token_logps, sampling_per_token_logps=sampling_per_token_logps,
            completion_mask=completion_mask, cu_seqlens=cu_seqlens, lm_head_bias=lm_head_bias,
            num_items_in_batch=num_items_in_batch, **self.hyperparameters,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The hyper-parameters, as torch prints them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.hyperparameters.items())
