"""Writes the rows beside it: sums of two digits in the shape of GSM8K, and in that of DAPO-Math-17K. The same ones every time."""

import json
import random
from pathlib import Path

NAMES, THINGS = ("Ann", "Ben", "Eva", "Tom"), ("pens", "nuts", "eggs", "figs")


def sums(count: int, seed: int) -> list[tuple[int, int]]:
    """Different pairs of digits."""
    return random.Random(seed).sample([(a, b) for a in range(10) for b in range(10)], count)


def gsm8k(a: int, b: int) -> dict[str, str]:
    """A question, and a worked solution with the answer behind `####`."""
    name, thing = NAMES[(a + b) % 4], THINGS[(a + 3 * b) % 4]
    question = f"{name} has {a} {thing} and finds {b}. How many now?"
    return {"question": question, "answer": f"{name} has {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {thing}.\n#### {a + b}"}


def dapo(a: int, b: int) -> dict[str, object]:
    """Messages, and the answer in `reward_model`."""
    return {
        "data_source": "digit_sums",
        "prompt": [
            {"role": "user", "content": f"Solve the problem. The last line must be the answer.\n\n{a} + {b} = ?"}
        ],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(a + b), "style": "rule"},
        "extra_info": {"index": f"{a}+{b}"},
    }


def write(folder: Path) -> None:
    """`gsm8k.jsonl` with 60 rows, and `dapo.jsonl` with 60 and its evaluation's with 16 others."""
    chosen = sums(76, seed=2)
    files = {
        "gsm8k.jsonl": [gsm8k(*pair) for pair in sums(60, seed=1)],
        "dapo.jsonl": [dapo(*pair) for pair in chosen[:60]],
        "dapo_test.jsonl": [dapo(*pair) for pair in chosen[60:]],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write(Path(__file__).parent)
