"""What ACE does not go with, said when the trainer is made."""

import warnings
from typing import Any

from torch import nn
from trl import GRPOConfig, GRPOTrainer

LOSS = ("_compute_loss", "get_off_policy_mask", "get_gamma_weights", "get_high_entropy_mask")
"""The methods of GRPOTrainer that a fused loss replaces."""


def check_trainer(kind: type, mixin: type) -> None:
    """Raise unless the class is TRL's own `GRPOTrainer`, or made from it, with ACE before it."""
    name = kind.__name__
    rewritten = [base for base in kind.__mro__ if "unsloth" in f"{base.__module__}.{base.__name__}".lower()]
    if rewritten:
        raise TypeError(
            f"{name} is made from {rewritten[0].__name__}, and Unsloth's rewritten trainer computes a loss of its own: import "
            "rlvr_ops.integrations.trl and TRL without unsloth"
        )
    if not issubclass(kind, GRPOTrainer):
        bases = ", ".join(base.__name__ for base in kind.__bases__ if base is not mixin)
        reason = " AsyncGRPOTrainer has no reference model." if "Async" in bases else ""
        raise TypeError(f"ACEMixin wants a subclass of trl.GRPOTrainer, got {bases or 'nothing else'}.{reason}")
    if kind.__mro__.index(mixin) > kind.__mro__.index(GRPOTrainer):
        raise TypeError(f"{name} must name ACEMixin before the trainer: class {name}(ACEMixin, ...)")


def check_arguments(kind: type, args: Any) -> None:
    """Raise unless args is a configuration that goes with this trainer."""
    if not isinstance(args, GRPOConfig):
        given = "nothing" if args is None else type(args).__name__
        raise TypeError(f"args must be a GRPOConfig or made from one, such as ACEGRPOConfig(output_dir), got {given}")
    owner = _owner_of_the_loss(kind)
    if vars(args).get("fused_loss", False) and owner is not GRPOTrainer:
        raise TypeError(
            f"fused_loss=True replaces the loss, and {owner.__name__} has one of its own: leave fused_loss=False"
        )


def check_reference(model: Any, *, needed: bool) -> None:
    """Raise if TRL would have to load a reference by name, and the model has none."""
    name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
    if needed and not name:
        raise ValueError(
            "model has no name, and TRL loads the reference that ACE needs by name: pass a folder or a hub name, or set "
            "model.config._name_or_path to the folder that holds the initial weights"
        )


def warn_of_dropout(model: nn.Module) -> None:
    """Warn of a policy whose log-probabilities are noise while it trains."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        warnings.warn(
            "model has dropout, so ACE would compare a noisy policy with its reference: set disable_dropout=True",
            stacklevel=4,
        )


def _owner_of_the_loss(kind: type) -> type:
    """The class whose loss would run, ACE left out."""
    bases = [base for base in kind.__mro__ if base.__name__ != "ACEMixin"]
    return next(base for base in bases if any(name in vars(base) for name in LOSS))
