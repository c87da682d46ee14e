"""A sampler that reads a prompt once for all its completions, which of 64 short ones is most of the work."""

import inspect
from typing import Any

import torch
from rlvr_trainer.sampling import Completion, Sampling
from rlvr_trainer.sampling.generate import Draw, GenerateSampler, pad_left
from torch import Tensor
from transformers import DynamicCache


class SharedPrompts(GenerateSampler):
    """`GenerateSampler` for models whose cache is that of full attention, and without stop texts.

    The completions are those of `GenerateSampler`, but for rounding.
    """

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        """See `Sampler.sample`."""
        assert not sampling.stop
        n, found = sampling.n, list[Completion]()
        each = max(self.batch_size // n, 1)
        for start in range(0, len(prompts), each):
            ids, mask = pad_left(prompts[start : start + each], self.tokenizer.pad_token_id)
            cache = self._read(ids, mask)
            cache.batch_repeat_interleave(n)
            rows = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
            found += self._continued(*rows, cache, sampling, sampling.seed + start * n)
        return found

    def _read(self, ids: Tensor, mask: Tensor) -> DynamicCache:
        """All but the last token of every prompt, whose logits `generate` needs."""
        cache = DynamicCache(config=self.model.config)
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        self.model.model(**{name: value[:, :-1] for name, value in given.items()}, **self._named(cache))
        return cache

    def _continued(
        self, ids: Tensor, mask: Tensor, cache: DynamicCache, sampling: Sampling, seed: int
    ) -> list[Completion]:
        draw = Draw(sampling, seed, len(ids), self.model.device)
        output = self.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, logits_processor=[draw],
            max_new_tokens=sampling.max_new_tokens, **self._named(cache),
        )  # fmt: skip
        rows, logps = output[:, ids.shape[1] :].tolist(), torch.stack(draw.logps, 1).tolist()
        return [self._cut(*row, stopped=0) for row in zip(rows, logps, strict=True)]

    def _named(self, cache: DynamicCache) -> dict[str, Any]:
        """By the name that this version of transformers has for it."""
        takes = inspect.signature(type(self.model).forward).parameters
        return {"cache" if "cache" in takes else "past_key_values": cache, "use_cache": True}
