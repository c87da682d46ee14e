"""The loop: it learns, micro-batches change nothing, and an interrupted run ends with the numbers of a whole one."""

import json

import pytest
import torch
from rlvr_trainer import checkpoints, loop
from rlvr_trainer.config import PRESETS
from rlvr_trainer.console import read_jsonl
from rlvr_trainer.judging.verdict import TIME, Verdict
from rlvr_trainer.metrics import StepMetrics
from rlvr_trainer.parsing import ConfigError
from rlvr_trainer.rollouts import collect


def optimizer_of(policy):
    return torch.optim.AdamW(policy.model.parameters(), lr=1e-3)


def informative_batch(policy, task, config):
    """A step's rollouts, with right and wrong answers in two groups of three."""
    torch.manual_seed(4)
    batch, _ = collect(policy, task, 0, config)
    assert (batch.rewards.reshape(3, -1).std(1) > 0).sum() == 2
    return batch


def without_clocks(rows):
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def test_a_policy_learns_what_is_rewarded(small, ready, digits):
    """From one answer in ten to nearly all: sampling, verification, loss and optimiser pull the same way."""
    config = small(
        "policy.warm_start_steps=0",
        "rollout.prompts=6",
        "rollout.group_size=8",
        "rollout.max_new_tokens=2",
        "optim.learning_rate=5e-3",
        "optim.micro_batch=48",
    )
    policy, task = ready(config), digits()
    reference, optimizer = policy.frozen(), optimizer_of(policy)
    torch.manual_seed(0)
    rewards, cursor = [], 0
    for step in range(20):
        batch, cursor = collect(policy, task, cursor, config)
        rewards.append(loop.update(policy, reference, optimizer, batch, config, step)["reward"])
        policy.refresh_sampler()
    assert rewards[0] < 0.3
    assert min(rewards[-3:]) > 0.8


@pytest.mark.parametrize("name", ["ace-grpo", "ace-dapo", "dr_grpo", "ace-luspo", "cispo", "ace-vespo"])
def test_the_size_of_micro_batches_does_not_change_the_update(small, ready, digits, name):
    found = []
    for size in (1, 5, 100):
        config = small(f"algorithm.name={name}", "algorithm.dynamic_sampling=false", f"optim.micro_batch={size}")
        policy = ready(config)
        reference = policy.frozen()
        batch = informative_batch(policy, digits(), config)
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=1.0)
        values = loop.update(policy, reference, optimizer, batch, config, 0)
        found.append((values, torch.cat([p.detach().flatten() for p in policy.model.parameters()])))
    whole_values, whole = found[-1]
    for values, weights in found[:-1]:
        torch.testing.assert_close(weights, whole, rtol=0, atol=1e-6)
        for name_ in ("loss", "grad_norm", "entropy", "kl", "ace/weight/mean", "num_tokens"):
            assert values[name_] == pytest.approx(whole_values[name_], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith("ace-")])
def test_every_preset_makes_off_policy_updates(small, ready, digits, name):
    config = small(f"algorithm.name={name}", "algorithm.dynamic_sampling=false", "optim.updates_per_batch=2")
    policy = ready(config)
    batch = informative_batch(policy, digits(), config)
    before = [p.detach().clone() for p in policy.model.parameters()]
    values = loop.update(policy, policy.frozen(), optimizer_of(policy), batch, config, 0)
    assert 0 <= values["grad_norm"] < float("inf")  # 0 where the first update went past a clip of 3e-4
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


