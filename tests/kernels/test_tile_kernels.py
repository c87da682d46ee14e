"""lse_fold, dlogits, weigh and fused_policy: each Triton kernel under the interpreter against its twin and float64."""

import dataclasses
import itertools

import pytest
import torch
from rlvr_kernels.dlogits import dlogits
from rlvr_kernels.fused_policy import FusedRows, PolicyRows, fused_policy
from rlvr_kernels.logits import Head
from rlvr_kernels.lse_fold import RowState, lse_fold
from rlvr_kernels.spec import PPO_CLIP, PolicySpec
from rlvr_kernels.weigh import STATISTICS, weigh

from rlvr_ops.surrogates import cispo, cispo_two_sided, dispo, gmpo, ppo_clip, reinforce, sapo, vespo

ROWS, COLS = 5, 203
HEADS = [Head(), Head(logit_scale=0.5, softcap=4.0)]
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.interpret)]


def make_rows(seed=0, cols=COLS, dtype=torch.float32, spread=3.0):
    """Raw logits (in `dtype`), ids, inverse temperatures and a bias with a token that cannot be."""
    g = torch.Generator().manual_seed(seed)
    raw = (spread * torch.randn(ROWS, cols, generator=g)).to(dtype)
    ids = torch.tensor([0, cols - 1, 7, 100, 3])
    bias = torch.randn(cols, generator=g)
    bias[5] = -float("inf")
    return raw, ids, 1 / torch.linspace(0.5, 2.0, ROWS), bias


def truth(raw, bias, head, inv_temperature):
    """The logits in float64, written out."""
    u = head.logit_scale * (raw.double() + (0 if bias is None else bias.double()))
    s = u if head.softcap is None else head.softcap * torch.tanh(u / head.softcap)
    return s * inv_temperature.double()[:, None]


