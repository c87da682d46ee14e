"""The settings of a run: one tree of plain dataclasses, read from YAML and `section.key=value` overrides.

A preset (`algorithm.name`) fills in the keys of the `algorithm` section that nobody set; whatever is written wins.
"""

import re
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_origin
from urllib.parse import urlsplit

from rlvr_ops import Objective
from rlvr_trainer.algorithm import BINARY, DEFAULT_NAME, PRESETS, AlgorithmConfig, preset_under
from rlvr_trainer.names import refuse_unknown, settings_of, unknown
from rlvr_trainer.parsing import ConfigError, build, check_number, nearest
from rlvr_trainer.task_parts import parts_of
from rlvr_trainer.yaml_reader import read_file, read_value, to_text

LEAST_TEMPERATURE = 0.01  # vLLM samples at this where it is asked for less


@dataclass
class TaskConfig:
    """Where problems come from and how an answer is judged."""

    name: str = (
        "chain_sum"  # a reasoning-gym generator, a file of rows, or a folder or name (with a slash) for `datasets`
    )
    parameters: dict[str, Any] = field(default_factory=dict)  # of the generator
    format: Literal["auto", "prompt_answer", "gsm8k", "math", "open_r1", "dapo", "messages"] = "auto"  # of the rows
    columns: dict[str, Any] = field(default_factory=dict)  # {prompt: ..., answer: ...} where the format's names differ
    split: str = "train"  # `datasets` only
    subset: str = ""  # `datasets` only: what its page calls subset or configuration
    evaluation: str = ""  # rows to evaluate on, in place of the last ones of `name`
    evaluation_split: str = "test"  # `datasets` only
    mixture: list[dict[str, Any]] = field(
        default_factory=list
    )  # several tasks at once: sections like this one + `weight`
    instruction: str = ""  # appended to every prompt, to its last user message
    extract: Literal["whole", "last_number"] = "whole"  # what of a completion is judged, after <answer> tags
    reward: Literal["correct", "score"] = "correct"  # 1 if the score is 1, else 0; or the score in [0, 1] itself
    held_out: int = 64  # problems kept for evaluation: the last rows of `name`, or the first of `evaluation`
    on_overlong: Literal["refuse", "drop"] = "refuse"  # prompts that leave no room for rollout.max_new_tokens
    on_bad_reference: Literal["refuse", "drop"] = "refuse"  # answers of rows that no judge can read
    accept_unevaluated: bool = False  # whether 3+4 is right where the answer is 7; rows only
    verifier_timeout: float = 10.0  # seconds per answer
    verifier_processes: int = 2

    @property
    def title(self) -> str:
        """What a run says it learns."""
        return " + ".join(part.name for _, part in parts_of(self)) or self.name


@dataclass
class PolicyConfig:
    """The model that learns."""

    name: str = "tiny"  # `tiny`, `smollm2-135m`, or anything `AutoModelForCausalLM.from_pretrained` takes
    precision: Literal["mixed", "full"] = "mixed"  # mixed: fp32 weights, bf16 autocast, bf16 copy for sampling
    device: str = "auto"
    system_prompt: str | None = (
        None  # in place of a prompt's own; None: that one, or what the chat template does by itself
    )
    assistant_prefix: str = ""  # the assistant's first words, given and not sampled; the verifier reads them too
    chat_template_arguments: dict[str, Any] = field(default_factory=dict)  # e.g. {enable_thinking: false}
    warm_start_steps: int = 400  # supervised updates that make `tiny`
    warm_start_noise: float = 0.5  # the share of wrong answers it is taught, so that something is left to learn


