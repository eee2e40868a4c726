"""Files that appear whole or not at all."""

import errno
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
