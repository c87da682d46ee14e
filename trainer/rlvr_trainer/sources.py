"""Rows of a source: JSON Lines, a JSON array or Parquet, each gzipped or not, or what the package `datasets` reads."""

import gzip
import importlib
import zlib
from pathlib import Path
from typing import Any

from rlvr_trainer.json_rows import Row, is_array, json_array, json_lines
from rlvr_trainer.parsing import ConfigError, nearest

ENDINGS = (".jsonl", ".json", ".parquet", ".gz")
SAVED = ("dataset_info.json", "dataset_dict.json")  # what `save_to_disk` leaves in a folder


def is_source(name: str) -> bool:
    """Whether `name` means rows and not a generator: a file, a path, or a name of `datasets`, which has a slash."""
    path = Path(name)
    return name.endswith(ENDINGS) or path.is_file() or "/" in name or any((path / file).is_file() for file in SAVED)


def read_rows(name: str, *, split: str = "train", subset: str = "", setting: str = "task.name") -> list[Row]:
    """Every row in its order. `split` and `subset` are read for `datasets` only; `setting` is what an error calls it.

    Raises:
        ConfigError: no such file, folder or data set, a package that is missing, or a file that is damaged as a whole.
    """
    path = Path(name)
    if path.is_file():
        return _file_rows(path)
    if name.endswith(ENDINGS):
        raise ConfigError(f"{setting}: no file {name!r}")
    return _counted(_dataset(name, split, subset, setting))


def _file_rows(path: Path) -> list[Row]:
    """The content decides, but for `.jsonl`, whose first line may begin with a bracket too."""
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{path} is damaged: {error}") from error
    if data.startswith(b"PAR1"):
        return _counted(_parquet(path, data))
    if is_array(data) and not path.name.endswith((".jsonl", ".jsonl.gz")):
        return json_array(data)
    return json_lines(data)


def _counted(rows: list[Any]) -> list[Row]:
    return [Row(f"row {number}", value) for number, value in enumerate(rows, start=1)]


def _parquet(path: Path, data: bytes) -> list[Any]:
    arrow, parquet = needed("pyarrow", str(path)), needed("pyarrow.parquet", str(path))
    try:
        rows: list[Any] = parquet.read_table(arrow.BufferReader(data)).to_pylist()
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {error}") from error
    return rows


def _dataset(name: str, split: str, subset: str, setting: str) -> list[Any]:
    datasets = needed("datasets", repr(name))
    saved = any((Path(name) / file).is_file() for file in SAVED)
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # of many kinds: no network, no such name, a split or a subset that is not there
        raise ConfigError(f"{setting}: datasets cannot load {name!r} (split {split!r}): {error}") from error
    if isinstance(found, dict):
        if split not in found:
            raise ConfigError(f"{setting}: {name!r} has no split {split!r}{nearest(split, found)}")
        found = found[split]
    return list(found)


def needed(package: str, what: str) -> Any:
    """The module `package`, imported now.

    Raises:
        ConfigError: it is not installed; what to install for reading `what`.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        root = package.partition(".")[0]
        raise ConfigError(f"{what} needs the package {root}: pip install {root}") from error
