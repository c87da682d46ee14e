"""Modules with the documented signature of a framework, for where it is not installed."""

import sys
import types
from importlib.machinery import PathFinder


def installed(framework):
    return PathFinder.find_spec(framework) is not None


def stand_in(monkeypatch, **modules):
    """Put modules with these attributes in the place of a framework's; a double underscore in a name stands for a dot."""
    for path, attributes in modules.items():
        parts = path.split("__")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules or depth == len(parts):
                monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
            if depth > 1:
                monkeypatch.setattr(
                    sys.modules[name.rpartition(".")[0]], parts[depth - 1], sys.modules[name], raising=False
                )
        vars(sys.modules[name]).update(attributes)
