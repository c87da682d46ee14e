"""Checkpoints: whole or not at all, Hugging Face folders too, and what may and may not change when a run goes on."""

import json
import shutil
import signal

import pytest
import torch
import transformers
from rlvr_trainer import checkpoints, loop
from rlvr_trainer.config import load
from rlvr_trainer.console import read_jsonl
from rlvr_trainer.evaluation import best_of
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.policies import load_policy
from rlvr_trainer.stopping import Stopped


def optimizer_of(policy):
    return torch.optim.AdamW(policy.model.parameters(), lr=1e-3)


def names(run):
    return [path.name for path in checkpoints.list_checkpoints(run)]


def test_a_checkpoint_is_a_hugging_face_folder(finished):
    folder = checkpoints.folder_of(finished, 4)
    held = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "state.pt"} <= held
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not [path for path in finished.rglob("*") if "unfinished" in path.name]
    assert transformers.AutoTokenizer.from_pretrained(folder).decode([5, 6]) == '!"'


def test_a_checkpoint_restores_every_bit(small, digits, tmp_path):
    config = small("policy.warm_start_steps=0")
    policy = load_policy(config, digits())
    optimizer = optimizer_of(policy)
    for _ in range(2):
        sum(p.square().sum() for p in policy.model.parameters()).backward()
        optimizer.step()
    place = checkpoints.Place(7, 123)
    checkpoints.save(tmp_path, place, policy, optimizer, fingerprint="f", keep=1)
    wanted = [p.detach().clone() for p in policy.model.parameters()]
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    drawn = torch.rand(5)
    again = load_policy(config, digits())
    other = optimizer_of(again)
    found = checkpoints.restore(checkpoints.find(tmp_path), again, other)
    assert (found.step, found.cursor) == (7, 123)
    assert all(torch.equal(a, b) for a, b in zip(wanted, again.model.parameters(), strict=True))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, other.state.values(), strict=True))
    assert torch.equal(torch.rand(5), drawn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_type_and_the_generation_defaults_that_a_policy_came_with_are_kept(small, digits, tmp_path, dtype):
    made = load_policy(small("policy.warm_start_steps=0"), digits())
    made.dtype = dtype
    made.generation_defaults = transformers.GenerationConfig(
        top_k=3, temperature=0.2, eos_token_id=[2, 5]
    )  # no do_sample
    made.save(tmp_path / "given")
    policy = load_policy(small(f"policy.name={tmp_path / 'given'}"), digits())
    assert policy.head.weight.dtype == torch.float32
    with torch.no_grad():
        policy.head.weight.add_(1e-5)  # lost in 16 bits
    wanted = policy.head.weight.clone()
    checkpoints.save(tmp_path, checkpoints.Place(), policy, optimizer_of(policy), fingerprint="f", keep=1)
    folder = checkpoints.folder_of(tmp_path, 0)
    assert transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == dtype
    given = json.loads((tmp_path / "given" / "generation_config.json").read_text())
    assert json.loads((folder / "generation_config.json").read_text()) == given
    assert (given["top_k"], given["temperature"], given["eos_token_id"]) == (3, 0.2, [2, 5])
    assert policy.head.weight.dtype == torch.float32  # saving changes nothing
    again = load_policy(small(f"policy.name={tmp_path / 'given'}"), digits())
    checkpoints.restore(checkpoints.find(tmp_path), again, optimizer_of(again))
    assert torch.equal(again.head.weight, wanted)


def test_only_the_last_checkpoints_are_kept_and_the_best(tmp_path, untrained):
    for step in (1, 2, 10, 1_000_000):
        place = checkpoints.Place(step, step)
        checkpoints.save(tmp_path, place, untrained, optimizer_of(untrained), fingerprint="f", keep=2, best=1)
    assert names(tmp_path) == ["step-000001", "step-000010", "step-1000000"]
    assert checkpoints.find(tmp_path).step == 1_000_000
    assert checkpoints.find(tmp_path, "10").step == checkpoints.find(tmp_path, "step-000010").step == 10
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names(tmp_path)


@pytest.mark.parametrize("file", ["state.pt", "model.safetensors"])
@pytest.mark.parametrize("length", [0, 100, -1])
def test_a_checkpoint_that_is_cut_short_is_named_with_the_one_before_it_which_can_be_used(four, file, length):
    run, config = four
    path = checkpoints.folder_of(run, 4) / file
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ConfigError, match=r"step-000004 is not whole .*use the one before it with --from step-000003"):
        loop.train(config(), resume=True, quiet=True)
    wanted = read_jsonl(run / "completions.jsonl")
    assert loop.train(config(), resume=True, start_from="step-000003", quiet=True)["steps"] == 4
    assert read_jsonl(run / "completions.jsonl") == wanted
    assert checkpoints.find(run).step == 4  # made anew


