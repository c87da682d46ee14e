"""Overlong prompts: found when the task is loaded, then dropped or refused as the settings say."""

import json
from dataclasses import replace

import pytest
from rlvr_trainer import loop
from rlvr_trainer.cli import main
from rlvr_trainer.console import read_jsonl
from rlvr_trainer.loop import train
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.policies import load_policy
from rlvr_trainer.prompt_limit import PromptLimit, fit_prompts
from rlvr_trainer.prompts import PromptFormat
from rlvr_trainer.rollouts import collect
from rlvr_trainer.tasks import Problem, make_task

LONG = "9" * 30


@pytest.fixture
def rows(tmp_path):
    """Twelve problems, of which those of lines 2, 5, 8 (and 11, which is held out) have prompts of 32 characters."""
    path = tmp_path / "rows.jsonl"
    prompts = [f"{i:02d}" + (LONG if i % 3 == 1 else "") for i in range(12)]
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "1"}) + "\n" for prompt in prompts))
    return path


@pytest.fixture
def asked(small, rows):
    """Settings for these rows and a limit of 20 tokens."""
    return lambda *overrides: small(f"task.name={rows}", "rollout.max_prompt_tokens=20", *overrides)


def test_overlong_prompts_are_refused_with_their_count_and_the_first_places(untrained, asked):
    config = asked()
    message = (
        r"4 prompts are longer than 20 tokens \(rollout\.max_prompt_tokens = 20\): rows\.jsonl, line 2, rows\.jsonl, line 5,"
        r" rows\.jsonl, line 8 and 1 more\. task\.on_overlong=drop leaves them out"
    )
    with pytest.raises(ConfigError, match=message):
        fit_prompts(untrained, make_task(config.task), config)


def test_overlong_prompts_are_dropped_held_out_ones_included(untrained, asked):
    config = asked("task.on_overlong=drop")
    task = make_task(config.task)
    before = task.fingerprint()
    assert fit_prompts(untrained, task, config).startswith("dropped: 4 prompts are longer than 20 tokens")
    assert [problem.prompt for problem in task.held_out] == ["08", "09", "11"]
    assert {problem.prompt for problem in task.problems(0, 30)[0]} == {"00", "02", "03", "05", "06"}
    assert task.fingerprint() != before


def test_nothing_is_said_where_every_prompt_fits(untrained, small, rows):
    config = small(f"task.name={rows}")
    assert fit_prompts(untrained, make_task(config.task), config) == ""


@pytest.mark.parametrize("how", ["drop", "refuse"])
def test_a_task_of_which_nothing_would_be_left_is_refused(untrained, asked, how):
    config = asked("rollout.max_prompt_tokens=1", f"task.on_overlong={how}")
    with pytest.raises(ConfigError, match=r"no problem to train on is left.* 12 prompts are longer than 1 tokens"):
        fit_prompts(untrained, make_task(config.task), config)


def test_the_models_positions_are_the_limit_where_none_is_set(untrained, small):
    limit = PromptLimit.of(untrained, small("rollout.max_new_tokens=24"))
    assert limit.fits(Problem("1" * 1000, "1"))
    assert not limit.fits(Problem("1" * 1001, "1"))
    with pytest.raises(ConfigError, match=r"max_new_tokens = 1024 leaves no room for a prompt in the model's 1024 pos"):
        PromptLimit.of(untrained, small("rollout.max_new_tokens=1024"))


def test_a_prompt_counts_with_all_that_is_rendered_around_it(small, digits, untrained):
    limit = PromptLimit.of(untrained, small("rollout.max_prompt_tokens=4"))
    assert limit.fits(Problem("1+1=", "2"))
    prefixed = replace(untrained, prompts=PromptFormat(assistant_prefix=" "))
    assert not PromptLimit.of(prefixed, small("rollout.max_prompt_tokens=4")).fits(Problem("1+1=", "2"))


def test_a_token_outside_the_embedding_is_refused_with_its_place(small, digits):
    config = small("policy.warm_start_steps=0")
    policy = load_policy(config, digits())
    policy.tokenizer.add_tokens(["QQQ"])
    with pytest.raises(
        ConfigError, match=r"x\.jsonl, line 3: token 'QQQ' has id 1\d\d, and the policy's embedding only"
    ):
        PromptLimit.of(policy, config).fits(Problem("QQQ", "1", where="x.jsonl, line 3"))


