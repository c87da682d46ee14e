import doctest
import importlib
import pkgutil

import pytest

import rlvr_ops

MODULES = [module.name for module in pkgutil.iter_modules(rlvr_ops.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings_run(name):
    module = importlib.import_module(f"rlvr_ops.{name}")
    assert doctest.testmod(module, extraglobs={"rlvr_ops": rlvr_ops}).failed == 0
