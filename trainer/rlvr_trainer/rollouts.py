"""Completions of the policy's sampler, judged, and laid out as the loss wants them.

Prompts are padded on the left and completions on the right, so the completion is the last T columns of every row.
"""

import time
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import rlvr_ops
from rlvr_ops.advantages import informative_groups, overlong_penalty
from rlvr_trainer.algorithm import BY_LENGTH
from rlvr_trainer.config import Config
from rlvr_trainer.judging.verdict import Verdict, counts
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.policies import Policy
from rlvr_trainer.prompt_limit import PromptLimit, positions
from rlvr_trainer.prompts import encode
from rlvr_trainer.sampling import Completion, Sampling
from rlvr_trainer.sampling.generate import pad_left, pad_right
from rlvr_trainer.tasks import Problem, Task


@dataclass
class Rollouts:
    """B rollouts, the G of a prompt next to each other. All tensors have B rows and lie on the policy's device."""

    input_ids: Tensor  # (B, P + T), prompt and completion
    attention_mask: Tensor  # (B, P + T)
    completion_ids: Tensor  # (B, T), the last T columns of input_ids
    completion_mask: Tensor  # (B, T), 1 up to and including the first end; 0 under `rollout.mask_truncated` without one
    sampling_logps: Tensor  # (B, T), of every token under the distribution it was drawn from; NaN where there is none
    ended: Tensor  # (B,), whether there was one: an end token, or a text of `rollout.stop`
    problems: list[Problem]
    texts: list[str]  # what the assistant said, its given prefix included

    def __len__(self) -> int:
        return len(self.texts)

    def lengths(self) -> Tensor:
        """(B,), tokens of every completion, whether they are masked or not."""
        return self.attention_mask[:, -self.completion_ids.shape[1] :].sum(1)

    def select(self, rows: list[int]) -> "Rollouts":
        """The given rows, without the columns that are padding in all of them."""
        part = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in part.items():
            part[name] = value[rows] if isinstance(value, Tensor) else [value[i] for i in rows]
        length = max(int(part["completion_mask"].sum(1).max()), 1) if rows else 1
        cut = self.completion_ids.shape[1] - length
        attended = part["attention_mask"]
        first = int(attended.any(0).int().argmax()) if rows else 0
        end = attended.shape[1] - cut
        part["input_ids"], part["attention_mask"] = part["input_ids"][:, first:end], attended[:, first:end]
        part["completion_ids"] = part["completion_ids"][:, :length]
        part["completion_mask"] = part["completion_mask"][:, :length]
        part["sampling_logps"] = part["sampling_logps"][:, :length]
        return Rollouts(**part)


@dataclass
class Batch:
    """What a step learns from, and what is logged about how it came to be."""

    rollouts: Rollouts
    rewards: Tensor  # (B,) float32, shaped
    advantages: Tensor  # (B,) float32
    metrics: dict[str, float]


def sample(
    policy: Policy,
    problems: list[Problem],
    config: Config,
    group_size: int,
    temperature: float,
    seed: int | None = None,
) -> Rollouts:
    """`group_size` completions of every problem, by the policy's sampler at `temperature`, nothing truncated.

    Without a `seed` one is drawn from torch's generator, and nothing else is.

    Raises:
        ConfigError: prompt and completion together are longer than the model's positions.
        SamplerError: the engine failed.
    """
    length = config.rollout.max_new_tokens
    prompts = encode(policy.tokenizer, policy.texts([problem.prompt for problem in problems]))
    limit, longest = positions(policy), max(map(len, prompts))
    if limit and longest + length > limit:
        raise ConfigError(
            f"a prompt of {longest} tokens and rollout.max_new_tokens = {length} exceed"
            f" the model's {limit} positions: shorten one of them."
        )
    drawn = int(torch.randint(2**31, ())) if seed is None else seed
    asked = Sampling(length, temperature, group_size, drawn, tuple(config.rollout.stop))
    completions = policy.sampler.sample(prompts, asked)
    repeated = [i for i in range(len(problems)) for _ in range(group_size)]
    return _lay_out(policy, [prompts[i] for i in repeated], completions, [problems[i] for i in repeated], length)


def _lay_out(
    policy: Policy, prompts: list[list[int]], completions: list[Completion], problems: list[Problem], length: int
) -> Rollouts:
    """B prompts, completions and problems as tensors, the completions `length` wide."""
    pad = policy.tokenizer.pad_token_id
    prompt_ids, prompt_mask = pad_left(prompts, pad)
    completion_ids = pad_right([found.token_ids for found in completions], pad, length)
    mask = pad_right([[1] * len(found.token_ids) for found in completions], 0, length)
    texts = [
        policy.prompts.assistant_prefix + policy.tokenizer.decode(found.token_ids, skip_special_tokens=True)
        for found in completions
    ]
    tensors = [
        torch.cat([prompt_ids, completion_ids], 1),
        torch.cat([prompt_mask, mask], 1),
        completion_ids,
        mask,
        pad_right([found.logps for found in completions], float("nan"), length),
        torch.tensor([found.finish_reason != "length" for found in completions]),
    ]
    return Rollouts(*(tensor.to(policy.device) for tensor in tensors), problems, texts)


