"""Files and folders that appear whole or not at all, and a sentence where there is no room or no permission for them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"  # in the names of what is being written or removed


class WriteError(OSError):
    """A file of a run that could not be written. The message is meant for the person who runs it."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong with `path` within into one sentence.

    Raises:
        WriteError: it cannot be written: no room, no permission, or a file where a folder must be.
    """
    from safetensors import SafetensorError

    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save and safetensors hide an OSError in theirs
        cause = error if isinstance(error, OSError) else error.__context__
        if type(error) is RuntimeError and not isinstance(cause, OSError) and "writ" not in str(error):
            raise  # a device out of memory, say
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error).partition("\n")[0]
        raise WriteError(f"cannot write {path}: {reason}") from error


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder` at the end, when every byte of it is on the disk.

    What is left over after an error or a kill has another name, and the next one removes it.
    """
    unfinished = folder.with_name(f"{folder.name}{UNFINISHED}")
    with writing(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            for path in [*unfinished.rglob("*"), unfinished]:
                _sync(path)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)  # on a full disk its room is needed
            raise
        remove(folder)
        os.replace(unfinished, folder)
        _sync(folder.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, under another name: killed half-way, a folder cannot be taken for a whole one."""
    doomed = path.with_name(f"{path.name}{UNFINISHED}-removal")
    shutil.rmtree(doomed, ignore_errors=True)
    if path.is_dir() and not path.is_symlink():
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file under another name, then rename it.

    Raises:
        WriteError: it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    with writing(path):
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
