"""verl finds the plug-in by its entry point, and the self-check says what verl would hide."""

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from rlvr_ops.integrations.verl import __main__ as check
from rlvr_ops.integrations.verl import plugin


def python(*arguments, **environment):
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def test_the_entry_point_is_installed():
    assert [point.value for point in entry_points(group="verl.plugins", name="rlvr_ops")] == [plugin.__name__]


PROGRAM = """
import sys, rlvr_ops
assert "verl" not in sys.modules and "rlvr_ops.integrations" not in sys.modules
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.workers.engine.base import EngineRegistry
print(get_policy_loss_fn("ace-dapo").name)
print(EngineRegistry.get_engine_cls("language_model", "fsdp2").__name__)
print(get_trainer_cls("ace").__name__)
"""


def test_importing_verl_is_enough_and_importing_rlvr_ops_does_not_import_verl():
    done = python("-c", PROGRAM, VERL_ENGINE_VENDOR="rlvr_ops")
    assert done.stdout.split() == ["ace-dapo", "HeadEngine", "ACETrainer"], done.stderr


def test_the_self_check_names_every_part(capsys):
    assert check.main() == 0
    said = capsys.readouterr().out
    assert "MISSING" not in said
    for part in ("verl 0.9", "entry point", "loss_mode=ace", "trainer_mode=ace", "VERL_ENGINE_VENDOR=rlvr_ops"):
        assert part in said


def test_the_self_checks_lines_stand_alone():
    command = [sys.executable, "-m", "rlvr_ops.integrations.verl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "UserWarning" not in done.stderr
    assert [line[:8] for line in done.stdout.splitlines()] == ["ok      "] * 6


def test_the_self_check_says_how_to_get_transfer_queue(monkeypatch, capsys):
    monkeypatch.setattr(plugin, "FAILURES", {})
    monkeypatch.setitem(sys.modules, "transfer_queue", None)
    monkeypatch.delitem(sys.modules, "rlvr_ops.integrations.verl.trainer", raising=False)
    assert check.main() == 1
    assert re.search(r"MISSING trainer, .*transfer_queue.*: pip install TransferQueue", capsys.readouterr().out)


def test_the_self_check_fails_where_plug_ins_are_switched_off(monkeypatch, capsys):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    assert check.main() == 1
    assert "MISSING VERL_USE_EXTERNAL_PLUGINS=none leaves rlvr_ops out" in capsys.readouterr().out


def test_the_self_check_fails_without_the_entry_point(monkeypatch, capsys):
    monkeypatch.setattr(check, "entry_points", lambda group: [])
    assert check.main() == 1
    assert "MISSING entry point verl.plugins: install" in capsys.readouterr().out


def test_what_verl_hides_is_kept_logged_and_shown(monkeypatch, capsys, caplog):
    def fails(name):
        raise ImportError("no flash for you")

    monkeypatch.setattr(plugin, "FAILURES", {})
    monkeypatch.setattr(plugin.importlib, "import_module", fails)
    assert check.main() == 1
    assert "MISSING head, VERL_ENGINE_VENDOR=rlvr_ops: ImportError('no flash for you')" in capsys.readouterr().out
    assert "could not be registered" in caplog.text


@pytest.mark.parametrize("name", ["RLVR_OPS_ACE_ALPHA", "RLVR_OPS_ACE_CONFIDENCE"])
def test_a_wrong_variable_is_refused(name, monkeypatch):
    from rlvr_ops.integrations.verl.settings import read_ace

    monkeypatch.setenv(name, "sideways")
    with pytest.raises(ValueError, match=r"sideways"):
        read_ace()
