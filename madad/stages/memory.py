"""Stages of a fit that are kept: a search over parameters of the maps trains once."""

from __future__ import annotations

from collections.abc import Callable

from sklearn.utils.validation import check_memory
from torch import nn

from madad.base.sklearn_callbacks import FitTask
from madad.stages.autoencoder import LatentAutoencoder
from madad.stages.denoiser import (
    train_denoiser,
)
from madad.training import graceful_stop


class _CutShort(Exception):
    """Takes the result of a stage that was stopped past ``memory``, which would keep what is returned."""

    def __init__(self, result):
        super().__init__()
        self.result = result


class _NotFound(Exception):
    """Comes from a stage that ``memory`` does not hold, where it is only looked for."""


def _found(cached: Callable, key: str):
    """What ``memory`` holds of a stage, or None; asked for the result, which it may fail to read."""
    try:
        return cached(key, None)
    except _NotFound:
        return None


def _fit_autoencoder(key: str, inputs: dict | None) -> LatentAutoencoder:
    """The first stage as a function that can be cached by its key."""
    if inputs is None:
        raise _NotFound
    autoencoder, task = inputs["autoencoder"], inputs["task"]
    with task.stage("autoencoder", fits=autoencoder):
        autoencoder.set_params(verbose=inputs["verbose"]).fit_stack(inputs["stack"], inputs["groups"])
    autoencoder.set_params(trainer=autoencoder.trainer.portable())
    return _unless_stopped(autoencoder, task)


def _fit_denoiser(key: str, inputs: dict | None) -> tuple[nn.Module, list[dict]]:
    """The second stage as a function that can be cached by its key."""
    if inputs is None:
        raise _NotFound
    return _unless_stopped(train_denoiser(**inputs), inputs["task"])


def _unless_stopped(result, task: FitTask):
    """The result, raised where a signal or a callback ended its training."""
    with graceful_stop() as stop:  # the one around all of fit
        if stop.signal is not None or task.was_stopped:
            raise _CutShort(result)
    return result


def _directory(memory) -> str | None:
    """Where ``memory`` keeps its files, if it does so on a disk."""
    memory = check_memory(memory)
    return memory.location if getattr(memory, "backend", None) == "local" else None
