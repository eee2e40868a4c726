"""Devices, and the way from arrays to network images and back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)
Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_BATCH = 32  # of training
PIXELS_PER_BATCH = 2**20
MAX_FORWARD_BATCH = {"cpu": 16, "cuda": 256}
FORWARD_PIXELS_ON_CPU = 2**18
FORWARD_BYTES_ON_CPU = 2**28
FREE_MEMORY_SHARE = 0.5
FORWARD_PRECISIONS = ("float32", "bfloat16")


def resolve_device(device) -> torch.device:
    """``"auto"`` is the first GPU there is, else the CPU; under torchrun, each process's own GPU.

    Raises
    ------
    ValueError
        If the named device does not exist here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        if resolved == torch.device("cuda") and "TORCHELASTIC_RUN_ID" in os.environ:
            n_gpus = max(1, torch.cuda.device_count())
            resolved = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % n_gpus)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device must be 'auto' or a device that torch can use here, got {device!r}. Use 'auto' or 'cpu'."
        ) from error
    return resolved


def default_batch_size(height: int, width: int) -> int:
    """Slices per step of training: fewer where slices are large, never by free memory."""
    return _power_of_two(min(MAX_BATCH, PIXELS_PER_BATCH // (height * width)))


def forward_batch_size(height: int, width: int, device: torch.device, bytes_per_slice: int) -> int:
    """The fixed number of slices per forward pass outside of training.

    A power of two, because vectorised kernels round the few values that are left over at the end of an array
    differently: a slice's result would depend on its place in the batch. On a CPU, where more slices at once
    than a few do not pay, and of large networks more than one, it depends on nothing but the network and the
    slice's size, so that results do not depend on the machine's load; on a GPU it is as many as half of the
    free memory holds.

    Parameters
    ----------
    height, width : int
        Sides of a slice in pixels.
    device : torch.device
        Where the networks run.
    bytes_per_slice : int
        Memory that a network needs for each slice.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        fitting = int(FREE_MEMORY_SHARE * free) // bytes_per_slice
    else:
        fitting = min(FORWARD_PIXELS_ON_CPU // (height * width), FORWARD_BYTES_ON_CPU // bytes_per_slice)
    return _power_of_two(min(MAX_FORWARD_BATCH.get(device.type, MAX_BATCH), fitting))


def _power_of_two(at_most: int) -> int:
    return 2 ** int(math.log2(max(1, at_most)))


def to_network(images: np.ndarray, device: torch.device) -> Tensor:
    """Images (batch, channels, height, width) in 0..1 to network images in -1..1."""
    values = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    if device.type == "cuda":  # pinned, so that the copy runs beside the work that is queued
        return values.pin_memory().to(device, non_blocking=True) * 2.0 - 1.0
    return values.to(device) * 2.0 - 1.0


def to_images(x: Tensor) -> np.ndarray:
    """Network images in -1..1 to float32 images, clipped to 0..1."""
    return ((x.float() + 1.0) / 2.0).clamp(0.0, 1.0).cpu().numpy()


def pad_with_background(x: Tensor, multiple: int, value: float) -> Tensor:
    """Pad ``x`` by ``value``, below and to the right, until its sides are multiples of ``multiple``."""
    below, right = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    return F.pad(x, (0, right, 0, below), value=value) if below or right else x


def fixed_batches(n: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Index arrays of exactly ``batch_size`` entries up to ``n``, the last one filled up by repetition.

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


def fixed_parts(rows: Tensor, size: int) -> Iterator[tuple[Tensor, int]]:
    """`fixed_batches` of some rows: index tensors of exactly ``size`` entries, and how many of each count."""
    for part in rows.split(size) if len(rows) else ():
        yield torch.cat([part, part[-1:].expand(size - len(part))]), len(part)


def one_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map(function, items)``, with each call in a thread of its own while the next item is made."""
    with ThreadPoolExecutor(1) as thread:
        before: Future[Result] | None = None
        for item in items:
            call = thread.submit(function, item)
            if before is not None:
                yield before.result()
            before = call
        if before is not None:
            yield before.result()


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


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """What runs convolutions and matrix products in bfloat16, or with ``"float32"`` nothing."""
    if precision not in FORWARD_PRECISIONS:
        raise ValueError(
            f"precision must be one of {FORWARD_PRECISIONS} at prediction, got {precision!r}. Use 'float32'."
        )
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def compile_in_place(enabled: bool, *modules: nn.Module) -> None:
    """Have ``modules`` run through ``torch.compile`` from now on, or, where not ``enabled``, no longer."""
    for module in modules:
        if not enabled:
            module._compiled_call_impl = None
        elif module._compiled_call_impl is None:
            module.compile(dynamic=False)


def state_to_numpy(module: nn.Module) -> dict[str, np.ndarray]:
    """A module's state as arrays on the CPU: picklable, hashable, without a device."""
    return {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}


def state_from_numpy(module: Module, state: dict[str, np.ndarray]) -> Module:
    """Fill a module with what `state_to_numpy` gave, strictly."""
    module.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in state.items()})
    return module