@dataclass
class RolloutConfig:
    """How completions are sampled."""

    backend: Literal["transformers", "vllm", "vllm-server"] = "transformers"
    servers: list[str] = field(default_factory=list)  # of vllm-server: http://host:port, one or several
    server_timeout: float = 300.0  # of vllm-server: seconds to wait for one that starts, or shows no sign of life
    memory_share: float = 0.3  # of vllm: the share of the device's memory for its weights and cache
    asynchronous: bool = False  # sample the next batch while this one trains: one step off policy
    prompts: int = 8
    group_size: int = 8  # completions per prompt
    max_new_tokens: int = 20
    max_prompt_tokens: int = 0  # longer prompts are `task.on_overlong`'s; 0 = what the model's positions leave room for
    temperature: float = 1.0
    stop: list[str] = field(default_factory=list)  # texts that end a completion, which includes them
    mask_truncated: bool = False  # no gradient from completions that did not end; they count in their group's mean
    batch_size: int = 128  # of transformers: completions generated at once; with all backends: scored at once
    threads: int = 0  # of transformers: CPU threads, of which its small operations gain little; 0 = as run.threads


@dataclass
class OptimConfig:
    """AdamW. Weight decay is zero by default."""

    learning_rate: float = 1e-5
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    max_grad_norm: float = 1.0
    micro_batch: int = 16  # rollouts per forward pass; changes memory and speed, not the gradient
    updates_per_batch: int = 1  # optimiser steps on the same rollouts; above 1 the loss is off policy


@dataclass
class EvalConfig:
    """Held-out Pass@k before, during and after training."""

    samples: int = 8  # completions per held-out problem
    every: int = 0  # steps between evaluations; 0 = only before and after
    temperature: float = 1.0
    seed: int = 1234


@dataclass
class RunConfig:
    """Length, folder, logging."""

    steps: int = 100
    seed: int = 0
    out: str = "runs/latest"
    checkpoint_every: int = 0  # steps between checkpoints; 0 = only when interrupted
    keep_checkpoints: int = 2  # the last ones: should one be damaged, there is the one before it
    keep_best: bool = False  # keep the checkpoint with the best held-out Pass@1 too, the first of equals
    table_every: int = 10  # steps between printed completions; 0 = never
    log_completions: bool = True
    threads: int = 0  # CPU threads; 0 = torch's choice


