"""Several tasks at once: shares, one cursor, held-out problems of every part, and a judge for each."""

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlvr_trainer.config import TaskConfig, load
from rlvr_trainer.evaluation import evaluate
from rlvr_trainer.loop import train
from rlvr_trainer.mixture import MixtureTask
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.policies import load_policy
from rlvr_trainer.rollouts import collect
from rlvr_trainer.tasks import make_task

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.fixture
def files(tmp_path):
    """Two files of 20 problems each, `a.jsonl` and `b.jsonl`, with prompts of their own."""
    for name in "ab":
        rows = [{"prompt": f"{name} {i}", "answer": str(i)} for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def mixture(folder, *sections, **shared):
    parts = [{"name": str(folder / f"{name}.jsonl"), **rest} for name, rest in sections]
    return MixtureTask(TaskConfig(**{"held_out": 4, "mixture": parts, **shared}), seed=3)


def mixed(folder, **shared):
    return mixture(folder, ("a", {"weight": 3}), ("b", {}), **shared)


def shares(problems):
    return [sum(problem.task == name for problem in problems) for name in "ab"]


def test_every_part_has_its_share_of_any_stretch(files):
    task = mixed(files)
    problems, cursor = task.problems(0, 400)
    assert shares(problems) == [300, 100]
    following, _ = task.problems(cursor, 40)
    assert abs(shares(following)[0] - 30) <= 2


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_the_cursor_alone_says_which_problems_come_next(tmp_path_factory, counts):
    folder = tmp_path_factory.getbasetemp()
    for name in "ab":
        rows = [{"prompt": f"{name} {i}", "answer": str(i)} for i in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, _ = mixed(folder).problems(0, sum(counts))
    cursor, found = 0, []
    for count in counts:
        part, cursor = mixed(folder).problems(pickle.loads(pickle.dumps(cursor)), count)
        found += part
    assert found == whole
    assert [p.task for p in found] == [p.task for p in whole]


def test_a_stream_that_passes_problems_over_repeats_none_of_them(files):
    sections = [{"name": "chain_sum", "parameters": ONE_DIGIT, "held_out": 48}, {"name": str(files / "a.jsonl")}]
    task = make_task(TaskConfig(mixture=sections, held_out=4))
    sums = [p for p in task.problems(0, 100)[0] if p.task == "chain_sum"]
    alone = make_task(TaskConfig(parameters=ONE_DIGIT, held_out=48))
    assert sums == alone.problems(0, len(sums))[0]


def test_a_prompt_that_any_part_holds_out_is_trained_on_in_none(files):
    held_out = [{"prompt": f"b {i}", "answer": str(i)} for i in range(10)]
    (files / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    task = mixture(files, ("a", {"evaluation": str(files / "test.jsonl"), "held_out": 10}), ("b", {}))
    assert len(task.held_out) == 14
    trained = {problem.prompt for problem in task.problems(0, 200)[0]}
    assert trained.isdisjoint(problem.prompt for problem in task.held_out)
    assert {f"b {i}" for i in range(10, 16)} < trained


def test_a_part_whose_problems_are_all_held_out_elsewhere_is_refused(files):
    (files / "small.jsonl").write_text(
        "".join(json.dumps({"prompt": f"a {i}", "answer": "1"}) + "\n" for i in range(16, 20))
    )
    with pytest.raises(
        ConfigError, match=r"task\.mixture\[1\]: other parts hold out 1000 problems of 'small' in a row"
    ):
        mixture(files, ("a", {}), ("small", {"held_out": 0}))


def test_two_parts_of_one_name_are_told_apart(files):
    assert mixture(files, ("a", {}), ("b", {}), ("a", {"held_out": 0})).names == ["a", "b", "a-2"]
    (files / "a-2.jsonl").write_text((files / "b.jsonl").read_text())
    assert mixture(files, ("a-2", {}), ("a", {}), ("a", {"held_out": 0})).names == ["a-2", "a", "a-3"]


def test_every_part_is_judged_by_its_own_judge(files):
    sections = [{"parameters": ONE_DIGIT}, {"name": str(files / "a.jsonl"), "extract": "last_number"}]
    task = make_task(TaskConfig(mixture=sections, held_out=2))
    sums, (row,) = task.held_out[:2], task.held_out[2:3]
    try:
        scores = task.score([sums[0], row, sums[1]], [sums[0].answer, f"so {row.answer}", "no"])
    finally:
        task.close()
    assert [verdict.score for verdict in scores] == [1.0, 1.0, 0.0]


def test_a_part_inherits_what_it_does_not_say(files):
    task = mixture(files, ("a", {"instruction": " now"}), ("b", {"held_out": 2}), instruction=" please")
    prompts = [problem.prompt for problem in task.held_out]
    assert prompts == [*(f"a {i} now" for i in range(16, 20)), *(f"b {i} please" for i in (18, 19))]


def test_the_fingerprint_changes_with_weights_order_files_and_what_is_held_out(files):
    base = mixed(files).fingerprint()
    assert mixed(files).fingerprint() == base
    others = [
        mixture(files, ("a", {"weight": 2}), ("b", {})),
        mixture(files, ("b", {}), ("a", {"weight": 3})),
        mixture(files, ("a", {"weight": 3}), ("b", {"held_out": 3})),
        mixed(files, instruction=" x"),
    ]
    (files / "b.jsonl").write_text((files / "b.jsonl").read_text().replace("b 3", "b 3?"))
    others.append(mixed(files))
    assert len({base, *(task.fingerprint() for task in others)}) == 6


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("[{nmae: x}]", r"unknown key task\.mixture\[0\]\.nmae: did you mean 'name'\?"),
        ("[{}, {weight: 0}]", r"task\.mixture\[1\]\.weight must be greater than 0 and finite, got 0\.0"),
        ("[{weight: .inf}]", r"task\.mixture\[0\]\.weight must be a finite number, got inf"),
        ("[{weight: much}]", r"task\.mixture\[0\]\.weight must be a number, got 'much'"),
        ("[{held_out: -1}]", r"task\.mixture\[0\]\.held_out must not be negative, got -1"),
        ("[{held_out: 0}]", r"task\.mixture: no part has held_out > 0"),
        ("[{reward: score}]", r"task\.mixture\[0\]\.reward cannot differ from part to part: set task\.reward"),
        ("[{mixture: []}]", r"task\.mixture\[0\]\.mixture cannot differ"),
        ("[chain_sum]", r"task\.mixture\[0\] must be a section of keys, got 'chain_sum'"),
    ],
)
def test_a_wrong_part_is_named_when_the_settings_are_read(mixture, message):
    with pytest.raises(ConfigError, match=message):
        load(None, [f"task.mixture={mixture}"])


def test_a_part_that_cannot_be_read_is_named(files):
    with pytest.raises(ConfigError, match=r"task\.mixture\[1\]: task\.name: no file '.*nowhere\.jsonl'"):
        mixture(files, ("a", {}), ("nowhere", {}))
    with pytest.raises(
        ConfigError, match=r"task\.mixture\[0\]: .* holds 20 different problems and task\.held_out = 20"
    ):
        mixture(files, ("a", {"held_out": 20}))


def test_one_evaluation_for_a_whole_mixture_is_refused():
    with pytest.raises(ConfigError, match=r"task\.evaluation and task\.mixture: give a part"):
        load(None, ["task.mixture=[{}]", "task.evaluation=x.jsonl"])


def overrides(files):
    sections = f"{{name: {files / 'a.jsonl'}, held_out: 2, weight: 2}}, {{name: chain_sum, held_out: 3}}"
    return [f"task.mixture=[{sections}]", "rollout.prompts=6"]


def test_accuracy_and_pass_at_1_are_logged_for_every_part(small, files, untrained):
    config = small(*overrides(files))
    task = make_task(config.task)
    try:
        batch, _ = collect(untrained, task, 0, config)
        found = evaluate(untrained, task, config)
    finally:
        task.close()
    assert {"accuracy/a", "accuracy/chain_sum"} <= batch.metrics.keys()
    assert found.parts == ["a", "a", "chain_sum", "chain_sum", "chain_sum"]
    values = found.metrics()
    for part in ("a", "chain_sum"):
        assert (
            0
            <= values[f"eval/{part}/pass@1/low"]
            <= values[f"eval/{part}/pass@1"]
            <= values[f"eval/{part}/pass@1/high"]
        )
    assert 5 * values["eval/pass@1"] == pytest.approx(2 * values["eval/a/pass@1"] + 3 * values["eval/chain_sum/pass@1"])


def test_a_resumed_mixture_continues_with_the_same_problems(small, tmp_path):
    mixture = "task.mixture=[{weight: 2}, {parameters: {max_terms: 3}}]"
    settings = [mixture, "rollout.prompts=6", "run.checkpoint_every=1", "evaluation.samples=1"]
    train(small(*settings, "run.steps=2", f"run.out={tmp_path / 'whole'}"), quiet=True)
    train(small(*settings, "run.steps=1", f"run.out={tmp_path / 'parts'}"), quiet=True)
    train(small(*settings, "run.steps=2", f"run.out={tmp_path / 'parts'}"), resume=True, quiet=True)
    rows = [(tmp_path / run / "completions.jsonl").read_text() for run in ("whole", "parts")]
    assert rows[0] == rows[1]


def test_a_policy_learns_from_a_mixture(small, files, digits):
    config = small(*overrides(files), "policy.warm_start_steps=1")
    task = make_task(config.task)
    policy = load_policy(config, task)
    assert policy.texts([task.held_out[0].prompt]) == ["a 18"]
    assert config.task.title == f"{files / 'a.jsonl'} + chain_sum"
