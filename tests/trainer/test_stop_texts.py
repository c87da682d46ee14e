"""Stop texts: where a completion ends, what is masked, and what of the prompt is not looked at."""

import copy
from dataclasses import replace

import pytest
import torch
from rlvr_trainer.config import load
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.prompts import PromptFormat
from rlvr_trainer.rollouts import sample
from rlvr_trainer.stop_texts import StopTexts
from rlvr_trainer.tasks import Problem


@pytest.fixture
def writes(untrained, small, monkeypatch):
    """Rollouts of a policy that writes these texts whatever it is asked; `<eos>` is its end token."""

    def make(texts, stop, prompt="a", pad=0, **changes):
        tokenizer = copy.deepcopy(untrained.tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        policy = replace(untrained, tokenizer=tokenizer, **changes)
        rows = [tokenizer(text.replace("<eos>", "\x00")).input_ids for text in texts]
        rows = [[2 if i == tokenizer.unk_token_id else i for i in row] for row in rows]
        longest = max(map(len, rows))
        planned = torch.tensor([row + [40] * (longest - len(row)) for row in rows])

        def generate(input_ids, logits_processor, stopping_criteria, max_new_tokens, **_):
            """As transformers does it: finished rows go on with pads until every row has finished."""
            done = torch.zeros(len(rows), dtype=torch.bool)
            for column in planned[:, :max_new_tokens].unbind(1):
                certain = torch.full((len(rows), 101), -torch.inf).scatter(1, column[:, None], 0.0)
                column = torch.where(done, pad, logits_processor[0](input_ids, certain).argmax(1))
                input_ids = torch.cat([input_ids, column[:, None]], 1)
                done |= torch.isin(column, torch.tensor(policy.eos_ids))
                if stopping_criteria is not None:
                    done |= stopping_criteria[0](input_ids, None)
                if done.all():
                    break
            return input_ids

        config = small(f"rollout.max_new_tokens={longest}", f"rollout.stop={stop}")
        policy.start_sampler(config)
        monkeypatch.setattr(policy.sampler.model, "generate", generate)
        return sample(policy, [Problem(prompt, "x")], config, len(texts), 1.0)

    return make


def test_a_completion_ends_with_its_stop_text_and_the_mask_includes_it(writes):
    rollouts = writes(["12</a>xy", "1234567<eos>", "12345678"], ["</a>"])
    assert rollouts.texts == ["12</a>", "1234567", "12345678"]
    assert rollouts.completion_mask.sum(1).tolist() == [6, 8, 8]
    assert rollouts.ended.tolist() == [True, True, False]


@pytest.mark.parametrize("pad", [0, 2])
def test_a_pad_that_is_an_end_token_is_not_taken_for_one_behind_a_stop_text(writes, pad):
    rollouts = writes(["1##45", "12345"], ["##"], pad=pad)
    assert rollouts.completion_mask.tolist() == [[1, 1, 1, 0, 0], [1] * 5]


def test_the_first_of_several_stop_texts_counts_and_an_end_token_before_it_wins(writes):
    rollouts = writes(["1;23456.", "1.23456;", "1<eos>;.", "123456;."], [";", "."])
    assert rollouts.texts == ["1;", "1.", "1", "123456;"]


def test_what_the_prompt_ends_with_is_no_part_of_a_stop_text(writes):
    assert writes(["#12", "##1"], ["##"], prompt="a#").texts == ["#12", "##"]


def test_the_assistants_prefix_is_read_by_the_verifier_and_is_no_completion(writes):
    rollouts = writes(["7</answer>"], ["</answer>"], prompts=PromptFormat(assistant_prefix="<answer>"))
    assert rollouts.texts == ["<answer>7</answer>"]
    assert rollouts.completion_mask.sum() == len("7</answer>")


def test_the_window_reaches_over_the_longest_stop_text(untrained):
    prompt = torch.zeros(1, 3, dtype=torch.long)
    long = "stop here, please, at this very place"
    stop = StopTexts(untrained.tokenizer, ["x", long], prompt)
    ids = torch.tensor([untrained.tokenizer("some words before it: " + long).input_ids])
    ends = [bool(stop(torch.cat([prompt, ids[:, :n]], 1), None)) for n in range(1, ids.shape[1] + 1)]
    assert ends == [False] * (len(ends) - 1) + [True]
    assert stop.lengths.tolist() == [len(ends)]


def test_transformers_stops_where_we_say(untrained, small):
    """With the model's own `generate`: every completion has at most one digit, at its end."""
    stop = "[" + ", ".join(f"'{digit}'" for digit in range(10)) + "]"
    torch.manual_seed(0)
    config = small("rollout.max_new_tokens=40", f"rollout.stop={stop}")
    rollouts = sample(untrained, [Problem("a#", "x"), Problem("another", "y")], config, 16, 1.0)
    for text, ended in zip(rollouts.texts, rollouts.ended, strict=True):
        assert not any(c.isdigit() for c in text[:-1])
        assert ended or not text[-1:].isdigit()
    assert sum(text[-1:].isdigit() for text in rollouts.texts) > 5
    kept = rollouts.completion_ids[~rollouts.completion_mask.bool()]
    assert (kept == untrained.tokenizer.pad_token_id).all()


def test_an_empty_stop_text_is_refused():
    with pytest.raises(ConfigError, match=r"rollout\.stop holds an empty text"):
        load(None, ["rollout.stop=['']"])
