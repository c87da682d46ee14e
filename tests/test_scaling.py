"""The cost model beside what runs; and a head on several ranks, simulated in one process, beside the whole."""

import json
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from rlvr_kernels.cost import H100_BF16, Problem, Rates, forward_only, single_pass, two_pass

from benchmarks import scaling
from benchmarks.cases import LEADING, Case
from benchmarks.measure import peak_bytes
from benchmarks.peers import PEERS
from benchmarks.systems import SYSTEMS, Outputs, compute, ours
from rlvr_ops import token_logps

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
TWIN_BLOCK_BYTES = 8 << 20  # the temporary block of a PyTorch twin


def head(dtype, rows=24, hidden=16, vocabulary=101):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, hidden, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    coef = torch.randn(rows, generator=generator, dtype=torch.float64) / rows
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    return states.to(dtype), weight.to(dtype), ids, coef.to(dtype)


def whole(states, weight, ids, coef, workspace_bytes):
    """logp, d_hidden and d_weight of the head on one rank."""
    states, weight = states.detach().requires_grad_(), weight.detach().requires_grad_()
    logp = token_logps(states, weight, ids, workspace_bytes=workspace_bytes).logps
    return logp.detach(), *torch.autograd.grad(logp, (states, weight), coef)


def split(weight, ranks):
    """(first row, rows) of the weight for each rank; the slices differ by at most one row."""
    ends = [weight.shape[0] * rank // ranks for rank in range(ranks + 1)]
    return [(first, weight[first:stop]) for first, stop in pairwise(ends)]


def look(states, shard, ids, workspace_bytes):
    """What one rank tells the others of each row: its slice's log-sum-exp, and the target's logit or -inf."""
    first, weight = shard
    there = (ids >= first) & (ids < first + len(weight))
    mine = (ids - first).clamp(0, len(weight) - 1)
    logit = (states * weight[mine]).sum(1)
    lse = logit - token_logps(states, weight, mine, workspace_bytes=workspace_bytes).logps
    return lse, logit.where(there, -math.inf)


def combine(seen):
    """(logp, lse) of the whole rows."""
    lse = torch.logsumexp(torch.stack([lse for lse, _ in seen]), 0)
    return torch.stack([logit for _, logit in seen]).amax(0) - lse, lse


def pull(states, shard, ids, lse, coef, workspace_bytes):
    """This rank's part of d_hidden, and its d_weight: dL/dlse = -coef times the slice's share of the probability."""
    states, weight = states.detach().requires_grad_(), shard[1].detach().requires_grad_()
    mine, logit = look(states, (shard[0], weight), ids, workspace_bytes)
    there = logit.isfinite()
    share = (mine - lse).exp().detach()
    return torch.autograd.grad(
        (logit, mine), (states, weight), (coef.where(there, torch.zeros_like(coef)), -coef * share)
    )


def assert_near(got, want, dtype):
    assert torch.linalg.vector_norm(got - want) <= TOLERANCE[dtype] * torch.linalg.vector_norm(want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("workspace_bytes", [1 << 10, 1 << 20])
def test_a_vocabulary_on_several_ranks_gives_the_unsharded_head(dtype, ranks, workspace_bytes):
    states, weight, ids, coef = head(dtype)
    want_logp, d_hidden, d_weight = whole(states, weight, ids, coef, workspace_bytes)
    shards = split(weight, ranks)
    logp, lse = combine([look(states, shard, ids, workspace_bytes) for shard in shards])
    parts = [pull(states, shard, ids, lse, coef, workspace_bytes) for shard in shards]
    assert_near(logp, want_logp, dtype)
    assert_near(lse, (states @ weight.T).logsumexp(1), dtype)
    assert_near(torch.cat([part[1] for part in parts]), d_weight, dtype)
    assert_near(torch.stack([part[0] for part in parts]).sum(0), d_hidden, dtype)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_sharded_head_has_the_gradient_of_full_logits(ranks):
    states, weight, ids, coef = head(torch.float64)
    h, w = states.clone().requires_grad_(), weight.clone().requires_grad_()
    logps = torch.log_softmax(h @ w.T, -1).gather(1, ids[:, None])[:, 0]
    d_hidden, d_weight = torch.autograd.grad((coef * logps).sum(), (h, w))
    shards = split(weight, ranks)
    logp, lse = combine([look(states, shard, ids, 1 << 20) for shard in shards])
    parts = [pull(states, shard, ids, lse, coef, 1 << 20) for shard in shards]
    assert_near(logp, logps.detach(), torch.float64)
    assert_near(torch.cat([part[1] for part in parts]), d_weight, torch.float64)
    assert_near(sum(part[0] for part in parts), d_hidden, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [2, 4])
def test_data_parallel_ranks_add_up_to_the_whole_batch(dtype, ranks):
    states, weight, ids, coef = head(dtype)
    logp, d_hidden, d_weight = whole(states, weight, ids, coef, 1 << 20)
    pieces = [whole(*some, 1 << 20) for some in zip(
        states.chunk(ranks), [weight] * ranks, ids.chunk(ranks), coef.chunk(ranks), strict=True
    )]  # fmt: skip
    assert_near(torch.cat([piece[0] for piece in pieces]), logp, dtype)
    assert_near(torch.cat([piece[1] for piece in pieces]), d_hidden, dtype)
    assert_near(sum(piece[2] for piece in pieces), d_weight, dtype)


def ran(action):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as profile:
        action()
    return sum(event.flops for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))


def test_the_model_counts_the_products_that_run():
    case = Case("ace", 32, 16, 101, 4)
    problem = Problem(32, 16, 101, 32, 32, 4, 4, 4)
    batch = case.batch(CPU)
    once = ran(partial(compute, ours(case, schedule="single_pass"), batch, case))
    assert once == single_pass(problem, H100_BF16, chunk_rows=32).flops

    def score(batch):
        return Outputs(token_logps(batch.hidden, batch.weight, batch.ids, workspace_bytes=1 << 20).logps.sum())

    twice = ran(partial(compute, score, batch, case))
    assert twice == two_pass(problem, H100_BF16, tile_bytes=1 << 20).flops
    scored = ran(lambda: token_logps(batch.hidden, batch.weight, batch.ids, workspace_bytes=1 << 20))
    assert scored == forward_only(problem, H100_BF16, tile_bytes=1 << 20).flops


def test_rows_without_a_gradient_are_scored_and_in_no_other_product():
    case = Case("ace", 32, 16, 101, 4, active=0.5)
    batch = case.batch(CPU)
    problem = Problem(32, 16, 101, 32, 16, 4, 4, 4)
    step = partial(compute, ours(case, schedule="single_pass", score_inactive=True), batch, case)
    assert ran(step) == single_pass(problem, H100_BF16, chunk_rows=32).flops


def test_the_model_foresees_the_peak_of_memory_but_for_a_block_of_the_twins():
    case = Case("ace", 64, 128, 20000, 8)
    problem = Problem(64, 128, 20000, 64, 64, 4, 4, 4)
    batch = case.batch(CPU)
    said = single_pass(problem, H100_BF16, chunk_rows=64).peak_bytes
    assert (
        said
        <= peak_bytes(partial(compute, ours(case, schedule="single_pass"), batch, case), CPU)
        <= 1.01 * said + TWIN_BLOCK_BYTES
    )


def test_an_exponent_is_that_of_the_power():
    points = [{"rows": n, "median_ms": 3 * n**1.5} for n in (1, 2, 8)]
    assert scaling.exponent(points, "rows", "median_ms") == pytest.approx(1.5)


@pytest.mark.parametrize("overlapped", [True, False])
def test_rates_are_fitted_from_the_products_alone(overlapped):
    flops, bandwidth, points = 1e12, 1e11, []
    for n, h, v in [(256, 512, 32000), (512, 512, 32000)]:
        traffic = 0 if overlapped else 3 * 4 * (n * v + v * h + n * h) / bandwidth
        points.append({"rows": n, "hidden": h, "vocabulary": v, "products_ms": 1e3 * (6 * n * h * v / flops + traffic)})
    rates = scaling.fitted_rates(points, bandwidth, Case("ace", 8, 8, 8, 1), overlapped=overlapped)
    assert rates == Rates(pytest.approx(flops), bandwidth, overlapped=overlapped)


def test_a_sweep_varies_one_size_alone():
    base = Case("ace", 64, 32, 400, 4)
    for varied in ("N", "V", "H"):
        size = scaling.SIZES[varied]
        found = scaling.cases(base, varied)
        assert [getattr(case, size) / getattr(base, size) for case in found] == [0.25, 0.5, 1, 2, 4]
        assert {case.rows * case.hidden * case.vocabulary for case in found} == {
            round(base.rows * base.hidden * base.vocabulary * factor) for factor in scaling.FACTORS
        }


def test_one_command_measures_and_keeps_what_the_page_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "COPIED_BYTES", {"cpu": 1 << 16})
    scaling.measure(CPU, tmp_path / "here", tiny=True)
    stored = json.loads((tmp_path / "here" / "scaling.json").read_text())
    assert {"device", "versions", "command", "points", "exponents", "rates"} <= set(stored)
    assert stored["command"] == "python -m benchmarks.on_gpu --only scaling"
    assert set(stored["exponents"]) == {"N", "V", "H"}
    assert [point["varied"] for point in stored["points"]] == ["N"] * 5 + ["V"] * 5 + ["H"] * 5
    for point in stored["points"]:
        assert min(point[key] for key in ("median_ms", "products_ms", "predicted_ms", "predicted_peak_bytes")) > 0
        assert point["measured_over_predicted"] == pytest.approx(point["median_ms"] / point["predicted_ms"])
    shown = scaling.measured(tmp_path)
    assert stored["device"] in shown
    assert "![scaling on here](plots/here-scaling.svg)" in shown
    assert len([line for line in shown.splitlines() if line.startswith("| H |")]) == 5


