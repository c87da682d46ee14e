import doctest
import importlib
import pkgutil

import pytest
import torch

import rlvr_ops

NEED_A_FRAMEWORK = ("rlvr_ops.integrations.trl", "rlvr_ops.integrations.verl")  # whose examples run beside it
FOUND = [module.name for module in pkgutil.walk_packages(rlvr_ops.__path__, "rlvr_ops.")]
MODULES = [name for name in FOUND if not name.startswith(NEED_A_FRAMEWORK)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"rlvr_ops": rlvr_ops, "torch": torch}).failed == 0
