"""Processes that fit one estimator together, as torchrun starts them; one alone is the usual case.

Everything here works on two collectives, broadcast and all-reduce, which every backend has.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Before a group is made: its functions have the group that is there at the import as their default, and an
# optimiser imports it. A group that outlives the interpreter has threads, which then abort the process.
import torch.distributed.nn
from torch import Tensor

TIMEOUT = timedelta(days=1)
"""The others wait while one reads a cohort; torchrun itself ends those that wait for a dead one."""
BUCKET = 2**25
"""So many numbers are sent at once."""
T = TypeVar("T")


class FirstFailedError(RuntimeError):
    """What the processes that waited for the first one raise when it failed: it has said why."""


@dataclass(frozen=True, eq=False)
class Team:
    """The processes that fit together. All of them call the same methods in the same order.

    Parameters
    ----------
    rank, size : int
        Which process this is, from 0, and of how many.
    reach : tuple of str
        Types of devices between which tensors can be sent.
    device : torch.device
        Where tensors of other devices go through.
    """

    rank: int = 0
    size: int = 1
    reach: tuple[str, ...] = ("cpu",)
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, shows and decides."""
        return self.rank == 0

    def shares(self, n: int) -> list[range]:
        """Which of ``n`` things each process does: neighbours, in the order of the ranks."""
        return [range(n * r // self.size, n * (r + 1) // self.size) for r in range(self.size)]

    @torch.no_grad()
    def copy_(self, tensors: Iterable[Tensor], source: int = 0) -> None:
        """Overwrite ``tensors`` with those of the process of rank ``source``, bit by bit."""
        if self.size == 1:
            return
        for tensor in tensors:
            if tensor.numel():
                buffer = self._within_reach(tensor.detach().contiguous())
                dist.broadcast(buffer.reshape(-1).view(torch.uint8), source)
                if self.rank != source:
                    tensor.copy_(buffer)

    @torch.no_grad()
    def mean_(self, tensors: Iterable[Tensor], weight: float) -> None:
        """Overwrite ``tensors`` with their mean over the processes, whose ``weight`` add up to 1."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = self._within_reach(torch.cat([tensor.reshape(-1) for tensor in bucket]).mul_(weight))
            dist.all_reduce(flat)
            sizes = [tensor.numel() for tensor in bucket]
            for tensor, mean in zip(bucket, flat.split(sizes), strict=True):
                tensor.copy_(mean.view(tensor.shape))

    def highest(self, *values: float) -> tuple[float, ...]:
        """The largest of each of ``values`` over the processes."""
        if self.size == 1:
            return values
        largest = self._within_reach(torch.tensor(values, dtype=torch.float64))
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return tuple(largest.tolist())

    def broadcast(self, value: T, source: int = 0) -> T:
        """The ``value`` that the process of rank ``source`` has."""
        if self.size == 1:
            return value
        content = bytearray(pickle.dumps(value) if self.rank == source else b"")
        size = torch.tensor([len(content)])
        self.copy_([size], source)
        buffer = torch.frombuffer(content or bytearray(int(size)), dtype=torch.uint8)
        self.copy_([buffer], source)
        return value if self.rank == source else pickle.loads(buffer.numpy().data)

    def broadcast_state(
        self, state: tuple[dict[str, Tensor], T] | None
    ) -> tuple[dict[str, Tensor], T] | None:
        """The ``state`` of the first process: tensors on the CPU, too large to be one object, and more."""
        kinds = {name: (value.shape, value.dtype) for name, value in state[0].items()} if state else {}
        found = self.broadcast((kinds, state[1]) if state else None)
        if found is None:
            return None
        if not self.is_first:
            kinds, rest = found
            state = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}, rest
        assert state is not None
        self.copy_(state[0].values())
        return state

    def gather(self, value: T) -> list[T]:
        """The ``value`` of each process, in the order of the ranks."""
        return [self.broadcast(value, source) for source in range(self.size)]

    def first(self, make: Callable[[], T]) -> T:
        """What ``make`` gives in the first process, while the others wait.

        Raises
        ------
        FirstFailedError
            In the others, if it fails.
        """
        if self.size == 1:
            return make()
        outcome: tuple[bool, Any] = (False, None)
        try:
            if self.is_first:
                outcome = True, make()
        finally:
            succeeded, made = self.broadcast(outcome)
        if not succeeded:
            raise FirstFailedError("the process of rank 0 must succeed, got an error there. See its message.")
        return made

    def _within_reach(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device.type in self.reach else tensor.to(self.device)


ALONE = Team()
_alone: ContextVar[bool] = ContextVar("_alone", default=False)
_home: int | None = None
"""The process that a group was first seen in: a fork of it inherits the group, and is no member."""


def join(device: torch.device | str = "cpu") -> Team:
    """The team to fit with: that of torch.distributed's group, which torchrun's processes make here.

    A process has none if it is the only one, and neither has what it starts itself, threads and joblib's
    workers: these fit alone.

    Parameters
    ----------
    device : torch.device
        The one that this process fits on.
    """
    if _alone.get() or threading.current_thread() is not threading.main_thread():
        return ALONE
    if not _is_grouped():
        if not _is_launched():
            return ALONE
        dist.init_process_group(_backend(), timeout=TIMEOUT)
        atexit.register(_leave)
        _is_grouped()
    if dist.get_world_size() == 1:
        return ALONE
    reach = tuple(part.partition(":")[0] for part in dist.get_backend_config().split(","))
    device = torch.device(device)
    through = "cpu" if "cpu" in reach else device if device.type in reach else reach[0]
    return Team(dist.get_rank(), dist.get_world_size(), reach, torch.device(through))


def is_first_process() -> bool:
    """Whether this process writes files that others of its group would write too. Waits for nobody."""
    if _alone.get():
        return True
    if _is_grouped():
        return dist.get_rank() == 0
    return not _is_launched() or os.environ["RANK"] == "0"


@contextmanager
def alone() -> Iterator[None]:
    """Fits in here are this process's own."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def _is_grouped() -> bool:
    """Whether this process is a member of a group of torch.distributed."""
    global _home
    if not dist.is_available() or not dist.is_initialized():
        return False
    _home = _home or os.getpid()
    return _home == os.getpid()


def _is_launched() -> bool:
    """Whether torchrun started this very process: its children inherit the environment."""
    return (
        dist.is_available()
        and dist.is_torchelastic_launched()
        and int(os.environ["WORLD_SIZE"]) > 1
        and multiprocessing.parent_process() is None
    )


def _backend() -> str:
    """NCCL between GPUs, unless processes share one, which it refuses."""
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    has_own_gpu = has_nccl and int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()
    return "cpu:gloo,cuda:nccl" if has_own_gpu else "gloo"


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type, together of at most `BUCKET` numbers where one alone has no more."""
    bucket: list[Tensor] = []
    n = 0
    for tensor in tensors:
        if bucket and (n + tensor.numel() > BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, n = [], 0
        bucket.append(tensor)
        n += tensor.numel()
    if bucket:
        yield bucket
