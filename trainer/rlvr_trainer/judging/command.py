"""`rlvr-ops judge`: why an answer is right or wrong, for one pair or for a file of them."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from rlvr_trainer.judging.verdict import Verdict
from rlvr_trainer.judging.workers import Workers, answers
from rlvr_trainer.parsing import ConfigError

AT_ONCE = 256


def add_to(commands: Any) -> None:
    """The subcommand and its arguments."""
    judge = commands.add_parser("judge", help="why an answer is right or wrong")
    judge.add_argument(
        "pairs", nargs="?", type=Path, help="JSON Lines with answer (or several in a list) and completion"
    )
    judge.add_argument("--answer", action="append", help="the right answer; more than once if any of several is right")
    judge.add_argument("--completion", help="what a model wrote")
    judge.add_argument("--extract", choices=("whole", "last_number"), default="whole")
    judge.add_argument("--accept-unevaluated", action="store_true", help="3+4 is right where the answer is 7")
    judge.add_argument("--out", type=Path, help="where the judged rows go; the default is the standard output")
    judge.set_defaults(command=run)


def run(parsed: argparse.Namespace) -> int:
    """Judge one pair, or every row of a file; 1 if a reference could not be read."""
    options = {"extract": parsed.extract, "accept_unevaluated": parsed.accept_unevaluated}
    one = parsed.answer is not None and parsed.completion is not None
    if one == (parsed.pairs is not None) or (parsed.answer is None) != (parsed.completion is None):
        raise ConfigError("judge takes either --answer and --completion, or a file of pairs")
    workers = Workers(processes=1 if one else 2)
    try:
        if one:
            (verdict,) = workers(answers([(parsed.answer, parsed.completion)], **options))
            print(json.dumps(_shown(verdict), indent=2, ensure_ascii=False))
            return int(verdict.score is None)
        return _judge_file(parsed, workers, options)
    finally:
        workers.close()


def _judge_file(parsed: argparse.Namespace, workers: Workers, options: dict[str, Any]) -> int:
    """Rows as they were, each with score, reason and readings; a count of reasons on the standard error."""
    if parsed.out is not None and parsed.out.exists():
        raise ConfigError(f"--out {parsed.out} exists already: choose another file")
    rows = list(_rows(parsed.pairs))
    counts: Counter[str] = Counter()
    with nullcontext(sys.stdout) if parsed.out is None else open(parsed.out, "w", encoding="utf-8") as file:
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            verdicts = workers(answers([(references, row["completion"]) for row, references in part], **options))
            counts.update(verdict.reason for verdict in verdicts)
            _write(file, part, verdicts)
    print(", ".join(f"{count} {reason}" for reason, count in counts.most_common()), file=sys.stderr)
    return int(counts["bad reference"] > 0)


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], list[str]]]:
    if not path.is_file():
        raise ConfigError(f"no file {str(path)!r}")
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
            row = json.loads(text, parse_constant=_refuse)
            yield row, _references(row, json.loads(text, parse_int=str, parse_float=str))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}: line {number} is no row with answer and completion: {error}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no answer")


def _references(row: Any, as_written: Any) -> list[str]:
    if not isinstance(row, dict) or not isinstance(row["completion"], str):
        raise ValueError("completion must be text")
    found = as_written["answer"] if isinstance(row["answer"], list) else [as_written["answer"]]
    if not found or not all(isinstance(answer, str) and answer.strip() for answer in found):
        raise ValueError("answer must be text or a list of texts")
    return found


def _write(file: TextIO, part: list[tuple[dict[str, Any], list[str]]], verdicts: list[Verdict]) -> None:
    for (row, _), verdict in zip(part, verdicts, strict=True):
        print(json.dumps({**row, **_shown(verdict)}, ensure_ascii=False), file=file)


def _shown(verdict: Verdict) -> dict[str, Any]:
    return {
        "score": verdict.score,
        "reason": verdict.reason,
        "read_reference": verdict.read_reference,
        "read_answer": verdict.read_answer,
    }
