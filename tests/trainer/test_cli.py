"""The command line: exit codes, messages on stderr, and nothing but plain lines in a log file."""

import json
import subprocess
import sys

import pytest
from rlvr_trainer.cli import main

FAST = [
    "policy.warm_start_steps=1",
    "task.held_out=3",
    "rollout.prompts=2",
    "rollout.group_size=2",
    "evaluation.samples=2",
    "run.steps=2",
    "run.threads=1",
]


@pytest.fixture
def trained(tmp_path):
    out = tmp_path / "run"
    assert main(["demo", "--model", "tiny", "--seed", "3", "--out", str(out), *FAST, "run.checkpoint_every=1"]) == 0
    return out


def test_a_demo_can_be_evaluated_plotted_and_continued(trained, capsys):
    assert json.loads((trained / "summary.json").read_text())["seed"] == 3
    capsys.readouterr()
    assert main(["eval", str(trained)]) == 0
    values = json.loads(capsys.readouterr().out)
    last = json.loads((trained / "summary.json").read_text())["after"]
    assert values["eval/pass@1"] == last["eval/pass@1"]  # the saved model is the trained one
    (trained / "report.png").unlink()
    assert main(["plot", str(trained)]) == 0
    assert (trained / "report.png").read_bytes().startswith(b"\x89PNG")
    assert main(["train", "--resume", str(trained), "run.steps=3"]) == 0
    assert json.loads((trained / "summary.json").read_text())["steps"] == 3


def test_a_run_in_a_log_file_is_plain_lines(tmp_path):
    command = [sys.executable, "-m", "rlvr_trainer", "train", "demo-tiny", *FAST, f"run.out={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert done.stderr == ""
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(steps) == 2
    assert "reward " in steps[0]
    assert "tokens/s" in steps[0]
    assert done.stdout.splitlines()[-1].startswith("Held-out Pass@1 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--model", "tinny"], r"unknown --model 'tinny': did you mean 'tiny'?"),
        (["train", "demo-tinny"], "no configuration 'demo-tinny'"),
        (["train", "run.stepz=3"], "unknown key run.stepz: did you mean run.steps?"),
        (["train", "task.name=chain_summ"], "unknown task.name 'chain_summ': did you mean 'chain_sum'?"),
        (["train", "--resume", "nowhere"], "cannot resume: nowhere holds no config.yaml"),
        (["plot", "nowhere"], "nothing to plot: nowhere holds no metrics.jsonl"),
        (["eval", "nowhere"], "no configuration 'nowhere'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err


def test_resuming_takes_no_other_configuration(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    assert main(["train", "demo-tiny", "--resume", str(tmp_path)]) == 2
    assert "--resume takes its settings from" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_cannot_be_resumed(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_env_names_versions_and_devices(capsys):
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    assert "torch 2." in said
    assert "accelerator: " in said


def test_an_interrupted_start_saves_nothing_and_says_so(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlvr_trainer.loop.train", lambda *a, **k: interrupt())
    assert main(["train"]) == 130
    assert "interrupted, nothing was saved" in capsys.readouterr().err


def test_overrides_may_follow_an_option(tmp_path, capsys):
    assert main(["train", "demo-tiny", "--out", str(tmp_path / "run"), "run.stepz=1"]) == 2
    assert "run.stepz" in capsys.readouterr().err


def test_a_run_that_did_not_finish_has_no_model_to_evaluate(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("policy: {name: tiny}")
    assert main(["eval", str(tmp_path)]) == 2
    assert "holds no model: the run did not finish; continue it with" in capsys.readouterr().err
