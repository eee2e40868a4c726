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


def write_json(path: Path, content: dict) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text, whole or not at all; an OSError names the file and what to do."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="")


def read_json(path: Path) -> dict:
    """What a JSON file holds; a ValueError names one that is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got a damaged file ({error}). Write it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}. Write it again.")
    return content
