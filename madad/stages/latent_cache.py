"""Latents of healthy slices, computed once: in memory, or on disk where they are many."""

from __future__ import annotations

import math
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from madad._runtime.distributed import ALONE, BUCKET, Team
from madad._runtime.tensors import default_batch_size, inference
from madad.base.network_batches import network_batches
from madad.base.slice_stack import SliceStack
from madad.stages.augmentation import SliceAugmentation

LARGE_CACHE = 2 * 2**30  # bytes


class RowsOnDisk:
    """float32 rows in a temporary file, of which only those that are asked for come into memory.

    Parameters
    ----------
    directory : path-like
        Made where it is missing. The file has no name in it, so that nothing is left of it when it is not
        needed any more or the process is killed.
    shape : tuple of int
        Number of rows, and the shape of a row.
    device : torch.device
        Where rows are read to.

    Raises
    ------
    OSError
        When rows are written and the disk is full.
    """

    def __init__(self, directory, shape: tuple[int, ...], device: torch.device):
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.directory, self.shape, self.device = directory, shape, device
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        # written, not mapped: a full disk is an error then, and not the process's end
        left = memoryview(values.cpu().numpy().tobytes())
        try:
            self._file.seek(4 * rows.start * math.prod(self.shape[1:]))
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(
                f"cache_directory must have room for {4 * math.prod(self.shape)} bytes, got {self.directory} "
                f"({error}). Free the disk, or let the detector's memory be elsewhere."
            ) from error

    def __getitem__(self, index: Tensor) -> Tensor:
        # as far as rows are written, until those asked for are copied
        mapped = np.memmap(self._file, np.float32, "r").reshape(-1, *self.shape[1:])
        return torch.from_numpy(np.asarray(mapped[index.cpu().numpy()])).to(self.device)


@dataclass(frozen=True)
class LatentCache:
    """Everything the denoiser is trained on, computed once: no epoch encodes a slice again.

    Attributes
    ----------
    mean, logvar : Tensor or RowsOnDisk of shape (n, c, h, w)
        The posterior of each slice, scaled; a draw from it costs one multiplication.
    brain_fraction : Tensor or RowsOnDisk of shape (n, 1, h, w)
        The share of each latent position's pixels that are brain, 0..1.
    """

    mean: Tensor | RowsOnDisk
    logvar: Tensor | RowsOnDisk
    brain_fraction: Tensor | RowsOnDisk

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """A latent of each slice of ``index``, drawn from its posterior by ``generator``."""
        mean, logvar = self.mean[index], self.logvar[index]
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return mean + (0.5 * logvar).exp() * noise


def cache_latents(
    autoencoder,
    stack: SliceStack,
    *,
    flip: bool,
    augmentation: SliceAugmentation | None = None,
    generator: torch.Generator,
    directory=None,
    team: Team = ALONE,
    verbose: bool = False,
) -> LatentCache:
    """Encode slices, with ``flip`` their left-right mirror images too, and augmented copies of both.

    Parameters
    ----------
    autoencoder : LatentAutoencoder
        What encodes them; fitted.
    stack : SliceStack
        The slices to encode.
    flip : bool
        Encode left-right mirror images too.
    augmentation : SliceAugmentation or None
        What makes the further copies; None = no copies.
    generator : torch.Generator
        Source of the augmentation's randomness.
    directory : path-like or None
        Where a cache of more than `LARGE_CACHE` bytes is kept; None = in memory, on the autoencoder's device.
    team : Team
        Each process encodes its share and has all. Augmented copies, whose draws follow one another, each
        makes itself.
    verbose : bool
        Say beforehand how large the cache becomes, and where it is.

    Returns
    -------
    LatentCache
        All slices in one version after the other. It takes twice (mean and log-variance)
        ``latent_channels / factor^2`` of the float32 images, times the versions.
    """
    device = autoencoder.to_device()
    n_copies = 0 if augmentation is None else augmentation.n_copies
    versions = [(mirrored, copy) for mirrored in range(1 + flip) for copy in range(1 + n_copies)]
    channels, height, width = autoencoder.latent_shape_
    shapes = [(len(versions) * len(stack), depth, height, width) for depth in (channels, channels, 1)]
    n_bytes = 4 * sum(map(math.prod, shapes))
    on_disk = directory is not None and n_bytes > LARGE_CACHE
    if verbose and team.rank == 0:
        place = f"on disk, below {directory}" if on_disk else f"in memory ({device})"
        print(
            f"latents of {len(stack)} slices, {len(versions)} of each: {n_bytes / 2**20:.1f} MiB {place}",
            file=sys.stderr,
        )
    if on_disk:
        cache = LatentCache(*(RowsOnDisk(directory, shape, device) for shape in shapes))
    else:
        cache = LatentCache(*(torch.empty(shape, device=device) for shape in shapes))
    shares = team.shares(len(stack))
    own = shares[team.rank] if augmentation is None else range(len(stack))
    batch_size = autoencoder.batch_size_of(device)
    if augmentation is not None:  # its draws go by batches, which must not depend on a GPU's free memory
        batch_size = autoencoder.batch_size or default_batch_size(*stack.image_shape[1:])
    with inference(autoencoder.network_):
        for batch in network_batches(stack.subset(np.asarray(own)), batch_size, device):
            for version, (mirrored, copy) in enumerate(versions):
                x, brain = (batch.x.flip(-1), batch.brain[..., ::-1]) if mirrored else (batch.x, batch.brain)
                if copy and augmentation is not None:
                    x, moved = augmentation(x, torch.from_numpy(brain.copy()).to(device), generator)
                    brain = moved.cpu().numpy()
                start = version * len(stack) + own.start + int(batch.rows[0])
                _encode(autoencoder, x, brain, cache, slice(start, start + batch.n_valid))
    if augmentation is None and team.size > 1:
        for part in (cache.mean, cache.logvar, cache.brain_fraction):
            for start in range(0, len(part), len(stack)):
                for source, share in enumerate(shares):
                    _copy_rows(part, range(start + share.start, start + share.stop), source, team)
    return cache


def _encode(autoencoder, x: Tensor, brain: np.ndarray, cache: LatentCache, rows: slice) -> None:
    """Write the posteriors of the first slices of a batch into some rows of a cache."""
    n_valid = rows.stop - rows.start
    mean, logvar = autoencoder.encode(autoencoder.pad(x))
    cache.mean[rows], cache.logvar[rows] = mean[:n_valid].float(), logvar[:n_valid].float()
    cache.brain_fraction[rows] = autoencoder.brain_fraction(brain, x.device)[:n_valid]


def _copy_rows(part: Tensor | RowsOnDisk, rows: range, source: int, team: Team) -> None:
    """Give all processes the rows of a cache that one of them has."""
    step = max(1, BUCKET // math.prod(part.shape[1:]))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        if team.rank == source:
            team.copy_([part[torch.arange(start, stop)]], source)
        else:
            values = torch.empty(stop - start, *part.shape[1:], device=part.device)
            team.copy_([values], source)
            part[slice(start, stop)] = values