def test_a_prompt_that_the_template_refuses_is_named_by_its_place(small, digits):
    config = small("policy.warm_start_steps=0")
    policy = load_policy(config, digits())
    policy.tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    )
    problem = Problem((("system", "s"), ("user", "u")), "1", where="x.jsonl, line 3")
    with pytest.raises(ConfigError, match=r"x\.jsonl, line 3: the chat template refuses a prompt: no system"):
        PromptLimit.of(policy, config).fits(problem)


def test_an_endless_stream_is_looked_at_before_the_first_step_too(untrained, small):
    config = small("rollout.max_prompt_tokens=10", "task.parameters={min_terms: 2, max_terms: 6}")
    with pytest.raises(ConfigError, match=r"prompts are longer than 10 tokens.*chain_sum, "):
        fit_prompts(untrained, make_task(config.task), config)


def test_an_endless_stream_passes_overlong_prompts_over_and_counts_them(small, digits, untrained):
    settings = ("task.parameters={min_terms: 1, max_terms: 3, min_digits: 1, max_digits: 1}", "task.on_overlong=drop")
    whole = make_task(small(*settings).task)
    lengths = [len(problem.text) for problem in whole.problems(0, 200)[0]]
    limit = sorted(lengths)[100]
    config = small(*settings, f"rollout.max_prompt_tokens={limit}", "rollout.prompts=6")
    task = make_task(config.task)
    assert "prompts are longer" in fit_prompts(untrained, task, config)
    assert all(len(problem.text) <= limit for problem in task.held_out)
    batch, cursor = collect(untrained, task, 0, config)
    used = {problem.text for problem in batch.rollouts.problems}
    assert batch.metrics["sampling/prompts_dropped"] == cursor - 6 > 0
    assert all(len(text) <= limit for text in used)
    following, _ = collect(untrained, task, cursor, config)
    again, _ = collect(untrained, task, cursor, config)
    assert [p.text for p in following.rollouts.problems] == [p.text for p in again.rollouts.problems]


def test_an_overlong_prompt_met_while_sampling_ends_no_run(small, digits, untrained):
    long = digits()
    own = long.problems
    long.problems = lambda cursor, count: (
        [Problem("9" * 40 if i % 2 else "9", "a digit") for i in range(cursor, cursor + count)],
        own(cursor, count)[1],
    )
    batch, cursor = collect(untrained, long, 0, small("rollout.max_prompt_tokens=20"))
    assert batch.metrics["sampling/prompts_dropped"] == 2
    assert cursor == 5
    with pytest.raises(ConfigError, match="hardly a prompt fits: 10"):
        collect(untrained, digits(), 0, small("rollout.max_prompt_tokens=1"))


def test_training_refuses_before_it_samples_and_drops_with_a_word(asked, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(loop, "collect", lambda *_: pytest.fail("something was sampled"))
        patched.setattr(loop, "evaluate", lambda *_: pytest.fail("something was sampled"))
        with pytest.raises(ConfigError, match=r"4 prompts are longer than 20 tokens"):
            train(asked(), quiet=True)
    train(asked("task.on_overlong=drop", "run.steps=1"), overwrite=True)
    assert "\ndropped: 4 prompts are longer than 20 tokens" in capsys.readouterr().out
    assert all(len(row["prompt"]) == 2 for row in read_jsonl(tmp_path / "run" / "completions.jsonl"))


def test_evaluation_from_the_command_line_drops_too(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [f"task.name={rows}", "task.held_out=4", "policy.warm_start_steps=1", "rollout.max_prompt_tokens=20"]
    config = tmp_path / "config.yaml"
    config.write_text("{}")
    assert main(["eval", str(config), *settings, "evaluation.samples=1"]) == 2
    assert "task.on_overlong=drop leaves them out" in capsys.readouterr().err
    assert main(["eval", str(config), *settings, "evaluation.samples=1", "task.on_overlong=drop"]) == 0
    output = capsys.readouterr()
    assert "dropped: 4 prompts" in output.err
    assert "eval/pass@1" in json.loads(output.out)
