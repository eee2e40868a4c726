"""Stages of a fit that are kept: a search over parameters of the maps trains once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sklearn.utils.validation import check_memory

from madad._runtime.distributed import Team
from madad._runtime.hashing import content_hash
from madad._runtime.version import __version__

T = TypeVar("T")


class StageMemory:
    """What a detector's ``memory`` holds: the result of each stage, by all that decides it.

    Parameters
    ----------
    memory : None, str or joblib.Memory
        Where results are kept; None = nowhere.
    team : Team
        The processes that fit together. The first one alone looks into the memory and writes there.
    """

    def __init__(self, memory, team: Team):
        self.keeps = memory is not None
        self.team = team
        self._memory = check_memory(memory)

    @property
    def directory(self) -> str | None:
        """The folder of the memory, if it is one on a disk."""
        return self._memory.location if getattr(self._memory, "backend", None) == "local" else None

    def result(
        self,
        stage: str,
        train: Callable[[], T],
        decisive: Callable[[], tuple],
        was_stopped: Callable[[], bool],
    ) -> T:
        """What a stage's training gives, from the memory where it is known.

        Parameters
        ----------
        stage : {"autoencoder", "denoiser"}
            Which of the two is trained: joblib keeps each in a folder of its name.
        train : callable () -> result
            Trains the stage.
        decisive : callable () -> tuple
            All that decides the result. Asked only where something is kept: hashing takes time.
        was_stopped : callable () -> bool
            Whether a signal, or a callback of scikit-learn's, ended the training early. Such a result is
            given and not kept.
        """
        if not (self.keeps and self.team.is_first):
            known = self.team.broadcast(None)
            return train() if known is None else known
        key = content_hash((__version__, *decisive()))
        trained: list[T] = []

        def train_and_keep() -> T:
            trained.append(train())
            if was_stopped():
                raise _NotKept
            return trained[0]

        cached = self._memory.cache(_STAGES[stage], ignore=["train"])
        if self.team.size > 1:
            known = self.team.broadcast(_look_up(cached, key))
            if known is not None:
                return known
        try:
            return cached(key, train_and_keep)
        except _NotKept:
            return trained[0]


class _NotKept(Exception):
    """Leaves a function that joblib caches, which would keep what is returned."""


# What joblib keeps by its key; at the top of a module, where other processes find it again.
def _autoencoder(key: str, train: Callable[[], Any]) -> Any:
    return train()


def _denoiser(key: str, train: Callable[[], Any]) -> Any:
    return train()


_STAGES = {"autoencoder": _autoencoder, "denoiser": _denoiser}


def _look_up(cached: Callable, key: str) -> Any:
    """What is kept under a key, or None; asked for the result, since reading it may fail."""

    def nothing():
        raise _NotKept

    try:
        return cached(key, nothing)
    except _NotKept:
        return None
