"""The command line: exit codes, messages on stderr, and nothing but plain lines in a log file."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rlvr_trainer import doctor
from rlvr_trainer.cli import main
from rlvr_trainer.console import read_jsonl

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
        (["train", "num_generations=8"], "unknown key num_generations: did you mean rollout.group_size?"),
        (
            ["train", "--learning_rate", "1"],
            "unknown option --learning_rate: did you mean optim.learning_rate? A setting",
        ),
        (["train", "--lr=1"], "unknown option --lr=1: did you mean optim.learning_rate? A setting is written section."),
        (["train", "--zzz"], "unknown option --zzz: a setting is written section.key=value"),
        (["train", "--res", "x"], "unknown option --res"),
        (["train", "demo-tiny", "run.steps"], "an override must look like section.key=value, got 'run.steps'"),
        (["train", "--out"], "argument --out: expected one argument"),
        (["train", "--from", "3"], "--from goes with --resume RUN"),
        (["train", "demo-tiny", "--keep-best"], "run.keep_best needs evaluation.every"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "which command? (rlvr-ops COMMAND --help says what there is)"),
        (["plot", "x", "run.steps=3"], "this command takes no settings, got run.steps=3"),
        (["demo", "--seed", "x"], "run.seed must be an integer, got 'x'"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "new"], "--resume continues in {run}, and so takes no --out: for another folder, start a new run"),
        (["run.out=new"], "--resume continues in {run}, and so takes no --out"),
        (["demo-tiny"], "--resume takes its settings from {run}/config.yaml: give overrides, not 'demo-tiny'"),
        (["task.held_out=2"], "cannot resume: task.held_out was 4 and cannot become 2 within a run"),
        (["--from", "7"], "{run} holds no checkpoint '7', only step-000000, step-000001"),
    ],
)
def test_what_does_not_go_with_resuming_is_one_line_and_exit_code_2(four, arguments, message, capsys):
    run, _ = four
    before = sorted(run.rglob("*"))
    assert main(["train", "--resume", str(run), *arguments]) == 2
    said = capsys.readouterr().err
    assert message.format(run=run) in said
    assert said.count("\n") == 1
    assert sorted(run.rglob("*")) == before


def test_an_older_checkpoint_is_resumed_on_request(four, capsys):
    run, _ = four
    (run / "checkpoints" / "step-000004" / "state.pt").write_bytes(b"half")
    assert main(["train", "--resume", str(run)]) == 2
    assert "use the one before it with --from step-000003" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--from", "step-000003"]) == 0
    assert main(["train", "--resume", str(run), "run.steps=5"]) == 0


def test_a_run_without_a_checkpoint_cannot_be_resumed(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("")
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_one_line(four, capsys):
    run, _ = four
    assert main(["train", "x" * 5000]) == 1
    assert capsys.readouterr().err.endswith("x: File name too long\n")
    assert main(["train", str(run)]) == 2
    assert f"{run} is a folder: to continue the run in it, rlvr-ops train --resume {run}" in capsys.readouterr().err


def test_the_version_is_one_line(capsys):
    assert main(["--version"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("rlvr-ops")
    assert said.count("\n") == 1


def test_the_command_is_read_before_anything_slow_is_imported():
    said = "import sys, rlvr_trainer.cli as cli; cli._parse(['doctor']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "False\n"


def test_a_missing_package_is_named_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("rlvr_trainer.report.read_jsonl", lambda _: [])
    monkeypatch.setattr("pathlib.Path.is_file", lambda _: True)
    assert main(["plot", "x"]) == 1
    assert "this needs matplotlib: in the repository's root, pip install '.[train]'" in capsys.readouterr().err


def test_the_doctor_finds_nothing_wrong_here(capsys, tmp_path):
    assert main(["doctor", f"run.out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "everything that a run needs is here"
    assert {line[:5].strip() for line in said.splitlines()[:-1]} <= {"ok", "note"}
    for word in (
        "Python 3.",
        "torch 2.",
        "transformers 5.",
        "gguf",
        "for judging mathematics",
        "a worker judges an answer",
        "Triton",
        " on cpu",
        "GiB of",
    ):
        assert word in said


def test_the_doctor_names_what_is_missing_and_what_does_not_work(capsys, tmp_path, monkeypatch):
    own = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: None if name in ("matplotlib", "gguf") else own(name))
    (tmp_path / "file").write_text("")
    assert main(["doctor", "policy.device=tpu9", f"run.out={tmp_path}/file/run"]) == 1
    said = capsys.readouterr().out
    assert "FAIL  matplotlib is not installed, for report.png" in said
    assert "note  gguf is not installed, for policy.name=smollm2-135m" in said
    assert "FAIL  device: policy.device 'tpu9' cannot be used here" in said
    assert "FAIL  run folder: " in said
    assert said.endswith("3 of these must be mended first\n")


def test_the_doctor_looks_for_the_engine_that_samples(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert main(["doctor", "rollout.backend=vllm", f"run.out={tmp_path}"]) == 1
    assert 'FAIL  rollout.backend=vllm needs vLLM: pip install ".[train,vllm]"' in capsys.readouterr().out
    servers = ["rollout.backend=vllm-server", "rollout.servers=[http://127.0.0.1:1]"]
    assert main(["doctor", *servers, f"run.out={tmp_path}"]) == 1
    said = capsys.readouterr().out
    assert "FAIL  the server at http://127.0.0.1:1 does not answer any more (connection refused)" in said


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


def test_every_folder_with_a_model_can_be_evaluated(four, capsys, tmp_path, monkeypatch):
    run, _ = four
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "model", tmp_path / "elsewhere")
    task = ["task.parameters={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}", "task.held_out=4"]
    alike = [*task, "rollout.max_new_tokens=5", "evaluation.samples=2", "run.threads=1", "policy.precision=full"]
    evaluated = {
        run / "eval" / "model": [str(run)],
        run / "eval" / "step-000004": [str(run / "checkpoints" / "step-000004")],
        run / "mine": [str(run / "model"), "--out", str(run / "mine")],
        Path("eval") / "elsewhere": ["elsewhere", *alike],
        Path("again"): ["elsewhere", "--config", str(run / "config.yaml"), "--out", "again"],
    }
    wanted = json.loads((run / "summary.json").read_text())["after"]
    for out, arguments in evaluated.items():
        assert main(["eval", *arguments]) == 0
        values = json.loads(capsys.readouterr().out)
        assert {name: value for name, value in values.items() if name.startswith("eval/")} == wanted
        assert json.loads((out / "evaluation.json").read_text()) == values
        assert values["completions"] == str(out / "completions.jsonl")
        rows = read_jsonl(out / "completions.jsonl")
        assert len(rows) == 8
        assert set(rows[0]) == {
            "where",
            "task",
            "prompt",
            "answer",
            "completion",
            "score",
            "reason",
            "read_reference",
            "read_answer",
            "confidence",
        }
        assert sum(row["score"] == 1 for row in rows) / 8 == values["eval/pass@1"]


def test_a_folder_that_is_not_there_is_not_replaced_by_the_settings_own_policy(four, capsys):
    run, _ = four
    assert main(["eval", "nowhere/model", "--config", str(run / "config.yaml")]) == 2
    assert "cannot load policy.name 'nowhere/model'" in capsys.readouterr().err


def test_settings_alone_can_be_evaluated(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["policy.warm_start_steps=0", "task.held_out=2", "evaluation.samples=2", "run.threads=1"]
    assert main(["eval", "rollout.max_new_tokens=2", *settings]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny"


def test_a_model_that_is_cut_short_is_one_line(four, capsys, tmp_path):
    run, _ = four
    weights = run / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(["eval", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"rlvr-ops: cannot load policy.name '{run}/model'")
    assert said.count("\n") == 1


def test_a_run_that_did_not_finish_is_evaluated_at_its_last_checkpoint(four, capsys):
    run, _ = four
    shutil.rmtree(run / "model")
    assert main(["eval", str(run)]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(run / "checkpoints" / "step-000004")


def test_a_model_of_no_run_needs_a_task(four, capsys, tmp_path, monkeypatch):
    run, _ = four
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "model", tmp_path / "elsewhere")
    assert main(["eval", "elsewhere"]) == 2
    assert "elsewhere belongs to no run: say what to evaluate it on, with task.name=..." in capsys.readouterr().err
    assert main(["eval", str(tmp_path)]) == 2
    assert "holds neither a run (config.yaml) nor a model (config.json)" in capsys.readouterr().err


def test_a_run_that_did_not_finish_has_no_model_to_evaluate(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("policy: {name: tiny}")
    assert main(["eval", str(tmp_path)]) == 2
    assert "holds no model: the run did not finish; continue it with" in capsys.readouterr().err
