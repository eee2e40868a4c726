"""One seed in, independent streams out; nothing here or elsewhere draws from a global generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from sklearn.utils import check_random_state


def spawn_seeds(random_state, n: int) -> list[int]:
    """Draw ``n`` seeds from scikit-learn's notion of a random state (None, int or RandomState)."""
    return [int(seed) for seed in check_random_state(random_state).randint(np.iinfo(np.int32).max, size=n)]


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
