import json

import pytest
import torch

from benchmarks import on_gpu
from benchmarks.cases import CPU_CASES, GPU_CASES, Case
from benchmarks.chart import BEGIN, END, rewrite
from benchmarks.measure import bare_matmuls, differentiate, interleave, peak_bytes, relative_error, spread
from benchmarks.systems import systems

CPU = torch.device("cpu")
TINY = [Case("ace", 16, 8, 50, 4), Case("ace", 16, 8, 50, 4, active=0.5), Case("grpo", 16, 8, 50, 4, peaked=True)]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_system_computes_the_same_loss_and_gradients(case):
    batch = case.batch(CPU)
    here, _ = systems(case)
    truth = differentiate(here[0], batch)
    assert {system.kind for system in here} >= {"eager", "rlvr_ops"}
    for system in here:
        assert relative_error(differentiate(system, batch), truth) < 1e-5, system


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_no_token_of_a_batch_is_clipped_and_the_share_of_active_rollouts_is_as_said(case):
    batch = case.batch(CPU)
    logps = torch.log_softmax(batch.hidden @ batch.weight.T, -1).gather(-1, batch.ids[..., None])[..., 0]
    assert ((logps - batch.old).exp() - 1).abs().max() < 0.2
    assert batch.active.sum() * (case.rows // case.rollouts) == case.active_rows


def test_peak_memory_counts_what_lives_at_once_and_not_what_came_and_went():
    def step():
        torch.ones(1 << 18).sum()  # 1 MiB, gone again
        return torch.ones(1 << 18) + 1  # 2 MiB at once

    assert peak_bytes(step, CPU) == pytest.approx(2 << 20, rel=0.01)


def test_systems_take_turns_and_another_one_begins_each_round():
    order = []
    steps = [lambda: order.append("a"), lambda: order.append("b")]
    times = interleave(steps, CPU, seconds=0, least=3, most=5)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(mine) for mine in times] == [3, 3]


def test_the_spread_of_one_run_is_that_run():
    assert spread([7.0]) == {"median_ms": 7.0, "p20_ms": 7.0, "p80_ms": 7.0, "min_ms": 7.0, "runs": 1}


def test_the_bare_products_cover_the_active_rows_alone():
    case = TINY[1]
    step = bare_matmuls(case, case.batch(CPU))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        step()
    flops = sum(event.flops for event in profile.key_averages())
    assert flops == 6 * case.active_rows * case.hidden * case.vocabulary


def test_case_names_are_distinct_because_they_are_file_names():
    for cases in (CPU_CASES, GPU_CASES):
        assert len({case.name for case in cases}) == len(cases)


def test_rewriting_the_page_twice_changes_nothing():
    row = {"system": "rlvr_ops", "median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "runs": 3, "ratio_to_eager": 0.5}
    row |= {"peak_bytes": 1000, "error": 0.0}
    case = TINY[0].describe()
    result = {
        "case": case,
        "systems": [row],
        "absent": {},
        "device": "d",
        "versions": {"torch": "1"},
        "command": "c",
        "load_average": 0.5,
    }
    once = rewrite(f"before\n{BEGIN}\nold\n{END}\nafter\n", [result])
    assert "old" not in once
    assert once.startswith("before")
    assert once.endswith("after\n")
    assert rewrite(once, [result]) == once


def test_the_command_for_a_machine_with_a_gpu_runs_every_stage_and_keeps_what_it_found(tmp_path, capsys):
    """On toy shapes and a CPU; that a stage fails does not stop the next."""
    stages = ["products", "cases", "tuning"]
    on_gpu.main(["--tiny", "--device", "cpu", "--minutes", "4", "--out", str(tmp_path), "--only", *stages])
    printed = capsys.readouterr().out
    assert all(f"{stage}: exit 0" in printed for stage in stages), printed
    assert {path.stem for path in (tmp_path / "cases").glob("*.json")} == {
        "ace-16x8x50-float32-100-active",
        "grpo-16x8x50-float32-100-active",
    }
    assert {row["form"] for row in json.loads((tmp_path / "products.json").read_text())} >= {
        "logits",
        "d_weight += fp32",
    }
    tuned = {row["what"] for row in json.loads((tmp_path / "tuning.json").read_text())}
    assert tuned == {"single_pass", "two_pass", "fused_policy", "lse_fold", "dlogits", "weigh"}
    assert "x products" in printed


def test_a_stage_that_runs_out_of_time_is_ended_and_said(tmp_path, capsys):
    on_gpu.main(["--tiny", "--device", "cpu", "--minutes", "0.02", "--out", str(tmp_path), "--only", "cases"])
    assert "cases: exit 124" in capsys.readouterr().out
