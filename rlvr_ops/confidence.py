"""How sure a policy is of a whole rollout: what it says in words, and what its token probabilities say."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from rlvr_ops import arguments

__all__ = ["mean_self_certainty", "mean_token_probability", "stated_confidence", "stated_confidences"]

NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)\s*(%?)", flags=re.ASCII)


def stated_confidence(text: str) -> float | None:
    """The number in the last `<confidence>...</confidence>` of a completion, or None where none can be read.

    A decimal in [0, 1], or a percentage with its sign: `0.8` and `80%` are 0.8. None, and never a guess, for: no tag or
    an unclosed one; words, fractions, signs or nothing inside; a value out of range, which is not clipped. `80` is out of
    range: read as a percentage, `1` could be both. Of several tags the last closed one counts, even if an earlier one
    could be read and it cannot (as in the code of arXiv 2507.16806, which knows no percentages).

    >>> stated_confidence("<confidence>0.3</confidence> No: <confidence> 80 % </confidence>")
    0.8
    >>> stated_confidence("<confidence>80</confidence>") is None
    True
    """
    before, closed, _ = text.rpartition("</confidence>")
    _, opened, inside = before.rpartition("<confidence>")
    found = NUMBER.fullmatch(inside.strip()) if closed and opened else None
    if found is None:
        return None
    value = float(found[1]) / (100 if found[2] else 1)
    return value if value <= 1 else None


def stated_confidences(texts: Iterable[str]) -> Tensor:
    """`stated_confidence` of every completion as (B,) float32 on the CPU; NaN where none can be read.

    The rewards here turn that NaN into a NaN reward unless their paper says what it is worth, and `group_advantages`
    refuses it. `torch.isnan(...)` counts them.

    >>> stated_confidences(["<confidence>1</confidence>", "quite sure"])
    tensor([1., nan])
    """
    if isinstance(texts, str):
        raise TypeError("texts must be several completions, got one str: give [text], or call stated_confidence(text)")
    found = [stated_confidence(text) for text in texts]
    return torch.tensor([math.nan if value is None else value for value in found], dtype=torch.float32)


def mean_token_probability(
    per_token_logps: Tensor, completion_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mean of exp(logp) over a rollout's unmasked tokens, (B,): a confidence in [0, 1]. A constant to any gradient.

    `per_token_logps` is (B, T), or packed (N,) with `cu_seqlens`, in nats. Not exp of the mean, which one unlikely token
    ruins. NaN for a rollout without a token. Rounding may leave a log-probability a hair above 0: it counts as 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> mean_token_probability(torch.tensor([[0.5, 1.0, 0.1]]).log(), torch.tensor([[1, 1, 0]]))
    tensor([0.7500])
    """
    return mean_probability("per_token_logps", per_token_logps, "completion_mask", completion_mask, cu_seqlens)


def mean_self_certainty(
    self_certainty: Tensor, completion_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mean over a rollout's unmasked tokens of `token_logps(..., with_self_certainty=True).self_certainty`, (B,).

    In nats, 0 for uniform distributions and without an upper bound (arXiv 2502.18581): an order between rollouts under one
    policy, not a probability. (B, T), or packed (N,) with `cu_seqlens`. NaN for a rollout without a token. A constant to
    any gradient.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.

    >>> mean_self_certainty(torch.tensor([1.0, 3.0, 5.0]), cu_seqlens=torch.tensor([0, 2, 3]))
    tensor([2., 5.])
    """
    values, counts = _active("self_certainty", self_certainty, "completion_mask", completion_mask)
    return _mean(self_certainty, values, counts, cu_seqlens)


def mean_probability(
    name: str, per_token_logps: Tensor, mask_name: str, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """`mean_token_probability` of arguments by any name."""
    logps, counts = _active(name, per_token_logps, mask_name, mask)
    if bool((logps > 1e-3).any()):
        where = tuple(int(i) for i in (logps > 1e-3).nonzero()[0])
        raise ValueError(
            f"{name} must be at most 0, got {float(logps[where]):g} at {where}: give log-probabilities, not probabilities"
        )
    return _mean(per_token_logps, logps.clamp(max=0).exp() * counts, counts, cu_seqlens)


def _active(name: str, values: Tensor, mask_name: str, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values as constants in float32 or wider, 0 where masked, and which of them count."""
    arguments.check_tensor(name, values)
    if mask is not None:
        arguments.check_tensor(mask_name, mask, values.device, floating=False)
        if mask.shape != values.shape:
            raise ValueError(f"{mask_name} must have shape {tuple(values.shape)} like {name}, got {tuple(mask.shape)}")
    counts = torch.ones_like(values, dtype=torch.bool) if mask is None else mask != 0
    active = values.detach().to(torch.promote_types(values.dtype, torch.float32)).masked_fill(~counts, 0)
    if bool(active.isnan().any()):
        where = tuple(int(i) for i in active.isnan().nonzero()[0])
        raise ValueError(f"{name} must not be NaN where {mask_name} is 1, got NaN at {where}")
    return active, counts


def _mean(like: Tensor, values: Tensor, counts: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    layout = arguments.make_layout("the per-token values", like, None, cu_seqlens)
    return layout.per_rollout(values.flatten()) / layout.per_rollout(counts.flatten().to(values.dtype))  # 0 / 0 = NaN
