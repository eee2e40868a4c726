"""Processes of one user on one GPU: they find each other by locked files, which vanish with them."""

from __future__ import annotations

import os
import tempfile
import warnings

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_known: set[str] = set()
"""GPUs that this process works on."""


def warn_if_shared(device: torch.device) -> None:
    """Warn, once in all processes together, if another one of this user works on the same GPU.

    Parameters
    ----------
    device : torch.device
        What this process is about to work on, until it ends.
    """
    if device.type == "cuda":
        warn_of_others(str(torch.cuda.get_device_properties(device).uuid), device)


def warn_of_others(gpu: str, device) -> None:
    """What `warn_if_shared` does for a GPU; ``gpu`` is its name on this machine, ``device`` that in here.

    A lock on one file makes a process the first, a lock on another the one that warns.
    """
    if fcntl is None or gpu in _known:
        return
    _known.add(gpu)
    if _lock(gpu) or not _lock(f"{gpu}-warned"):
        return
    warnings.warn(
        f"device {str(device)!r} is shared by several processes. They wait for each other and their memory "
        "adds up. Use n_jobs=1, or give each one a GPU by CUDA_VISIBLE_DEVICES.",
        stacklevel=6,  # who called an estimator's method
    )


def _lock(name: str) -> bool:
    """Lock a file for as long as this process lives; False if another one has, or if it cannot be opened."""
    file = os.path.join(tempfile.gettempdir(), f"madad-{os.getuid()}-{name}.lock")
    try:
        # never closed: that would unlock it
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return False
    return True
