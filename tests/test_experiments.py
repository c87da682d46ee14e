"""The experiments: the plan is the trainer's, runs repeat and resume to the digit, the analysis is right on made-up numbers."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from rlvr_trainer.config import load
from rlvr_trainer.loop import train
from rlvr_trainer.policies import load_policy
from rlvr_trainer.prompts import encode
from rlvr_trainer.sampling import Sampling
from rlvr_trainer.sampling.generate import GenerateSampler
from rlvr_trainer.tasks import make_task
from safetensors.torch import load_file

from experiments import ace, analysis, report, steady, theorem
from experiments.advantages import ADVANTAGES
from experiments.analysis import Pairs, at_equal_pass1, compare, holm, not_rejected, pass_rates, sign_flip
from experiments.plan import ARMS, LONGER, ON_SMOLLM2, ON_TINY, TASKS, Cell, cells
from experiments.shared_prompts import SharedPrompts

SHORT = [
    "policy.warm_start_steps=60", "evaluation.samples=8", "task.held_out=6", "rollout.prompts=4", "policy.warm_start_noise=0.2",
]  # fmt: skip


@pytest.fixture
def short(monkeypatch):
    """Cells of seconds, whose evaluations are in two parts."""
    setup = TASKS["chain_sum"]
    brief = replace(setup, settings=[*setup.settings, *SHORT], evaluated=(0, 2, 4), part=4)
    monkeypatch.setitem(TASKS, "chain_sum", brief)


def run(cell, home, **keywords):
    from experiments.cell import run

    return run(cell, home, **keywords)


def test_every_cell_of_the_plan_is_there_once_and_has_settings_that_the_trainer_takes():
    planned = cells()
    assert len(set(planned)) == len(planned)
    assert {(c.task, c.arm) for c in planned if c.task in ON_TINY} == set(product(ON_TINY, ARMS))
    assert {c.task for c in planned} == set(TASKS) == {*ON_TINY, LONGER, *ON_SMOLLM2}
    assert [c.name for c in planned[-4:]] == [f"{task}/{arm}/2" for arm in ("grpo", "ace-grpo") for task in ON_SMOLLM2]
    assert all(Cell.named(c.name) == c for c in planned)
    for cell in planned:
        if cell.seed == 0:
            assert cell.config.evaluation.samples >= 64
            assert cell.config.task.held_out >= 128


def test_arms_sample_and_update_equally():
    for cell in cells():
        config = cell.config
        one = Cell(cell.task, "grpo", cell.seed).config
        assert config.rollout == one.rollout
        assert config.run == one.run
        assert config.algorithm.max_resamples == 0 or not config.algorithm.dynamic_sampling


@pytest.mark.parametrize(
    "name",
    ["chain_sum/grpo", "chain_sum/GRPO/0", "sum/grpo/0", "chain_sum/grpo/x", "chain_sum/kl/4", "smollm2-gcd/kl/0"],
)
def test_a_cell_that_is_none_is_refused_by_name(name):
    with pytest.raises(ValueError, match="no cell is called"):
        Cell.named(name)


def test_a_cell_learns_what_the_trainer_learns(short, tmp_path):
    run(Cell("chain_sum", "ace-grpo", 0), tmp_path)
    settings = [*TASKS["chain_sum"].settings, *ARMS["ace-grpo"].settings, "run.steps=4"]
    train(load("demo-tiny", [*settings, f"run.out={tmp_path / 'run'}"]), quiet=True)
    ours = torch.load(tmp_path / "chain_sum/ace-grpo/0/state.pt", weights_only=True)["model"]
    theirs = load_file(tmp_path / "run/model/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("arm", ["grpo", "shuffled", "ace-moving", "ace-twice"])
def test_a_cell_that_was_stopped_anywhere_goes_on_to_the_same_digits(short, tmp_path, arm):
    cell = Cell("chain_sum", arm, 1)
    whole = run(cell, tmp_path / "whole")
    stops = 0
    while (parts := run(cell, tmp_path / "parts", until=lambda: True)) is None:
        stops += 1
    assert stops == 4 + 3  # steps, and evaluations in the middle of which
    assert parts["rows"] == whole["rows"]
    assert [row["step"] for row in whole["rows"]] == [0, 2, 4]


def test_arms_start_alike_and_then_differ(short, tmp_path):
    found = {arm: run(Cell("chain_sum", arm, 0), tmp_path)["rows"] for arm in ("grpo", "constant", *ADVANTAGES)}
    starts = [rows[0] for rows in found.values()]
    assert all(start == starts[0] for start in starts)
    ends = [json.dumps(rows[-1]) for rows in found.values()]
    assert len(set(ends)) == len(found)


def test_results_are_kept_and_a_line_that_was_cut_short_is_none(tmp_path):
    rows = [{"cell": f"{task}/grpo/{seed}", "rows": []} for task in TASKS for seed in (0, 1)]
    for row in rows:
        ace.keep(row, tmp_path)
    path = tmp_path / f"{next(iter(TASKS))}.jsonl"
    whole = path.read_text()
    for cut in (whole[:-20], whole[:-2] + '{"step": 1}'):
        path.write_text(cut)
        assert len(ace.results(tmp_path)) == len(rows) - 1
    ace.keep(rows[1], tmp_path)
    assert ace.results(tmp_path) == {Cell.named(row["cell"]): row for row in rows}


def test_the_command_runs_what_is_left_and_stops_at_its_budget(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ace, "RESULTS", tmp_path)
    assert ace.run_all(cells()[:2], 0.0, 1, tmp_path / "runs", tmp_path / "results") == (0, 0)
    assert ace.main(["--list"]) == 0
    assert "chain_sum/grpo/0" in capsys.readouterr().out


def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path, capfd):
    (tmp_path / "file").touch()
    assert ace.run_all(cells()[:2], 1.0, 2, tmp_path / "file", tmp_path / "results") == (0, 2)
    seen = capfd.readouterr().err
    assert all(f"{cell.name} failed" in seen for cell in cells()[:2])
    assert "NotADirectoryError" in seen


@pytest.mark.parametrize(
    "wrong", [["--budget", "nan"], ["--budget", "-1"], ["--processes", "0"], ["--again", "chain_sum/grpo/99"]]
)
def test_the_command_refuses_by_name(wrong, capsys):
    with pytest.raises(SystemExit):
        ace.main(wrong)
    assert wrong[0] in capsys.readouterr().err.splitlines()[-1]


def test_workers_end_when_who_started_them_is_killed():
    code = (
        "import multiprocessing, os, time; from concurrent.futures import ProcessPoolExecutor\n"
        "from experiments.ace import end_with_parent\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('fork'), end_with_parent)\n"
        "    print(pool.submit(os.getpid).result(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{worker}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


def test_pass_rates_are_the_unbiased_ones():
    found = pass_rates(np.array([[0, 1, 4]]), 4, 2)
    np.testing.assert_allclose(found, [[0.0, 0.5, 1.0]])


def test_equal_pass1_is_a_mean_over_the_common_range():
    first = np.array([[0.1, 0.9], [0.3, 0.5]])  # falls by 2 for 1
    second = np.array([[0.1, 0.9], [0.2, 0.9], [0.15, 0.0], [0.5, 0.6]])  # a step back that is passed over
    one, other = at_equal_pass1(first, second)
    assert one == pytest.approx(0.7, abs=1e-3)
    assert other == pytest.approx((0.9 + (0.9 + 0.8) / 2) / 2, abs=1e-3)
    same = np.array([[0.1, 0.9], [0.1, 0.5]])
    assert all(math.isnan(value) for value in at_equal_pass1(first, same))
    longer = first[[0, 1, 1, 1]]
    both = at_equal_pass1(np.stack([longer, second]), np.stack([second, longer]))
    np.testing.assert_allclose(both, [[one, other], [other, one]], rtol=1e-12)


def simulated(rng, shift, seeds=8, samples=64):
    """Two arms whose pass rates differ by `shift` at the end, or by what is peculiar to each seed on each problem."""

    def rates(more):
        p = np.clip(rng.normal(0.3, 0.1, (seeds, 1, 64)) + more * np.linspace(0, 1, 5)[None, :, None], 0, 1)
        correct = rng.binomial(samples, p)
        return pass_rates(correct, samples, 1), pass_rates(correct, samples, samples)

    return Pairs(rates(0.2 + shift), rates(0.2))


def test_the_bootstrap_finds_a_difference_that_is_there():
    rng = np.random.default_rng(0)
    found = compare([simulated(rng, 0.1) for _ in range(3)], family=21, resamples=500)["pass@1"]
    assert found.corrected[0] > 0
    assert found.corrected[0] <= found.interval[0] < found.mean < found.interval[1] <= found.corrected[1]
    assert found.given_problems[0] > found.corrected[0]
    assert found.mean == pytest.approx(0.1, abs=0.02)
    assert (found.p, found.said, found.pairs) == (pytest.approx(5e-5, abs=1e-6), 24, 24)


def test_the_bootstrap_is_conservative_where_seeds_on_problems_are_all_that_varies():
    """There it has three times the variance of the mean."""
    rng = np.random.default_rng(0)
    drawn = [analysis._resampled(simulated(rng, 0.0), rng, 200) for _ in range(60)]
    spread = np.std([observed[0].mean() for observed, _ in drawn])
    wide = np.sqrt(np.mean([deviations[0].var() for _, deviations in drawn]))
    assert wide / spread == pytest.approx(math.sqrt(3), abs=0.25)


def test_the_bootstrap_counts_what_varies_from_problem_to_problem():
    task, shift = simulated(np.random.default_rng(1), 0.0), np.linspace(-0.3, 0.3, 64)
    task = Pairs((task.one[0] * 0.1 + shift, task.one[1]), (task.other[0] * 0.1, task.other[1]))
    _, deviations = analysis._resampled(task, np.random.default_rng(0), 2000)
    assert deviations[0].std() == pytest.approx(shift.std() / 8, rel=0.15)


def test_means_that_are_not_rejected_hold_the_true_one_as_often_as_they_should():
    rng, held = np.random.default_rng(0), 0
    for _ in range(200):
        low, high = not_rejected(rng.normal(0.3, 1.0, 9), 0.2, rng)
        held += low <= 0.3 <= high
    assert held / 200 == pytest.approx(0.8, abs=0.07)
    values = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
    low, high = not_rejected(values, 0.05, rng)
    assert sign_flip(values - low - 1e-9, rng) > 0.05 >= sign_flip(values - low + 1e-9, rng)
    assert low + high == pytest.approx(0.8)
    assert not_rejected(values[:4], 0.05, rng) == (-math.inf, math.inf)


def test_pairs_that_say_nothing_are_counted_and_a_task_with_one_left_gives_no_interval():
    rng = np.random.default_rng(0)
    tasks = [simulated(rng, 0.0, seeds=4) for _ in range(2)]
    for rates in tasks[0].one:
        rates[1:3] = rates[1:3, :1]  # two runs that stay where they were
    found = compare(tasks, family=3, resamples=50)
    assert (found["pass@1"].said, found["pass@64 at equal pass@1"].said) == (8, 6)
    assert not math.isnan(found["pass@64 at equal pass@1"].p)
    for rates in tasks[0].one:
        rates[3] = rates[3, :1]
    lost = compare(tasks, family=3, resamples=50)["pass@64 at equal pass@1"]
    assert (lost.said, lost.pairs) == (5, 8)
    assert not math.isnan(lost.mean)
    assert all(math.isnan(value) for value in (*lost.interval, *lost.corrected, *lost.given_problems, lost.p))


def test_runs_on_other_problems_are_no_pair():
    found = made_up(["grpo", "ace-grpo"])
    found[Cell("lcm", "grpo", 1)]["fingerprint"] = "others"
    assert len(analysis.pairs(found, "gcd", "ace-grpo", "grpo").one[0]) == 2
    with pytest.raises(ValueError, match=r"lcm/ace-grpo/1 and lcm/grpo/1 .* same problems"):
        analysis.pairs(found, "lcm", "ace-grpo", "grpo")


def test_sign_flips_are_exact_for_few_pairs():
    rng = np.random.default_rng(0)
    assert sign_flip(np.array([1.0, 2.0, 3.0, 4.0]), rng) == 2 / 16
    assert sign_flip(np.array([1.0, -1.0]), rng) == 1.0


def test_holm_is_monotone_and_at_most_one():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def made_up(arms, seeds=2):
    """Results that nobody ran."""
    rng, found = np.random.default_rng(0), {}
    for task, arm, seed in product(ON_TINY, arms, range(seeds)):
        level = np.linspace(0.1, 0.3, 8)[:, None] * np.ones((1, 16))
        other = dict.fromkeys(report.ENDS.values(), 0.5)
        training = {"num_tokens": 10.0, "ace/weight/mean": 1.5, "ace/weight/max": 2.5}
        rows = [
            {"step": step, "correct": correct, **other, "training": training}
            for step, correct in zip(TASKS[task].evaluated, rng.binomial(64, level).tolist(), strict=True)
        ]
        cell = Cell(task, arm, seed)
        machine = {"processor": "an abacus"}
        found[cell] = {"cell": cell.name, "fingerprint": task, "rows": rows, "seconds": 36.0, "machine": machine}
    return found


def test_the_report_makes_tables_and_plots_of_whatever_is_there(tmp_path, monkeypatch):
    arms = ["grpo", "ace-grpo", "constant", "ace-2"]
    monkeypatch.setattr(report, "results", lambda: made_up(arms))
    monkeypatch.setattr(analysis, "RESAMPLES", 20)
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(report, "PLOTS", tmp_path / "plots")
    names = ["spent", "ends", "by task", "weights", "longer", *report.FAMILIES]
    report.PAGE.write_text(
        "\n".join(f"# {name}\n{report.BEGIN.format(name)}{report.END}" for name in names) + "\nlast\n"
    )
    report.main()
    once = report.PAGE.read_text()
    assert once.endswith("last\n")
    assert "24 of" in once
    assert "0.2 hours of one core" in once
    assert "an abacus" in once
    assert once.count("| `ace-grpo` − `grpo` | pass@64 |") == 1
    assert "`ace-2` − `ace-grpo`" in once
    assert "| `ace-2` | 1.50, 2.50 | 1.50, 2.50 | 1.50, 2.50 |" in once
    assert "`ace-dapo`" not in once
    plots = {path.name: path.read_bytes() for path in report.PLOTS.glob("*.svg")}
    assert {"trade.svg", "pass-at-k.svg", "errors.svg", "theorem.svg", "what-ace-hangs-on.svg"} <= plots.keys()
    report.main()
    assert report.PAGE.read_text() == once
    assert {path.name: path.read_bytes() for path in report.PLOTS.glob("*.svg")} == plots


def test_memory_that_grows_is_seen():
    assert steady.drift([1.0] + [10.0] * 19) == 0.0
    assert steady.drift([1.0] + [10.0] * 18 + [10.5]) == pytest.approx(0.05)


def test_the_theorem_run_decomposes_the_librarys_own_gradient(monkeypatch):
    monkeypatch.setattr(theorem, "STEPS", 8)
    for alpha, reduction in theorem.RUNS.values():
        rows = theorem.train(alpha, reduction)
        assert all(row["identity"] < 1e-12 for row in rows)
        assert rows[0]["overconfident"] == 0.0
        assert rows[-1]["solved"] > rows[0]["solved"]


def test_the_listed_answers_are_all_answers():
    world = theorem.World.make(torch.Generator().manual_seed(0))
    theta = torch.randn(theorem.FEATURES, int(world.prefixes.max()) + 1, theorem.VOCABULARY, dtype=torch.float64)
    total = world.logps(theta).sum(-1).exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)
    assert len(analysis.OUTCOMES) == 3


def test_a_prompt_that_is_read_once_has_the_same_completions():
    config = load("demo-tiny", ["policy.warm_start_steps=30", "task.held_out=5", "run.threads=1"])
    task = make_task(config.task)
    policy = load_policy(config, task)
    task.close()
    prompts = encode(policy.tokenizer, [*policy.texts([p.prompt for p in task.held_out]), "1 + 1 ="])
    asked = Sampling(4, 0.9, 8, 3, ())
    one, other = (
        made(policy.model, policy.tokenizer, policy.eos_ids, batch_size=size).sample(prompts, asked)
        for made, size in ((GenerateSampler, 512), (SharedPrompts, 16))
    )
    assert [found.token_ids for found in one] == [found.token_ids for found in other]
    assert [found.finish_reason for found in one] == [found.finish_reason for found in other]
    for a, b in zip(one, other, strict=True):
        assert a.logps == pytest.approx(b.logps, abs=1e-5)
