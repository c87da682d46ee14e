"""TRL's GRPOTrainer with ACE."""

from typing import Any

from trl import GRPOTrainer
from trl.trainer.utils import get_config_model_id

from rlvr_ops.integrations.trl.config import ACEGRPOConfig
from rlvr_ops.integrations.trl.mixin import ACEMixin


class ACEGRPOTrainer(ACEMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` with ACE (arXiv 2602.21420). All arguments are TRL's.

    args: an `ACEGRPOConfig`. A plain `GRPOConfig` has ACE's defaults, so that changing the trainer's name is enough.

    >>> from trl import GRPOConfig
    >>> issubclass(ACEGRPOTrainer, GRPOTrainer), ACEGRPOConfig("out", use_cpu=True, bf16=False).ace_alpha
    (True, 1.0)
    """

    _tag_names = ["trl", "grpo", "ace"]  # noqa: RUF012
    _name = "ACE-GRPO"

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: Any = None, *arguments: Any, **keywords: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = ACEGRPOConfig(f"{name.split('/')[-1]}-ACE-GRPO")
        super().__init__(model, reward_funcs, args, *arguments, **keywords)
