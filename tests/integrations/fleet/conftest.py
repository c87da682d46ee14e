"""Makes the frameworks importable where there is no GPU."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import typing
from unittest import mock

import typing_extensions

# transformers and TRL ask once what is installed: before there are stand-ins.
import swift.rlhf_trainers.grpo_trainer  # noqa: F401  isort: skip
import transformers.integrations.deepspeed  # isort: skip
import transformers.integrations.flash_attention  # noqa: F401  isort: skip

collect_ignore = [] if importlib.util.find_spec("openrlhf") else ["test_openrlhf.py"]  # its wheels end at Python 3.12
CUDA_ONLY = (
    "deepspeed",
    "flash_attn",
    "vllm",
)  # imported by OpenRLHF and by SkyRL's workers, and not called in these tests


class StandIn(types.ModuleType):
    """A module that has every attribute."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return mock.MagicMock(name=f"{self.__name__}.{name}")


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] in CUDA_ONLY:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        """Nothing to run."""


sys.meta_path.insert(0, Finder())
if sys.version_info < (3, 12):
    typing.TypedDict = typing_extensions.TypedDict  # pydantic refuses the one that SkyRL 0.3.0 takes
