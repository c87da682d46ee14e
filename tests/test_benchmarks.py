import importlib.metadata
import re

import pytest
import torch

from benchmarks import measure as measuring
from benchmarks.cases import Case, cases, variations
from benchmarks.measure import Measured, bare_matmuls, interleave, measure, peak_bytes, spread, too_far, truth, wrong
from benchmarks.systems import SYSTEMS, Missing, Outputs, System, clipped_loss, eager, systems

CPU = torch.device("cpu")
ONCE = {"seconds": 0, "least": 1, "most": 1}
TINY = variations(Case("ace", 16, 8, 50, 4))
IN_PLAIN_PYTORCH = {"rlvr_ops", "rlvr_ops-two_pass", "verl-torch", "liger-grpo"}


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_every_system_computes_what_the_truth_does(case):
    rows, absent, times = found = measure(case, CPU, IN_PLAIN_PYTORCH, **ONCE)
    assert rows.keys() >= {"products", "eager-cross_entropy", "eager-logsumexp", "rlvr_ops"}
    assert not [one for one in absent.values() if "computes something else" in one["reason"]]
    assert not wrong(found)
    for row in rows.values():
        assert all(error < 1e-5 for error in row.get("errors", {}).values()), row
        assert row["kind"] == "products" or row["peak_bytes"] >= row["workspace_bytes"] >= 0
        assert len(times[row["key"]]) == 1


@pytest.mark.parametrize("case", TINY[:4], ids=lambda case: case.name)
def test_the_truth_is_the_loss_differentiated_in_float64_over_all_rows_at_once(case):
    batch = case.batch(CPU)
    hidden, weight = (x.double().requires_grad_() for x in (batch.hidden, batch.weight))
    logits = hidden @ weight.T
    logps = logits.log_softmax(-1).gather(-1, batch.ids[..., None])[..., 0]
    want = truth(case, batch)
    torch.testing.assert_close(want.logps, logps.detach())
    torch.testing.assert_close(want.entropy, torch.distributions.Categorical(logits=logits).entropy().mean().detach())
    if not case.forward:
        ref = batch.ref.double() if case.loss == "ace" else None
        clipped_loss(logps, batch.old.double(), batch.advantages.double(), ref).backward()
        torch.testing.assert_close((want.d_hidden, want.d_weight), (hidden.grad, weight.grad))


def test_what_cannot_be_loaded_or_called_is_named_with_the_reason_and_the_others_go_on(monkeypatch):
    def no_package(case):
        raise Missing("it needs a hammer")

    def fails(batch):
        raise RuntimeError("no kernel image\nsecond line")

    def wrong(batch):
        return Outputs(3 * eager(TINY[0])(batch).loss)

    def not_a_number(batch):
        return Outputs(float("nan") * eager(TINY[0])(batch).loss)

    chosen = [
        *SYSTEMS[:5],
        System("a", "A", lambda case: fails, package="surely-not-installed"),
        System("b", "B", no_package),
        System("c", "C", lambda case: fails),
        System("d", "D", lambda case: wrong),
        System("e", "E", lambda case: not_a_number),
    ]
    monkeypatch.setattr(measuring, "systems", lambda case: chosen)
    rows, absent, _ = measure(TINY[0], CPU, **ONCE)
    assert rows.keys() == {system.key for system in SYSTEMS[:5]}
    reasons = {key: one["reason"] for key, one in absent.items()}
    assert reasons["a"] == "surely-not-installed is not installed"
    assert reasons["b"] == "it needs a hammer"
    assert reasons["c"] == "RuntimeError: no kernel image"
    assert reasons["d"].startswith("computes something else")
    assert reasons["e"].startswith("computes something else"), "not a number is never comparable"


def test_a_version_stands_in_the_name():
    system = System("x", "PyTorch", lambda case: lambda batch: Outputs(), package="torch")
    assert system.title == f"PyTorch {importlib.metadata.version('torch')}"
    assert system.enter(TINY[0])(None) == Outputs()


def test_a_gradient_of_ours_that_is_further_off_than_eagers_fails_the_case():
    eager = [{"d_weight": 2e-3, "logps": 1e-3, "loss": 1e-9}, {"d_weight": 3e-3, "logps": 2e-3, "loss": 0.0}]
    assert not too_far({"d_weight": 2e-3, "logps": 1e-3, "loss": 9e-4}, eager, wide=True)
    assert re.match(r"d_weight is 2\.11e-03 from the truth", too_far({"d_weight": 2.11e-3}, eager, wide=True))
    assert not too_far({"d_weight": 2.7e-3}, eager, wide=False)  # one rounding more: the root of 2.10 and 1.95 squared
    assert re.match(r"d_weight is 2\.90e-03 from the truth", too_far({"d_weight": 2.9e-3}, eager, wide=False))
    assert re.match(r"logps is 2\.00e-03 from the truth", too_far({"logps": 2e-3}, eager, wide=False))
    assert too_far({"logps": float("nan")}, eager, wide=False)
    rows = {"rlvr_ops": {"wrong": "rlvr_ops: logps is off"}, "trl": {}}
    assert wrong(Measured(rows, {}, {})) == ["rlvr_ops: logps is off"]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_no_token_of_a_batch_is_clipped_and_the_share_of_active_rollouts_is_as_said(case):
    batch = case.batch(CPU)
    logps = torch.log_softmax(batch.hidden @ batch.weight.T, -1).gather(-1, batch.ids[..., None])[..., 0]
    assert ((logps - batch.old).exp() - 1).abs().max() < 0.2
    if not case.forward:
        assert (batch.advantages != 0).sum() * (case.rows // case.rollouts) == case.active_rows


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


@pytest.mark.parametrize(("case", "products"), [(TINY[1], 3), (TINY[2], 1), (TINY[6], 2)], ids=lambda x: str(x))
def test_the_bare_products_are_the_useful_flops_of_the_active_rows(case, products):
    assert case.flops == 2 * products * case.active_rows * case.hidden * case.vocabulary
    assert flops_of(bare_matmuls(case, case.batch(CPU))) == case.flops


def flops_of(step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        step()
    return sum(event.flops for event in profile.key_averages())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_a_suite_has_distinct_names_because_they_are_file_names_and_every_kind_of_case(device, quick):
    chosen = cases(device, quick=quick)
    assert len({case.name for case in chosen}) == len(chosen)
    assert {case.loss for case in chosen} == {"ace", "grpo", "logps"}
    assert {case.active for case in chosen} == {1.0, 0.7, 0.5, 0.25}
    for kind in ("peaked", "entropy", "frozen"):
        assert any(getattr(case, kind) for case in chosen)
    assert all(case.rows % case.rollouts == 0 for case in chosen)


def test_systems_have_distinct_keys_and_only_those_that_give_an_entropy_are_asked_for_one():
    assert len({system.key for system in SYSTEMS}) == len(SYSTEMS)
    asked = {system.key for system in systems(Case("ace", 16, 8, 50, 4, entropy=True))}
    assert {"rlvr_ops", "trl", "verl-torch", "verl-triton", "liger-scaled_ce"} <= asked
    assert not {"torch-chunked", "cce-exact"} & asked
