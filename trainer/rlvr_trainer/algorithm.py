"""The `algorithm` section of the settings: from rewards to advantages to a loss, and the presets that fill it in."""

import importlib
import importlib.util
import inspect
import os
import sys
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

import rlvr_ops
from rlvr_ops import surrogates
from rlvr_ops.hyperparameters import SurrogateLike, make_hyperparameters
from rlvr_trainer.parsing import ConfigError

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "beta": 0.001},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "dynamic_sampling": True, "overlong_fraction": 0.2},
    "dr_grpo": {"loss_type": "dr_grpo", "advantages": "dr_grpo"},
    "gspo": {"importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "luspo": {
        "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4, "loss_type": "luspo",
    },
    "cispo": {"surrogate": "cispo", "loss_type": "dapo"},
    "dispo": {"surrogate": "dispo", "loss_type": "dapo"},
    "sapo": {"surrogate": "sapo"},
    "gmpo": {"surrogate": "gmpo"},
    "vespo": {"surrogate": "vespo", "loss_type": "dapo"},
    "reinforce": {"surrogate": "reinforce", "advantages": "rloo"},
}  # fmt: skip
PRESETS |= {f"ace-{name}": {**preset, "alpha": 1.0} for name, preset in PRESETS.items()}
_CLIP = ("epsilon_low", "epsilon_high", "delta")


def preset_under(algorithm: dict[str, Any]) -> dict[str, Any]:
    """The preset that `algorithm.name` stands for, without PPO's numbers if what was written names others or another surrogate."""
    gives_way: tuple[str, ...] = ()
    if algorithm.get("surrogate", "ppo_clip") != "ppo_clip":
        gives_way = (*_CLIP, "importance_sampling_level")
    elif algorithm.get("surrogate_parameters"):
        gives_way = _CLIP
    return {key: value for key, value in PRESETS[algorithm["name"]].items() if key not in gives_way}


BINARY = ("bnpo", "psr", "nsr", "w_reinforce")
"""The estimators of advantages that need rewards of 0 and 1."""


@dataclass
class AlgorithmConfig:
    """From rewards to a loss. The keywords are those of `rlvr_ops.policy_loss`.

    `bnpo` is no loss_type here: a batch is one update, and the tokens of that are what dapo divides by.
    """

    name: str = "ace-grpo"
    loss_type: Literal[
        "grpo", "dapo", "dr_grpo", "luspo", "seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm",
        "seq-mean-token-sum",
    ] = "grpo"  # fmt: skip
    advantages: Literal[
        "grpo", "dr_grpo", "rloo", "opo", "bnpo", "psr", "nsr", "w_reinforce", "reinforce_plus_plus"
    ] = "grpo"
    surrogate: str = "ppo_clip"  # or a function of yours: package.module:function, or path/to/file.py:function
    surrogate_parameters: dict[str, Any] = field(default_factory=dict)  # of rlvr_ops.surrogates, or of your function
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = "token"
    alpha: float = 0.0
    confidence: Literal["current", "old"] = "current"
    confidence_reduction: Literal["mean", "sum"] = "mean"
    shape: Literal["softplus", "relu"] = "softplus"
    epsilon_low: float = 0.2
    epsilon_high: float | None = None  # None: epsilon_low
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    use_bias_correction_kl: bool = False
    entropy_coef: float = 0.0
    top_entropy_quantile: float = 1.0  # the quantile is taken in every micro-batch
    off_policy_mask_threshold: float | None = None
    dynamic_sampling: bool = False  # drop groups of accuracy 0 or 1 and sample others in their place
    max_resamples: int = 3  # how many further rounds of prompts that may cost
    overlong_fraction: float = 0.0  # the last share of max_new_tokens in which length is punished; 0 = never

    def __post_init__(self) -> None:
        """Refuse what the loss would refuse, before anything is loaded."""
        try:
            make_hyperparameters(
                **self.policy(), sampling_correction=None, sampling_clip_max=3.0, sampling_clip_min=None
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"algorithm.{error}") from error

    def title(self) -> str:
        """The name, and the surrogate if it is not the one that the name stands for."""
        own = self.surrogate if self.surrogate != PRESETS[self.name].get("surrogate", "ppo_clip") else ""
        return f"{self.name} with surrogate {own}" if own else self.name

    def probe(self) -> None:
        """Call the loss once on two made-up rollouts, so that a function of the user's own fails before a model is loaded.

        Raises:
            ConfigError: it failed; what it raised is the cause.
        """
        logps = torch.tensor([[-0.5, -1.0], [-1.5, -2.0]], requires_grad=True)
        constant = logps.detach() - 0.1
        try:
            rlvr_ops.policy_loss_from_logps(
                logps, torch.tensor([1.0, -1.0]), ref_per_token_logps=constant, old_per_token_logps=constant,
                per_token_entropies=torch.ones(2, 2), max_completion_length=2, loss_type=self.loss_type, **self.policy(),
            ).loss.backward()  # fmt: skip
        except Exception as error:
            raise ConfigError(f"algorithm.surrogate={self.surrogate} failed on four tokens: {error!r}") from error

    def policy(self) -> dict[str, Any]:
        """The keywords of `rlvr_ops.policy_loss` that say which loss it is, but for the aggregation."""
        names = (
            "importance_sampling_level", "alpha", "confidence", "confidence_reduction", "shape", "epsilon_low",
            "epsilon_high", "delta", "beta", "kl_estimator", "use_bias_correction_kl", "entropy_coef",
            "top_entropy_quantile", "off_policy_mask_threshold",
        )  # fmt: skip
        surrogate = load_surrogate(self.surrogate, self.surrogate_parameters)
        return {"surrogate": surrogate, **{name: getattr(self, name) for name in names}}


def load_surrogate(name: str, parameters: dict[str, Any]) -> SurrogateLike:
    """A published surrogate by name, or a function by import path, with its parameters.

    Raises:
        ValueError: no such module, file or function, or parameters that it does not take.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon:
        known = surrogates.SURROGATES.get(name)
        try:
            return known(**parameters) if known and parameters else name
        except TypeError as error:
            raise ValueError(f"surrogate_parameters do not fit: {error}") from error
    try:
        function = getattr(_import(where), attribute)
    except (ImportError, OSError, AttributeError, SyntaxError) as error:
        raise ValueError(f"surrogate={name} cannot be loaded: {error}") from error
    if not callable(function):
        raise ValueError(f"surrogate={name} must be a function, got {function!r}")
    try:
        inspect.signature(function).bind(None, None, **parameters)
    except TypeError as error:
        raise ValueError(
            f"surrogate={name} must take (per_token_logps, rows, **surrogate_parameters): {error}"
        ) from error
    return partial(function, **parameters) if parameters else function


@cache
def _import(where: str) -> ModuleType:
    """A module by its dotted name, the working directory included, or by the path of its file; loaded once."""
    if not where.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        return importlib.import_module(where)
    spec = importlib.util.spec_from_file_location(f"surrogate_of_{Path(where).stem}", where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