def test_a_surrogate_of_ones_own_trains_as_the_one_that_it_writes_out(small, ready, digits, tmp_path):
    (tmp_path / "mine.py").write_text("def loss(logps, rows):\n    return -rows.advantages * logps\n")
    found = []
    for name in ("reinforce", f"{tmp_path}/mine.py:loss"):
        config = small("algorithm.name=ace-grpo", f"algorithm.surrogate={name}", "optim.updates_per_batch=2")
        policy = ready(config)
        batch = informative_batch(policy, digits(), config)
        optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
        values = loop.update(policy, policy.frozen(), optimizer, batch, config, 0)
        found.append((values["loss"], torch.cat([p.detach().flatten() for p in policy.model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-6)


def test_at_the_first_update_policy_and_reference_agree_exactly(small, ready, digits):
    config = small()
    policy = ready(config)
    batch = informative_batch(policy, digits(), config)
    values = loop.update(policy, policy.frozen(), optimizer_of(policy), batch, config, 0)
    assert values["kl"] == 0.0
    assert values["ace/shift/mean"] == 0.0
    assert values["ace/frac_exploratory"] == 1.0


def test_several_updates_on_a_batch_are_off_policy(small, ready, digits):
    config = small("optim.updates_per_batch=3", "algorithm.epsilon_low=1e-6", "algorithm.epsilon_high=1e-6")
    policy = ready(config)
    batch = informative_batch(policy, digits(), config)
    values = loop.update(policy, policy.frozen(), optimizer_of(policy), batch, config, 0)
    assert values["clip_ratio/region_mean"] > 0.0


def test_a_batch_without_groups_changes_nothing(small, ready, digits):
    config = small()
    policy = ready(config)
    before = policy.head.weight.clone()
    batch, _ = collect(policy, digits(broken=tuple(f"problem {i}" for i in range(3))), 0, config)
    values = loop.update(policy, policy.frozen(), optimizer_of(policy), batch, config, 0)
    assert torch.equal(policy.head.weight, before)
    assert values["num_tokens"] == 0.0


def test_a_gradient_that_is_not_finite_stops_the_run(small, ready, digits):
    config = small()
    policy = ready(config)
    reference = policy.frozen()
    batch = informative_batch(policy, digits(), config)
    with torch.no_grad():
        policy.head.weight[5] = float("nan")
    with pytest.raises(FloatingPointError, match="the gradient norm of step 4 is nan"):
        loop.update(policy, reference, optimizer_of(policy), batch, config, 3)


def test_the_learning_rate_warms_up(small, ready, digits):
    config = small("optim.warmup_steps=4")
    policy = ready(config)
    batch, _ = collect(policy, digits(), 0, config)
    reference, optimizer = policy.frozen(), optimizer_of(policy)
    rates = [loop.update(policy, reference, optimizer, batch, config, s)["learning_rate"] for s in (0, 1, 3, 9)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("precision", ["full", "mixed"])
def test_a_resumed_run_continues_to_the_same_bits(small, tmp_path, precision):
    whole, halves = str(tmp_path / "whole"), str(tmp_path / "halves")
    common = ["run.checkpoint_every=2", "evaluation.every=3", f"policy.precision={precision}", "optim.warmup_steps=3"]
    loop.train(small(*common, "run.steps=4", f"run.out={whole}"), quiet=True)
    loop.train(small(*common, "run.steps=2", f"run.out={halves}"), quiet=True)
    torch.rand(17)  # whatever happened in between is forgotten
    loop.train(small(*common, "run.steps=4", f"run.out={halves}"), resume=True, quiet=True)

    found = [checkpoints.find(tmp_path / name) for name in ("whole", "halves")]
    first, second = (checkpoint.state for checkpoint in found)
    assert first["cursor"] == second["cursor"]
    assert torch.equal(first["random"]["torch"], second["random"]["torch"])
    weights = [(checkpoint.folder / "model.safetensors").read_bytes() for checkpoint in found]
    assert weights[0] == weights[1]
    for index, moments in first["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, second["optimizer"]["state"][index][name]), (index, name)
    rows = [without_clocks(read_jsonl(tmp_path / name / "metrics.jsonl")) for name in ("whole", "halves")]
    by_step = [{(row["step"], "eval/pass@1" in row): row for row in part} for part in rows]
    assert by_step[0] == {key: row for key, row in by_step[1].items() if key != (2, True)}
    completions = [read_jsonl(tmp_path / name / "completions.jsonl") for name in ("whole", "halves")]
    assert completions[0] == completions[1]


def test_a_run_leaves_everything_a_report_needs(small, tmp_path):
    summary = loop.train(small("run.steps=2", "run.table_every=1"))
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "completions.jsonl", "evaluations.jsonl"} <= names
    assert {"summary.json", "report.png", "model"} <= names
    assert json.loads((run / "summary.json").read_text()) == summary
    assert len(read_jsonl(run / "completions.jsonl")) == 2 * 12
    row = read_jsonl(run / "metrics.jsonl")[1]
    assert {"reward", "reward_std", "loss", "kl", "entropy", "grad_norm", "completions/mean_length"} <= set(row)


def test_a_folder_that_holds_a_run_is_not_overwritten(small):
    config = small("run.steps=0")
    loop.train(config, quiet=True)
    with pytest.raises(ConfigError, match=r"holds a run already: choose another run\.out"):
        loop.train(config, quiet=True)
    loop.train(config, overwrite=True, quiet=True)


def test_bad_data_is_reported_before_a_model_is_loaded(small, tmp_path, monkeypatch):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "1+1"}\n')
    monkeypatch.setattr(loop, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match="line 1: the columns 'prompt' are no known format's"):
        loop.train(small(f"task.name={path}"), quiet=True)


def test_means_are_weighted_by_what_they_are_means_of():
    metrics = StepMetrics()
    one = {"kl": torch.tensor(1.0), "ace/shift/mean": torch.tensor(2.0), "ace/weight/max": torch.tensor(3.0)}
    one["off_policy/frac_dropped"] = torch.tensor(0.5)
    two = {"kl": torch.tensor(4.0), "ace/shift/mean": torch.tensor(0.0), "ace/weight/max": torch.tensor(0.0)}
    metrics.add({**one, "head/rows": torch.tensor(7)}, tokens=3, wrong=1)
    metrics.add({**two, "head/rows": torch.tensor(5)}, tokens=1, wrong=0)
    # kl: (3 * 1 + 1 * 4) / 4; the second part has no wrong rollout and so says nothing of ace/.
    wrong_alone = {"ace/shift/mean": 2.0, "ace/weight/max": 3.0, "off_policy/frac_dropped": 0.5}
    assert metrics.result() == {"kl": 1.75, **wrong_alone, "head/rows": 12.0}


def test_extremes_are_those_of_all_micro_batches():
    metrics, name = StepMetrics(), "sampling/importance_sampling_ratio"
    for low, high in ((0.5, 1.5), (0.9, 2.5), (0.7, 1.1)):
        metrics.add({f"{name}/min": torch.tensor(low), f"{name}/max": torch.tensor(high)}, tokens=2, wrong=1)
    assert metrics.result() == pytest.approx({f"{name}/min": 0.5, f"{name}/max": 2.5})


def test_a_mean_over_nothing_is_left_out():
    metrics = StepMetrics()
    metrics.add({"ace/shift/mean": torch.tensor(0.0), "kl": torch.tensor(0.5)}, tokens=4, wrong=0)
    assert metrics.result() == {"kl": 0.5}


def test_a_folder_of_other_things_is_left_alone(small, tmp_path):
    precious = tmp_path / "run" / "checkpoints" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("x")
    with pytest.raises(
        ConfigError, match=r"is not empty and holds no run \(checkpoints, ...\): choose another run.out"
    ):
        loop.train(small("run.steps=1"), overwrite=True)
    assert precious.read_text() == "x"


def test_a_policy_made_on_the_spot_begins_without_a_gradient(untrained):
    assert all(parameter.grad is None for parameter in untrained.model.parameters())


def test_an_evaluation_says_how_many_problems_could_not_be_judged(small, digits, monkeypatch, capsys):
    monkeypatch.setattr(loop, "make_task", lambda *_: digits(broken=("held out 1",)))
    loop.train(small("run.steps=0", "policy.warm_start_steps=0"))
    assert "1 of 4 problems could not be judged and are not counted" in capsys.readouterr().out


def test_one_odd_answer_costs_nobody_else_of_its_group(small, digits, monkeypatch, untrained):
    task = digits()
    own = task.score
    monkeypatch.setattr(task, "score", lambda *pair: [Verdict(0.0, TIME), *own(*pair)[1:]])
    batch, _ = collect(untrained, task, 0, small())
    assert batch.metrics["sampling/groups_kept"] == 3
    assert batch.metrics["judge/time_limit"] == 1
    assert batch.rewards[0] == 0.0
