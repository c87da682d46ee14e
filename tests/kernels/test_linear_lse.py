"""linear_lse: the twin and, under the interpreter, the Triton kernels, against float64 logits that are written out."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import KERNELS
from rlvr_kernels import gemm
from rlvr_kernels import linear_lse as module
from rlvr_kernels.gemm import FOLD_CANDIDATES, tiling
from rlvr_kernels.linear_lse import linear_lse

N, H, V = 37, 40, 131  # nothing divides anything: three row blocks, five column tiles, three steps of H
BACKENDS = ["torch", *KERNELS]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # exp = inf is meant in a softcap


def make(n=N, h=H, v=V, dtype=torch.float32, spread=0.5):
    hidden, weight = torch.randn(n, h).to(dtype), (spread * torch.randn(v, h)).to(dtype)
    return hidden, weight, torch.randint(0, v, (n,))


def truth(hidden, weight, ids, *, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """(logp, lse) from whole logits in float64."""
    z = hidden.double() @ weight.double().T
    z = logit_scale * (z if bias is None else z + bias.double())
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (
        temperature.double()[:, None] if isinstance(temperature, torch.Tensor) and temperature.dim() else temperature
    )
    return z.gather(1, ids[:, None])[:, 0] - z.logsumexp(1), z.logsumexp(1)


def check(found, expected):
    for name, a, b in zip(("logp", "lse"), found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


OPTIONS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1, 1, V)},
    "temperature": {"temperature": 0.7},
    "0-d temperature": {"temperature": torch.tensor(0.7, dtype=torch.float64)},
    "strided row temperature": {"temperature": torch.linspace(0.5, 2, 2 * N)[::2]},
    "softcap": {"softcap": 3.0, "logit_scale": 1.5},
    "all": {
        "bias": torch.linspace(1, -1, V),
        "temperature": torch.linspace(2, 0.5, N),
        "softcap": 4.0,
        "logit_scale": -0.5,
    },
}


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_log_probabilities_are_those_of_whole_logits(backend, dtype, options):
    tensors = make(dtype=dtype)
    found = linear_lse(*tensors, **options, backend=backend)
    assert all(x.dtype == torch.float32 for x in found)
    check(found, truth(*tensors, **options))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize(
    ("n", "h", "v"), [(1, 1, 1), (16, 16, 32), (17, 16, 33), (1, 123, 300), (70, 1, 65), (15, 33, 31)]
)
def test_every_shape_is_whole(backend, n, h, v):
    tensors = make(n, h, v)
    check(linear_lse(*tensors, backend=backend), truth(*tensors))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_no_rows_give_no_numbers(backend):
    assert [x.shape for x in linear_lse(*make(0), backend=backend)] == [(0,), (0,)]


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_strides_and_offsets_are_honoured(backend):
    hidden, weight, ids = make()
    wide = torch.full((N + 2, 2 * H + 3), float("nan"))
    wide[1 : N + 1, 3::2] = hidden
    rows = torch.stack([ids, torch.full_like(ids, -1)], 1)
    bias = torch.linspace(-1, 1, 2 * V)
    expected = truth(hidden, weight, ids, bias=bias[::2])
    check(
        linear_lse(wide[1 : N + 1, 3::2], weight.T.contiguous().T, rows[:, 0], bias=bias[::2], backend=backend),
        expected,
    )


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_one_expanded_row_serves_every_row(backend):
    hidden, weight, ids = make()
    hidden = hidden[:1].expand(N, H)
    check(linear_lse(hidden, weight, ids, backend=backend), truth(hidden, weight, ids))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_operands_of_two_dtypes_are_multiplied_in_float32(backend):
    hidden, weight, ids = make()
    hidden = hidden.bfloat16()
    check(linear_lse(hidden, weight, ids.int(), backend=backend), truth(hidden, weight, ids))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_masked_vocabulary_has_no_mass_and_makes_no_nan(backend):
    hidden, weight, ids = make()
    bias = torch.zeros(V)
    bias[:100] = -float("inf")  # whole splits of nothing, then a tile that is partly masked
    ids[::2], ids[1::2] = 110, 3
    found, expected = linear_lse(hidden, weight, ids, bias=bias, backend=backend), truth(hidden, weight, ids, bias=bias)
    assert (found[0][1::2] == -float("inf")).all()
    check((found[0][::2], found[1]), (expected[0][::2], expected[1]))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_columns_past_the_vocabulary_hold_no_mass_and_match_no_id(backend):
    hidden, weight, ids = make()
    ids[0], ids[1], ids[2], ids[3] = V, V + 1, -100, 2**32 + 7  # the last is 7 to 32 bits
    logp, lse = linear_lse(hidden - 10, weight, ids, logit_scale=-1.0, backend=backend)
    assert (logp[:4] == -float("inf")).all()
    assert torch.isfinite(logp[4:]).all()
    check(
        (logp[4:], lse),
        tuple(
            x[k:]
            for x, k in zip(truth(hidden - 10, weight, ids.clamp(0, V - 1), logit_scale=-1.0), (4, 0), strict=True)
        ),
    )


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("offset", [-5000.0, 5000.0])
def test_far_away_logits_neither_overflow_nor_underflow(backend, offset):
    hidden, weight, ids = make()
    options = {"bias": torch.full((V,), offset)}
    found, expected = linear_lse(hidden, weight, ids, **options, backend=backend), truth(hidden, weight, ids, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=2e-3)  # float32 has 5e-4 between numbers around 5000


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_far_away_logits_meet_the_softcap(backend):
    tensors = make(spread=500.0)
    check(linear_lse(*tensors, softcap=5.0, backend=backend), truth(*tensors, softcap=5.0))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_certain_token_has_log_probability_zero(backend):
    hidden, weight, ids = make()
    bias = torch.full((V,), -1000.0)
    bias[17] = 300.0
    assert (linear_lse(hidden, weight, torch.full_like(ids, 17), bias=bias, backend=backend)[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_nan_is_passed_on(backend):
    hidden, weight, ids = make()
    hidden[3, 7] = float("nan")
    for softcap in (None, 5.0):
        for found in linear_lse(hidden, weight, ids, softcap=softcap, backend=backend):
            assert found.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_the_kernels_agree_with_their_twin(backend):
    tensors = make(70, 120, 300)
    options = {"bias": torch.randn(300), "temperature": torch.rand(70) + 0.5, "softcap": 6.0}
    twin = linear_lse(*tensors, **options, backend="torch")
    check(linear_lse(*tensors, **options, backend=backend), [x.double() for x in twin])


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_a_row_has_the_same_bits_in_any_company(backend):
    hidden, weight, ids = make()
    together = linear_lse(hidden, weight, ids, backend=backend)
    for rows in (slice(0, 1), slice(5, 30), slice(N - 1, N)):
        alone = linear_lse(hidden[rows], weight, ids[rows], backend=backend)
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))


@pytest.mark.interpret
def test_either_way_of_reading_the_operands_gives_the_same_bits(monkeypatch):
    tensors = make(dtype=torch.bfloat16)
    described = linear_lse(*tensors, backend="triton")
    monkeypatch.setattr(gemm, "_describable", lambda matrix: False)
    assert all(torch.equal(a, b) for a, b in zip(linear_lse(*tensors, backend="triton"), described, strict=True))


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize(("name", "value"), [("PARTIAL_BYTES", 8 * 5 * 16), ("GROUP", 2), ("PROCESSORS", 1)])
def test_how_the_work_is_cut_does_not_change_the_bits(backend, name, value, monkeypatch):
    tensors = make()
    whole = linear_lse(*tensors, backend=backend)
    monkeypatch.setattr(gemm, name, value)
    assert all(torch.equal(a, b) for a, b in zip(linear_lse(*tensors, backend=backend), whole, strict=True))


@pytest.mark.interpret
@pytest.mark.parametrize(
    "cut",
    [{"cols": 64}, {"cols": 64, "parts": 2}, {"cols": 64, "parts": 4}, {"rows": 32, "inner": 32, "per_processor": 2}],
)
def test_any_tiling_gives_the_numbers(cut, monkeypatch):
    tensors, options = make(), {"bias": torch.linspace(-1, 1, V), "softcap": 4.0}
    monkeypatch.setattr(module, "tiling", lambda *operands: replace(tiling(*operands), **cut))
    check(linear_lse(*tensors, **options, backend="triton"), truth(*tensors, **options))


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_every_element_is_written(backend, monkeypatch):
    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(float("nan"))

    empty, tensors = torch.empty, make()
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: torch.full_like(tensor, float("nan")))
    check(linear_lse(*tensors, backend=backend), truth(*tensors))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_float64_stays_float64(backend):
    tensors = [x.double() if x.is_floating_point() else x for x in make()]
    for found, expected in zip(linear_lse(*tensors, backend=backend), truth(*tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_the_twin_never_holds_the_logits():
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                biggest = max(biggest, out.untyped_storage().nbytes())
            return out

    hidden, weight, ids = make(1500, 8, 3000)
    with Watch():
        linear_lse(hidden, weight, ids, bias=torch.zeros(3000), softcap=3.0, backend="torch")
    assert biggest <= 4 * module.TWIN_ROWS * module.TWIN_COLS < 4 * 1500 * 3000


def on_gpu(*tensors):
    return [x.to(torch.accelerator.current_accelerator()) for x in tensors]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_error_is_below_that_of_whole_logits_in_the_same_dtype(dtype):
    hidden, weight, ids = on_gpu(*make(1000, 896, 32003, dtype=dtype, spread=0.1))
    eager = (hidden @ weight.T).float().log_softmax(1).gather(1, ids[:, None])[:, 0]
    found, expected = linear_lse(hidden, weight, ids)[0], truth(hidden, weight, ids)[0]
    error, allowed = ((x.double() - expected).abs().max() for x in (found, eager))
    assert error <= 2 * allowed + 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("n", "h", "v"), [(1000, 896, 32003), (37, 40, 131), (4096, 64, 151936)])
def test_on_a_gpu_descriptors_and_pointers_agree(n, h, v, options, monkeypatch):
    tensors = on_gpu(*make(n, h, v, dtype=torch.bfloat16, spread=0.1))
    options = {name: torch.linspace(0.5, 2, v if name == "bias" else n).to(tensors[0].device)
               if isinstance(value, torch.Tensor) and value.dim() else value for name, value in options.items()}  # fmt: skip
    found = linear_lse(*tensors, **options)
    monkeypatch.setattr(gemm, "_describable", lambda matrix: False)
    for a, b in zip(found, linear_lse(*tensors, **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.gpu
def test_on_a_gpu_every_candidate_gives_the_numbers(monkeypatch):
    tensors = on_gpu(*make(1000, 896, 32003, dtype=torch.bfloat16, spread=0.1))
    expected, target = truth(*tensors), torch.cuda.get_device_capability()
    for tile in FOLD_CANDIDATES.get(("cuda", 10 * target[0] + target[1]), ()):
        monkeypatch.setattr(module, "tiling", lambda *operands, tile=tile: tile)
        for name, a, b in zip(("logp", "lse"), linear_lse(*tensors), expected, strict=True):
            torch.testing.assert_close(
                a.double(), b, rtol=1e-5, atol=2e-5, msg=lambda m, n=name, t=tile: f"{t} {n}: {m}"
            )


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "h", "v"), [(70_000, 64, 40_000), (600_000, 4096, 256)], ids=["N x V", "N x H"])
def test_on_a_gpu_nothing_overflows_32_bits(n, h, v):
    device = torch.accelerator.current_accelerator()
    hidden, weight = torch.randn(n, h, dtype=torch.bfloat16, device=device), on_gpu(torch.randn(v, h).bfloat16())[0]
    ids = torch.randint(0, v, (n,), device=device)
    together = linear_lse(hidden, weight, ids)
    assert n * max(h, v) > 2**31
    for rows in (slice(0, 100), slice(n - 100, n)):
        alone = linear_lse(hidden[rows].clone(), weight, ids[rows])
        assert all(torch.equal(a, b[rows]) for a, b in zip(alone, together, strict=True))
