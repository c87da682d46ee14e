"""Sampling ahead: one step off policy, the same run for the same seeds, and nothing lost on the way."""

import threading
from pathlib import Path

import pytest
import torch
from rlvr_trainer import checkpoints, loop
from rlvr_trainer.console import read_jsonl
from rlvr_trainer.sampling import SamplerError
from rlvr_trainer.sampling.ahead import Ahead
from rlvr_trainer.sampling.generate import GenerateSampler

AHEAD = ["rollout.asynchronous=true", "run.checkpoint_every=2", "algorithm.name=grpo", "rollout.group_size=16"]


@pytest.fixture(autouse=True)
def learns(monkeypatch, digits):
    """A task of which an untaught policy gets a part right, so that every step changes the weights."""
    monkeypatch.setattr(loop, "make_task", lambda *_: digits())


def timeless(run, name="metrics.jsonl"):
    rows = read_jsonl(run / name)
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]


def weights(run):
    return (checkpoints.find(run).folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("precision", ["full", "mixed"])
def test_the_same_seeds_give_the_same_run_and_a_resumed_one_goes_on_to_it(small, tmp_path, precision):
    runs = [tmp_path / name for name in ("one", "two", "halves")]
    common = [*AHEAD, "run.steps=4", f"policy.precision={precision}"]
    for run in runs[:2]:
        loop.train(small(*common, f"run.out={run}"), quiet=True)
    loop.train(small(*common, f"run.out={runs[2]}"), quiet=True)
    for later in (runs[2] / "checkpoints").glob("step-000004"):
        checkpoints.remove(later)
    torch.rand(17)
    loop.train(small(*common, f"run.out={runs[2]}"), resume=True, quiet=True)
    assert weights(runs[0]) == weights(runs[1]) == weights(runs[2])
    assert timeless(runs[0]) == timeless(runs[1]) == timeless(runs[2])
    assert timeless(runs[0], "completions.jsonl") == timeless(runs[2], "completions.jsonl")


def test_a_batch_is_sampled_by_the_weights_before_the_update_that_it_waits_for(small, monkeypatch):
    """Sampled by w0 (step 1), w0 (step 2, while w0 -> w1), w1 (step 3), ...; evaluations by what is there."""
    seen, own = [], GenerateSampler.sample

    def watched(self, prompts, sampling):
        seen.append(float(self.model.lm_head.weight.double().sum()))
        return own(self, prompts, sampling)

    monkeypatch.setattr(GenerateSampler, "sample", watched)
    config = small(*AHEAD, "run.steps=4", "evaluation.samples=1")
    loop.train(config, quiet=True)
    evaluated, *steps, last = seen
    assert steps[0] == steps[1] == evaluated
    assert len({steps[1], steps[2], steps[3], last}) == 4
    lags = [row["sampling/policy_lag"] for row in timeless(Path(config.run.out)) if "loss" in row]
    assert lags == [0.0, 1.0, 1.0, 1.0]


def test_what_is_off_policy_is_corrected_and_said(small):
    config = small(*AHEAD, "run.steps=3", "optim.learning_rate=1e-2")
    loop.train(config, quiet=True)
    first, second, third = [row for row in timeless(Path(config.run.out)) if "loss" in row]
    assert first["sampling/sampling_logp_difference/max"] < 1e-4
    assert second["sampling/sampling_logp_difference/mean"] > 1e-3
    assert third["sampling/effective_sample_size"] < 1
    assert second["sampling/importance_sampling_ratio/max"] <= 3.0


def test_sampling_and_training_happen_at_the_same_time(small, monkeypatch):
    """Each waits for the other: neither could be first."""
    training, sampling = threading.Event(), threading.Event()
    own_update, own_sample = loop.update, GenerateSampler.sample

    def update(*arguments):
        training.set()
        assert sampling.wait(30)
        return own_update(*arguments)

    def sample(self, prompts, asked):
        if threading.current_thread() is not threading.main_thread():
            sampling.set()
            assert training.wait(30)
        return own_sample(self, prompts, asked)

    monkeypatch.setattr(loop, "update", update)
    monkeypatch.setattr(GenerateSampler, "sample", sample)
    loop.train(small(*AHEAD, "run.steps=2"), quiet=True)


def test_an_engine_that_dies_while_the_policy_trains_costs_no_finished_step(small, monkeypatch, tmp_path):
    own = GenerateSampler.sample

    def dying(self, prompts, asked):
        if threading.current_thread() is not threading.main_thread():
            raise SamplerError("the engine is gone")
        return own(self, prompts, asked)

    config = small("rollout.asynchronous=true", "run.steps=3")
    with monkeypatch.context() as patched:
        patched.setattr(GenerateSampler, "sample", dying)
        with pytest.raises(SamplerError, match="the engine is gone"):
            loop.train(config, quiet=True)
    run = tmp_path / "run"
    assert checkpoints.find(run).step == 1
    assert [row["step"] for row in timeless(run) if "loss" in row] == [1]
    loop.train(config, resume=True, quiet=True)
    assert [row["step"] for row in timeless(run) if "loss" in row] == [1, 2, 3]


def test_an_engine_that_takes_no_weights_costs_no_finished_step(small, monkeypatch, tmp_path):
    config = small("run.steps=3")
    undisturbed = small("run.steps=3", "run.checkpoint_every=3", f"run.out={tmp_path / 'undisturbed'}")
    loop.train(undisturbed, quiet=True)

    def refuse(self, weights):
        raise SamplerError("the engine is gone")

    with monkeypatch.context() as patched:
        patched.setattr(GenerateSampler, "update", refuse)
        with pytest.raises(SamplerError, match="the engine is gone"):
            loop.train(config, quiet=True)
    run = tmp_path / "run"
    assert checkpoints.find(run).step == 1
    loop.train(config, resume=True, quiet=True)
    assert timeless(run) == timeless(tmp_path / "undisturbed")


@pytest.mark.parametrize("error", [FloatingPointError("the gradient norm is nan"), KeyboardInterrupt()])
def test_nothing_samples_on_after_an_update_that_failed(small, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(loop, "update", fail)
    with pytest.raises(type(error)):
        loop.train(small(*AHEAD, "run.steps=3", "rollout.max_new_tokens=900"), quiet=True)
    assert not [thread for thread in threading.enumerate() if thread.name == "sampling-ahead"]


def test_a_batch_sampled_ahead_is_left_out_once_nothing_would_correct_for_it(small, tmp_path):
    loop.train(small(*AHEAD, "run.steps=4", "run.keep_checkpoints=9"), quiet=True)
    now = small(*AHEAD, "run.steps=4", "rollout.asynchronous=false", "run.keep_checkpoints=9")
    loop.train(now, resume=True, start_from="step-000002", quiet=True)
    rows = [row for row in timeless(tmp_path / "run") if "loss" in row]
    assert [row["sampling/policy_lag"] for row in rows] == [0.0, 1.0, 0.0, 0.0]
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in rows[2:])


def test_an_engine_that_takes_no_weights_while_one_samples_ahead_costs_no_finished_step(small, monkeypatch, tmp_path):
    config = small(*AHEAD, "run.steps=4")
    own, calls = GenerateSampler.update, []

    def refuse(self, weights):
        calls.append(1)
        if len(calls) == 2:
            raise SamplerError("the engine is gone")
        own(self, weights)

    with monkeypatch.context() as patched:
        patched.setattr(GenerateSampler, "update", refuse)
        with pytest.raises(SamplerError, match="the engine is gone"):
            loop.train(config, quiet=True)
    loop.train(config, resume=True, quiet=True)
    whole = small(*AHEAD, "run.steps=4", f"run.out={tmp_path / 'whole'}")
    loop.train(whole, quiet=True)
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_work_ahead_has_the_threads_of_who_starts_it():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert Ahead(torch.get_num_threads).wait() == before + 1
    finally:
        torch.set_num_threads(before)


def test_what_fails_ahead_is_kept_and_not_raised():
    ahead = Ahead(lambda: 1 / 0)
    assert ahead.wait() is None
    assert isinstance(ahead.error, ZeroDivisionError)