def entropy_of(logp):
    return -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folding_tiles_in_any_order_gives_the_whole_rows_statistics(backend, head, with_bias, dtype):
    raw, ids, inv_temperature, bias = make_rows(dtype=dtype)
    bias = bias if with_bias else None
    state = RowState.empty(ROWS, raw, entropy=True, mean=not with_bias, squares=True)
    for start, stop in [(128, COLS), (0, 1), (1, 128)]:
        part = None if bias is None else bias[start:stop]
        lse_fold(raw[:, start:stop], ids, start, state, inv_temperature, bias=part, head=head, backend=backend)
    z = truth(raw, bias, head, inv_temperature)
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
    never = torch.full((40,), -float("inf"))
    lse_fold(raw[:, 160:200], ids, 160, state, inv_temperature, bias=never, backend=backend)
    lse_fold(raw[:, :160], ids, 0, state, inv_temperature, backend=backend)
    z = truth(raw[:, :160], None, Head(), inv_temperature)
    torch.testing.assert_close(state.lse().double(), z.logsumexp(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.entropy().double(), entropy_of(z.log_softmax(-1)), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_very_negative_logits_do_not_underflow(backend):
    raw, ids, inv_temperature, _ = make_rows()
    state = RowState.empty(ROWS, raw)
    lse_fold(raw - 5000, ids, 0, state, inv_temperature, backend=backend)
    z = truth(raw - 5000, None, Head(), inv_temperature)
    torch.testing.assert_close(
        state.logp().double(), z.log_softmax(-1).gather(1, ids[:, None])[:, 0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("separate_out", [False, True])
def test_dlogits_is_the_gradient_that_autograd_finds(backend, head, with_entropy, separate_out):
    raw, ids, inv_temperature, bias = make_rows()
    coef, entropy_coef = torch.linspace(-1, 2, ROWS), torch.linspace(1, -0.5, ROWS)
    leaf = raw.double().requires_grad_()
    logp = truth(leaf, bias, head, inv_temperature).log_softmax(-1)
    entropy = -(logp.exp() * torch.where(logp.isinf(), 0, logp)).sum(-1)
    target = logp.gather(1, ids[:, None])[:, 0]
    (target @ coef.double() + (entropy @ entropy_coef.double() if with_entropy else 0)).backward()
    lse = truth(raw, bias, head, inv_temperature).logsumexp(-1).float()
    out = torch.full((ROWS, 60), float("nan"), dtype=torch.bfloat16) if separate_out else None
    for start in (0, 60, 120, 180):
        tile = raw[:, start : start + 60].clone()
        cut = None if out is None else out[:, : tile.shape[1]]
        gradient = dlogits(
            tile, ids, start, lse, coef, inv_temperature, bias=bias[start : start + 60], head=head, out=cut, backend=backend,
            entropy=entropy.detach().float() if with_entropy else None, entropy_coef=entropy_coef if with_entropy else None,
        )  # fmt: skip
        tolerance = {"rtol": 1e-2, "atol": 1e-4} if separate_out else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(gradient.double(), leaf.grad[:, start : start + 60], **tolerance)
        assert separate_out or gradient.data_ptr() == tile.data_ptr()


def policy_rows(seed=1, rows=ROWS):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(rows, generator=g)
    old, ref = (logp + 0.5 * torch.randn(rows, generator=g) for _ in range(2))
    return logp, old, ref, torch.randn(rows, generator=g)


SPECS = [
    PolicySpec(
        ppo_clip(delta=delta),
        alpha=alpha,
        shape=shape,
        confidence=confidence,
        confidence_reduction=reduction,
        beta=beta,
        kl_estimator=kl,
    )
    for alpha, shape, confidence, reduction in [
        (0.0, "softplus", "current", "mean"),
        (1.0, "softplus", "current", "mean"),
        (0.7, "relu", "old", "sum"),
    ]
    for beta, kl, delta in [(0.0, "k3", None), (0.1, "k3", 1.4), (0.1, "k2", None), (0.1, "k1", None)]
]
LEVELS = ("token", "sequence", "sequence_token")
OTHERS = [
    *(PolicySpec(ppo_clip(0.1, 0.05), level, beta=0.1, use_bias_correction_kl=True) for level in LEVELS),
    *(PolicySpec(sapo(), level, alpha=0.7) for level in LEVELS),
    *(PolicySpec(make(), level) for make in (cispo, cispo_two_sided, dispo) for level in LEVELS[:2]),
    *(PolicySpec(make(), alpha=1.0, beta=0.05) for make in (gmpo, vespo, reinforce)),
    PolicySpec(ppo_clip(), off_policy_mask_threshold=0.01, beta=0.1, kl_estimator="k1", use_bias_correction_kl=True),
    PolicySpec(
        gmpo(0.2, 0.1), off_policy_mask_threshold=0.01, kl_estimator="k2", beta=0.1, use_bias_correction_kl=True
    ),
]


@pytest.mark.interpret
@pytest.mark.parametrize("spec", SPECS + OTHERS, ids=str)
@pytest.mark.parametrize("has_old", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_weigh_kernel_agrees_with_its_twin_in_float64(spec, has_old, masked):
    rows = 2500  # the longest rollout takes three blocks
    logp, old, ref, advantages = policy_rows(rows=rows)
    cu_seqlens = torch.tensor([0, 3, 3, 20, 2400, rows])
    mask = torch.rand(rows, generator=torch.Generator().manual_seed(3)) > 0.4 if masked else None
    if mask is not None:
        logp, ref = (torch.where(mask, x, float("nan")) for x in (logp, ref))
    old = old if has_old else None
    weights = torch.linspace(0.1, 0.5, 5)
    behaviour = logp + 0.1 * ref  # what sampled, unknown for some tokens
    behaviour[::7] = float("nan")
    found = weigh(logp, old, ref, advantages, mask, cu_seqlens, weights, spec, "triton", behaviour=behaviour)
    wide = [None if x is None else x.double() for x in (logp, old, ref, advantages)]
    expected = weigh(*wide, mask, cu_seqlens, weights.double(), spec, "torch", behaviour=behaviour.double())
    for name, a, b in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_divergence_that_overflows_does_not_reach_a_loss_without_it(backend):
    """exp(ref - logp) is infinite in float32 for a token that the policy has all but ruled out."""
    logp, ref = torch.tensor([-95.0, -1.0]), torch.tensor([-1.0, -1.0])
    advantages, weights = torch.tensor([1.0, -1.0]), torch.tensor([0.5])
    spec = PolicySpec(PPO_CLIP, alpha=1.0)
    found = weigh(logp, logp, ref, advantages, None, torch.tensor([0, 2]), weights, spec, backend=backend)
    torch.testing.assert_close(found.losses, torch.tensor([-0.5, 0.5]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.coef, torch.tensor([-0.5, 0.5]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("spec", SPECS[::3] + [spec for spec in OTHERS if spec.is_token_local(True)], ids=str)
@pytest.mark.parametrize("has_old", [True, False])
def test_fused_policy_is_the_three_kernels_in_one(backend, head, spec, has_old):
    raw, ids, inv_temperature, bias = make_rows(spread=1.0)
    state = RowState.empty(ROWS, raw)
    lse_fold(raw, ids, 0, state, inv_temperature, bias=bias, head=head, backend="torch")
    logp = state.logp()
    _, noise, gap, advantages = policy_rows()
    old, ref = (logp + noise / 5 if has_old else None), logp + gap / 9
    cu_seqlens, weights = torch.arange(ROWS + 1), torch.linspace(0.2, 1.0, ROWS)  # rollouts of one token
    spec = dataclasses.replace(spec, confidence="old")
    weighed = weigh(logp, old, ref, advantages, None, cu_seqlens, weights, spec, backend="torch")
    gradient = dlogits(
        raw.clone(), ids, 0, state.lse(), weighed.coef, inv_temperature, bias=bias, head=head, backend="torch"
    )
    shift = weighed.statistics[:, STATISTICS.index("shift")] if spec.alpha else None
    tile = raw.clone()
    fused = fused_policy(
        tile,
        ids,
        PolicyRows(advantages, weights, old, ref, shift),
        inv_temperature,
        spec,
        bias=bias,
        head=head,
        backend=backend,
    )
    expected = {"logp": logp, "lse": state.lse(), "loss": weighed.losses, "coef": weighed.coef}
    for name, b in expected.items():
        a = getattr(fused, name)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(scaled(tile, fused), gradient, rtol=1e-5, atol=1e-6)


def scaled(tile: torch.Tensor, fused: FusedRows) -> torch.Tensor:
    """The gradient that `fused_policy` has left in a tile."""
    return tile if fused.scale is None else tile * fused.scale[:, None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_deferred_coefficient_multiplies_the_gradient_later(backend):
    raw, ids, inv_temperature, _ = make_rows()
    rows = PolicyRows(torch.ones(ROWS), torch.ones(ROWS))
    tile = raw.clone()
    fused = fused_policy(tile, ids, rows, inv_temperature, PolicySpec(PPO_CLIP), deferred=True, backend=backend)
    coef = torch.linspace(-1, 1, ROWS)
    expected = dlogits(raw.clone(), ids, 0, fused.lse, coef, inv_temperature, backend="torch")
    torch.testing.assert_close(scaled(tile, fused) * coef[:, None], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("fused", [False, True], ids=["dlogits", "fused_policy"])
def test_a_narrower_gradient_may_lie_over_the_logits_of_its_own_row(fused, head, backend, monkeypatch):
    """As where a matmul of bfloat16 writes float32: the first half of a row's memory becomes its gradient."""
    for kernel in ("dlogits", "fused_policy"):
        monkeypatch.setattr(f"rlvr_kernels.{kernel}.BLOCK", 64)
    raw, ids, inv_temperature, bias = make_rows(spread=1.0)
    coef = torch.linspace(-1, 1, ROWS)
    state = RowState.empty(ROWS, raw)
    lse_fold(raw, ids, 0, state, inv_temperature, bias=bias, head=head, backend="torch")
    rows = PolicyRows(-coef, torch.ones(ROWS))  # REINFORCE: the coefficient is minus the advantage

    def gradient(tile, out):
        options = {"bias": bias, "head": head, "out": out, "backend": backend}
        if fused:
            fused_policy(tile, ids, rows, inv_temperature, PolicySpec(PPO_CLIP), **options)
            return out
        return dlogits(tile, ids, 0, state.lse(), coef, inv_temperature, **options)

    apart = gradient(raw.clone(), torch.empty(raw.shape, dtype=torch.bfloat16))
    tile = raw.clone()
    over = gradient(tile, tile.view(torch.bfloat16)[:, :COLS])
    torch.testing.assert_close(over, apart, rtol=0, atol=0)
    assert apart.abs().sum() > 0


@pytest.mark.interpret
def test_every_element_that_the_kernels_promise_is_written(monkeypatch):
    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    def poisoned_like(tensor, **kwargs):
        return torch.full_like(tensor, float("nan"), **kwargs)

    empty = torch.empty
    raw, ids, inv_temperature, _ = make_rows()
    logp, old, ref, advantages = policy_rows()
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", poisoned_like)
    rows = PolicyRows(advantages, torch.ones(ROWS), old, ref, torch.zeros(ROWS))
    fused = fused_policy(raw, ids, rows, inv_temperature, PolicySpec(PPO_CLIP, alpha=1.0), backend="triton")
    weighed = weigh(
        logp,
        old,
        ref,
        advantages,
        None,
        torch.tensor([0, 2, 2, ROWS]),
        torch.ones(3),
        PolicySpec(PPO_CLIP, alpha=1.0),
        backend="triton",
    )
    assert all(torch.isfinite(x).all() for x in itertools.chain(fused[:4], weighed, [raw]))


@pytest.mark.interpret
def test_strided_tiles_are_read_and_written_where_they_lie():
    raw, ids, inv_temperature, _ = make_rows()
    wide = torch.full((ROWS, COLS + 13), 77.0)
    wide[:, 4 : COLS + 4] = raw
    state, plain = RowState.empty(ROWS, raw), RowState.empty(ROWS, raw)
    lse_fold(wide[:, 4 : COLS + 4], ids, 0, state, inv_temperature, backend="triton")
    lse_fold(raw, ids, 0, plain, inv_temperature, backend="torch")
    torch.testing.assert_close(state.lse(), plain.lse())
    dlogits(wide[:, 4 : COLS + 4], ids, 0, plain.lse(), torch.ones(ROWS), inv_temperature, backend="triton")
    torch.testing.assert_close(
        wide[:, 4 : COLS + 4],
        dlogits(raw.clone(), ids, 0, plain.lse(), torch.ones(ROWS), inv_temperature, backend="torch"),
    )
    assert (wide[:, :4] == 77).all()
    assert (wide[:, COLS + 4 :] == 77).all()
