"""Compile every Triton kernel of the library for GPUs that need not be present, and tabulate what each one uses.

    python -m tools.compile_table [--target sm_90 ...] [--only linear_lse ...]
    python -m tools.compile_table --record     # what the tests and docs/kernels.md hold

The library's own functions run on meta tensors of a language model's size (launches.py), while a driver without a GPU
stands in for Triton's. Triton's own just-in-time path compiles each kernel, specialised and with constants as in a real
launch, and launches nothing: the table shows what would run. Registers and stack come from the binary: from cuobjdump for
NVIDIA, from the code object's metadata for AMD.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from rlvr_kernels._triton import HAS_TRITON, interpreting, triton

from tools.compile_targets import LIMITS, TARGETS, Target, occupancy
from tools.launches import LAUNCHES

RECORD, PAGE = Path("tests/kernels/compiled.json"), Path("docs/kernels.md")
BEGIN, END = "<!-- compile table: written by --record -->", "<!-- end of the compile table -->"
INSTRUCTIONS = ("HGMMA", "UTMALDG", "UTMASTG", "STSM", "MUFU.EX2", "STG")
"""Matrix products, reads and writes by TMA, what stages a tile in shared memory, exponentials, ordinary stores."""
LEGEND = (
    "registers / bytes of stack (spills) / KiB of shared memory (warps) programs per processor and what limits them"
)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel uses: a thread's registers (AMD: vector registers), bytes of its stack and of shared memory.

    The stack holds spilled registers and nothing else. matrix_unit is the instruction family of the matrix products, "" if
    they run on the ordinary arithmetic units. bulk_copies counts the places where TMA reads. in_flight is the most groups of
    Hopper's matrix instructions that a wait in the code leaves running. instructions counts those in SASS on sm_90, of a
    product. A variant's second form of a kernel has a number behind its name: the one that looks for flagged rows.
    """

    variant: str
    kernel: str
    target: str
    num_warps: int
    registers: int
    stack: int
    shared: int
    matrix_unit: str = ""
    bulk_copies: int = 0
    in_flight: int = 0
    instructions: str = ""

    def occupancy(self) -> tuple[int, tuple[str, ...]]:
        """(programs per processor, what limits them)."""
        return occupancy(TARGETS[self.target], self.num_warps, self.registers, self.shared)

    def __str__(self) -> str:
        programs, limits = self.occupancy()
        used = f"{self.registers} / {self.stack} / {self.shared / 1024:.0f} ({self.num_warps})"
        return f"{used} {programs}{''.join(LIMITS[name] for name in limits)}"


class _Driver:
    """Stands in for Triton's driver: names a target, and has no device."""

    def __init__(self, target: Target):
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget(target.backend, target.arch, target.warp_size)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> str:
        return str(self._target)  # Triton caches compiled kernels by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def recorded(target: Target) -> Iterator[list[tuple[str, Any]]]:
    """Inside, a launch compiles its kernel for `target`, appends (name, compiled kernel) to the list and runs nothing.

    Raises:
        RuntimeError: Triton is not installed, or interprets its kernels.
    """
    if not HAS_TRITON or interpreting():
        raise RuntimeError("compiling the kernels needs triton, imported without TRITON_INTERPRET=1")
    from triton.runtime.jit import JITFunction

    compiled: list[tuple[str, Any]] = []
    run = JITFunction.run

    def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    driver = triton.runtime.driver
    previous = driver._active  # `driver.active` would look for a GPU
    driver.set_active(_Driver(target))
    try:
        with mock.patch.object(JITFunction, "run", compile_alone):
            yield compiled
    finally:
        driver.set_active(previous)


def compile_variant(variant: str, target_name: str) -> list[Usage]:
    """Compile for one target every kernel that a variant launches."""
    with recorded(TARGETS[target_name]) as compiled:
        LAUNCHES[variant]()
    found = dict.fromkeys(usage(variant, name, target_name, kernel) for name, kernel in compiled)
    seen: Counter[str] = Counter()
    numbered = []
    for one in found:
        seen[one.kernel] += 1
        numbered.append(replace(one, kernel=f"{one.kernel} {seen[one.kernel]}") if seen[one.kernel] > 1 else one)
    return numbered


