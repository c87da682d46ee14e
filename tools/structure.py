"""Measure what the library's structure costs its readers: `python -m tools.structure`.

Calls, functions and files of one `ace_loss` forward on a CPU; depth of imports; lengths of files; and the host's time from
entry to the first product. tests/test_structure.py holds the counts.
"""

import ast
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rlvr_kernels import tile

import rlvr_ops

ROOT = Path(rlvr_ops.__file__).parent
PACKAGES = {"rlvr_ops": ROOT, "rlvr_kernels": Path(tile.__file__).parent}


def forward(rows: int = 16) -> Callable[[], Any]:
    """One `ace_loss` forward with all defaults, on a small batch that wants gradients."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, rows // 4, 64, generator=g, requires_grad=True)
    weight = torch.randn(1000, 64, generator=g, requires_grad=True)
    ids = torch.randint(1000, (4, rows // 4), generator=g)
    ref, advantages = -3 * torch.rand(ids.shape, generator=g), torch.tensor([1.0, -1.0, 0.5, -0.5])
    return lambda: rlvr_ops.ace_loss(hidden, weight, ids, advantages, ref_per_token_logps=ref)


def calls_of(run: Callable[[], Any]) -> dict[tuple[str, str], int]:
    """How often `run` calls each (file, function) of the packages."""
    found: dict[tuple[str, str], int] = {}
    folders = tuple(str(folder) for folder in PACKAGES.values())

    def count(frame: Any, event: str, _argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(folders):
            key = code.co_filename, code.co_qualname
            found[key] = found.get(key, 0) + 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def sources(*, integrations: bool = False) -> dict[str, Path]:
    """The modules of `rlvr_ops` by dotted name: the library, or what stands on it for each framework."""
    paths = [path for path in sorted(ROOT.rglob("*.py")) if ("integrations" in path.parts) == integrations]
    return {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in paths}


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules among `known` that a file imports when it is imported."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.col_offset == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= names or ({node.module, f"{node.module}.__init__"} & known)
    return found


def storeys(*, integrations: bool = False) -> dict[str, int]:
    """The import depth of each module: 1 imports none of the others."""
    files = sources(integrations=integrations)
    graph = {name: imports(path, set(files)) - {name} for name, path in files.items()}
    depth: dict[str, int] = {}

    def of(name: str) -> int:
        if name not in depth:
            depth[name] = 0  # ends a cycle
            depth[name] = 1 + max((of(other) for other in graph[name]), default=0)
        return depth[name]

    return {name: of(name) for name in files if not name.endswith("__init__")}


def lengths(*, integrations: bool = False) -> dict[str, int]:
    """Lines of every file but `__init__.py`."""
    files = sources(integrations=integrations).items()
    return {name: len(path.read_text().splitlines()) for name, path in files if path.stem != "__init__"}


def seconds_to_the_first_product(repeats: int = 300) -> float:
    """Median host time from the call of `ace_loss` to its first product, on tensors that cost next to nothing."""

    class ReachedError(Exception):
        pass

    def stop(*_args: Any, **_keywords: Any) -> None:
        raise ReachedError

    run, multiply, found = forward(), tile.multiply, []
    torch.set_num_threads(1)  # measures the host, not its threads waking up
    tile.multiply = stop
    try:
        for _ in range(repeats):
            start = time.perf_counter()
            try:
                run()
            except ReachedError:
                found.append(time.perf_counter() - start)
    finally:
        tile.multiply = multiply
    return statistics.median(found)


def main() -> None:
    """Print every measure."""
    run = forward()
    run()
    calls, deep, long = calls_of(run), storeys(), lengths()
    files = {file for file, _ in calls}
    print(f"one ace_loss forward: {sum(calls.values())} calls into {len(calls)} functions of {len(files)} files")
    for file in sorted(files):
        inside = {function: n for (where, function), n in calls.items() if where == file}
        print(f"  {sum(inside.values()):4d}  {Path(file).parent.name}/{Path(file).name}")
    print(f"import depth of rlvr_ops: {max(deep.values())} ({max(deep, key=lambda name: deep[name])})")
    print(f"lines of its {len(long)} files: median {statistics.median(long.values()):g}, longest {max(long.values())}")
    print(f"host time to the first product: {1e3 * seconds_to_the_first_product():.3f} ms")


if __name__ == "__main__":
    main()
