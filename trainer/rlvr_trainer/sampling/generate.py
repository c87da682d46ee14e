"""Sampling by transformers' `generate`: one engine that runs wherever the policy does."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlvr_trainer.sampling.sampler import (
    Completion,
    FinishReason,
    SamplerError,
    Sampling,
    Weights,
    refuse_other_weights,
    shapes_of,
)
from rlvr_trainer.stop_texts import StopTexts


class GenerateSampler:
    """Samples with `model` itself, or with a copy in `dtype` that `update` brings up to date.

    Tokens are drawn by inverting the distribution function at one uniform number per token, from a generator of each
    completion's own: neither its batch nor its neighbours change what a completion draws.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: list[int],
        *,
        dtype: torch.dtype | None = None,
        batch_size: int = 128,
        threads: int = 0,
    ) -> None:
        self.shared = dtype is None
        self.model = model if dtype is None else rounded_copy(model, dtype)
        self.dtype: torch.dtype = self.model.dtype
        self.tokenizer, self.eos_ids = tokenizer, eos_ids
        self.batch_size, self.threads = batch_size, threads
        self._closed = False

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """See `Sampler.sample`."""
        repeated = [prompt for prompt in prompts for _ in range(sampling.n)]
        ids, mask = pad_left(repeated, self.tokenizer.pad_token_id)
        found: list[Completion] = []
        with cpu_threads(self.threads):
            for start in range(0, len(repeated), self.batch_size):
                rows = slice(start, start + self.batch_size)
                found += self._batch(ids[rows], mask[rows], sampling, sampling.seed + start)
        return found

    def _batch(self, ids: Tensor, mask: Tensor, sampling: Sampling, seed: int) -> list[Completion]:
        device = self.model.device
        ids = ids.to(device)
        stop = StopTexts(self.tokenizer, list(sampling.stop), ids)
        draw = Draw(sampling, seed, len(ids), device)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask.to(device),
            do_sample=False,  # `draw` has drawn already, and leaves one token
            logits_processor=[draw],
            max_new_tokens=sampling.max_new_tokens,
            stopping_criteria=[*([stop] if sampling.stop else []), self._given_up],
        )
        if self._closed:
            raise SamplerError("the sampler has been closed")
        rows, logps = output[:, ids.shape[1] :].tolist(), torch.stack(draw.logps, 1).tolist()
        return [self._cut(*row) for row in zip(rows, logps, stop.lengths.tolist(), strict=True)]

    def _cut(self, ids: list[int], logps: list[float], stopped: int) -> Completion:
        """Without what `generate` padded a row with: `stopped` is its length at the end of a stop text, or 0."""
        ended = next((i + 1 for i, token in enumerate(ids) if token in self.eos_ids), 0)
        ends = [length for length in (ended, stopped) if length]
        length = min(ends, default=len(ids))
        reason: FinishReason = "length" if not ends else "end" if length == ended else "stop"
        return Completion(ids[:length], logps[:length], reason)

    @torch.no_grad()
    def update(self, weights: Weights) -> None:
        """See `Sampler.update`. A model that is shared with the trainer has them already."""
        if self.shared:
            return
        own = self.model.state_dict()
        refuse_other_weights(weights, shapes_of(own))
        for name, value in own.items():
            value.copy_(weights[name])

    def _given_up(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self._closed, device=input_ids.device)

    def close(self) -> None:
        """See `Sampler.close`. What another thread is sampling ends at the next token."""
        self._closed = True


class Draw:
    """A logits processor that draws each row's token, and remembers its log-probability."""

    def __init__(self, sampling: Sampling, seed: int, rows: int, device: torch.device) -> None:
        self.temperature = sampling.temperature
        self.exact = torch.float32 if device.type == "mps" else torch.float64  # whose sums repeat to all that matters
        draws = [
            torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed + i), dtype=self.exact)
            for i in range(rows)
        ]  # drawn in the type that they are used in: rounded to 1, one would choose what has no probability
        self.draws = torch.stack(draws).to(device)
        self.logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` (B, V) of the next token, with all but the one that was drawn at -inf."""
        logps = (scores.float() / (self.temperature or 1.0)).log_softmax(-1)
        tokens = self._tokens(logps)
        self.logps.append(logps.gather(1, tokens)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)

    def _tokens(self, logps: Tensor) -> Tensor:
        if self.temperature == 0:
            return logps.argmax(-1, keepdim=True)
        below = logps.to(self.exact).exp_().cumsum(-1)
        wanted = self.draws[:, len(self.logps), None] * below[:, -1:]
        return torch.searchsorted(below, wanted, right=True).clamp_(max=logps.shape[1] - 1)


def rounded_copy(model: Any, dtype: torch.dtype) -> Any:
    """A frozen copy with its parameters in `dtype`. Buffers stay: rotary frequencies in bf16 turn far positions by radians."""
    model = copy.deepcopy(model).requires_grad_(False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def pad_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, longest), padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def pad_right(rows: list[list[Any]], pad: float, length: int) -> Tensor:
    """(B, length), padded on the right."""
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute on `count` CPU threads for a while; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