def usage(variant: str, kernel: str, target: str, compiled: Any) -> Usage:
    """Read a compiled kernel's use of the machine out of its binary."""
    asm, meta = compiled.asm, compiled.metadata
    registers, stack = _nvidia(asm["cubin"]) if "cubin" in asm else _amd(asm["amdgcn"])
    text = asm["ptx"] if "ptx" in asm else asm["amdgcn"]
    units = re.findall(r"wgmma|tcgen05|mma\.sync|mfma", text)
    waits = [int(groups) for groups in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", text)]
    copies = len(re.findall(r"cp\.async\.bulk\.tensor\S*\.shared\S*\.global", text))
    said = instructions(_cuobjdump("--dump-sass", asm["cubin"])) if units and target == "sm_90" else ""
    return Usage(
        variant, kernel, target, meta.num_warps, registers, stack, meta.shared, units[0] if units else "", copies,
        max(waits, default=0), said,
    )  # fmt: skip


def instructions(sass: str) -> str:
    """How many of INSTRUCTIONS, and of all, the disassembled kernel has."""
    found = Counter(re.findall(r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.EX2)?)", sass, re.MULTILINE))
    said = [f"{found[name]} {name}" for name in INSTRUCTIONS if found[name]]
    return f"{', '.join(said)} of {sum(found.values())}"


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of the one kernel in a cubin."""
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _cuobjdump("--dump-resource-usage", cubin)))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _amd(assembly: str) -> tuple[int, int]:
    """(vector registers, bytes of private memory) of the one kernel in a code object's assembly."""
    found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly))
    return int(found["vgpr_count"]), int(found["private_segment_fixed_size"])


def compile_all(targets: Sequence[str] = tuple(TARGETS), only: Sequence[str] = (), processes: int = 2) -> list[Usage]:
    """Compile every variant, or those whose name begins with one of `only`, for every target, in LAUNCHES' order."""
    jobs = [(v, t) for v in LAUNCHES for t in targets if not only or v.startswith(tuple(only))]
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(processes, context, initializer=_use_cache, initargs=(cache,)) as pool,
    ):
        results = pool.map(compile_variant, *zip(*jobs, strict=True))
        return list(dict.fromkeys(row for rows in results for row in rows))


def _use_cache(folder: str) -> None:
    triton.knobs.cache.dir = folder


def table(rows: Sequence[Usage], *, markdown: bool = False) -> str:
    """One line per variant and kernel, one column per target, whose cells LEGEND explains.

    A variant's further kernels are left out if an earlier line shows the same.
    """
    targets = list(dict.fromkeys(row.target for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        cells.setdefault((row.variant, row.kernel), {})[row.target] = str(row)
    lines, variants, seen = [["variant", "kernel", *targets]], set(), set()
    for (variant, kernel), used_on in cells.items():
        line = [kernel, *(used_on.get(target, "") for target in targets)]
        if variant not in variants or tuple(line) not in seen:
            lines.append([variant, *line])
        variants.add(variant)
        seen.add(tuple(line))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def load(path: Path) -> tuple[str, list[Usage]]:
    """(Triton's version, usages) that --record wrote."""
    found = json.loads(path.read_text())
    return found["triton"], [Usage(**row) for row in found["usages"]]


def with_table(page: str, rows: Sequence[Usage]) -> str:
    """The page with its table replaced."""
    before, rest = page.split(BEGIN)
    counted = dict.fromkeys((row.variant, row.kernel, row.instructions) for row in rows if "HGMMA" in row.instructions)
    lines = [("variant", "kernel", "instructions on sm_90"), ("---",) * 3, *counted]
    sass = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{before}{BEGIN}\n\n{table(rows, markdown=True)}\n\n{sass}\n\n{END}{rest.split(END)[1]}"


def record(rows: Sequence[Usage]) -> None:
    """Write what the tests and the page hold, below the current folder."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    RECORD.write_text(f'{{"triton": "{triton.__version__}", "usages": [\n{lines}\n]}}\n')
    PAGE.write_text(with_table(PAGE.read_text(), rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or record it."""
    parser = argparse.ArgumentParser(prog="python -m tools.compile_table", description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help=f"write all of it to {RECORD} and {PAGE}")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="variants whose name begins so")
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args(arguments)
    if chosen.record and (
        chosen.only or chosen.target != list(TARGETS) or not (RECORD.parent.is_dir() and PAGE.exists())
    ):
        parser.error("--record takes every variant and target, and the repository as current folder")
    rows = compile_all(chosen.target, chosen.only, chosen.processes)
    if chosen.record:
        record(rows)
    print(LEGEND, table(rows), sep="\n\n")


if __name__ == "__main__":
    main()
