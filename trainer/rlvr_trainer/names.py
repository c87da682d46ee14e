"""Which setting is meant by a name that is none: a word of TRL, verl or OpenRLHF, a setting of another section, or a slip."""

import difflib
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from rlvr_trainer.parsing import ConfigError

MEANINGS = {
    "algorithm.name": "algorithm preset algo",
    "algorithm.advantages": "adv_estimator advantage_estimator scale_rewards advantage",
    "algorithm.beta": "kl_coef kl_loss_coef init_kl_coef kl_beta kl_penalty kl_ctrl",
    "algorithm.entropy_coef": "entropy_coeff ent_coef entropy_bonus entropy_loss_coef",
    "algorithm.epsilon_low": "epsilon eps clip_ratio clip_ratio_low cliprange clip_range eps_clip eps_clip_low",
    "algorithm.epsilon_high": "clip_ratio_high eps_clip_high clip_higher",
    "algorithm.delta": "clip_ratio_c dual_clip",
    "algorithm.loss_type": "loss_agg_mode aggregation loss_mode",
    "algorithm.dynamic_sampling": "filter_groups dynamic_filtering",
    "algorithm.overlong_fraction": "overlong_buffer overlong_buffer_len soft_punish_cache",
    "algorithm.sampling_clip_max": "vllm_importance_sampling_clip_max vllm_importance_sampling_cap rollout_is_threshold"
    " is_correction_threshold",
    "algorithm.sampling_clip_min": "vllm_importance_sampling_clip_min",
    "algorithm.sampling_correction": "vllm_importance_sampling_correction vllm_importance_sampling_mode rollout_is"
    " is_correction_mode",
    "evaluation.every": "eval_steps test_freq eval_every eval_interval eval_freq",
    "evaluation.samples": "eval_n_samples_per_prompt val_n num_eval_samples eval_samples",
    "evaluation.temperature": "eval_temperature",
    "optim.betas": "adam_betas adam_beta1 adam_beta2",
    "optim.learning_rate": "lr actor_learning_rate actor_lr step_size",
    "optim.max_grad_norm": "grad_clip clip_grad max_norm gradient_clipping clip_grad_norm",
    "optim.micro_batch": "per_device_train_batch_size micro_batch_size micro_train_batch_size ppo_micro_batch_size"
    " ppo_micro_batch_size_per_gpu gradient_accumulation_steps",
    "optim.updates_per_batch": "num_iterations ppo_epochs max_epochs mu",
    "optim.warmup_steps": "lr_warmup_steps warmup num_warmup_steps warmup_ratio",
    "optim.weight_decay": "l2 wd",
    "policy.device": "use_cpu cuda gpu",
    "policy.name": "model model_name model_name_or_path model_path pretrain path",
    "policy.precision": "dtype torch_dtype bf16 fp16 mixed_precision param_dtype",
    "rollout.asynchronous": "async_enable async_train",
    "rollout.backend": "use_vllm vllm_mode rollout.name",
    "rollout.batch_size": "micro_rollout_batch_size per_device_eval_batch_size generation_batch_size",
    "rollout.group_size": "num_generations n n_samples_per_prompt num_samples_per_prompt num_samples generations",
    "rollout.max_new_tokens": "max_completion_length max_response_length generate_max_len max_tokens response_length",
    "rollout.memory_share": "gpu_memory_utilization vllm_gpu_memory_utilization",
    "rollout.prompts": "train_batch_size rollout_batch_size num_prompts prompts_per_step prompts_per_batch",
    "rollout.server_timeout": "vllm_server_timeout",
    "rollout.servers": "vllm_server_base_url vllm_server_host vllm_server_port",
    "run.checkpoint_every": "save_steps save_freq save_every save_interval checkpoint_steps",
    "run.keep_checkpoints": "save_total_limit max_ckpt_num max_actor_ckpt_to_keep keep_last",
    "run.out": "output_dir output out_dir save_path ckpt_path default_local_dir logging_dir",
    "run.steps": "max_steps num_steps total_steps total_training_steps train_steps num_train_steps iterations",
    "run.threads": "num_threads omp_num_threads",
    "task.held_out": "eval_size test_size num_eval val_size",
    "task.name": "dataset dataset_name train_files train_file prompt_data data env environment",
}
"""The words of other libraries for a setting; a letter's case, `-` and `_` do not matter, nor does the section before a word
that has none."""


def settings_of(kind: type, prefix: str = "") -> dict[str, Any]:
    """The dotted name of every setting below a dataclass, and its type."""
    hints = get_type_hints(kind)
    found: dict[str, Any] = {}
    for item in fields(kind):
        key, hint = f"{prefix}{item.name}", hints[item.name]
        found |= settings_of(hint, f"{key}.") if is_dataclass(hint) and isinstance(hint, type) else {key: hint}
    return found


def refuse_unknown(tree: dict[str, Any], known: Iterable[str]) -> None:
    """Raise for the first key of a tree of sections that is no setting.

    Raises:
        ConfigError: with the setting that is meant.
    """
    known = list(known)
    for section, node in tree.items():
        if section not in _sections(known):
            raise ConfigError(unknown(str(section), known))
        for name in node if isinstance(node, dict) else ():
            if f"{section}.{name}" not in known:
                raise ConfigError(unknown(f"{section}.{name}", known))


def unknown(key: str, known: Iterable[str]) -> str:
    """`unknown key optim.lr: did you mean optim.learning_rate?`, and the known ones of that section.

    >>> unknown("num_generations", ["rollout.group_size", "run.steps"])
    'unknown key num_generations: did you mean rollout.group_size?'
    """
    known = sorted(known)
    meant = " or ".join(meant_by(key, known))
    listed = [name for name in known if name.startswith(f"{key.partition('.')[0]}.")] or _sections(known)
    return f"unknown key {key}" + (f": did you mean {meant}?" if meant else f" (known: {', '.join(listed)})")


def meant_by(key: str, known: Iterable[str]) -> list[str]:
    """The settings that a name may stand for: by the same name elsewhere, then by meaning, then by spelling."""
    known = sorted(known)
    section, _, last = key.lower().replace("-", "_").rpartition(".")
    same = [name for name in known if name.endswith(f".{last}")]
    exact = [name for name in same if name == f"{section}.{last}"]
    found = exact or _meaning(f"{section.split('.')[-1]}.{last}", known) or same or _meaning(last, known)
    if found:
        return found
    near = {name.partition(".")[2]: name for name in known if name.startswith(f"{section}.")}
    close = difflib.get_close_matches(last, near, n=1)
    return (
        [near[close[0]]]
        if close
        else difflib.get_close_matches(key, known if section else [*known, *_sections(known)], n=1)
    )


def _meaning(word: str, known: list[str]) -> list[str]:
    return [name for name, words in MEANINGS.items() if word in words.split() and name in known]


def _sections(known: Iterable[str]) -> list[str]:
    return sorted({name.split(".")[0] for name in known})
