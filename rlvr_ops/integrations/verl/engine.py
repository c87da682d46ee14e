"""verl's FSDP engine with our head, chosen by the environment variable VERL_ENGINE_VENDOR=rlvr_ops.

verl asks a "fused" model for log-probabilities and an entropy, and this engine is one whatever the configuration says.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from verl.models.transformers.dense_common import CausalLMOutputForPPO
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from rlvr_ops.integrations.verl import head
from rlvr_ops.integrations.verl.reference import scored_by
from rlvr_ops.integrations.verl.settings import say_once

VENDOR = "rlvr_ops"


@EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device=["cuda", "cpu"], vendor=VENDOR)
class HeadEngine(FSDPEngineWithLMHead):
    """`FSDPEngineWithLMHead` whose log-probabilities and entropies are made without logits.

    The losses that it calls see the reference, so that `loss_mode=ace` needs no other trainer.

    Raises:
        ValueError: `use_fused_kernels`, verl's own heads.
        TypeError: a model whose log-probabilities the head does not reproduce, or an adapter on its lm_head.
    """

    def __init__(self, model_config: Any, engine_config: Any, *args: Any, **kwargs: Any) -> None:
        if model_config.use_fused_kernels:
            raise ValueError(
                f"VERL_ENGINE_VENDOR={VENDOR} brings a head of its own, got actor_rollout_ref.model.use_fused_kernels=True: set "
                "it to False"
            )
        super().__init__(model_config, engine_config, *args, **kwargs)
        engine_config.use_fused_kernels = True
        say_once("log-probabilities without logits, by our head")

    def _build_fsdp_module(self, module: Any) -> Any:
        head.install(module, CausalLMOutputForPPO)
        return super()._build_fsdp_module(module)

    def _build_model_optimizer(self) -> None:
        super()._build_model_optimizer()
        plain = self._autocast_dtype == torch.float32
        with nullcontext() if plain else torch.autocast(get_device_name(), self._autocast_dtype):
            head.check(self.module, get_device_id())

    def prepare_model_inputs(self, micro_batch: Any) -> Any:
        """As verl's, and whether anybody reads the entropies."""
        inputs, output_args = super().prepare_model_inputs(micro_batch)
        inputs["with_entropy"] = tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False)
        return inputs, output_args

    def forward_step(self, micro_batch: Any, loss_function: Callable[..., Any] | None, forward_only: bool) -> Any:
        """As verl's, with a loss that can read the micro-batch's reference."""

        def loss(**given: Any) -> Any:
            with scored_by(given["data"]):
                return loss_function(**given)  # type: ignore[misc]

        return super().forward_step(micro_batch, loss if loss_function else None, forward_only)
