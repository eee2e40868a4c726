"""Devices, and the way from arrays to network images and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

MAX_BATCH = 32
PIXELS_PER_BATCH = 2**20


def resolve_device(device) -> torch.device:
    """``"auto"`` is the first GPU there is, else the CPU.

    Raises
    ------
    ValueError
        If the named device does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device must be 'auto' or a device that torch can use here, got {device!r}. Use 'auto' or 'cpu'."
        ) from error
    return resolved


def default_batch_size(height: int, width: int) -> int:
    """The fixed number of slices per forward pass: fewer where slices are large, never by free memory.

    A power of two, because vectorised kernels round the few values that are left over at the end of an array
    differently: a slice's result would depend on its place in the batch. It depends on nothing but the
    slice's size, so that results do not depend on the machine's load.
    """
    return 2 ** int(math.log2(min(MAX_BATCH, max(1, PIXELS_PER_BATCH // (height * width)))))


def to_network(images: np.ndarray, device: torch.device) -> Tensor:
    """Images (batch, channels, height, width) in 0..1 to network images in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32)).to(device) * 2.0 - 1.0


def to_images(x: Tensor) -> np.ndarray:
    """Network images in -1..1 to float32 images, clipped to 0..1."""
    return ((x.float() + 1.0) / 2.0).clamp(0.0, 1.0).cpu().numpy()


def pad_with_background(x: Tensor, multiple: int, value: float) -> Tensor:
    """Pad below and to the right until height and width are multiples of ``multiple``."""
    below, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    return F.pad(x, (0, right, 0, below), value=value) if below or right else x


def fixed_batches(n: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Index arrays of exactly ``batch_size`` entries, the last one filled up by repetition.

    Yields
    ------
    index : ndarray of int, (batch_size,)
    n_valid : int
        How many leading entries count. Kernels choose their summation order by shape: batches of one
        shape make a slice's result independent of its company.
    """
    for start in range(0, n, batch_size):
        index = np.arange(start, min(start + batch_size, n))
        yield np.pad(index, (0, batch_size - len(index)), mode="edge"), len(index)


@contextmanager
def inference(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, restored afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        with torch.inference_mode():
            yield
    finally:
        for part, training in modes:
            part.training = training


def state_to_numpy(module: nn.Module) -> dict[str, np.ndarray]:
    """A module's state as arrays on the CPU: picklable, hashable, without a device."""
    return {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}


def state_from_numpy(module: Module, state: dict[str, np.ndarray]) -> Module:
    """Fill a module with what `state_to_numpy` gave, strictly."""
    module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return module
