"""Where and with what something was measured: device, clocks, versions, commit."""

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("rlvr-ops", "torch", "triton", "trl", "verl", "liger-kernel", "cut-cross-entropy", "quack-kernels",
            "nvidia-cutlass-dsl", "pytest-benchmark")  # fmt: skip
NVIDIA_SMI = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"


def device_name(device: torch.device) -> str:
    """The hardware, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text())
        model = names[0] if names else model
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def device_folder(device: torch.device) -> str:
    """The device's name as a folder's."""
    words = re.sub(r"\((?:r|tm)\)|processor|cpu", "", device_name(device).lower())
    return f"{device.type}-{'-'.join(re.findall(r'[a-z0-9]+', words))}"


def versions() -> dict[str, str]:
    """Of Python and of every package that takes part and is there."""
    found = {"python": platform.python_version()} | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def clocks(device: torch.device) -> dict[str, Any]:
    """What the clocks say now, right after the work: nvidia-smi's own words on a GPU, the mean MHz on a CPU."""
    if device.type == "cuda":
        fields = NVIDIA_SMI.split(",")
        index = torch.cuda.current_device()
        words = _said("nvidia-smi", f"--id={index}", f"--query-gpu={NVIDIA_SMI}", "--format=csv,noheader")
        return dict(zip(fields, (words or "").split(", "), strict=False))
    cpuinfo = Path("/proc/cpuinfo")
    found = re.findall(r"cpu MHz\s*: ([\d.]+)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return {"mean": f"{sum(map(float, found)) / len(found):.0f} MHz"} if found else {}


@functools.cache
def commit() -> dict[str, Any]:
    """The commit that was checked out when the run began, and whether tracked files differed; results and pages aside.

    A copy without its .git is told by the environment variable RLVR_OPS_COMMIT, if at all.
    """
    found = _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if found is None:
        return {"id": os.environ.get("RLVR_OPS_COMMIT"), "dirty": None}
    aside = (":!benchmarks/results", ":!docs")
    changed = _said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".", *aside)
    return {"id": found, "dirty": bool(changed)}


def _said(*command: str) -> str | None:
    """What a command printed, or None if it is not there or failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
