"""One seed in, independent streams out; nothing here or elsewhere draws from a global generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from sklearn.model_selection import GroupShuffleSplit, ShuffleSplit
from sklearn.utils import check_random_state


def spawn_seeds(random_state, n: int) -> list[int]:
    """Draw ``n`` seeds from ``random_state``, None, an int or a RandomState as scikit-learn has it."""
    return [int(seed) for seed in check_random_state(random_state).randint(np.iinfo(np.int32).max, size=n)]


def derived_seed(seed: int, *place: int) -> int:
    """A seed for a ``place`` in a run of ``seed``, such as a step: no draws of earlier places are needed."""
    return int(np.random.SeedSequence((seed, *place)).generate_state(1)[0])


def generator_from(seed: int) -> torch.Generator:
    """A CPU generator; its draws are moved to the device, so that every device sees the same ones."""
    return torch.Generator().manual_seed(seed)


@contextmanager
def isolated_seed(seed: int) -> Iterator[None]:
    """Seed torch's global generator for code that knows no other one, and put its state back afterwards.

    Initialising modules and dropout are such code.
    """
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


def hold_out(n: int, groups, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the samples to train on and of those held out.

    Parameters
    ----------
    n : int
        Number of samples.
    groups : array-like of shape (n,) or None
        All samples of a group are on one side, where there are several groups.
    share : float
        Share of the samples, or of the groups, that is held out, 0..1; 0 = none.
    seed : int
        Seed of the draw.
    """
    if share == 0:
        return np.arange(n), np.arange(0)
    if groups is not None and len(np.unique(groups)) > 1:
        splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
    else:
        groups = None
        splitter = ShuffleSplit(1, test_size=share, random_state=seed)
    train, held_out = next(splitter.split(np.zeros(n), groups=groups))
    return np.sort(train), np.sort(held_out)
