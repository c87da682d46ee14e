"""The matrix products that the head is made of, in every form that a schedule could choose: what there is to choose from.

logits   (n, H) x (H, c), written in the operands' dtype and in float32
d_hidden (n, c) x (c, H), written and accumulated in float32
d_weight (c, n) x (n, H), written in the operands' dtype and accumulated in float32
"""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_stage import Stage, stage
from benchmarks.measure import interleave, spread
from benchmarks.report import write

SHAPES = [(n, 4096, c) for n in (2048, 4096, 8192) for c in (8192, 16384, 32768, 131072)]


def forms(n: int, h: int, c: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Every product at one shape, into memory that is there already."""
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden, weight = torch.randn(n, h, device=device, dtype=low), torch.randn(c, h, device=device, dtype=low)
    tile = torch.randn(n, c, device=device).to(low)
    wide: dict[str, Any] = {"out_dtype": torch.float32} if device.type == "cuda" else {}
    logits, d_hidden, d_weight = (torch.empty(s, device=device) for s in ((n, c), (n, h), (c, h)))
    low_logits, low_d_weight = torch.empty(n, c, device=device, dtype=low), torch.empty(c, h, device=device, dtype=low)
    return {
        "logits": lambda: torch.mm(hidden, weight.T, out=low_logits),
        "logits fp32": lambda: torch.mm(hidden, weight.T, out=logits, **wide),
        "d_hidden fp32": lambda: torch.mm(tile, weight, out=d_hidden, **wide),
        "d_hidden += fp32": lambda: torch.addmm(d_hidden, tile, weight, out=d_hidden, **wide),
        "d_weight": lambda: torch.mm(tile.T, hidden, out=low_d_weight),
        "d_weight += fp32": lambda: torch.addmm(d_weight, tile.T, hidden, out=d_weight, **wide),
    }


def measured(n: int, h: int, c: int, here: Stage) -> list[dict[str, Any]]:
    """Milliseconds and TFLOP/s of each form."""
    found = forms(n, h, c, here.device)
    turns: dict[str, Any] = {"seconds": 0.5, "least": 1 if here.tiny else 20, "most": 1 if here.tiny else 50}
    interleave(list(found.values()), here.device, seconds=0, least=2, most=2)  # warm up
    times = interleave(list(found.values()), here.device, **turns)
    rows = []
    for name, mine in zip(found, times, strict=True):
        median = spread(mine)["median_ms"]
        rows.append(
            {
                "n": n,
                "h": h,
                "c": c,
                "form": name,
                "ms": round(median, 4),
                "tflops": round(2e-9 * n * h * c / median, 1),
            }
        )
    return rows


def main() -> None:
    """Measure until the time is up."""
    here, rows = stage(), []
    for n, h, c in [(16, 8, 50)] if here.tiny else SHAPES:
        if here.over():
            break
        rows += measured(n, h, c, here)
        write(here.out / "products.json", rows)


if __name__ == "__main__":
    main()
