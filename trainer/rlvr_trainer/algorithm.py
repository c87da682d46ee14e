"""The `algorithm` section of the settings: from rewards to advantages to a loss, and the presets that fill it in.

The keys that say which loss it is are read off the signature of `rlvr_ops.ace_loss`, and a preset's numbers off that of the loss
it is named after: a new hyper-parameter of the library is a new key.
"""

import inspect
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal

import torch
from rlvr_kernels.objective import AGAINST, CONFIDENCES, ESTIMATORS, IMPORTANCE_SAMPLING_LEVELS, REDUCTIONS, SHAPES

import rlvr_ops
from rlvr_ops import Head, Objective, Plan, Rollouts
from rlvr_ops.objectives.objective import AGGREGATIONS, VERL_NAMES
from rlvr_ops.objectives.sampling import CORRECTIONS
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.surrogate import load_surrogate

CHOICES = {
    "loss_type": tuple(name for name in (*AGGREGATIONS, *VERL_NAMES) if name != "bnpo"),
    "importance_sampling_level": IMPORTANCE_SAMPLING_LEVELS,
    "confidence": CONFIDENCES,
    "confidence_reduction": REDUCTIONS,
    "shape": SHAPES,
    "kl_estimator": ESTIMATORS,
    "kl_against": AGAINST,
    "sampling_correction": ("auto", "none", *CORRECTIONS),
}
"""The names that a key takes, for messages that say which was meant. `bnpo` is none: a batch is one update here, and its tokens
are what dapo divides by."""
TYPES = {"surrogate": str, **{key: Literal[names] for key, names in CHOICES.items()}}
DEFAULTS = {"alpha": 0.0, "sampling_correction": "auto"}  # ACE is in the presets that begin with ace-
DEFAULT_NAME = "ace-grpo"


def _loss_keys() -> dict[str, tuple[Any, Any]]:
    """Type and default of the keywords of `ace_loss` that say which loss it is.

    The others are about data, head and plan, or come from `rollout.max_new_tokens`.
    """
    elsewhere = {item.name for record in (Rollouts, Head, Plan) for item in fields(record)} | {
        "lm_head_bias", "max_completion_length",
    }  # fmt: skip
    keywords = (p for p in inspect.signature(rlvr_ops.ace_loss).parameters.values() if p.kind == p.KEYWORD_ONLY)
    return {
        p.name: (TYPES.get(p.name, p.annotation), DEFAULTS.get(p.name, p.default))
        for p in keywords
        if p.name not in elsewhere
    }


LOSS_KEYS = _loss_keys()
LossSettings: Any = make_dataclass(
    "LossSettings", [("name", str, DEFAULT_NAME), *((key, *typed) for key, typed in LOSS_KEYS.items())]
)


