"""linear_exp: the twin and, under the interpreter, the Triton kernels, against gradients of float64 logits that are written out."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from kernel_cases import KERNELS
from rlvr_kernels import gemm, linear_exp
from rlvr_kernels.gemm import tiling
from rlvr_kernels.linear_exp import linear_probabilities
from rlvr_kernels.linear_lse import linear_scores
from rlvr_kernels.logits import LogitMap

N, H, V = 37, 40, 131  # nothing divides anything: three row blocks, five column tiles, three steps of H
BACKENDS = ["torch", *KERNELS]
OPTIONS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1, 1, V)},
    "scale": {"logit_scale": -0.5},
    "softcap": {"softcap": 3.0, "logit_scale": 1.5},
    "all": {"bias": torch.linspace(1, -1, V), "softcap": 4.0, "logit_scale": -0.5},
}
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 3e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-3},
}  # a tile rounds to 2^-9
TWIN = [pytest.param("torch", torch.float32, option, id=f"torch-{name}") for name, option in OPTIONS.items()]
EVERY = TWIN + [  # in bfloat16 a CPU rounds the products of the twin
    pytest.param(how, dtype, OPTIONS[name], id=f"{how}-{dtype}-{name}", marks=pytest.mark.interpret)
    for how in ("pointers", "descriptors")
    for dtype, names in ((torch.float32, OPTIONS), (torch.bfloat16, ("plain", "all")))
    for name in names
]
FAR = [("torch", torch.float32)] + [
    pytest.param(how, dtype, marks=pytest.mark.interpret)
    for how, dtype in (("pointers", torch.bfloat16), ("descriptors", torch.float32))
]
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning"
)  # exp = inf is meant in a softcap, and where an anchor fails


def make(dtype=torch.float32, spread=0.5, temperature=True, v=V, **head):
    hidden, weight = torch.randn(N, H).to(dtype), (spread * torch.randn(v, H)).to(dtype)
    inv_temperature = torch.linspace(0.5, 2, N) if temperature else torch.ones(N)
    return hidden, weight, torch.randint(0, v, (N,)), LogitMap(inv_temperature, **head)


def tile(v=V, dtype=torch.float32):
    """Memory (N, v), NaN until it is written; rows begin at multiples of 16 bytes."""
    return torch.full((N, -(-v // 8) * 8), float("nan"), dtype=dtype)[:, :v]


def truth(hidden, weight, ids, logit_map):
    """(logp, lse, entropy, p, (p - 1[v = y]) times the softcap's derivative) in float64."""
    raw = hidden.double() @ weight.double().T
    z = logit_map.logit_scale * (raw if logit_map.bias is None else raw + logit_map.bias.double())
    slope = torch.ones_like(z)
    if logit_map.softcap is not None:
        slope = 1 - (z / logit_map.softcap).tanh().square()
        z = logit_map.softcap * (z / logit_map.softcap).tanh()
    z = z * logit_map.inv_temperature.double()[:, None]
    log_p = z.log_softmax(1)
    p, gradient = log_p.exp(), log_p.exp()
    gradient[torch.arange(len(ids)), ids] -= 1
    return (
        log_p.gather(1, ids[:, None])[:, 0],
        z.logsumexp(1),
        -(p * log_p.clamp(min=-1e30)).sum(1),
        p,
        gradient * slope,
    )


def normalised(out, found):
    return out.double() / found.total.double()[:, None]


@pytest.mark.parametrize(("backend", "dtype", "options"), EVERY, indirect=["backend"])
@pytest.mark.parametrize("raw", [False, True])
def test_what_is_left_is_the_gradient_but_for_a_factor_of_each_row(backend, dtype, options, raw):
    arguments, out = make(dtype, **options), tile(dtype=dtype)
    logp, _, entropy, p, gradient = truth(*arguments)
    found = linear_exp.linear_exp(*arguments, out, entropy=True, raw=raw, backend=backend)
    torch.testing.assert_close(normalised(out, found), p if raw else gradient, **CLOSE[dtype])
    for one, expected in ((found.logp, logp), (found.entropy, entropy)):
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_the_factor_makes_up_for_the_rounding_of_the_targets_entry(backend, options):
    """p - 1 is as large as all the other entries of its row together."""
    hidden, weight, ids, logit_map = make(torch.bfloat16, **options)
    out = tile(dtype=torch.bfloat16)
    found = linear_exp.linear_exp(hidden, weight, ids, logit_map, out, backend=backend)
    entries = normalised(out, found)[torch.arange(N), ids]
    slope, (states, columns) = 1.0, (hidden, weight) if backend == "torch" else (hidden.double(), weight.double())
    if logit_map.softcap is not None:  # a twin's products are rounded on a CPU
        raw = (states @ columns.T).double().gather(1, ids[:, None])[:, 0]
        raw = raw if logit_map.bias is None else raw + logit_map.bias.double()[ids]
        slope = 1 - (logit_map.logit_scale * raw / logit_map.softcap).tanh().square()
    torch.testing.assert_close(entries, found.logp.double().expm1() * slope, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("backend", "dtype", "options"), EVERY, indirect=["backend"])
@pytest.mark.parametrize("raw", [False, True])
def test_slices_of_probabilities_are_those_of_whole_rows(backend, dtype, options, raw):
    hidden, weight, ids, logit_map = make(dtype, **options)
    _, lse, _, p, gradient = truth(hidden, weight, ids, logit_map)
    for start, stop in pairwise((0, 64, 65, V)):
        part, out = slice(start, stop), tile(stop - start, dtype)
        local = logit_map[slice(None), part]
        factor = None if raw else torch.linspace(-2, 3, N)
        expected = p if factor is None else factor.double()[:, None] * gradient
        linear_probabilities(hidden, weight[part], ids, start, local, out, lse.float(), factor, backend=backend)
        torch.testing.assert_close(out.double(), expected[:, part], **CLOSE[dtype])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_certain_token_keeps_all_digits_of_what_is_left_for_the_others(backend):
    """p = 1 - 1e-9 in float32, where p - 1 would be 0."""
    hidden, weight, ids, _ = make(temperature=False)
    bias = torch.full((V,), -25.0) + torch.linspace(-1, 1, V)
    bias[17] = 0.0
    arguments = hidden, weight / 100, torch.full_like(ids, 17), LogitMap(torch.ones(N), bias)
    out, expected = tile(), truth(*arguments)
    found = linear_exp.linear_exp(*arguments, out, backend=backend)
    others = torch.arange(V) != 17
    torch.testing.assert_close(normalised(out, found)[:, others], expected[-1][:, others], rtol=1e-5, atol=0)
    if backend == "triton":  # the twin's anchor is the maximum, and its target's entry exp(0) - S
        torch.testing.assert_close(out[:, 17].double(), expected[-1][:, 17], rtol=1e-5, atol=0)
        torch.testing.assert_close(found.logp.double(), expected[0], rtol=1e-5, atol=0)


def far(case):
    """Rows whose target's logit is no anchor, beside rows whose is."""
    hidden, weight, ids, _ = make(temperature=False)
    bias = torch.linspace(-1, 1, V)
    if case == "one-hot":
        bias[3] = 1e4
        ids[5] = 3
    elif case == "logits of 1e4":
        hidden[::2] *= 1e4 / hidden[::2].norm(dim=1, keepdim=True) / weight[0].norm()
    elif case == "an impossible target":
        bias[7], ids[:20] = -float("inf"), 7
    elif case == "equal":
        hidden, bias = torch.zeros_like(hidden), bias * 0 + 1e4
    elif case == "one row of the first block":
        hidden[2] *= 200
    return hidden, weight, ids, LogitMap(torch.ones(N), bias)


@pytest.mark.parametrize(("backend", "dtype"), FAR, indirect=["backend"])
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(
    "case", ["one-hot", "logits of 1e4", "an impossible target", "equal", "one row of the first block"]
)
def test_rows_whose_anchor_does_not_hold_are_left_again(backend, dtype, raw, case):
    hidden, weight, ids, logit_map = far(case)
    hidden, weight, out = hidden.to(dtype), weight.to(dtype), tile(dtype=dtype)
    logp, _, entropy, p, gradient = truth(hidden, weight, ids, logit_map)
    found = linear_exp.linear_exp(hidden, weight, ids, logit_map, out, entropy=True, raw=raw, backend=backend)
    loose = {"rtol": 1e-4, "atol": 4e-3}  # float32 has 5e-4 between numbers around 5000
    torch.testing.assert_close(normalised(out, found), p if raw else gradient, rtol=1e-2, atol=4e-3)
    torch.testing.assert_close(found.logp.double(), logp, **loose)
    torch.testing.assert_close(found.entropy.double(), entropy, **loose)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_a_row_has_the_same_bits_in_any_company(backend):
    """Also beside a row that is left again: its block is, too."""
    hidden, weight, ids, logit_map = far("one row of the first block")
    together = tile()
    found = linear_exp.linear_exp(hidden, weight, ids, logit_map, together, entropy=True, backend=backend)
    assert int((found.total == 1).sum()) < 3
    for rows in (slice(0, 2), slice(3, 30), slice(N - 1, N)):
        alone = tile()[rows]
        mine = linear_exp.linear_exp(
            hidden[rows], weight, ids[rows], logit_map[rows, :], alone, entropy=True, backend=backend
        )
        for name, value in mine._asdict().items():
            assert torch.equal(value, getattr(found, name)[rows]), name
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_nan_stays_in_its_row(backend):
    hidden, weight, ids, logit_map = make()
    hidden[3, 7] = float("nan")
    for softcap in (None, 5.0):
        out = tile()
        found = linear_exp.linear_exp(
            hidden, weight, ids, replace(logit_map, softcap=softcap), out, entropy=True, backend=backend
        )
        assert out.isnan().any(1).nonzero().tolist() == [[3]]
        assert found.logp.isnan().nonzero().tolist() == found.entropy.isnan().nonzero().tolist() == [[3]]


@pytest.mark.interpret
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("raw", [False, True])
def test_an_anchor_that_rounds_otherwise_than_the_product_does_no_harm(options, raw, monkeypatch):
    """Tensor cores may truncate where a dot product rounds, always to the same side: here the anchors are off by 0.1."""
    arguments, out = far("one row of the first block"), tile()
    arguments = (*arguments[:3], replace(arguments[3], **options))
    launch = linear_exp._launch

    def off(*args, **kwargs):
        if kwargs.get("sums"):
            args[6].add_(0.1)
        return launch(*args, **kwargs)

    monkeypatch.setattr(linear_exp, "_launch", off)
    found = linear_exp.linear_exp(*arguments, out, entropy=True, raw=raw, backend="triton")
    logp, _, entropy, p, gradient = truth(*arguments)
    torch.testing.assert_close(found.logp.double(), logp, rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(normalised(out, found), p if raw else gradient, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_log_probabilities_are_those_of_scoring_to_a_few_units_in_the_last_place(backend):
    """Both have the target's logit from their product: a policy and its reference agree where they are one."""
    hidden, weight, ids, logit_map = make()
    found = linear_exp.linear_exp(hidden, weight, ids, logit_map, tile(), backend=backend)
    scores = linear_scores(hidden, weight, ids, logit_map)
    torch.testing.assert_close(found.logp, scores.logp, rtol=4e-7, atol=2e-6)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
def test_an_id_outside_the_vocabulary_matches_no_column(backend):
    hidden, weight, ids, logit_map = make()
    ids[0], ids[1], ids[2], ids[3] = V, V + 1, -100, 2**32 + 7  # the last is 7 to 32 bits
    out = tile()
    found = linear_exp.linear_exp(hidden, weight, ids, logit_map, out, backend=backend)
    p = truth(hidden, weight, ids.clamp(0, V - 1), logit_map)[3]
    assert (found.logp[:4] == -float("inf")).all()
    torch.testing.assert_close(out[:4].double(), p[:4], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
def test_a_row_without_a_possible_token_is_nan(backend):
    hidden, weight, ids, _ = make(temperature=False)
    bias = torch.full((V,), -float("inf"))
    found = linear_exp.linear_exp(hidden, weight, ids, LogitMap(torch.ones(N), bias), tile(), backend=backend)
    assert found.logp.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)
@pytest.mark.parametrize("v", [1, 2, 31, 32, 33])
def test_every_vocabulary_is_whole(backend, v):
    arguments, out = make(v=v), tile(v)
    found = linear_exp.linear_exp(*arguments, out, backend=backend)
    torch.testing.assert_close(normalised(out, found), truth(*arguments)[-1], rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize(("name", "value"), [("PARTIAL_BYTES", 4 * 2 * 5 * 16), ("GROUP", 2), ("PROCESSORS", 1)])
def test_how_the_work_is_cut_does_not_change_the_bits(backend, name, value, monkeypatch):
    arguments, whole, cut = far("one row of the first block"), tile(), tile()
    before = linear_exp.linear_exp(*arguments, whole, entropy=True, backend=backend)
    monkeypatch.setattr(gemm, name, value)
    after = linear_exp.linear_exp(*arguments, cut, entropy=True, backend=backend)
    assert torch.equal(whole, cut)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.interpret
@pytest.mark.parametrize("cut", [{"cols": 64, "parts": 2}, {"cols": 64, "parts": 4}, {"rows": 32, "inner": 32}])
def test_any_tiling_gives_the_numbers(cut, monkeypatch):
    arguments, out = make(**OPTIONS["all"]), tile()
    monkeypatch.setattr(linear_exp, "tiling", lambda *operands: replace(tiling(*operands), **cut))
    found = linear_exp.linear_exp(*arguments, out, backend="triton")
    torch.testing.assert_close(normalised(out, found), truth(*arguments)[-1], rtol=1e-5, atol=3e-6)


@pytest.mark.interpret
def test_nothing_is_computed_again_where_every_anchor_holds(monkeypatch):
    """Then the launches for flagged rows find none: poisoned weights change nothing."""
    hidden, weight, ids, logit_map = make()
    expected, out = tile(), tile()
    linear_exp.linear_exp(hidden, weight, ids, logit_map, expected, backend="triton")
    launch, poisoned = linear_exp._launch, torch.full_like(weight, float("nan"))

    def poison(states, columns, *args, **kwargs):
        flagged = len(args) > 6
        return launch(states, poisoned if flagged else columns, *args, **kwargs)

    monkeypatch.setattr(linear_exp, "_launch", poison)
    linear_exp.linear_exp(hidden, weight, ids, logit_map, out, backend="triton")
    assert torch.equal(out, expected)


def on_gpu(hidden, weight, ids, logit_map):
    device = torch.accelerator.current_accelerator()
    bias = None if logit_map.bias is None else logit_map.bias.to(device)
    numbers = replace(logit_map, inv_temperature=logit_map.inv_temperature.to(device), bias=bias)
    return hidden.to(device), weight.to(device), ids.to(device), numbers


def large(n, h, v, **head):
    """Logits with a standard deviation of about 3, in bfloat16."""
    hidden, weight = torch.randn(n, h).bfloat16(), (3 * torch.randn(v, h) / h**0.5).bfloat16()
    if "bias" in head:
        head["bias"] = torch.linspace(-1, 1, v)
    return on_gpu(hidden, weight, torch.randint(v, (n,)), LogitMap(torch.linspace(0.5, 2, n), **head))


def room(n, v):
    return torch.full((n, -(-v // 64) * 64), float("nan"), dtype=torch.bfloat16, device="cuda")[:, :v]


def check_on_gpu(arguments, **options):
    logp, lse, entropy, _, gradient = truth(*arguments)
    out, again = room(*gradient.shape), room(*gradient.shape)
    found = linear_exp.linear_exp(*arguments, out, entropy=True, **options)
    torch.testing.assert_close(found.logp.double(), logp, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-4, atol=1e-3)
    factor = torch.linspace(0.5, 2, len(logp), device=logp.device)
    linear_probabilities(*arguments[:3], 0, arguments[3], again, lse.float(), factor)
    for tile in (normalised(out, found), again.double() / factor.double()[:, None]):
        assert (tile - gradient).norm() <= 4e-3 * gradient.norm()  # bfloat16 rounds to 2^-9
    return out, found


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("n", "h", "v"), [(1000, 896, 32003), (37, 40, 131), (512, 4096, 131072)])
def test_on_a_gpu_what_is_left_is_the_gradient(n, h, v, options):
    check_on_gpu(large(n, h, v, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["one-hot", "logits of 1e4", "an impossible target", "one row of the first block"])
def test_on_a_gpu_rows_whose_anchor_does_not_hold_are_left_again(case):
    hidden, weight, *rest = far(case)
    arguments = on_gpu(hidden.bfloat16(), weight.bfloat16(), *rest)
    logp, _, _, _, gradient = truth(*arguments)
    out = room(*gradient.shape)
    found = linear_exp.linear_exp(*arguments, out)
    torch.testing.assert_close(found.logp.double(), logp, rtol=1e-4, atol=5e-3)
    torch.testing.assert_close(normalised(out, found), gradient, rtol=1e-2, atol=5e-3)


@pytest.mark.gpu
def test_on_a_gpu_every_candidate_and_either_way_of_reading_gives_the_numbers(monkeypatch):
    arguments, (major, minor) = large(1000, 896, 32003), torch.cuda.get_device_capability()
    for tiling_of in gemm.LEAVE_CANDIDATES.get(("cuda", 10 * major + minor), ()):
        with monkeypatch.context() as patch:
            patch.setattr(linear_exp, "tiling", lambda *operands, chosen=tiling_of: chosen)
            check_on_gpu(arguments)
    monkeypatch.setattr(gemm, "_describable", lambda matrix: False)
    check_on_gpu(arguments)


@pytest.mark.gpu
def test_on_a_gpu_the_bits_are_the_same_on_every_run_and_in_any_company():
    hidden, weight, ids, logit_map = large(1000, 896, 32003)
    out, found = check_on_gpu((hidden, weight, ids, logit_map))
    again, _ = check_on_gpu((hidden, weight, ids, logit_map))
    assert torch.equal(out, again)
    rows = slice(130, 150)
    alone = room(20, 32003)
    mine = linear_exp.linear_exp(hidden[rows], weight, ids[rows], logit_map[rows, :], alone, entropy=True)
    assert torch.equal(mine.logp, found.logp[rows])
    assert torch.equal(alone, out[rows])


@pytest.mark.gpu
def test_on_a_gpu_nothing_overflows_32_bits():
    n, v = 70_000, 40_000
    hidden, weight, ids, logit_map = large(n, 64, v)
    out = room(n, v)
    found = linear_exp.linear_exp(hidden, weight, ids, logit_map, out)
    for rows in (slice(0, 100), slice(n - 100, n)):
        alone = room(100, v)
        mine = linear_exp.linear_exp(hidden[rows].clone(), weight, ids[rows], logit_map[rows, :], alone)
        assert torch.equal(mine.logp, found.logp[rows])
        assert torch.equal(alone, out[rows])
