import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rlvr_ops

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

WITHOUT = """
import sys

for name in {blocked}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError, as if it were not installed
import rlvr_ops, torch
hidden = torch.randn(2, 3, 8, requires_grad=True)
out = rlvr_ops.grpo_loss(hidden, torch.randn(16, 8), torch.zeros(2, 3, dtype=torch.long), torch.tensor([1.0, -1.0]))
out.loss.backward()
assert hidden.grad is not None
print(rlvr_ops.explain_backend("cpu"), [name for name in {blocked} if sys.modules.get(name)])
"""


def run(*arguments: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_the_library_needs_torch_alone():
    blocked = {"triton", "transformers", "accelerate", "numpy", "yaml", "matplotlib", "reasoning_gym", "rlvr_trainer"}
    assert "('torch', 'CPU tensors take the PyTorch twins') []" in run(
        "-c", WITHOUT.replace("{blocked}", repr(blocked))
    )


def test_an_import_leaves_the_compiler_alone():
    assert run("-c", "import sys, rlvr_ops; print('torch._dynamo' in sys.modules)") == "False\n"


def test_the_installed_version_is_the_one_in_the_code():
    assert rlvr_ops.__version__ == PROJECT["version"] == importlib.metadata.version("rlvr-ops")


def test_torch_is_the_only_dependency_that_everybody_gets():
    assert [requirement.split(">")[0] for requirement in PROJECT["dependencies"]] == ["torch"]


def test_every_promised_extra_exists():
    assert {"train", "vllm", "trl", "bench", "docs", "dev"} <= set(PROJECT["optional-dependencies"])


def test_the_version_is_the_one_that_the_citation_names():
    assert f"version: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", rlvr_ops.__all__)
def test_every_public_name_says_what_it_is(name):
    assert getattr(rlvr_ops, name).__doc__


def test_benchmarks_are_collected_with_the_flag_and_only_with_it():
    quiet = ("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider")
    assert "bench_loss[" not in run(*quiet, "benchmarks", code=5)
    listed = run(*quiet, "--benchmark")
    assert (
        "bench_loss[ace-1024x896x151936-float32-100-active-rlvr_ops]" in listed or "bench_loss[ace-8192x4096" in listed
    )
    assert "tests/" not in listed
