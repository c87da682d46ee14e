"""Products, tilings and few rows, each in turns with bare products, by which measurements minutes apart compare."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from rlvr_kernels.gemm import FOLD_CANDIDATES, LEAVE_CANDIDATES
from rlvr_kernels.linear_exp import linear_exp
from rlvr_kernels.linear_lse import linear_lse
from rlvr_kernels.logits import LogitMap
from rlvr_kernels.tile import Tile, TileShape

from benchmarks.cases import LEADING, Case
from benchmarks.measure import Step, bare_matmuls, interleave, spread
from benchmarks.stage import Row, Stage, Work
from benchmarks.systems import reason

PRODUCTS = [(n, 4096, c) for n in (2048, 4096, 8192) for c in (8192, 16384, 32768, 131072)]
TINY = (16, 8, 50)
Shape = tuple[int, int, int]


def timed(here: Stage, flops: float, step: Callable[[], object], bare: Step) -> Row:
    """Milliseconds, TFLOP/s, and multiples of the bare products; or why not, where a tile does not fit."""
    steps: list[Step] = [step, bare]
    try:
        interleave(steps, here.device, seconds=0, least=2, most=2)  # warm up
        times = interleave(steps, here.device, seconds=0.3, least=1 if here.tiny else 10, most=50)
    except Exception as error:
        return {"ms": reason(error)}
    ms, products = (spread(mine)["median_ms"] for mine in times)
    found = {"ms": ms, "tflops": 1e-9 * flops / ms, "x_products": ms / products}
    return {key: round(value, 4) for key, value in found.items()}


def text(shape: Shape) -> str:
    return "x".join(map(str, shape))


@functools.lru_cache(1)
def operands(shape: Shape, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden (n, h), weight (c, h) and a tile (n, c) in the dtype of the products."""
    (n, h, c), low = shape, torch.bfloat16 if device.type == "cuda" else torch.float32
    return tuple(torch.randn(size, device=device).to(low) for size in ((n, h), (c, h), (n, c)))  # type: ignore[return-value]


def product_of(here: Stage, shape: Shape, name: str, form: str) -> Row:
    """A product written in its operands' dtype, in float32, or added to float32."""
    hidden, weight, tile = operands(shape, here.device)
    x, y = {"logits": (hidden, weight.T), "d_hidden": (tile, weight), "d_weight": (tile.T, hidden)}[name]
    out = torch.empty(len(x), y.shape[1], device=here.device, dtype=torch.float32 if form else x.dtype)
    wide = {"out_dtype": torch.float32} if form and here.device.type == "cuda" else {}
    step = partial(torch.mm, x, y, out=out, **wide)
    if form == " += fp32":
        step = partial(torch.addmm, out.zero_(), x, y, out=out, **wide)
    bare = partial(torch.mm, hidden, weight.T, out=torch.empty_like(tile))
    return timed(here, 2.0 * math.prod(shape), step, bare)


def products(here: Stage) -> Iterator[Work]:
    """The products that the head is made of, in every form."""
    for shape in [TINY] if here.tiny else PRODUCTS:
        for name, form in itertools.product(("logits", "d_hidden", "d_weight"), ("", " fp32", " += fp32")):
            yield {"shape": text(shape), "form": name + form}, partial(product_of, here, shape, name, form)


@functools.lru_cache(1)
def case_at(shape: Shape, device: torch.device) -> tuple[Case, Step, dict[str, Callable[[], object]]]:
    """A case of scoring, its bare product, linear_lse and linear_exp."""
    n, h, v = shape
    case = Case("logps", n, h, v, 4 if n < 1024 else 16, "bfloat16" if device.type == "cuda" else "float32")
    batch = case.batch(device)
    given = batch.hidden.flatten(0, 1), batch.weight, batch.ids.flatten()
    tile = Tile(TileShape(n, v), given[0].dtype, device).part(n, v)
    leave = partial(linear_exp, *given, LogitMap(torch.ones(n, device=device)), tile)
    return case, bare_matmuls(case, batch), {"linear_lse": partial(linear_lse, *given), "linear_exp": leave}


def kernel_of(here: Stage, shape: Shape, name: str, tiling: object = None) -> Row:
    """A product of ours, with its own tiling or with this one."""
    case, bare, kernels = case_at(shape, here.device)
    step = kernels[name]
    if tiling is not None:
        step = mock.patch(f"rlvr_kernels.{name}.tiling", mock.Mock(return_value=tiling))(step)
    return timed(here, case.flops, step, bare)


def tilings(here: Stage) -> Iterator[Work]:
    """linear_lse and linear_exp with each tiling that could be the one for this GPU, at three shapes."""
    target = ("cuda", 10 * torch.cuda.get_device_capability()[0]) if here.device.type == "cuda" else ("cpu", 0)
    for shape in [TINY] if here.tiny else LEADING:
        for table, name, known in (("FOLD", "linear_lse", FOLD_CANDIDATES), ("LEAVE", "linear_exp", LEAVE_CANDIDATES)):
            for one in known.get(target, (None,)):
                label = {"table": table, "shape": text(shape), "tiling": str(one)}
                yield label, partial(kernel_of, here, shape, name, one)


def few_rows(here: Stage) -> Iterator[Work]:
    """From how many rows on our products take longer than the vendor's, which all wait for the weight below some number."""
    rows = [16] if here.tiny else [64, 128, 256, 512, 1024, 2048, 4096]
    for h, n, name in itertools.product([8] if here.tiny else [4096, 896], rows, ("linear_lse", "linear_exp")):
        shape = (n, h, 50 if here.tiny else 151936)
        yield {"kernel": name, "shape": text(shape)}, partial(kernel_of, here, shape, name)


def winners(rows: list[Row]) -> list[str]:
    """For each table of gemm.py, the line of the tiling that was fastest over all shapes, as multiples of the products."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["table"], row["tiling"]), []).append(math.log(row.get("x_products", math.inf)))
    best = {
        table: min((sum(x) / len(x), tiling) for (name, tiling), x in found.items() if name == table)
        for table, _ in found
    }
    lines = ((table, x, tiling) for table, (x, tiling) in best.items() if x < math.inf)
    return [f"fastest: {table}[...] = {tiling}  # {math.exp(x):.3f} x products" for table, x, tiling in lines]
