"""Say what is registered in verl, and what is missing and why: `python -m rlvr_ops.integrations.verl`. Exit status 0 or 1."""

import os
import sys
import warnings
from importlib.metadata import entry_points, version

TESTED = "0.9.1"


def report() -> list[tuple[bool, str]]:
    """A line for each thing that has to be there, and whether it is."""
    lines = [(True, f"verl {version('verl')}, tested with {TESTED}")]
    points = [
        point for point in entry_points(group="verl.plugins") if point.value == "rlvr_ops.integrations.verl.plugin"
    ]
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto")
    allowed = policy.strip().lower() == "auto" or "rlvr_ops" in policy
    again = "" if points else ": install rlvr-ops again (pip install -e . after an update)"
    lines.append((bool(points), f"entry point verl.plugins{again}"))
    lines.append((allowed, f"VERL_USE_EXTERNAL_PLUGINS={policy}" + ("" if allowed else " leaves rlvr_ops out")))
    import verl  # noqa: F401  # loads the plug-ins

    from rlvr_ops.integrations.verl import plugin

    for part in plugin.PARTS:
        plugin.load(part)
    for part, what in plugin.PARTS.items():
        error = plugin.FAILURES.get(part)
        lines.append((error is None, what if error is None else f"{what}: {error!r}{_remedy(error)}"))
    return lines


def _remedy(error: Exception) -> str:
    """What to install, where verl leaves a package out that its trainers import."""
    return ": pip install TransferQueue" if getattr(error, "name", None) == "transfer_queue" else ""


def main() -> int:
    """Print the report; return the exit status."""
    warnings.simplefilter("ignore")  # verl's, of each engine that is not installed
    try:
        lines = report()
    except Exception as error:  # verl itself
        lines = [(False, f"verl cannot be imported: {error!r}")]
    for good, text in lines:
        print(f"{'ok     ' if good else 'MISSING'} {text}")
    return 0 if all(good for good, _ in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
