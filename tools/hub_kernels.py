"""Lay the kernels out as Hugging Face `kernels` loads them: `python -m tools.hub_kernels FOLDER`.

FOLDER becomes a project of kernel-builder (build.toml, CARD.md, flake.nix, torch-ext/) with its build beside it. Nothing is
compiled ahead of time, so build/torch-<backend>/ holds the same sources and a metadata.json.
"""

import base64
import hashlib
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "kernels"
PACKAGE, HUB = KERNELS / "rlvr_kernels", KERNELS / "hub"
LOADER = "0.17.0"  # the oldest `kernels` that loads this layout


def build(folder: Path) -> None:
    """Write the project and its build into `folder`, which must not exist.

    Raises:
        FileExistsError: `folder` exists.
    """
    folder.mkdir(parents=True)
    for path in HUB.iterdir():
        if path.is_file() and path.suffix != ".py":
            shutil.copy(path, folder)
    general = tomllib.loads((HUB / "build.toml").read_text())["general"]
    files = sources()
    write(folder / "torch-ext" / general["name"].replace("-", "_"), files)
    for backend in general["backends"]:
        variant = folder / "build" / f"torch-{backend}"
        write(variant, files)
        (variant / "metadata.json").write_text(json.dumps(metadata(general, backend, files), indent=2) + "\n")


def sources() -> dict[str, str]:
    """The package's files by relative path, with relative imports: it is loaded under a name that nobody knows beforehand."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE)
        found[name.as_posix()] = re.sub(
            r"^from rlvr_kernels\.", f"from {'.' * len(name.parts)}", path.read_text(), flags=re.MULTILINE
        )
    return found | {"__init__.py": (HUB / "__init__.py").read_text()}


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files by relative path."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def metadata(general: dict[str, object], backend: str, files: dict[str, str]) -> dict[str, object]:
    """What the loader reads: an identifier that becomes the module's name, the backend, and each file's digest."""
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in files.items()}
    unique = hashlib.sha256(b"".join(digests.values())).hexdigest()[:10]
    return {
        "id": f"_{str(general['name']).replace('-', '_')}_{backend}_{unique}",
        "name": general["name"],
        "version": general["version"],
        "kernels-minver": LOADER,
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    build(Path(sys.argv[1]))
