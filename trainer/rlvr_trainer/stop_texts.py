"""Texts that end a completion.

transformers has `stop_strings`, but looks into the prompt too (half of a stop text at a prompt's end would end the
completion early) and does not say where a row stopped, which the pads behind it do not tell if the pad is an end token.
"""

from typing import Any

import torch
from torch import Tensor

SLACK = 4  # tokens: a window may begin inside a character


class StopTexts:
    """A criterion for `generate` that ends a row where one of `texts` is complete, and remembers where that was."""

    def __init__(self, tokenizer: Any, texts: list[str], prompt_ids: Tensor) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self.width = prompt_ids.shape[1]
        self.window = max((len(text.encode()) for text in texts), default=0) + SLACK  # a token has one byte or more
        self.lengths = torch.zeros(len(prompt_ids), dtype=torch.long, device=prompt_ids.device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(B,), which rows are at an end; `input_ids` (B, S) are prompts and completions so far."""
        start = max(self.width, input_ids.shape[1] - self.window)
        tails = self.tokenizer.batch_decode(input_ids[:, start:], clean_up_tokenization_spaces=False)
        found = torch.tensor([any(text in tail for text in self.texts) for tail in tails], device=input_ids.device)
        self.lengths[found & (self.lengths == 0)] = input_ids.shape[1] - self.width
        return self.lengths > 0