def test_a_checkpoint_without_weights_is_not_whole(four):
    run, config = four
    (checkpoints.folder_of(run, 4) / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"step-000004 is not whole \(.*model\.safetensors"):
        loop.train(config(), resume=True, quiet=True)


def test_a_damaged_checkpoint_with_none_before_it_says_so(four):
    run, config = four
    for step in (0, 1, 2, 3):
        shutil.rmtree(checkpoints.folder_of(run, step))
    (checkpoints.folder_of(run, 4) / "state.pt").write_bytes(b"half")
    with pytest.raises(ConfigError, match=r"step-000004 is not whole .*: there is none before it"):
        loop.train(config(), resume=True, quiet=True)


def test_an_earlier_checkpoint_drops_what_came_after_it(four):
    run, config = four
    assert loop.train(config("run.steps=2"), resume=True, start_from="2", quiet=True)["steps"] == 2
    assert names(run) == ["step-000000", "step-000001", "step-000002"]
    assert {row["step"] for row in read_jsonl(run / "metrics.jsonl")} == {0, 1, 2}
    assert [row["step"] for row in read_jsonl(run / "evaluations.jsonl")] == [0, 2]


def test_a_checkpoint_that_there_is_not_is_named_with_those_there_are(four):
    _, config = four
    for name in ("step-000009", "last", ""):
        with pytest.raises(ConfigError, match=f"holds no checkpoint '{name}', only step-000000, step-000001, "):
            loop.train(config(), resume=True, start_from=name, quiet=True)


def test_a_folder_without_a_checkpoint_cannot_be_resumed(four):
    run, config = four
    for path in checkpoints.list_checkpoints(run):
        path.rename(path.with_name(f"{path.name}.unfinished"))
    with pytest.raises(ConfigError, match=r"cannot resume: .*copy holds no checkpoint"):
        loop.train(config(), resume=True, quiet=True)
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"cannot resume: .*copy holds no config\.yaml and so no run"):
        loop.train(load(None, [f"run.out={run}"]), resume=True, quiet=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.held_out=3", r"task\.held_out was 4 and cannot become 3 within a run: start a new one"),
        ("task.parameters={min_terms: 2, max_terms: 3}", r"task\.parameters was .* and cannot become"),
        ("task.instruction= Think.", r"task\.instruction was '' and cannot become ' Think\.'"),
        ("task.extract=last_number", r"task\.extract was 'whole'"),
        ("policy.name=smollm2-135m", r"policy\.name was 'tiny' and cannot become 'smollm2-135m'"),
        ("policy.warm_start_steps=9", r"policy\.warm_start_steps was 2"),
        ("run.seed=1", r"run\.seed was 0 and cannot become 1"),
        ("evaluation.samples=3", r"evaluation\.samples was 2 and cannot become 3"),
        ("run.steps=3", r"run\.steps=3 is behind .*step-000004: ask for more, or go on --from an earlier one"),
        ("task.name=products", r"the problems of task\.name=products are not those that this run was trained on"),
    ],
)
def test_what_makes_another_run_is_refused_by_name(four, override, message):
    run, config = four
    before = (run / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=message):
        loop.train(config(override), resume=True, quiet=True)
    assert (run / "config.yaml").read_text() == before
    assert len(names(run)) == 5


