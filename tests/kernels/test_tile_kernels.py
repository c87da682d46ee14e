"""lse_fold and dlogits: each Triton kernel under the interpreter, and its twin, against float64."""

import pytest
import torch
from kernel_cases import BACKENDS, COLS, HEADS, ROWS, make_rows, truth
from rlvr_kernels.dlogits import dlogits
from rlvr_kernels.logits import LogitMap
from rlvr_kernels.lse_fold import RowState, lse_fold


def entropy_of(logp):
    return -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_tiles_in_any_order_gives_the_whole_rows_statistics(backend, head, with_bias, dtype):
    raw, ids, inv_temperature, bias = make_rows(dtype=dtype)
    logit_map = LogitMap(inv_temperature, bias if with_bias else None, **head)
    state = RowState.empty(ROWS, raw, entropy=True, mean=not with_bias, squares=True)
    for part in (slice(128, COLS), slice(0, 1), slice(1, 128)):
        lse_fold(raw[:, part], ids, part.start, state, logit_map[:, part], backend)
    z = truth(raw, logit_map)
    logp = z.log_softmax(-1)
    torch.testing.assert_close(state.logp().double(), logp.gather(1, ids[:, None])[:, 0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(state.lse().double(), z.logsumexp(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.entropy().double(), entropy_of(logp), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(state.sum_p_squared().double(), logp.exp().square().sum(-1), rtol=1e-5, atol=1e-7)
    assert torch.equal(state.top1(), z.argmax(1) == ids)
    if state.summed is not None:
        torch.testing.assert_close(state.summed.double() / COLS, z.mean(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tile_of_impossible_tokens_leaves_the_row_as_it_was(backend):
    raw, ids, inv_temperature, _ = make_rows()
    state = RowState.empty(ROWS, raw, entropy=True)
    never = LogitMap(inv_temperature, torch.full((40,), -float("inf")))
    lse_fold(raw[:, 160:200], ids, 160, state, never, backend)
    lse_fold(raw[:, :160], ids, 0, state, LogitMap(inv_temperature), backend)
    z = truth(raw[:, :160], LogitMap(inv_temperature))
    torch.testing.assert_close(state.lse().double(), z.logsumexp(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.entropy().double(), entropy_of(z.log_softmax(-1)), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_very_negative_logits_do_not_underflow(backend):
    raw, ids, inv_temperature, _ = make_rows()
    state, logit_map = RowState.empty(ROWS, raw), LogitMap(inv_temperature)
    lse_fold(raw - 5000, ids, 0, state, logit_map, backend)
    logp = truth(raw - 5000, logit_map).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    torch.testing.assert_close(state.logp().double(), logp, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("separate_out", [False, True])
def test_dlogits_is_the_gradient_that_autograd_finds(backend, head, with_entropy, separate_out):
    raw, ids, inv_temperature, bias = make_rows()
    logit_map = LogitMap(inv_temperature, bias, **head)
    coef, entropy_coef = torch.linspace(-1, 2, ROWS), torch.linspace(1, -0.5, ROWS)
    leaf = raw.double().requires_grad_()
    logp = truth(leaf, logit_map).log_softmax(-1)
    entropy = -(logp.exp() * torch.where(logp.isinf(), 0, logp)).sum(-1)
    target = logp.gather(1, ids[:, None])[:, 0]
    (target @ coef.double() + (entropy @ entropy_coef.double() if with_entropy else 0)).backward()
    lse = truth(raw, logit_map).logsumexp(-1).float()
    out = torch.full((ROWS, 60), float("nan"), dtype=torch.bfloat16) if separate_out else None
    for start in (0, 60, 120, 180):
        part = slice(start, start + 60)
        tile = raw[:, part].clone()
        gradient = dlogits(
            tile, ids, start, lse, coef, logit_map[:, part], entropy=entropy.detach().float() if with_entropy else None,
            entropy_coef=entropy_coef if with_entropy else None, backend=backend,
            out=None if out is None else out[:, : tile.shape[1]],
        )  # fmt: skip
        tolerance = {"rtol": 1e-2, "atol": 1e-4} if separate_out else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(gradient.double(), leaf.grad[:, part], **tolerance)
        assert separate_out or gradient.data_ptr() == tile.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
def test_a_narrower_gradient_may_lie_over_the_logits_of_its_own_row(head, backend, monkeypatch):
    """As where a matmul of bfloat16 writes float32: the first half of a row's memory becomes its gradient."""
    monkeypatch.setattr("rlvr_kernels.dlogits.BLOCK", 64)
    raw, ids, inv_temperature, bias = make_rows(spread=1.0)
    logit_map = LogitMap(inv_temperature, bias, **head)
    coef = torch.linspace(-1, 1, ROWS)
    lse = truth(raw, logit_map).logsumexp(-1).float()
    apart = torch.empty(raw.shape, dtype=torch.bfloat16)
    dlogits(raw.clone(), ids, 0, lse, coef, logit_map, out=apart, backend=backend)
    tile = raw.clone()
    over = dlogits(tile, ids, 0, lse, coef, logit_map, out=tile.view(torch.bfloat16)[:, :COLS], backend=backend)
    torch.testing.assert_close(over, apart, rtol=0, atol=0)
    assert apart.abs().sum() > 0


@pytest.mark.interpret
def test_strided_tiles_are_read_and_written_where_they_lie():
    raw, ids, inv_temperature, _ = make_rows()
    logit_map, ones = LogitMap(inv_temperature), torch.ones(ROWS)
    wide = torch.full((ROWS, COLS + 13), 77.0)
    tile = wide[:, 4 : COLS + 4]
    tile.copy_(raw)
    state, plain = RowState.empty(ROWS, raw), RowState.empty(ROWS, raw)
    lse_fold(tile, ids, 0, state, logit_map, "triton")
    lse_fold(raw, ids, 0, plain, logit_map, "torch")
    torch.testing.assert_close(state.lse(), plain.lse())
    dlogits(tile, ids, 0, plain.lse(), ones, logit_map, backend="triton")
    torch.testing.assert_close(tile, dlogits(raw.clone(), ids, 0, plain.lse(), ones, logit_map, backend="torch"))
    assert (wide[:, :4] == 77).all()
    assert (wide[:, COLS + 4 :] == 77).all()


@pytest.mark.interpret
def test_every_element_of_a_gradient_is_written():
    raw, ids, inv_temperature, _ = make_rows()
    out = torch.full_like(raw, float("nan"))
    dlogits(raw, ids, 0, raw.logsumexp(-1), torch.ones(ROWS), LogitMap(inv_temperature), out=out, backend="triton")
    assert torch.isfinite(out).all()
