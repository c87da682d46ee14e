"""verl reads its platform and its process group from the environment, when it is first imported."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
os.environ |= {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "cpu_platform",
    "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
}
sys.path.insert(0, str(HERE))
trl = find_spec("trl")
assert trl is None or trl.origin, (
    f"{list(trl.submodule_search_locations)} looks like the package trl, which verl then imports"
)


@pytest.fixture(scope="session", autouse=True)
def one_process():
    """A process group of one. verl would ask for the backend "cpu:gloo,cpu:gloo", which torch refuses."""
    import torch.distributed

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders of tiny random models, made once each: models("qwen2", tie_word_embeddings=True)."""
    import tiny

    return tiny.Models(tmp_path_factory.mktemp("models"))