@dataclass
class AlgorithmConfig(LossSettings):
    """From rewards to a loss. The inherited keys are explained in `rlvr_ops.ace_loss`.

    surrogate is a name, or a function of the user's: package.module:function, or path/to/file.py:function. Its numbers are
    surrogate_parameters. The quantile of top_entropy_quantile is taken in every micro-batch. sampling_correction is auto
    (token_truncate where the sampler's log-probabilities are not the trainer's), none, or a correction by name.
    """

    surrogate_parameters: dict[str, Any] = field(default_factory=dict)
    advantages: Literal[
        "grpo", "dr_grpo", "rloo", "lite_ppo", "gpg", "grpo_passk", "maxrl", "opo", "bnpo", "psr", "nsr", "w_reinforce",
        "reinforce_plus_plus", "reinforce_plus_plus_baseline",
    ] = "grpo"  # fmt: skip
    dynamic_sampling: bool = False  # drop groups of accuracy 0 or 1 and sample others in their place
    max_resamples: int = 3  # how many further rounds of prompts that may cost
    overlong_fraction: float = 0.0  # the last share of max_new_tokens in which length is punished; 0 = never

    def __post_init__(self) -> None:
        """Refuse what the loss would refuse, before anything is loaded."""
        self.objective(max_completion_length=1, off_policy_sampler=True)

    def title(self) -> str:
        """The name, and the surrogate if it is not the one that the name stands for."""
        own = self.surrogate if self.surrogate != PRESETS[self.name].get("surrogate", "ppo_clip") else ""
        return f"{self.name} with surrogate {own}" if own else self.name

    def objective(self, max_completion_length: int, off_policy_sampler: bool) -> Objective:
        """The loss that these settings mean, for a sampler that rounds as the trainer does or not.

        Raises:
            ConfigError: the library refuses it.
        """
        try:
            keywords = {**self.policy(), "sampling_correction": self.correction(off_policy_sampler)}
            return rlvr_ops.ACELoss(**keywords, max_completion_length=max_completion_length).objective
        except (TypeError, ValueError) as error:
            raise ConfigError(f"algorithm.{error}") from error

    def correction(self, off_policy_sampler: bool) -> str | None:
        """The library's name for what `sampling_correction` means with such a sampler."""
        if self.sampling_correction == "auto":
            return "token_truncate" if off_policy_sampler else None
        return None if self.sampling_correction == "none" else self.sampling_correction

    def policy(self) -> dict[str, Any]:
        """The keywords of `rlvr_ops.ace_loss` that say which loss it is."""
        surrogate = load_surrogate(self.surrogate, self.surrogate_parameters)
        return {**{key: getattr(self, key) for key in LOSS_KEYS}, "surrogate": surrogate}

    def probe(self) -> None:
        """Call the loss once on two made-up rollouts, so that a function of the user's own fails before a model is loaded.

        Raises:
            ConfigError: it failed; what it raised is the cause.
        """
        logps = torch.tensor([[-0.5, -1.0], [-1.5, -2.0]], requires_grad=True)
        constant = logps.detach() - 0.1
        objective, entropies = self.objective(max_completion_length=2, off_policy_sampler=True), torch.ones(2, 2)
        sampling = constant if objective.sampling else None
        rollouts = Rollouts(None, torch.tensor([1.0, -1.0]), constant, constant, sampling)
        try:
            out = rlvr_ops.policy_loss_from_logps(logps, rollouts, objective, per_token_entropies=entropies)
            out.loss.backward()
        except Exception as error:
            raise ConfigError(f"algorithm.surrogate={self.surrogate} failed on four tokens: {error!r}") from error


def _own_defaults(loss: str) -> dict[str, Any]:
    """The keywords in which a named loss's signature differs from the defaults here."""
    parameters = inspect.signature(getattr(rlvr_ops, f"{loss}_loss")).parameters
    own = {key: p.default for key, p in parameters.items() if key in LOSS_KEYS and key not in DEFAULTS}
    return {key: default for key, default in own.items() if default != LOSS_KEYS[key][1]}


FIXED: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.001},
    "dapo": {"loss_type": "dapo", "dynamic_sampling": True, "overlong_fraction": 0.2},
    "dr_grpo": {"loss_type": "dr_grpo", "advantages": "dr_grpo"},
    "gspo": {},
    "luspo": {"loss_type": "luspo"},
    "cispo": {"surrogate": "cispo"},
    "dispo": {"surrogate": "dispo"},
    "sapo": {"surrogate": "sapo"},
    "gmpo": {"surrogate": "gmpo"},
    "vespo": {"surrogate": "vespo"},
    "reinforce": {"surrogate": "reinforce", "advantages": "rloo"},
}
"""What a loss of that name is without a keyword for it, and what its paper does outside of the loss."""
PRESETS: dict[str, dict[str, Any]] = {name: {**_own_defaults(name), **fixed} for name, fixed in FIXED.items()}
PRESETS |= {f"ace-{name}": {**preset, "alpha": 1.0} for name, preset in PRESETS.items()}
_CLIP = ("epsilon_low", "epsilon_high", "delta")
BINARY = ("maxrl", "bnpo", "psr", "nsr", "w_reinforce")
"""The estimators of advantages that need rewards of 0 and 1."""
BY_LENGTH = ("opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
"""Those that are given the lengths in tokens."""


def preset_under(algorithm: dict[str, Any]) -> dict[str, Any]:
    """The preset that `algorithm.name` stands for, without PPO's numbers if what was written names others or another surrogate."""
    gives_way: tuple[str, ...] = ()
    if algorithm.get("surrogate", "ppo_clip") != "ppo_clip":
        gives_way = (*_CLIP, "importance_sampling_level")
    elif algorithm.get("surrogate_parameters"):
        gives_way = _CLIP
    return {key: value for key, value in PRESETS[algorithm["name"]].items() if key not in gives_way}
