"""Whether the kernels are right on this device: each against float64, whole steps, and how often a step waits for the device.

A row a check, with distances |got - want| / |want| over all rows and the whole vocabulary. Eager PyTorch in the same dtype says
how far is far.
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from rlvr_kernels.dlogits import dlogits
from rlvr_kernels.linear_exp import linear_exp, linear_probabilities
from rlvr_kernels.linear_lse import linear_lse
from rlvr_kernels.logits import LogitMap
from rlvr_kernels.lse_fold import RowState, lse_fold
from rlvr_kernels.scale import scale_
from rlvr_kernels.score import score
from rlvr_kernels.tile import Tile, TileShape, multiply
from rlvr_kernels.weigh import Rows, weigh
from torch import Tensor

import rlvr_ops
from benchmarks.cases import Case
from benchmarks.measure import FLOAT32_NOISE, TIE, errors, too_far, truth
from benchmarks.stage import Row, Stage, Work
from benchmarks.systems import compute, eager, ours
from tools.launches import OBJECTIVES

BLOCK = 1 << 29  # float64 logits that exist at a time
SMALL, LARGE, ODD, TINY = (128, 128, 4096), (8192, 4096, 131072), (96, 100, 1003), (24, 16, 83)
TOKENS = 1 << 14
Values = dict[str, Tensor]


class Head(NamedTuple):
    """hidden (n, H), weight (V, H), ids (n,), and the map from their products to logits."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    logit_map: LogitMap


def make(shape: tuple[int, int, int], like: Tensor, *, full: bool = False, far: bool = False) -> Head:
    """Logits of standard deviation 1, every other target likely. full: a bias, a softcap, a scale and temperatures.
    far: of every fourteenth row the target is too unlikely to be an anchor.
    """
    (n, h, v), device = shape, like.device
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (torch.randn(size, device=device, generator=generator) for size in ((n, h), (v, h)))
    ids = torch.randint(v, (n,), device=device, generator=generator)
    weight = weight / h**0.5
    hidden[::2] += 12 * weight[ids[::2]]
    hidden[1::14] *= 300 if far else 1
    plain = LogitMap(torch.ones(n, device=device))
    capped = LogitMap(torch.linspace(0.5, 2, n, device=device), torch.linspace(-1, 1, v, device=device), 1.5, 8.0)
    return Head(hidden.to(like.dtype), weight.to(like.dtype), ids, capped if full else plain)