@dataclass
class Config:
    """Everything about a run. Written to the run folder as `config.yaml`."""

    task: TaskConfig = field(default_factory=TaskConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        """Refuse what no run can use, by name."""
        self._check_every_number()
        for key, text in {
            "task.name": self.task.name,
            "policy.name": self.policy.name,
            "policy.device": self.policy.device,
            "task.split": self.task.split,
            "run.out": self.run.out,
        }.items():
            if not text.strip():
                raise ConfigError(f"{key} must not be empty")
            if text != text.strip():
                raise ConfigError(f"{key} begins or ends with a space: {text!r}")
        positive = {
            "rollout.prompts": self.rollout.prompts,
            "rollout.max_new_tokens": self.rollout.max_new_tokens,
            "rollout.temperature": self.rollout.temperature,
            "rollout.batch_size": self.rollout.batch_size,
            "rollout.server_timeout": self.rollout.server_timeout,
            "optim.learning_rate": self.optim.learning_rate,
            "optim.max_grad_norm": self.optim.max_grad_norm,
            "optim.micro_batch": self.optim.micro_batch,
            "optim.updates_per_batch": self.optim.updates_per_batch,
            "evaluation.samples": self.evaluation.samples,
            "evaluation.temperature": self.evaluation.temperature,
            "task.held_out": self.task.held_out,
            "task.verifier_timeout": self.task.verifier_timeout,
            "task.verifier_processes": self.task.verifier_processes,
            "run.keep_checkpoints": self.run.keep_checkpoints,
        }
        for key, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{key} must be greater than 0, got {value}")
        not_negative = {
            "algorithm.max_resamples": self.algorithm.max_resamples,
            "policy.warm_start_steps": self.policy.warm_start_steps,
            "optim.warmup_steps": self.optim.warmup_steps,
            "optim.weight_decay": self.optim.weight_decay,
            "evaluation.every": self.evaluation.every,
            "run.steps": self.run.steps,
            "run.seed": self.run.seed,
            "run.checkpoint_every": self.run.checkpoint_every,
            "run.table_every": self.run.table_every,
            "run.threads": self.run.threads,
            "rollout.threads": self.rollout.threads,
            "rollout.max_prompt_tokens": self.rollout.max_prompt_tokens,
            "evaluation.seed": self.evaluation.seed,
        }
        for key, value in not_negative.items():
            if not value >= 0:
                raise ConfigError(f"{key} must not be negative, got {value}")
        if self.rollout.group_size < 2:
            raise ConfigError(f"rollout.group_size must be at least 2, got {self.rollout.group_size}: one has no peers")
        if not 0 <= self.algorithm.overlong_fraction < 1:
            raise ConfigError(f"algorithm.overlong_fraction must be in [0, 1), got {self.algorithm.overlong_fraction}")
        self._check_advantages()
        self._check_backend()
        parts = parts_of(self.task)
        if parts and not any(part.held_out for _, part in parts):
            raise ConfigError("task.mixture: no part has held_out > 0, so nothing could be evaluated")
        if "" in self.rollout.stop:
            raise ConfigError("rollout.stop holds an empty text, which would end every completion at once")
        if any("\\n" in text for text in self.rollout.stop):
            raise ConfigError(
                r"rollout.stop: \n is two characters here; a new line is in double quotes: rollout.stop=[\"\n\"]"
            )
        if self.run.keep_best and not self.evaluation.every:
            raise ConfigError("run.keep_best needs evaluation.every: only what was evaluated can be the best")
        if len(self.optim.betas) != 2 or not all(0 <= beta < 1 for beta in self.optim.betas):
            raise ConfigError(f"optim.betas must hold two numbers in [0, 1), got {self.optim.betas}")
        if not 0 <= self.policy.warm_start_noise <= 1:
            raise ConfigError(f"policy.warm_start_noise must be in [0, 1], got {self.policy.warm_start_noise}")
        self.algorithm.objective(self.rollout.max_new_tokens, self.off_policy_sampler)

    def _check_every_number(self) -> None:
        """Refuse what is not finite, and counts of thousands of millions: whatever they are, they are a slip."""
        for key in settings_of(Config):
            section, name = key.split(".")
            value = getattr(getattr(self, section), name)
            if isinstance(value, int | float):
                check_number(value, key)
            if isinstance(value, int) and name != "seed" and value >= 2**31:
                raise ConfigError(f"{key} must be below 2**31, got {value}")

    def _check_backend(self) -> None:
        """Refuse servers that nobody asks, and a share that is none."""
        rollout = self.rollout
        if (rollout.backend == "vllm-server") != bool(rollout.servers):
            wanted = "needs rollout.servers=[http://host:port]" if not rollout.servers else "asks no rollout.servers"
            raise ConfigError(f"rollout.backend={rollout.backend} {wanted}")
        for url in rollout.servers:
            if not _is_server(str(url)):
                raise ConfigError(f"rollout.servers must hold addresses like http://host:8000, got {url!r}")
        if len({url.rstrip("/") for url in rollout.servers}) < len(rollout.servers):
            raise ConfigError(f"rollout.servers holds one server twice: {rollout.servers}")
        for key, value in {"rollout": rollout.temperature, "evaluation": self.evaluation.temperature}.items():
            if rollout.backend != "transformers" and value < LEAST_TEMPERATURE:
                raise ConfigError(f"{key}.temperature must be at least {LEAST_TEMPERATURE} with vLLM, got {value}")
        if not 0 < rollout.memory_share <= 1:
            raise ConfigError(f"rollout.memory_share must be in (0, 1], got {rollout.memory_share}")

    def _check_advantages(self) -> None:
        """Refuse an estimator that counts right answers where rewards are something else."""
        shaped = "task.reward=score" if self.task.reward == "score" else "algorithm.overlong_fraction > 0"
        if self.algorithm.advantages in BINARY and (
            self.task.reward == "score" or self.algorithm.overlong_fraction > 0
        ):
            raise ConfigError(
                f"algorithm.advantages={self.algorithm.advantages} needs rewards of 0 and 1, and {shaped} gives others"
            )

    @property
    def off_policy_sampler(self) -> bool:
        """Whether completions come from other log-probabilities than the trainer's: another engine, precision or step."""
        return self.rollout.backend != "transformers" or self.policy.precision == "mixed" or self.rollout.asynchronous

    @cached_property
    def objective(self) -> Objective:
        """The loss, built once."""
        return self.algorithm.objective(self.rollout.max_new_tokens, self.off_policy_sampler)

    def to_yaml(self) -> str:
        """Every key with its value, presets resolved: reading it back gives an equal `Config`."""
        return to_text(asdict(self))


def _is_server(url: str) -> bool:
    try:
        urlsplit(url).port  # noqa: B018  reading it checks it
    except ValueError:
        return False
    return re.fullmatch(r"https?://[^/\s?#]+/?", url) is not None


def from_tree(tree: dict[str, Any]) -> Config:
    """A `Config` from nested dicts, the preset named by `algorithm.name` under what the tree says.

    Raises:
        ConfigError: an unknown key or preset (with the nearest known name), or a value of the wrong type.
    """
    refuse_unknown(tree, settings_of(Config))
    algorithm = tree.get("algorithm") or {}
    if not isinstance(algorithm, dict):
        raise ConfigError(f"algorithm must be a section of keys, got {algorithm!r}: write algorithm.name=NAME")
    name = algorithm.get("name", DEFAULT_NAME)
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"unknown algorithm.name {name!r}{nearest(str(name), PRESETS)}")
    config = build(Config, {**tree, "algorithm": {**preset_under({"name": name, **algorithm}), **algorithm}})
    assert isinstance(config, Config)
    return config


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


