"""The cases of the suite, in order of what they tell: a run that is cut off has had the most telling ones.

Not the full product of everything that varies: each variation stands once, on one shape.
"""

from dataclasses import replace

from benchmarks.cases import Case


def variations(case: Case) -> list[Case]:
    """Everything that is varied, once: what is computed, how many rows are active, what the inputs are like."""
    return [
        case,
        replace(case, active=0.5),
        replace(case, loss="logps"),
        replace(case, loss="grpo"),
        replace(case, peaked=True),
        replace(case, entropy=True),
        replace(case, frozen=True),
        replace(case, active=0.7),
        replace(case, active=0.25),
    ]


_LARGE, _SMALL = Case("ace", 1024, 896, 151936, 8), Case("ace", 256, 256, 32000, 16)
CPU_CASES = [
    _LARGE,
    replace(_LARGE, active=0.5),
    replace(_LARGE, loss="grpo"),
    replace(_LARGE, dtype="bfloat16"),
    *variations(_SMALL),
    replace(_SMALL, dtype="bfloat16"),
    Case("ace", 8192, 64, 8192, 16),
]

_MAIN, *_VARIED = variations(Case("ace", 8192, 4096, 151936, 16, "bfloat16"))
_LONG = Case("ace", 65536, 2048, 151936, 64, "bfloat16")
_SHAPES = [(8192, 4096, 131072), (4096, 4096, 128256), (16384, 2048, 151936), (8192, 896, 151936)]
GPU_CASES = [
    _MAIN,
    *_VARIED[:3],
    *(replace(_MAIN, rows=rows, hidden=hidden, vocabulary=vocabulary) for rows, hidden, vocabulary in _SHAPES),
    _LONG,
    *_VARIED[3:],
]

_QUICK_CPU = Case("ace", 128, 256, 4096, 16)
_QUICK_GPU = Case("ace", 2048, 1024, 32768, 16, "bfloat16")


def cases(device_type: str, *, quick: bool) -> list[Case]:
    """The suite for a device; `quick` has small shapes, for a run under 3 minutes."""
    if device_type == "cuda":
        return [*variations(_QUICK_GPU), replace(_QUICK_GPU, rows=65536, hidden=128)] if quick else GPU_CASES
    return [*variations(_QUICK_CPU), replace(_QUICK_CPU, rows=4096, hidden=32)] if quick else CPU_CASES
