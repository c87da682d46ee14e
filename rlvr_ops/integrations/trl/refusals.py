"""What ACE does not go with, said when the trainer is made."""

from typing import Any

from trl import GRPOTrainer

from rlvr_ops import Ace


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


def check_arguments(kind: type, model: Any, args: Any, ace: Ace, fused: bool) -> None:
    """Raise if the settings cannot go together with this trainer or model."""
    name = kind.__name__
    if args is None:
        raise TypeError(f"args is missing: {name} needs its config, for example ACEGRPOConfig(output_dir)")
    if fused and _own_loss(kind) is not GRPOTrainer:
        raise TypeError(
            f"fused_loss=True replaces the loss, and {_own_loss(kind).__name__} has one of its own: leave fused_loss=False"
        )
    if ace.alpha > 0 and not (isinstance(model, str) or hasattr(model, "peft_config") or model.config._name_or_path):
        raise ValueError(
            "model has no name, and TRL loads the reference that ACE needs by name: pass a folder or a hub name, or set "
            "model.config._name_or_path to the folder that holds the initial weights"
        )


def _own_loss(kind: type) -> type:
    """The class that computes the loss, ACE left out."""
    owners = [base for base in kind.__mro__ if "_compute_loss" in vars(base)]
    return next(base for base in owners if base.__name__ != "ACEMixin")