def test_a_file_of_problems_may_move_but_not_change(small, tmp_path):
    lines = [json.dumps({"prompt": f"1 + {i} =", "answer": str(i + 1)}) for i in range(9)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    common = ["run.checkpoint_every=1", "policy.warm_start_steps=0", "run.steps=1"]
    loop.train(small(f"task.name={tmp_path / 'a.jsonl'}", *common), quiet=True)
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    moved = small(f"task.name={tmp_path / 'b.jsonl'}", *common)
    assert loop.train(moved, resume=True, quiet=True)["steps"] == 1
    (tmp_path / "b.jsonl").write_text("\n".join(lines[::-1]))
    with pytest.raises(ConfigError, match=r"the problems of task\.name=.*b\.jsonl are not those that this run"):
        loop.train(moved, resume=True, quiet=True)


def test_what_may_change_is_used_and_said(four, capsys):
    run, config = four
    changed = config("run.steps=5", "optim.learning_rate=1e-9", "optim.weight_decay=0.5", "optim.betas=[0.5, 0.6]")
    loop.train(changed, resume=True)
    said = capsys.readouterr().out
    assert "changed since step 4: optim.learning_rate 0.001 -> 1e-09, optim.weight_decay 0.0 -> 0.5, " in said
    assert "run.steps 4 -> 5" in said
    group = checkpoints.find(run).state["optimizer"]["param_groups"][0]
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (1e-9, 0.5, (0.5, 0.6))
    assert "learning_rate: 1.0e-09" in (run / "config.yaml").read_text()


def test_a_resume_at_the_last_step_evaluates_if_nobody_has(four):
    run, config = four
    assert [row["step"] for row in read_jsonl(run / "evaluations.jsonl")] == [0, 4]
    summary = loop.train(config("run.steps=3"), resume=True, start_from="3", quiet=True)
    assert [row["step"] for row in read_jsonl(run / "evaluations.jsonl")] == [0, 3]
    assert summary["steps"] == 3
    again = loop.train(config("run.steps=3"), resume=True, quiet=True)  # and does not do it twice
    assert [row["step"] for row in read_jsonl(run / "evaluations.jsonl")] == [0, 3]
    assert again["after"] == summary["after"]


def test_the_best_checkpoint_is_kept_and_named(small, tmp_path, monkeypatch, capsys):
    rights = iter([[1, 1, 1, 1], [2, 2, 1, 1], [2, 2, 1, 1], [0, 0, 0, 0], [0, 0, 1, None]])
    own = loop.evaluate

    def staged(*arguments):
        found = own(*arguments)
        found.correct = next(rights)
        return found

    monkeypatch.setattr(loop, "evaluate", staged)
    config = small("run.keep_best=true", "evaluation.every=1", "run.steps=4", "run.keep_checkpoints=1")
    config.run.checkpoint_every = 1
    summary = loop.train(config)
    best = tmp_path / "run" / "checkpoints" / "step-000001"
    assert summary["best"] == {"step": 1, "pass@1": 0.75, "checkpoint": str(best)}
    assert names(tmp_path / "run") == ["step-000001", "step-000004"]
    assert f"best held-out pass@1: 0.750 at step 1, kept in {best}" in capsys.readouterr().out


def test_the_best_survives_being_interrupted_twice_in_the_same_evaluation(small, tmp_path, monkeypatch):
    own, rights = loop.evaluate, iter([[1, 1, 1, 1], [2, 2, 1, 1], [0, 0, 0, 0]])

    def staged(*arguments):
        correct = next(rights, None)
        if correct is None:
            raise Stopped(signal.SIGINT)
        found = own(*arguments)
        found.correct = correct
        return found

    monkeypatch.setattr(loop, "evaluate", staged)
    config = small("run.keep_best=true", "evaluation.every=1", "run.steps=4", "run.keep_checkpoints=1")
    for resume in (False, True, True):
        assert loop.train(config, resume=resume, quiet=True)["interrupted_at"] == 3
        assert names(tmp_path / "run") == ["step-000001", "step-000003"]


def test_the_best_is_kept_without_other_checkpoints(small, tmp_path):
    summary = loop.train(small("run.keep_best=true", "evaluation.every=1", "run.steps=2"), quiet=True)
    assert f"step-{summary['best']['step']:06d}" in names(tmp_path / "run")


def test_the_best_is_among_those_of_which_there_is_a_checkpoint(four):
    run, config = four
    for step in (0, 1, 2):
        shutil.rmtree(checkpoints.folder_of(run, step))
    summary = loop.train(config("run.keep_best=true", "evaluation.every=9", "run.steps=5"), resume=True, quiet=True)
    assert summary["best"]["step"] in (4, 5)  # not 0, although it was evaluated
    assert checkpoints.folder_of(run, summary["best"]["step"]).is_dir()


def test_the_best_needs_evaluations(small):
    with pytest.raises(ConfigError, match=r"run\.keep_best needs evaluation\.every"):
        small("run.keep_best=true")


def test_nothing_judged_is_nothing_best():
    assert best_of([]) is None
    assert best_of([{"step": 0, "samples": 2, "correct": [None]}]) is None
    assert best_of([{"step": 0, "samples": 2, "correct": [1]}, {"step": 5, "samples": 4, "correct": [2]}]) == (0, 0.5)
