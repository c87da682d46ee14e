"""The layout of Hugging Face `kernels`: built, loaded where nobody knows rlvr_kernels, and compared with it."""

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from rlvr_kernels import surrogates
from rlvr_kernels.linear_lse import linear_lse
from rlvr_kernels.objective import KL, Ace, TokenObjective
from rlvr_kernels.surrogates import Dppo
from rlvr_kernels.weigh import Rows, weigh

from tools import hub_kernels

ROOT = Path(__file__).parents[2]
CHILD = """
import sys
from pathlib import Path

for name in ("rlvr_kernels", "rlvr_ops"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError, as if it were not installed
import torch
from kernels import get_local_kernel

folder, given, found = map(Path, sys.argv[1:])
hub = get_local_kernel(folder)
assert all(hasattr(hub, name) for name in hub.__all__)
given = torch.load(given)
rows = hub.Rows(**given["rows"])
objective = hub.TokenObjective(hub.Dppo(), ace=hub.Ace(alpha=1.0), kl=hub.KL(beta=0.1))
results = {"module": hub.__name__, "names": list(hub.__all__)}
for backend in ("torch", "triton"):
    scores = hub.linear_lse(*given["head"], temperature=0.7, softcap=5.0, backend=backend)
    results[backend] = (*scores, *hub.weigh(scores[0], rows, objective, backend))
torch.save(results, found)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "rlvr-kernels"
    hub_kernels.build(folder)
    return folder


@pytest.fixture(scope="module")
def given():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(11, 24, generator=g), torch.randn(70, 24, generator=g)
    rows = {
        "advantages": torch.tensor([1.0] * 4 + [-1.0] * 7),
        "cu_seqlens": torch.tensor([0, 4, 11]),
        "weights": torch.tensor([0.125, 1 / 14]),
        "old": -torch.rand(11, generator=g) * 4,
        "ref": -torch.rand(11, generator=g) * 4,
    }
    return {"head": (hidden, weight, torch.randint(70, (11,), generator=g)), "rows": rows}


@pytest.fixture(scope="module")
def loaded(folder, given, tmp_path_factory):
    """What a fresh process computes with the loaded kernels, by backend."""
    work = tmp_path_factory.mktemp("loaded")
    torch.save(given, work / "given.pt")
    run_alone(work, CHILD, folder, work / "given.pt", work / "found.pt")
    return torch.load(work / "found.pt")


def run_alone(work, code, *arguments):
    """Run code in a process that finds no file of this repository, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(work), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_twins_that_are_loaded_have_the_bits_of_ours_and_the_kernels_their_numbers(given, loaded):
    logp, lse = linear_lse(*given["head"], temperature=0.7, softcap=5.0, backend="torch")
    objective = TokenObjective(Dppo(), ace=Ace(alpha=1.0), kl=KL(beta=0.1))
    truth = (logp, lse, *weigh(logp, Rows(**given["rows"]), objective, "torch"))
    assert len(loaded["torch"]) == len(loaded["triton"]) == len(truth)
    for twin, kernel, ours in zip(loaded["torch"], loaded["triton"], truth, strict=True):
        assert torch.equal(twin, ours)
        torch.testing.assert_close(kernel, ours, rtol=1e-5, atol=1e-6)


def test_the_module_is_loaded_under_the_name_in_its_metadata(folder, loaded):
    variant = "torch-cuda" if torch.version.cuda else "torch-cpu"
    assert loaded["module"] == json.loads((folder / "build" / variant / "metadata.json").read_text())["id"]


def test_the_loader_accepts_the_project_and_the_digests(folder):
    rust = importlib.import_module("kernels._rust")
    general = tomllib.loads((folder / "build.toml").read_text())["general"]
    assert [str(backend) for backend in rust.Build.open(folder).general.backends] == general["backends"]
    for backend in general["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        found = rust.Metadata.read_from_file(variant / "metadata.json")
        assert (str(found.name), found.version) == (general["name"], general["version"])
        assert str(found.backend.backend_type) == backend
        found.digest.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))


def test_no_file_imports_its_package_by_a_name_or_anything_but_torch_triton_and_python(folder):
    for path in (folder / "build/torch-cuda").rglob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), flags=re.MULTILINE):
            root = module.split(".")[0]
            assert root in {"", "torch", "triton", *sys.stdlib_module_names}, f"{path.name} imports {module}"


def test_the_card_names_what_is_public(folder):
    card = (folder / "CARD.md").read_text()
    source = (folder / "torch-ext/rlvr_kernels/__init__.py").read_text()
    functions = re.findall(r'^    "([a-z]\w*)",$', source, flags=re.MULTILINE)
    assert functions == sorted(re.findall(r"^\| `(\w+)` \|", card, flags=re.MULTILINE))


INPUTS = """
import sys, torch
for name in ("rlvr_kernels", "rlvr_ops"):
    sys.modules[name] = None
hidden, weight, ids = torch.randn(6, 16), torch.randn(50, 16), torch.randint(50, (6,))
"""
DIFFERENCE = """
logits = (hidden @ weight.T / 0.7).double()
print(float((logp - logits.log_softmax(1).gather(1, ids[:, None])[:, 0]).abs().max()))
"""


@pytest.mark.parametrize("page", ["kernels/hub/CARD.md", "docs/kernels.md"])
def test_the_code_that_loads_the_folder_runs_as_it_is_printed(folder, page, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    (code,) = [block for block in blocks if "get_local_kernel" in block]
    (tmp_path / "rlvr-kernels").symlink_to(folder)
    assert float(run_alone(tmp_path, INPUTS + code + DIFFERENCE)) < 1e-5


def test_every_surrogate_is_public(folder):
    public = (folder / "torch-ext/rlvr_kernels/__init__.py").read_text()
    records = [name for name in surrogates.__all__ if name[0].isupper() and hasattr(getattr(surrogates, name), "form")]
    assert [name for name in records if f'"{name}"' not in public] == []


def test_a_folder_that_exists_is_left_alone(folder):
    with pytest.raises(FileExistsError):
        hub_kernels.build(folder)