def load(source: str | Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file (or a shipped configuration by name, or nothing) and apply `section.key=value` overrides.

    Raises:
        ConfigError: no such file or name, YAML that does not parse, or anything `from_tree` refuses.
    """
    tree: dict[str, Any] = {}
    if source is not None:
        path = shipped().get(str(source), Path(source))
        if path.is_dir():
            raise ConfigError(f"{path} is a folder: to continue the run in it, rlvr-ops train --resume {path}")
        if not path.is_file():
            raise ConfigError(f"no configuration {str(source)!r}: neither a file nor one of {', '.join(shipped())}")
        tree = read_file(path)
    for override in overrides or []:
        _override(tree, override)
    return from_tree(tree)


def _override(tree: dict[str, Any], override: str) -> None:
    """Write one `section.key=value` into a tree. What is below a section of free keys may have more dots."""
    key, equals, text = override.partition("=")
    known = settings_of(Config)
    setting = ".".join(key.split(".")[:2])
    if not equals or (setting not in known and setting in {name.split(".")[0] for name in known}):
        raise ConfigError(f"an override must look like section.key=value, got {override!r}")
    if setting not in known or (key != setting and get_origin(known[setting]) is not dict):
        raise ConfigError(unknown(key, known))
    value = read_value(text, known[key] if key == setting else None, key)
    *sections, name = key.split(".")
    node = tree
    for part in sections:
        node[part] = {} if node.get(part) is None else node[part]
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {part} is not a section")
    if key == "algorithm.name":
        tree["algorithm"] = node = _without_preset(node)
    node[name] = value


def _without_preset(algorithm: dict[str, Any]) -> dict[str, Any]:
    """The keys that say something else than their preset, so that another preset can take its place."""
    preset = {**asdict(AlgorithmConfig()), **PRESETS.get(str(algorithm.get("name", DEFAULT_NAME)), {})}
    return {key: value for key, value in algorithm.items() if key == "name" or preset.get(key) != value}
