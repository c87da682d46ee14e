"""What digits and seconds depend on besides the settings."""

from importlib.metadata import version
from pathlib import Path


def machine() -> dict[str, str]:
    """Processor and versions."""
    names = ("torch", "transformers", "reasoning-gym", "rlvr-ops")
    return {"processor": _processor(), **{name: version(name) for name in names}}


def _processor() -> str:
    """Its name and model number, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return f"{fields.get('model name', '')} (family {fields.get('cpu family')}, model {fields.get('model')})"
