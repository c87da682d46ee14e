"""What every engine that samples completions can do: `Sampler`, and what goes in and comes out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NO_VLLM = 'rollout.backend=vllm needs vLLM: pip install ".[train,vllm]" on a GPU; on a CPU see docs/sampling.md'
Weights = Mapping[str, "Tensor"]
FinishReason = Literal["end", "stop", "length"]


class SamplerError(Exception):
    """The engine failed, cannot be reached, or is not what the policy needs. Says what a person can do."""


@dataclass(frozen=True)
class Sampling:
    """How to sample: `n` completions of every prompt, nothing truncated (no top-k, no top-p)."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    n: int = 1
    seed: int = 0  # completion i of a call draws with seed + i, whatever is sampled beside it
    stop: tuple[str, ...] = ()  # texts that end a completion, which includes them


@dataclass(frozen=True)
class Completion:
    """What was sampled for one prompt, up to and including the token that ended it."""

    token_ids: list[int]
    logps: list[float]  # of every token under the distribution that it was drawn from; NaN where the engine gave none
    finish_reason: FinishReason  # an end token, a text of `stop`, or neither


class Sampler(Protocol):
    """An engine with a copy of the policy's weights, which computes in `dtype`."""

    dtype: "torch.dtype"

    def sample(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """`sampling.n` completions of every prompt of token ids, those of a prompt next to each other.

        The global random generators are left alone: what is drawn, `sampling.seed` decides.

        Raises:
            SamplerError: the engine failed.
        """

    def update(self, weights: Weights) -> None:
        """Sample with these weights from now on: a model's `state_dict`, tied weights under each of their names.

        Raises:
            SamplerError: names or shapes are not those of the policy, and nothing was changed; or the engine failed.
        """

    def close(self) -> None:
        """Give back memory, processes and files. A second call does nothing."""


def refuse_other_weights(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise before an engine is given what it would break on.

    Raises:
        SamplerError: with the first weight that is missing, unknown or of another shape.
    """
    for name in [*shapes, *weights]:
        if name not in weights:
            raise SamplerError(f"weights: {name} is missing; the sampler goes on with those that it has")
        if name not in shapes:
            raise SamplerError(
                f"weights: the policy has none called {name}; the sampler goes on with those that it has"
            )
        if tuple(weights[name].shape) != shapes[name]:
            raise SamplerError(
                f"weights: {name} has shape {tuple(weights[name].shape)}, and the policy's {shapes[name]}; the sampler goes"
                " on with those that it has"
            )


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    """The shape of every weight."""
    return {name: tuple(value.shape) for name, value in weights.items()}


def number(logp: float | None) -> float:
    """An engine's log-probability: NaN for none."""
    return math.nan if logp is None else logp