def written_out(head: Head, rows: slice, dtype: torch.dtype) -> Values:
    """What the kernels compute of some rows, from logits that were multiplied in `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    u = (head.hidden[rows].to(dtype) @ head.weight.to(dtype).T).to(wide)
    part, slope = head.logit_map[rows, :], torch.ones((), dtype=wide, device=u.device)
    u = part.logit_scale * (u if part.bias is None else u + part.bias.to(wide))
    if part.softcap is not None:
        slope = 1 - (u / part.softcap).tanh().square()
        u = part.softcap * (u / part.softcap).tanh()
    z, ids = u * part.inv_temperature.to(wide)[:, None], head.ids[rows, None]
    log_p, target = z.log_softmax(1), torch.zeros_like(z).scatter_(1, ids, 1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    found = {"logp": log_p.gather(1, ids)[:, 0], "lse": z.logsumexp(1), "entropy": entropy, "mean_logit": z.mean(1)}
    found |= {"sum_p_squared": p.square().sum(1), "top1": (z.argmax(1) == ids[:, 0]).to(wide)}
    rate = part.logit_scale * part.inv_temperature.to(wide)[:, None] * slope
    bonus = rate * (target - p - 0.5 * p * (log_p + entropy[:, None]))  # an entropy coefficient of 0.5
    return found | {"p": p, "gradient": (p - target) * slope, "with a bonus": bonus}


def distances(head: Head, found: Values, total: Tensor | None = None) -> Row:
    """Of what was found, (n,) or (n, V), and of eager PyTorch in the operands' dtype, each from float64.

    total (n,): what a tile is to be divided by.
    """
    low, step = head.hidden.dtype, max(1, BLOCK // (8 * head.weight.shape[0]))
    sums = {name: torch.zeros(3, dtype=torch.float64, device=head.hidden.device) for name in found}
    for start in range(0, len(head.ids), step):
        rows = slice(start, start + step)
        want, usual = written_out(head, rows, torch.float64), written_out(head, rows, low)
        for name, values in found.items():
            mine, other = values[rows].double(), usual[name].to(low) if values.ndim == 2 else usual[name]
            mine = mine if total is None or values.ndim == 1 else mine / total[rows, None]
            parts = (mine - want[name], other.double() - want[name], want[name])
            sums[name] += torch.stack([part.square().sum() for part in parts])
    return judged({name: (s[:2] / s[2]).sqrt().tolist() for name, s in sums.items()})


def judged(pairs: dict[str, list[float]]) -> Row:
    """Our error and eager's by name, and what is wrong: neither near float32's noise nor as near as eager."""
    off = [name for name, (mine, other) in pairs.items() if not mine <= max(FLOAT32_NOISE, TIE * other)]
    found: Row = {"errors": {name: mine for name, (mine, _) in pairs.items()}}
    found |= {"eager": {name: other for name, (_, other) in pairs.items()}}
    return found | ({"wrong": ", ".join(off)} if off else {})


def scores(head: Head, *, everything: bool) -> Values:
    """Without the logits in memory."""
    if not everything:
        return dict(zip(("logp", "lse"), linear_lse(*head[:3]), strict=True))
    wanted = dict.fromkeys(("entropy", "mean", "top1", "squares"), True)
    found = score(*head, **wanted, workspace_bytes=1 << 28)  # type: ignore[arg-type]
    return {name: value for name, value in found._asdict().items() if value is not None}


def tile_of(head: Head) -> Tensor:
    n, v = len(head.ids), head.weight.shape[0]
    return Tile(TileShape(n, v), head.hidden.dtype, head.hidden.device).part(n, v)


def left(head: Head, *, raw: bool = False) -> tuple[Values, Tensor | None]:
    """What the product leaves: the gradient but for a factor of each row, or the exponentials, differentiated with a bonus."""
    out = tile_of(head)
    found = linear_exp(*head, out, entropy=True, raw=raw)
    assert found.entropy is not None
    summed = {"logp": found.logp, "entropy": found.entropy}
    if not raw:
        return summed | {"gradient": out}, found.total
    ones = torch.ones_like(found.logp)
    given = (head.ids, 0, found.anchor + found.total.log(), ones, head.logit_map)
    dlogits(out, *given, entropy=found.entropy, entropy_coef=0.5 * ones, anchor=found.anchor)
    return summed | {"with a bonus": out}, None


def slices(head: Head) -> tuple[Values, Tensor]:
    """The gradient in four slices of the vocabulary, times a factor, as two passes leave it."""
    lse, v = scores(head, everything=True)["lse"], head.weight.shape[0]
    out, step, factor = tile_of(head), -(-v // 512) * 128, torch.linspace(0.5, 2, len(lse), device=lse.device)
    for first in range(0, v, step):
        part = slice(first, first + step)
        local = head.logit_map[slice(None), part]
        linear_probabilities(head.hidden, head.weight[part], head.ids, first, local, out[:, part], lse, factor)
    return {"gradient": out}, factor


def folded(head: Head) -> Values:
    """Logits in a float32 tile, folded and differentiated, as for float16 and float32."""
    tile = torch.empty(len(head.ids), head.weight.shape[0], device=head.hidden.device)
    multiply(head.hidden, head.weight.T, out=tile)
    state = RowState.empty(len(head.ids), head.logit_map.inv_temperature, entropy=True, mean=True, squares=True)
    lse_fold(tile, head.ids, 0, state, head.logit_map)
    entropy, ones = state.entropy(), torch.ones_like(state.total)
    assert entropy is not None
    dlogits(tile, head.ids, 0, state.lse(), ones, head.logit_map, entropy=entropy, entropy_coef=0.5 * ones)
    return {"logp": state.logp(), "lse": state.lse(), "entropy": entropy, "with a bonus": tile}


def weighed(name: str, tokens: int, device: torch.device, *, on_policy: bool = False) -> Row:
    """An objective's losses, coefficients and sums against the twin in float64; in float32 for comparison."""
    generator, ends = torch.Generator(device).manual_seed(0), [0, 3, 3, tokens // 2, tokens]
    draw = partial(torch.randn, tokens, device=device, generator=generator)
    logp, mask = -draw().abs(), draw() > -1
    given = draw(), None if on_policy else logp + 0.3 * draw(), logp + 0.3 * draw()

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        advantages, old, ref = (None if x is None else x.to(dtype) for x in given)
        assert advantages is not None
        weights = torch.full((len(ends) - 1,), 1 / tokens, dtype=dtype, device=device)
        rows = Rows(advantages, torch.tensor(ends, device=device), weights, old, ref, mask=mask)
        return [x.double() for x in weigh(logp.to(dtype), rows, OBJECTIVES[name], backend)]

    exact, usual, mine = run(torch.float64, "torch"), run(torch.float32, "torch"), run(torch.float32, "auto")
    pairs = {}
    for what, true, *found in zip(("losses", "coef", "sums"), exact, mine, usual, strict=True):
        pairs[what] = [float((one - true).norm() / true.norm()) for one in found]
    return judged(pairs)


def scaled(size: int, like: Tensor) -> Row:
    values = torch.randn(size, device=like.device).to(like.dtype)
    want = values.double() * 0.3
    found = [scale_(values.clone(), torch.full((1,), 0.3, device=like.device)), values * 0.3]
    return judged({"values": [float((one.double() - want).norm() / want.norm()) for one in found]})


def steps(shape: tuple[int, int, int], like: Tensor, schedule: str) -> Row:
    """Two whole steps of ace_loss: as near to float64 as eager, and the same bits."""
    case = Case("ace", *shape, 8, str(like.dtype).removeprefix("torch."))
    batch = case.batch(like.device)
    want = truth(case, batch)
    usual = errors(compute(eager(case), batch, case), want, batch, case)
    first, again = (compute(ours(case, schedule=schedule), batch, case) for _ in range(2))
    found = errors(first, want, batch, case)
    said = [too_far(found, [usual], wide=True)]
    pairs = [(a, b) for a, b in zip(first, again, strict=True) if a is not None and b is not None]
    said += ["the second step has other bits"] if not all(torch.equal(a, b) for a, b in pairs) else []
    wrong = "; ".join(one for one in said if one)
    return {"errors": found, "eager": usual} | ({"wrong": wrong} if wrong else {})


def kernels(here: Stage) -> Iterator[Work]:
    """Every kernel and whole steps at a small shape, at a large one, whose kernels are compiled by then, and at an odd one."""
    like = torch.empty(0, device=here.device, dtype=torch.bfloat16 if here.device.type == "cuda" else torch.float32)
    for shape in (TINY, TINY[::-1]) if here.tiny else (SMALL, LARGE, ODD):
        size = "x".join(map(str, shape))
        for name, kind, run in (
            ("linear_lse", {}, partial(scores, everything=False)),
            ("linear_lse, all sums", {"full": True}, partial(scores, everything=True)),
            ("linear_exp", {}, left),
            ("linear_exp", {"full": True}, left),
            ("linear_exp", {"far": True}, left),
            ("linear_exp, dlogits", {}, partial(left, raw=True)),
            ("linear_probabilities", {}, slices),
            ("lse_fold, dlogits", {"full": True}, folded),
        ):
            low = like.float() if run is folded else like
            label = {"kernel": name, "shape": size, "head": " ".join(kind) or "plain"}
            yield label, partial(on_head, run, partial(make, shape, low, **kind))
        for schedule in ("single_pass", "two_pass"):
            yield {"kernel": f"two steps, {schedule}", "shape": size}, partial(steps, shape, like, schedule)
        tokens = shape[0] if shape[0] < 1024 else TOKENS
        for name in OBJECTIVES:
            yield {"kernel": f"weigh {name}", "shape": str(tokens)}, partial(weighed, name, tokens, here.device)
        on_policy = partial(weighed, "ACE, KL", tokens, here.device, on_policy=True)
        yield {"kernel": "weigh ACE, KL, on policy", "shape": str(tokens)}, on_policy
        yield {"kernel": "scale_", "shape": str(tokens)}, partial(scaled, tokens, like)


def on_head(run: Callable[[Head], Any], make_head: Callable[[], Head]) -> Row:
    head = make_head()
    found = run(head)
    return distances(head, *found) if isinstance(found, tuple) else distances(head, found)


WAITS: dict[str, tuple[dict[str, Any], int, int]] = {
    "every row counts": ({}, 0, 0),
    "every row counts, off policy": ({"old": True}, 1, 0),
    "advantages of 0": ({"zeros": True}, 1, 0),
    "a mask": ({"mask": True}, 1, 0),
    "a mask, off policy": ({"mask": True, "old": True}, 1, 0),
    "a mask and advantages on the host": ({"mask": True, "host": True}, 0, 0),
    "two passes, a mask": ({"mask": True, "schedule": "two_pass"}, 1, 1),
}
"""What is given, and how often at most a step may wait for the device in its forward and in its backward."""


def waits(here: Stage) -> Iterator[Work]:
    """Steps that were taken once before, so that nothing is compiled or allocated for the first time."""
    for name, (given, forward, backward) in WAITS.items():
        yield (
            {"given": name, "allowed": [forward, backward]},
            partial(waits_of, here.device, forward, backward, **given),
        )


def waits_of(device: torch.device, most: int, most_backward: int, **given: Any) -> Row:
    """How often a step of (16, 64) tokens waits for the device in its forward and in its backward."""
    case = Case("ace", 1024, 64, 1000, 16, "bfloat16" if device.type == "cuda" else "float32")
    batch, where = case.batch(device), "cpu" if given.pop("host", False) else device
    mask = torch.arange(64, device=where).expand(16, 64) < 40 if given.pop("mask", False) else None
    advantages = batch.advantages * (torch.arange(16, device=device) % 4 > 0 if given.pop("zeros", False) else 1)
    given["old_per_token_logps"] = batch.old if given.pop("old", False) else None
    # A KL penalty gives every row that is not masked a gradient.
    given |= {"completion_mask": mask, "ref_per_token_logps": batch.ref, "beta": 0.1 if mask is None else 0.0}
    given["beta"] = 0.0 if bool((advantages == 0).any()) else given["beta"]
    hidden, weight = (x.detach().requires_grad_() for x in (batch.hidden, batch.weight))
    step = partial(rlvr_ops.ace_loss, hidden, weight, batch.ids, advantages.to(where), **given)
    for _ in range(2):
        out, forward = waited(step, device)
        _, backward = waited(out.loss.backward, device)
    found: Row = {"forward": forward, "backward": backward}
    return found | ({"wrong": "waits more often"} if forward > most or backward > most_backward else {})


def waited(step: Callable[[], Any], device: torch.device) -> tuple[Any, int]:
    """What a step returns, and how many of its operations waited for the device, as PyTorch says; 0 on a CPU."""
    if device.type != "cuda":
        return step(), 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            found = step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found, sum("synchroniz" in str(one.message) for one in said)
