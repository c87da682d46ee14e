"""A sealed process can compute and answer; it cannot write, reach the network, start anything, or read what is not Python's."""

import os
import platform
import socket
import subprocess
import sys

import pytest
from rlvr_trainer.judging.workers import Workers

LINUX = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
SCRIPT = """
import ctypes, os, resource, shutil, socket, subprocess, sys, threading
from rlvr_trainer.judging.sandbox import seal
libc = ctypes.CDLL(None, use_errno=True)
def checked(result):
    if result in (-1, None):
        raise OSError(ctypes.get_errno(), "refused")
    return result
sealed = seal()
folder, port = sys.argv[1], int(sys.argv[2])
try:
    print("did", eval(sys.argv[3]))
except (OSError, MemoryError, ValueError, RuntimeError) as error:
    print("refused", type(error).__name__)
print(sealed)
"""
REFUSED = {
    "writing a new file": "open(folder + '/new', 'w').write('x')",
    "writing a file that is there": "open(folder + '/old', 'a').write('x')",
    "writing by libc": "checked(libc.open((folder + '/new').encode(), os.O_WRONLY | os.O_CREAT, 0o600))",
    "removing": "os.remove(folder + '/old')",
    "renaming": "os.rename(folder + '/old', folder + '/new')",
    "making a folder": "os.mkdir(folder + '/new')",
    "linking": "os.symlink(folder + '/old', folder + '/new')",
    "changing rights": "os.chmod(folder + '/old', 0)",
    "cutting short": "os.truncate(folder + '/old', 0)",
    "a socket": "socket.create_connection(('127.0.0.1', port))",
    "a socket by libc": "checked(libc.socket(2, 1, 0))",
    "a process": "subprocess.run(['true'])",
    "a fork": "os.fork()",
    "a fork by libc": "checked(libc.fork())",
    "another program": "os.execv('/bin/true', ['true'])",
    "a signal": "os.kill(os.getppid(), 0)",
    "reading the trainer's memory": "checked(libc.ptrace(16, os.getppid(), 0, 0))",
    "raising a limit": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "all memory": "len(bytearray(2**33))",
    "leaving the name space": "checked(libc.unshare(0x10000000))",
}


def run_sealed(tmp_path, action):
    (tmp_path / "old").write_text("as it was")
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(server.getsockname()[1]), action]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    outcome, sealed = done.stdout.splitlines()
    return outcome, sealed


@pytest.mark.parametrize("action", REFUSED.values(), ids=REFUSED)
def test_a_sealed_process_cannot(tmp_path, action):
    outcome, _ = run_sealed(tmp_path, action)
    assert outcome.startswith("refused "), outcome
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "as it was"


def test_a_sealed_process_computes_and_imports(tmp_path):
    outcome, sealed = run_sealed(tmp_path, "__import__('decimal').Decimal(2) ** 10")
    assert outcome == "did 1024"
    assert "RLIMIT_AS" in sealed
    assert ("seccomp" in sealed) == LINUX


def test_a_sealed_process_reads_nothing_but_pythons_own_folders_where_the_kernel_has_landlock(tmp_path):
    outcome, sealed = run_sealed(tmp_path, "open(folder + '/old').read()")
    assert outcome.startswith("refused " if "Landlock" in sealed else "did ")


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="the environment of another process is read from /proc")
def test_a_worker_has_no_secrets(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    workers = Workers(1)
    try:
        workers.sealed()
        pid = workers._all[0]._process.pid
        with open(f"/proc/{pid}/environ", "rb") as file:
            names = {entry.partition(b"=")[0].decode() for entry in file.read().split(b"\0") if entry}
        assert not any(word in name for name in names for word in ("KEY", "TOKEN", "SECRET", "HOME", "USER"))
        opened = {os.readlink(f"/proc/{pid}/fd/{number}").split(":")[0] for number in os.listdir(f"/proc/{pid}/fd")}
        assert opened == {"pipe", "/dev/null", f"/proc/{pid}/statm"}
    finally:
        workers.close()


GUARDED = """
import os, socket, subprocess, sys
from rlvr_trainer.judging.guard import Guard
guard = Guard()
action = compile(sys.argv[2], "action", "exec")
guard.close()
try:
    exec(action, {"folder": sys.argv[1], "os": os, "socket": socket, "subprocess": subprocess})
    print("did")
except RuntimeError:
    print("refused", guard.refused)
"""
EVALUATED = {
    "an import": "eval(\"__import__('os').system('touch ' + folder)\")",
    "an attribute": "eval('().__class__')",
    "a program": "exec('x = 1')",
    "sympy's parser": "import sympy; sympy.sympify(\"__import__('os').getcwd()\")",
    "writing": "open(folder + '/new', 'w')",
    "a process": "subprocess.run(['true'])",
    "a shell": "os.system('true')",
    "a socket": "socket.create_connection(('127.0.0.1', 9))",
    "removing": "os.remove(folder)",
}


@pytest.mark.parametrize("action", EVALUATED.values(), ids=EVALUATED)
def test_the_guard_alone_refuses_where_there_is_no_kernel_to_help(tmp_path, action):
    command = [sys.executable, "-c", GUARDED, str(tmp_path), action]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.stdout.startswith("refused "), done
    assert list(tmp_path.iterdir()) == []


def test_the_guard_lets_expressions_through(tmp_path):
    action = "assert eval('[1, 2*3, factorial(3)]', {'factorial': lambda n: n}) == [1, 6, 3]"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", GUARDED, str(tmp_path), action]
    assert subprocess.run(command, capture_output=True, text=True, env=env, timeout=60).stdout == "did\n"
