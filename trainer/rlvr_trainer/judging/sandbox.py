"""What a worker gives up before it reads the first answer: memory, files, processes, network, by the means of the kernel.

Everywhere with `resource` (Linux, macOS): limits on address space, CPU time, processes, open files, and no file may grow.
Linux, x86-64 and ARM64: seccomp lets some fifty system calls through, none of which opens a file for writing, a socket or a
process; Landlock (kernel 5.13) leaves only Python's own folders readable. What a platform lacks is missing from `seal`'s list.
"""

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress

MEMORY = 2 * 2**30  # bytes of address space beyond what the imported modules hold
CPU_SECONDS = (
    3600  # of all its answers: ends a worker whose trainer was killed, and one of a living trainer is replaced
)
OPEN_FILES = 64

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_READ = 0b1100  # read a file, list a folder
LANDLOCK_ALL = (1 << 13) - 1  # every right of the first version
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000  # REFUSE gives EPERM
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# name: (number on x86-64, number on ARM64); -1 where there is none
CALLS = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "close": (3, 57), "fstat": (5, 80),
    "lseek": (8, 62), "pread64": (17, 67), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "fcntl": (72, 25), "dup": (32, 23),
    "stat": (4, -1), "lstat": (6, -1), "newfstatat": (262, 79), "statx": (332, 291), "access": (21, -1),
    "faccessat": (269, 48), "faccessat2": (439, 439), "getdents64": (217, 61), "readlink": (89, -1),
    "readlinkat": (267, 78), "getcwd": (79, 17), "futex": (202, 98), "sched_yield": (24, 124), "getpid": (39, 172),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getrandom": (318, 278), "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "getrusage": (98, 165), "times": (100, 153),
    "sysinfo": (99, 179), "uname": (63, 160), "restart_syscall": (219, 128), "exit": (60, 93), "exit_group": (231, 94),
    "rseq": (334, 293), "set_robust_list": (273, 99),
}  # fmt: skip
OPENAT = (257, 56)
OPEN = (2, -1)
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


def seal(memory: int = MEMORY) -> list[str]:
    """Give up what this process will not need, for good; what was taken away, in words."""
    found = _limit_resources(memory)
    if sys.platform == "linux" and platform.machine() in ARCHITECTURES:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
            if _landlock(libc, _readable()):
                found.append("files outside Python's folders (Landlock)")
            if _seccomp(libc):
                found.append("writing files, processes, network (seccomp)")
    return found


def _limit_resources(memory: int) -> list[str]:
    try:
        import resource
    except ImportError:
        return []
    limits = {
        "AS": memory + _address_space(), "CPU": CPU_SECONDS, "NPROC": 0, "FSIZE": 0, "NOFILE": OPEN_FILES, "CORE": 0,
    }  # fmt: skip
    found = []
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        with suppress(ValueError, OSError):  # macOS refuses some of them
            resource.setrlimit(kind, (value, value))
            found.append(f"RLIMIT_{name}")
    return found


def _address_space() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 2**30


def _readable() -> list[str]:
    """Folders that lazy imports may read: Python's own and its packages'."""
    own = [sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path, "/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo"]
    return sorted({path for path in own if path and path != "/" and os.path.isdir(path)})


def _landlock(libc: ctypes.CDLL, readable: Sequence[str]) -> bool:
    """Deny every access to files but reading below the given folders; False if the kernel cannot."""
    rights = ctypes.c_uint64(LANDLOCK_ALL)
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(rights), 8, 0)
    if ruleset < 0:
        return False
    for path in readable:
        folder = os.open(path, os.O_PATH | os.O_DIRECTORY)
        rule = ctypes.create_string_buffer(struct.pack("=Qi", LANDLOCK_READ, folder), 12)
        libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, 0)
        os.close(folder)
    done = libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done


def _seccomp(libc: ctypes.CDLL) -> bool:
    """Let only `CALLS` through, and opening files to read them; False if the kernel cannot."""
    program = _program(*ARCHITECTURES[platform.machine()])
    code = b"".join(program)
    buffer = ctypes.create_string_buffer(code, len(code))
    descriptor = struct.pack("HxxxxxxQ", len(program), ctypes.addressof(buffer))
    return libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(descriptor), 0, 0) == 0


def _program(column: int, architecture: int) -> list[bytes]:
    """The filter in BPF: load a word of `struct seccomp_data`, compare it, jump or return."""

    def load(offset: int) -> bytes:
        return struct.pack("HBBI", 0x20, 0, 0, offset)

    def equals(value: int, yes: int, no: int) -> bytes:
        return struct.pack("HBBI", 0x15, yes, no, value)

    def any_bit(value: int, yes: int, no: int) -> bytes:
        return struct.pack("HBBI", 0x45, yes, no, value)

    def give(value: int) -> bytes:
        return struct.pack("HBBI", 0x06, 0, 0, value)

    number, kind, second, third = (
        0,
        4,
        24,
        32,
    )  # offsets of the call, the architecture, and the flags of open and openat
    program = [load(kind), equals(architecture, 1, 0), give(KILL), load(number)]
    for call, flags in ((OPENAT[column], third), (OPEN[column], second)):
        if call >= 0:
            program += [equals(call, 0, 4), load(flags), any_bit(WRITE_FLAGS, 0, 1), give(REFUSE), give(ALLOW)]
    for numbers in CALLS.values():
        if numbers[column] >= 0:
            program += [equals(numbers[column], 0, 1), give(ALLOW)]
    return [*program, give(REFUSE)]
