"""The process that reads answers: `python -m rlvr_trainer.judging.worker`, a JSON line in, a JSON line out.

It is started with an empty environment, imports what judging needs, and then gives up everything else. It never sends anything but
verdicts, and the trainer reads them as JSON, so that nothing in them can be executed.
"""

import base64
import json
import logging
import os
import pickle
import sys
from dataclasses import replace
from typing import Any

from rlvr_trainer.judging.compare import LONGEST_READING, check, compare
from rlvr_trainer.judging.guard import Guard
from rlvr_trainer.judging.sandbox import seal
from rlvr_trainer.judging.verdict import BAD_REFERENCE, CRASHED, MEMORY, REFUSED, Verdict

MOST_MEMORY = 2**30  # bytes after which a worker ends: what answers leave in caches must not fall on later ones


def answer(request: dict[str, Any]) -> Verdict:
    """The verdict on one request: a generator's problem, references to compare with, or references to check."""
    if "entry" in request:
        from rlvr_trainer.judging.generator import score

        entry = pickle.loads(base64.b64decode(request["entry"]))
        return score(request["generator"], request["parameters"], entry, request["completion"], request["extract"])
    if "completion" in request:
        return compare(
            request["references"],
            request["completion"],
            extract=request["extract"],
            accept_unevaluated=request["accept_unevaluated"],
        )
    return check(request["references"][0])


def main() -> None:
    """Import, close, and answer until the input ends."""
    logging.disable(logging.CRITICAL)
    channel = os.fdopen(os.dup(1), "w", encoding="ascii")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # what a library prints must not look like a verdict
    warm_up(generators="generators" in sys.argv[1:])
    memory = Memory()
    taken = seal()
    guard = Guard()
    guard.close()
    print(json.dumps({"sealed": taken}), file=channel, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        guard.refused = ""
        verdict = _answer(request)
        if guard.refused and "entry" in request and verdict.score != 1.0:  # the generator may have swallowed it
            verdict = replace(verdict, score=0.0, reason=REFUSED)
        print(json.dumps(_reply(verdict)), file=channel, flush=True)
        if memory.held() > MOST_MEMORY:
            break  # the next answer finds a new worker


def warm_up(generators: bool) -> None:
    """Import what the answers need, so that it costs none of them time and little is left to import behind closed doors."""
    if generators:
        import reasoning_gym  # noqa: F401
    else:
        compare(["\\frac{1}{2}", "x^2-1", "\\{1\\}", "(1, \\pi)"], "$(x-1)(x+1) = \\boxed{\\sqrt{3}}$")


class Memory:
    """The bytes that this process holds, from a file that is opened while that is still allowed; 0 where there is none."""

    def __init__(self) -> None:
        self._file = os.open("/proc/self/statm", os.O_RDONLY) if os.path.exists("/proc/self/statm") else None

    def held(self) -> int:
        """Now. (`getrusage` gives the most ever, which a child begins with as its parent's.)"""
        if self._file is None:
            return 0
        return int(os.pread(self._file, 200, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _answer(request: dict[str, Any]) -> Verdict:
    try:
        return answer(request)
    except MemoryError:
        reason, said = MEMORY, ""
    except Exception as error:
        reason, said = CRASHED, f"{type(error).__name__}: {error}"
    if "completion" in request:
        return Verdict(0.0, reason, read_answer=said)
    return Verdict(None, BAD_REFERENCE, f"{request['references'][0]!r}: {said or reason}")


def _reply(verdict: Verdict) -> dict[str, Any]:
    readings = {name: getattr(verdict, name)[:LONGEST_READING] for name in ("read_reference", "read_answer")}
    return {"score": verdict.score, "reason": verdict.reason, **readings}


if __name__ == "__main__":
    main()
