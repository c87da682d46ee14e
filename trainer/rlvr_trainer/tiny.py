"""`tiny`: a character-level transformer made on the spot and taught the task just well enough to learn from reward.

It is shown training problems with their answers, a share of them wrong on purpose, so that it knows the format and
gets about the other share right: reinforcement learning then has something to find. For tests and for laptops.
"""

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlvr_trainer.tasks import Prompt, Task, plain_text

CHARACTERS = "".join(chr(c) for c in range(32, 127)) + "\n"
PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
LEAST_ENDING = 8
BATCH = 128
LEARNING_RATE = 2e-3


def make_tokenizer(prompts: Sequence[str] = ()) -> Any:
    """One token per printable ASCII character, one for the words that all of `prompts` begin with, and one for those they end with.

    What they share is most of a prompt and says nothing: as one token it costs a tenth of the time. An end of a few characters
    is left as it is. Characters outside ASCII are `<unk>`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    beginning = _beginning(prompts)
    ending = _beginning([prompt[len(beginning) :][::-1] for prompt in prompts])[::-1]
    shared = [text for text, least in ((beginning, 2), (ending, LEAST_ENDING)) if len(text) >= least]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in shared])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN, padding_side="left"
    )


def _beginning(texts: Sequence[str]) -> str:
    """The characters that all of them begin with."""
    return os.path.commonprefix(list(texts))  # noqa: RUF071  not of folders


def make_model(vocabulary: int, hidden: int = 96, layers: int = 2) -> Any:
    """A Llama of about a quarter of a million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=4 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=3,  # of 32 dimensions each, the fewest that vLLM's attention takes
            num_key_value_heads=3,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def warm_start(
    model: Any,
    tokenizer: Any,
    task: Task,
    *,
    steps: int,
    noise: float,
    seed: int,
    text_of: Callable[[Prompt], str] = plain_text,
) -> float:
    """Supervised updates on training problems, a share `noise` of them with another problem's answer; the last loss.

    `text_of` writes a prompt out as it will be when completions are sampled.
    """
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    cursor, loss = 0, torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:  # up over 50 steps, then straight down to a tenth
            group["lr"] = LEARNING_RATE * min((step + 1) / 50, 1 - 0.9 * step / steps)
        problems, cursor = task.problems(cursor, BATCH)
        others = rng.sample([p.answer for p in problems], len(problems))
        answers = [o if rng.random() < noise else p.answer for p, o in zip(problems, others, strict=True)]
        batch = _supervised(tokenizer, [text_of(p.prompt) for p in problems], answers)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # or it would be added to the first gradient of the training proper
    return float(loss.detach())


def _supervised(tokenizer: Any, prompts: list[str], answers: list[str]) -> dict[str, torch.Tensor]:
    """Left-padded prompt + answer + end, with the loss on answer and end only."""
    asked = tokenizer(prompts).input_ids
    told = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(answers).input_ids]
    width = max(len(a) + len(t) for a, t in zip(asked, told, strict=True))
    rows, labels, mask = [], [], []
    for a, t in zip(asked, told, strict=True):
        left = width - len(a) - len(t)
        rows.append([tokenizer.pad_token_id] * left + a + t)
        labels.append([-100] * (left + len(a)) + t)
        mask.append([0] * left + [1] * (len(a) + len(t)))
    mask_rows = torch.tensor(mask)
    return {
        "input_ids": torch.tensor(rows),
        "labels": torch.tensor(labels),
        "attention_mask": mask_rows,
        "position_ids": (mask_rows.cumsum(-1) - 1).clamp(min=0),
    }