def collect(policy: Policy, task: Task, cursor: int, config: Config) -> tuple[Batch, int]:
    """One step's rollouts with rewards and advantages, and the cursor behind the problems used.

    A group whose reference cannot be read is left out whole. Under dynamic sampling groups of accuracy 0 or 1 are left
    out too, and replaced while `max_resamples` allows.
    """
    size, wanted = config.rollout.group_size, config.rollout.prompts
    kept: list[Rollouts] = []
    scores: list[Tensor] = []
    verdicts: list[Verdict] = []
    uninformative, dropped = 0, 0
    limit = PromptLimit.of(policy, config)
    seconds = {"generate": 0.0, "verify": 0.0}
    rounds = 1 + (config.algorithm.max_resamples if config.algorithm.dynamic_sampling else 0)
    for _ in range(rounds):
        missing = wanted - sum(len(part) for part in kept) // size
        if missing == 0:
            break
        start = time.perf_counter()
        problems, cursor, passed_over = limit.draw(task, cursor, missing)
        dropped += passed_over
        rollouts = sample(policy, problems, config, size, config.rollout.temperature)
        middle = time.perf_counter()
        given = task.score(rollouts.problems, rollouts.texts)
        seconds["generate"] += middle - start
        seconds["verify"] += time.perf_counter() - middle
        verdicts += given
        score = torch.tensor([float("nan") if verdict.score is None else verdict.score for verdict in given])
        keep = ~score.reshape(-1, size).isnan().any(1)
        if config.algorithm.dynamic_sampling:
            informative = informative_groups((score == 1).float(), size)
            uninformative += int((keep & ~informative).sum())
            keep &= informative
        rows = keep.repeat_interleave(size).nonzero().flatten().tolist()
        kept.append(rollouts.select(rows))
        scores.append(score[rows])
    metrics = {
        "sampling/rollouts": float(len(verdicts)),
        **counts(verdicts),
        "sampling/prompts_dropped": float(dropped),
        "sampling/groups_uninformative": float(uninformative),
        "sampling/groups_kept": float(sum(len(part) for part in kept) // size),
        "perf/seconds_generate": seconds["generate"],
        "perf/seconds_verify": seconds["verify"],
    }
    return _judged(_merge(kept, policy), torch.cat(scores), config, metrics), cursor


def _judged(rollouts: Rollouts, score: Tensor, config: Config, metrics: dict[str, float]) -> Batch:
    size = config.rollout.group_size
    correct = (score == 1).float()
    rewards = score.float() if config.task.reward == "score" else correct
    lengths = rollouts.lengths().cpu()
    longest = config.rollout.max_new_tokens
    if config.algorithm.overlong_fraction > 0:
        cache = round(config.algorithm.overlong_fraction * longest)
        rewards = rewards + overlong_penalty(lengths, max_length=longest, cache=cache)
    if len(rollouts):
        groups = rewards.reshape(-1, size)
        metrics |= {
            "reward": float(rewards.mean()),
            "reward_std": float(groups.std(1).mean()),
            "frac_reward_zero_std": float((groups.std(1) == 0).float().mean()),
            "accuracy": float(correct.mean()),
            "completions/mean_length": float(lengths.float().mean()),
            "completions/max_length": float(lengths.max()),
            "completions/clipped_ratio": float(1 - rollouts.ended.float().mean()),
            **_of_parts(rollouts, correct),
        }
    if config.rollout.mask_truncated:
        rollouts = replace(rollouts, completion_mask=rollouts.completion_mask * rollouts.ended[:, None])
    estimator = config.algorithm.advantages
    read = lengths if estimator in BY_LENGTH else None
    advantages = rlvr_ops.group_advantages(rewards, size, estimator, lengths=read)
    device = rollouts.input_ids.device
    return Batch(rollouts, rewards, advantages.to(device), metrics)


def _of_parts(rollouts: Rollouts, correct: Tensor) -> dict[str, float]:
    """`accuracy/<part>` of every part of a mixture; nothing for a task that has no parts."""
    names = [problem.task for problem in rollouts.problems]
    rows = {name: [i for i, other in enumerate(names) if other == name] for name in sorted(set(names) - {""})}
    return {f"accuracy/{name}": float(correct[chosen].mean()) for name, chosen in rows.items()}


def _merge(parts: list[Rollouts], policy: Policy) -> Rollouts:
    """Rounds of rollouts under one another, padded to the widest prompt and the longest completion."""
    if len(parts) == 1:
        return parts[0]
    length = max(part.completion_ids.shape[1] for part in parts)
    width = max(part.input_ids.shape[1] - part.completion_ids.shape[1] for part in parts)
    pad = policy.tokenizer.pad_token_id
    columns: dict[str, list[Tensor]] = {
        "input_ids": [],
        "attention_mask": [],
        "completion_ids": [],
        "completion_mask": [],
        "sampling_logps": [],
        "ended": [],
    }
    for part in parts:
        right = length - part.completion_ids.shape[1]
        left = width + length - right - part.input_ids.shape[1]
        grow = torch.nn.functional.pad
        columns["input_ids"].append(grow(part.input_ids, (left, right), value=pad))
        columns["attention_mask"].append(grow(part.attention_mask, (left, right)))
        columns["completion_ids"].append(grow(part.completion_ids, (0, right), value=pad))
        columns["completion_mask"].append(grow(part.completion_mask, (0, right)))
        columns["sampling_logps"].append(grow(part.sampling_logps, (0, right), value=float("nan")))
        columns["ended"].append(part.ended)
    tensors = {name: torch.cat(values) for name, values in columns.items()}
    return Rollouts(
        **tensors,
        problems=[problem for part in parts for problem in part.problems],
        texts=[text for part in parts for text in part.texts],
    )
