"""What the head allocates and how many rows it multiplies, measured."""

from functools import partial

import pytest
import torch
from rlvr_kernels.dlogits import dlogits
from rlvr_kernels.logits import TWIN_BLOCK_BYTES, LogitMap
from rlvr_kernels.lse_fold import RowState, lse_fold
from rlvr_kernels.tile import TileShape, compact_, row_pitch, vocabulary_tile
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import rlvr_ops
from benchmarks.measure import peak_bytes

B, T, H, V = 8, 32, 24, 2003
WORKSPACE = 64 * V * 4  # 64 whole rows, a quarter of the batch


def make_batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, H, generator=g, requires_grad=True)
    weight = torch.randn(V, H, generator=g, requires_grad=True)
    ids = torch.randint(0, V, (B, T), generator=g)
    advantages = torch.tensor([1.0, -1.0] * (B // 2))
    return hidden, weight, ids, advantages, -3 * torch.rand(B, T, generator=g)


def allocations(run):
    """The size of every CPU allocation that `run` makes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
@pytest.mark.parametrize("keywords", [{}, {"confidence": "old"}, {"with_entropy": True}, {"on_policy": True}], ids=str)
def test_nothing_larger_than_the_workspace_and_the_gradients_is_ever_allocated(schedule, keywords):
    hidden, weight, ids, advantages, ref = make_batch()
    keywords = dict(keywords)
    old = None if keywords.pop("on_policy", False) else ref + 0.1

    def run():
        out = rlvr_ops.ace_loss(
            hidden, weight, ids, advantages, ref_per_token_logps=ref, old_per_token_logps=old, schedule=schedule,
            workspace_bytes=WORKSPACE, **keywords,
        )  # fmt: skip
        out.loss.backward()

    run()  # so that one-time allocations are not counted
    hidden.grad = weight.grad = None
    assert max(allocations(run)) <= max(WORKSPACE, weight.numel() * 4)
    assert WORKSPACE < B * T * V * 4 / 3, "the bound would not tell"


def test_a_single_pass_drops_the_product_of_d_hidden_before_that_of_d_weight():
    rows, inner, vocabulary = 256, 512, 600
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, rows // 8, inner, generator=g, requires_grad=True)
    weight = torch.randn(vocabulary, inner, generator=g, requires_grad=True)
    ids, advantages = torch.randint(vocabulary, (8, rows // 8), generator=g), torch.ones(8)
    step = partial(rlvr_ops.grpo_loss, hidden, weight, ids, advantages, schedule="single_pass")
    logits, states = rows * vocabulary, rows * inner
    allowed = 4 * (logits + weight.numel() + 2 * states)  # the tile, both gradients, the scaled states
    assert allowed <= peak_bytes(step, torch.device("cpu")) < allowed + 4 * states / 4


def test_two_passes_scale_the_coefficients_in_place_unless_the_graph_is_kept():
    rows, inner, vocabulary = 100_000, 1, 2
    hidden, weight = torch.randn(1, rows, inner, requires_grad=True), torch.randn(vocabulary, inner)
    ids, advantages = torch.randint(vocabulary, (1, rows)), torch.ones(1)

    def peak(**keywords):
        loss = rlvr_ops.grpo_loss(hidden, weight, ids, advantages, schedule="two_pass").loss
        hidden.grad = None
        return peak_bytes(partial(loss.backward, **keywords), torch.device("cpu"))

    peak()
    assert peak() <= peak(retain_graph=True) - 4 * rows


def test_the_twins_hold_one_float32_block_of_a_16_bit_tile_at_a_time():
    rows, vocabulary = 96, 65536  # three blocks
    tile, ids = torch.randn(rows, vocabulary).bfloat16(), torch.arange(rows)
    state, logit_map = RowState.empty(rows, tile), LogitMap(torch.ones(rows))

    def fold_and_pull_back():
        lse_fold(tile, ids, 0, state, logit_map)
        dlogits(tile, ids, 0, state.lse(), torch.ones(rows), logit_map)

    assert TWIN_BLOCK_BYTES <= peak_bytes(fold_and_pull_back, torch.device("cpu")) < 1.1 * TWIN_BLOCK_BYTES


def test_scoring_stays_inside_its_workspace():
    hidden, weight, ids, *_ = make_batch()
    with torch.no_grad():
        sizes = allocations(
            lambda: rlvr_ops.token_logps(hidden, weight, ids, with_entropy=True, workspace_bytes=50_000)
        )
    assert max(sizes) <= 50_000


class RowCounter(TorchDispatchMode):
    """Counts the rows that reach the head's matrix products, whoever asks for them.

    logits: rows times columns over V, whole rows' worth of tiles filled. pulled: the rows of each product with a tile.
    """

    def __init__(self):
        super().__init__()
        self.logits, self.pulled, self.weight_grads = 0.0, set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm"):
            a, b = args[-2:]
            if a.shape[1] == H and b.shape[1] != H:  # hidden states by columns of the weight
                self.logits += a.shape[0] * b.shape[1] / V
            elif b.shape[0] <= B * T:  # columns of a tile by hidden states
                self.pulled.add(a.shape[1])
                self.weight_grads += 1
            else:
                self.pulled.add(a.shape[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
def test_masked_rows_and_rollouts_without_advantage_are_never_multiplied(schedule):
    hidden, weight, ids, advantages, ref = make_batch()
    advantages[2:5] = 0
    mask = torch.ones(B, T)
    mask[:, 20:] = 0
    with RowCounter() as counter:
        out = rlvr_ops.ace_loss(
            hidden, weight, ids, advantages, ref_per_token_logps=ref, old_per_token_logps=None, completion_mask=mask,
            schedule=schedule,
        )  # fmt: skip
        out.loss.backward()
    active = 5 * 20
    assert counter.logits == pytest.approx(active if schedule == "single_pass" else 2 * active)
    assert counter.pulled == {active}
    assert out.metrics["head/rows_scored"] == out.metrics["head/rows_pulled_back"] == active
    assert not hidden.grad[2:5].any()
    assert not hidden.grad[:, 20:].any()
    assert hidden.grad[5:, :20].any(-1).all()


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
@pytest.mark.parametrize("keywords", [{}, {"confidence": "old"}, {"entropy_coef": 0.1}], ids=str)
def test_a_tile_wider_than_its_gradient_with_padded_rows_gives_the_same_gradients(schedule, keywords, monkeypatch):
    """As on CUDA, where float16 operands give float32 logits and rows begin at multiples of 128 bytes; here the products round
    them, so that the numbers are those of a float16 tile."""
    hidden, weight, ids, advantages, ref = make_batch()
    leaves = [x.detach().half().requires_grad_() for x in (hidden, weight)]
    old = ref - 2.0 * (torch.arange(T) % 3 == 0)  # some are clipped
    monkeypatch.setattr("rlvr_kernels.single_pass.moving_pays", lambda kept, dropped, *_: dropped > 0)

    def gradients():
        out = rlvr_ops.ace_loss(
            *leaves, ids, advantages, ref_per_token_logps=ref, old_per_token_logps=old, schedule=schedule,
            workspace_bytes=WORKSPACE * 4, **keywords,
        )  # fmt: skip
        return torch.autograd.grad(out.loss, leaves)

    expected = gradients()
    monkeypatch.setattr("rlvr_kernels.tile.logit_dtype", lambda *_: torch.float32)
    on_cuda = torch.device("cuda")
    monkeypatch.setattr("rlvr_kernels.tile.row_pitch", lambda cols, device: row_pitch(cols, on_cuda))
    for a, b in zip(gradients(), expected, strict=True):
        assert (a.double() - b.double()).norm() < 0.01 * b.double().norm()


@pytest.mark.parametrize("schedule", ["single_pass", "two_pass"])
@pytest.mark.parametrize("confidence", ["current", "old"])
def test_clipped_tokens_never_reach_the_backward_matmuls(schedule, confidence, monkeypatch):
    hidden, weight, ids, advantages, _ = make_batch()
    logp = rlvr_ops.token_logps(hidden, weight, ids).logps.detach()
    old = logp.clone()
    old[advantages > 0, :10] -= 1.0  # ratio e: clipped where A > 0
    old[advantages < 0, 20:] += 1.0  # ratio 1/e: clipped where A < 0
    monkeypatch.setattr("rlvr_kernels.single_pass.moving_pays", lambda kept, dropped, *_: dropped > 0)
    with RowCounter() as counter:
        out = rlvr_ops.ace_loss(
            hidden, weight, ids, advantages, ref_per_token_logps=logp, old_per_token_logps=old, schedule=schedule,
            confidence=confidence,
        )  # fmt: skip
        out.loss.backward()
    expected = B * T - 4 * 10 - 4 * 12
    assert counter.pulled == {expected}
    assert out.metrics["head/rows_pulled_back"] == expected
    assert out.metrics["clip_ratio/region_mean"] == pytest.approx(1 - expected / (B * T))


def test_a_frozen_head_never_pays_for_its_gradient():
    hidden, weight, ids, advantages, ref = make_batch()
    for schedule in ("single_pass", "two_pass"):
        with RowCounter() as counter:
            out = rlvr_ops.ace_loss(
                hidden, weight.detach(), ids, advantages, ref_per_token_logps=ref, schedule=schedule
            )
            out.loss.backward()
        assert counter.pulled
        assert not counter.weight_grads, "only d_hidden = dz W"


def test_vocabulary_tiles_fill_the_workspace_and_cut_rows_before_they_get_narrow():
    assert vocabulary_tile(100, 50_000, 4, 100 * 50_000 * 4) == TileShape(100, 50_000)
    assert vocabulary_tile(100, 50_000, 4, 100 * 10_000 * 4) == TileShape(100, 9984)  # 78 x 128
    assert vocabulary_tile(100_000, 50_000, 4, 4096 * 5_000 * 4) == TileShape(5_000, 4096)
    assert vocabulary_tile(10, 50_000, 4, 4) == TileShape(1, 1)
    with pytest.raises(ValueError, match="workspace_bytes must be at least 4"):
        vocabulary_tile(10, 50_000, 4, 3)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("piece_bytes", [1, 16 << 20])
def test_only_rows_from_below_move_and_each_is_where_the_order_says(share, piece_bytes, monkeypatch):
    monkeypatch.setattr("rlvr_kernels.tile.CACHED_BYTES", piece_bytes)
    g = torch.Generator().manual_seed(int(100 * share))
    rows = torch.rand(97, generator=g)
    tile = (rows[:, None] + torch.arange(5)).repeat(1, 1)
    before, keep = tile.clone(), (torch.rand(97, generator=g) < share).nonzero()[:, 0]
    top, order = compact_(tile, keep, int((keep >= len(keep)).sum()))
    assert order.sort().values.equal(keep)
    assert top.equal(before[order])
    stays = keep[keep < len(keep)]
    assert order[stays].equal(stays)
    assert tile[len(keep) :].equal(before[len(keep) :])