def test_the_prediction_has_every_shape_on_both_chips_and_stays_within_memory():
    ours, peers = scaling.predicted().split("\n\n")
    assert len(peers.splitlines()) == 2 + 2 * len(LEADING)
    rows = [line.strip("| ").split(" | ") for line in ours.splitlines()[2:]]
    assert len(rows) == 2 * len(scaling.GPU_SHAPES)
    for i, (n, h, v) in enumerate(2 * scaling.GPU_SHAPES):
        assert rows[i][1:4] == [str(n), str(h), str(v)]
        assert all(float(share) > 1 for share in rows[i][6:9])
        assert float(rows[i][9]) < 0.55 or n < 1024
    (large,) = {tuple(row[10:]) for row in rows if row[1:4] == ["8192", "4096", "131072"]}
    assert float(large[0]) <= 2.2
    assert float(large[1]) <= 0.5


def test_what_a_peer_would_take_is_near_its_published_time():
    (verl,) = (one for one in PEERS if one.key == "verl-torch")
    assert 1e3 * verl.seconds(8192, 4096, 131072, H100_BF16) == pytest.approx(128.8, rel=0.15)  # docs/scaling.md


def test_the_peers_are_systems_of_the_suite():
    assert {peer.key for peer in PEERS} <= {system.key for system in SYSTEMS} | {"eager"}
