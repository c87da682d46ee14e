"""Products, tilings and few rows, each in turns with bare products, by which measurements minutes apart compare."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
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


def products(here: Stage) -> Iterator[Work]:
    """The products that the head is made of, written in their operands' dtype, in float32, and added to float32."""
    low, wide = (torch.bfloat16, {"out_dtype": torch.float32}) if here.device.type == "cuda" else (torch.float32, {})
    for n, h, c in [TINY] if here.tiny else PRODUCTS:
        hidden, weight, tile = (torch.randn(s, device=here.device).to(low) for s in ((n, h), (c, h), (n, c)))
        bare = partial(torch.mm, hidden, weight.T, out=torch.empty_like(tile))
        for name, x, y in (("logits", hidden, weight.T), ("d_hidden", tile, weight), ("d_weight", tile.T, hidden)):
            out, total = (torch.empty(len(x), y.shape[1], device=here.device, dtype=t) for t in (low, torch.float32))
            forms = {name: partial(torch.mm, x, y, out=out), f"{name} fp32": partial(torch.mm, x, y, out=total, **wide)}
            forms[f"{name} += fp32"] = partial(torch.addmm, total, x, y, out=total, **wide)
            for form, step in forms.items():
                yield {"shape": f"{n}x{h}x{c}", "form": form}, partial(timed, here, 2.0 * n * h * c, step, bare)


def tilings(here: Stage) -> Iterator[Work]:
    """linear_lse and linear_exp with each tiling that could be the one for this GPU, at three shapes."""
    target = ("cuda", 10 * torch.cuda.get_device_capability()[0]) if here.device.type == "cuda" else ("cpu", 0)
    for shape in [TINY] if here.tiny else LEADING:
        case, bare, *kernels = kernels_at(here, shape)
        for step, table, known in zip(kernels, ("FOLD", "LEAVE"), (FOLD_CANDIDATES, LEAVE_CANDIDATES), strict=True):
            module = step.func.__name__
            for one in known.get(target, (None,)):
                tiled = step if one is None else mock.patch(f"rlvr_kernels.{module}.tiling", return_value=one)(step)
                label = {"table": table, "shape": "x".join(map(str, shape)), "tiling": str(one)}
                yield label, partial(timed, here, case.flops, tiled, bare)


def few_rows(here: Stage) -> Iterator[Work]:
    """From how many rows on our products take longer than the vendor's, which all wait for the weight below some number."""
    rows = [16] if here.tiny else [64, 128, 256, 512, 1024, 2048, 4096]
    for h, n in itertools.product([8] if here.tiny else [4096, 896], rows):
        case, bare, *kernels = kernels_at(here, (n, h, 50 if here.tiny else 151936))
        for step in kernels:
            label = {"kernel": step.func.__name__, "shape": f"{n}x{h}x{case.vocabulary}"}
            yield label, partial(timed, here, case.flops, step, bare)


def kernels_at(here: Stage, shape: tuple[int, int, int]) -> tuple[Case, Step, Any, Any]:
    """A case of scoring, its bare product, linear_lse and linear_exp."""
    n, h, v = shape
    case = Case("logps", n, h, v, 4 if n < 1024 else 16, "bfloat16" if here.device.type == "cuda" else "float32")
    batch = case.batch(here.device)
    given = batch.hidden.flatten(0, 1), batch.weight, batch.ids.flatten()
    tile = Tile(TileShape(n, v), given[0].dtype, here.device).part(n, v)
    leave = partial(linear_exp, *given, LogitMap(torch.ones(n, device=here.device)), tile)
    return case, bare_matmuls(case, batch), partial(linear_lse, *given), leave


def winners(rows: list[Row]) -> list[str]:
    """For each table of gemm.py, the line of the tiling that was fastest over all shapes, as multiples of the products."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        found.setdefault((row["table"], row["tiling"]), []).append(math.log(row.get("x_products", math.inf)))
    best = {
        table: min((sum(x) / len(x), tiling) for (name, tiling), x in found.items() if name == table)
        for table, _ in found
    }
    return [f"fastest: {table}[...] = {tiling}  # {math.exp(x):.3f} x products" for table, (x, tiling) in best.items()]
