"""The file that a training run leaves behind and goes on from: safetensors, written whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT_VERSION = 1


def fingerprint(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """What makes a run the same run, as text of hexadecimal digits."""
    text = json.dumps({"format_version": FORMAT_VERSION, **settings}, sort_keys=True, default=_plain)
    return _digest(text, tensors)


class CheckpointFile:
    """A run's own file in a directory that many runs may share.

    Parameters
    ----------
    directory : path-like
        Made where it is missing.
    description : str
        Start of the file's name.
    run : str
        The run's `fingerprint`.

    Notes
    -----
    Written under a temporary name in the directory, flushed to the disk and renamed: a kill at any time
    leaves the last whole file. Nothing that a disk does ends a training: the first failure to write is warned
    of, and what cannot be read is warned of and taken as missing. Numbers in JSON are exact.
    """

    def __init__(self, directory, description: str, run: str):
        name = re.sub(r"[^\w.-]+", "_", description)
        self.path = Path(directory) / f"{name}-{run[:12]}.safetensors"
        self.run = run
        self._failed = False

    def write(self, tensors: Mapping[str, Tensor], facts: dict) -> None:
        """Replace the file."""
        text = json.dumps({"format_version": FORMAT_VERSION, "run": self.run, **facts})
        metadata = {"facts": text, "digest": _digest(text, tensors)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            scratch = Path(tempfile.mkdtemp(prefix=f".{self.path.name}-", dir=self.path.parent))
            try:
                save_file(dict(tensors), scratch / "new", metadata=metadata)
                with open(scratch / "new", "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(scratch / "new", self.path)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except (OSError, SafetensorError) as error:
            if not self._failed:
                self._failed = True
                warnings.warn(
                    f"checkpoint_dir must have room and be writable, got {self.path.parent}, where no "
                    f"checkpoint could be written ({error}). Training goes on without: free the disk or "
                    f"choose another directory.",
                    UserWarning,
                    stacklevel=4,
                )

    def read(self) -> tuple[dict[str, Tensor], dict] | None:
        """What was written last, or None; leftovers of killed writers are cleared away."""
        for leftover in self.path.parent.glob(f".{glob.escape(self.path.name)}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            if not self.path.exists():
                return None
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            if metadata["digest"] != _digest(metadata["facts"], tensors):
                raise ValueError("its contents do not fit its checksum")
            facts = json.loads(metadata["facts"])
            if facts["run"] != self.run:
                raise ValueError("it belongs to another run")
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            warnings.warn(
                f"{self.path} must be a checkpoint of this run, got a damaged file ({error}). Training "
                f"starts anew.",
                UserWarning,
                stacklevel=3,
            )
            return None
        return tensors, facts


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=32)
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, whatever else by what it says of itself."""
    return value.item() if hasattr(value, "item") else repr(value)
