"""Files that appear whole or not at all."""

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; the file becomes ``path`` when the block ends without an error.

    Parameters
    ----------
    path : Path
        The file to write; one that is there already is replaced.

    Yields
    ------
    Path
        A name in the same folder that no file has.

    Raises
    ------
    OSError
        Of the kind that came, if the file cannot be written; ``path`` is then what it was before.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        try:
            yield scratch
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        # OSError itself picks the subclass, such as PermissionError, by the number.
        raise OSError(
            error.errno or errno.EIO,
            f"path must be in a folder that can be written to, got {str(path)!r} "
            f"({error.strerror or error}). Create the folder, change its permissions or free space.",
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write text, whole or not at all.

    Parameters
    ----------
    path : Path
        The file to write; one that is there already is replaced.
    text : str
        What it holds, written as UTF-8 with line ends as they are.

    Raises
    ------
    OSError
        As `whole_file`.
    """
    with whole_file(path) as scratch, open(scratch, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # or a power cut could leave the new name with nothing in it


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object, whole or not at all.

    Parameters
    ----------
    path : Path
        The file to write; one that is there already is replaced.
    content : dict
        Names and what JSON can hold; no NaN and no infinity.

    Raises
    ------
    OSError
        As `whole_file`.
    """
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str = "Write it again.") -> dict:
    """Read the JSON object in a file.

    Parameters
    ----------
    path : Path
        The file to read.
    remedy : str, default="Write it again."
        What error messages tell the user to do; a sentence.

    Returns
    -------
    dict
        What the file holds.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, or holds something other than a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must exist, got no such file. {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got a damaged file ({error}). {remedy}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}. {remedy}")
    return content
