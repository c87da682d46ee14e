"""The folder of a run: one process at a time, no room, no permission, and nobody who reads what is printed."""

import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from rlvr_trainer import checkpoints, loop, printing, writing
from rlvr_trainer.cli import main
from rlvr_trainer.config import load
from rlvr_trainer.console import RunLog, read_jsonl
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.session import claimed
from rlvr_trainer.writing import WriteError, whole_folder, write_text


@contextmanager
def room_for(size):
    """No file grows beyond `size` bytes: what a full disk does, without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_two_runs_in_one_folder_are_kept_apart(small, tmp_path):
    run = tmp_path / "run"
    with claimed(run, resume=False, overwrite=False):
        for again in ({"overwrite": True}, {}):
            with pytest.raises(
                ConfigError, match=rf"run is being written to by another run, process {os.getpid()}: wait"
            ):
                loop.train(small("run.steps=0"), quiet=True, **again)
    loop.train(small("run.steps=0"), quiet=True)


def test_a_killed_process_leaves_no_lock(tmp_path):
    script = (
        "import os, sys, pathlib; from rlvr_trainer.session import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1]), resume=False, overwrite=False):\n    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], timeout=120, check=False)
    assert done.returncode == -9
    with claimed(tmp_path / "run", resume=False, overwrite=False):
        pass


def test_a_resume_while_the_run_still_goes_is_refused(four):
    run, config = four
    with (
        claimed(run, resume=True, overwrite=False),
        pytest.raises(ConfigError, match="is being written to by another run"),
    ):
        loop.train(config(), resume=True, quiet=True)


def test_a_run_is_overwritten_only_by_one_that_begins(four, monkeypatch):
    run, config = four
    (run / "eval").mkdir()
    before = {path.name for path in run.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr(loop, "load_policy", lambda *_: (_ for _ in ()).throw(ConfigError("stopped here")))
        with pytest.raises(ConfigError, match="stopped here"):
            loop.train(config(), overwrite=True, quiet=True)
    assert {path.name for path in run.iterdir()} == before
    loop.train(config("run.steps=0", "run.checkpoint_every=0"), overwrite=True, quiet=True)
    assert not {"eval", "checkpoints"} & {path.name for path in run.iterdir()}
    assert len(read_jsonl(run / "evaluations.jsonl")) == 1


def test_a_folder_that_holds_no_run_of_ours_keeps_what_is_in_it(small, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "precious").mkdir(parents=True)
    (run / "config.yaml").write_text("mine: 1")
    with pytest.raises(ConfigError, match=r"is not empty and holds no run \(checkpoints, \.\.\.\)"):
        loop.train(small("run.steps=0"), quiet=True)
    assert (run / "checkpoints" / "precious").is_dir()
    assert (run / "config.yaml").read_text() == "mine: 1"


def test_a_finished_run_that_goes_on_has_no_old_model_to_be_mistaken_for_its_own(four, monkeypatch):
    run, config = four
    monkeypatch.setattr(loop, "update", lambda *_: (_ for _ in ()).throw(FloatingPointError("stopped here")))
    with pytest.raises(FloatingPointError, match="stopped here"):
        loop.train(config("run.steps=6"), resume=True, quiet=True)
    assert not {"model", "summary.json", "report.png"} & {path.name for path in run.iterdir()}


def test_a_run_that_fails_while_it_samples_saves_its_steps(four, monkeypatch, capsys):
    run, config = four
    own, calls = loop.collect, iter([False, True])
    monkeypatch.setattr(loop, "collect", lambda *a: own(*a) if not next(calls) else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.train(config("run.steps=6", "run.checkpoint_every=0"), resume=True)
    assert checkpoints.list_checkpoints(run)[-1] == checkpoints.folder_of(run, 5)
    assert f"failed after step 5: saved {checkpoints.folder_of(run, 5)}" in capsys.readouterr().out
    monkeypatch.setattr(loop, "collect", own)
    assert loop.train(config("run.steps=6", "run.checkpoint_every=0"), resume=True, quiet=True)["steps"] == 6


def test_a_run_without_a_checkpoint_is_not_said_to_be_continued(small):
    loop.train(small("run.steps=0"), quiet=True)
    with pytest.raises(ConfigError, match=r"run holds a run already: choose another run\.out"):
        loop.train(small("run.steps=0"), quiet=True)


def test_a_judge_that_cannot_be_started_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "x^2"}\n{"prompt": "b", "answer": "x^3"}')
    monkeypatch.setattr(sys, "executable", "/bin/false")
    out = ["--out", str(tmp_path / "run")]
    assert main(["train", f"task.name={tmp_path / 'rows.jsonl'}", "task.held_out=1", *out]) == 1
    assert capsys.readouterr().err.startswith("rlvr-ops: no judge could be started: run /bin/false")


def test_what_a_kill_left_half_written_does_not_stand_in_the_way(small, tmp_path):
    run = tmp_path / "run"
    for name in ("initial_policy", "initial_policy.unfinished", "checkpoints.unfinished-removal"):
        (run / name).mkdir(parents=True)
    (run / ".config.yaml.unfinished").write_text("ru")
    loop.train(small("run.steps=0"), quiet=True)


def test_a_folder_without_locks_is_used_all_the_same(small, monkeypatch):
    monkeypatch.setattr("rlvr_trainer.session.fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(95, "no locks")))
    loop.train(small("run.steps=0"), quiet=True)


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_loaded(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(loop, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    for out in (tmp_path / "file", tmp_path / "file" / "run", f"/proc/{os.getpid()}/run", "/dev/null/run"):
        assert main(["train", "demo-tiny", "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"rlvr-ops: run.out={out} cannot be written: ")
        assert said.count("\n") == 1


def test_a_full_disk_names_the_file_and_the_checkpoint_to_go_on_from(four, capsys, monkeypatch):
    run, config = four
    own = loop.update

    def filled(*arguments):
        monkeypatch.setattr(
            writing.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        return own(*arguments)

    monkeypatch.setattr(loop, "update", filled)
    last = checkpoints.folder_of(run, 4)
    with pytest.raises(
        WriteError, match=rf"cannot write .*step-000005: No space left on device; go on from {last} with: "
    ):
        loop.train(config("run.steps=6"), resume=True, quiet=True)
    assert main(["train", "--resume", str(run), "run.steps=6"]) == 1
    assert f"with: rlvr-ops train --resume {run}\n" in capsys.readouterr().err
    monkeypatch.undo()
    assert loop.train(config("run.steps=6"), resume=True, quiet=True)["steps"] == 6


@pytest.mark.parametrize("size", [100, 50_000, 1_200_000])
def test_a_checkpoint_for_which_there_is_no_room_leaves_the_others_and_nothing_half(four, size):
    """Too large are the configuration, the weights (1 MB) or the state of the optimiser (2 MB)."""
    run, config = four
    names = [path.name for path in checkpoints.list_checkpoints(run)]
    policy = loop.load_policy(config(), loop.make_task(config().task, 0), run / "initial_policy")
    optimizer = loop.torch.optim.AdamW(policy.model.parameters())
    optimizer.load_state_dict(checkpoints.find(run).state["optimizer"])
    with room_for(size), pytest.raises(WriteError, match=r"cannot write .*step-000009: .*File too large"):
        checkpoints.save(run, checkpoints.Place(9), policy, optimizer, fingerprint="f", keep=1)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names


def test_a_log_for_which_there_is_no_room_is_named(tmp_path):
    log = RunLog(tmp_path)
    with room_for(10), pytest.raises(WriteError, match=r"cannot write .*metrics\.jsonl: File too large"):
        log.metrics(1, {"reward": 0.5})
    log.close()


def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path, capsys):
    with room_for(50_000):
        assert (
            main(["demo", "--model", "tiny", "--out", str(tmp_path), "policy.warm_start_steps=0", "run.threads=1"]) == 1
        )
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"rlvr-ops: cannot write {tmp_path}/initial_policy: " in said
    assert "File too large" in said
    assert said.endswith("; there is no checkpoint yet")


def test_a_disk_without_room_for_a_byte_is_one_line(tmp_path, capsys):
    with room_for(0):
        assert main(["demo", "--model", "tiny", "--out", str(tmp_path / "run"), "policy.warm_start_steps=0"]) == 1
    assert capsys.readouterr().err == f"rlvr-ops: cannot write {tmp_path}/run/.lock: File too large\n"


def test_a_file_that_was_not_finished_replaces_nothing(tmp_path):
    path = tmp_path / "config.yaml"
    write_text(path, "before")
    with room_for(3), pytest.raises(WriteError, match=r"cannot write .*config\.yaml: File too large"):
        write_text(path, "afterwards")
    assert path.read_text() == "before"


def test_a_folder_that_was_not_finished_replaces_nothing(tmp_path):
    folder = tmp_path / "model"
    for text in ("before", "after"):
        with whole_folder(folder) as unfinished:
            (unfinished / "a").write_text(text)
    with pytest.raises(KeyboardInterrupt), whole_folder(folder) as unfinished:  # noqa: PT012
        (unfinished / "a").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "a").read_text() == "after"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_row_that_was_cut_short_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    log = RunLog(tmp_path, resumed_at=1)
    log.metrics(2, {"reward": 0.5})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "reward": 0.5}\n'
    path.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 is not JSON"):
        read_jsonl(path)


def test_an_evaluation_of_which_only_half_was_logged_is_done_again(tmp_path):
    log = RunLog(tmp_path)
    log.evaluation(0, {"correct": [1]})
    log.metrics(0, {"eval/mean_length": 1.0})
    log.evaluation(3, {"correct": [1]})  # killed before the metrics
    log.close()
    assert RunLog(tmp_path, resumed_at=3).evaluations == [{"step": 0, "correct": [1]}]


def command(*arguments):
    return [sys.executable, "-m", "rlvr_trainer", *arguments]


def test_a_run_goes_on_when_nobody_reads_what_it_prints(finished, tmp_path):
    run = tmp_path / "run"
    train = command("train", str(finished / "config.yaml"), f"run.out={run}")
    process = subprocess.Popen(train, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) == 0
    assert (run / "summary.json").is_file()
    assert len(read_jsonl(run / "completions.jsonl")) == 48


def test_a_short_command_that_nobody_reads_ends_quietly(finished):
    process = subprocess.Popen(command("env"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


def test_a_line_that_cannot_be_printed_ends_printing_alone(monkeypatch):
    muted = []
    monkeypatch.setattr(printing, "mute", lambda: muted.append(1))
    monkeypatch.setattr("builtins.print", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "the terminal is gone")))
    printing.say("hello")
    assert muted == [1]


def test_what_a_terminal_cannot_show_is_escaped(tmp_path, finished):
    """Under an ASCII terminal: the name of the folder has an é, and an error repeats it."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    train = command("train", str(finished / "config.yaml"), "run.steps=0", f"run.out={tmp_path}/caf\u00e9")
    done = subprocess.run(train, env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0
    assert done.stderr == b""
    assert b"writing to " in done.stdout
    assert b"caf\\xe9" in done.stdout
    assert load(tmp_path / "caf\u00e9" / "config.yaml").run.out == f"{tmp_path}/caf\u00e9"
