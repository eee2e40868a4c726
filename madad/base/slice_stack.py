"""Slices and their brain masks, read by batch: no torch here, and never a copy of the whole."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

ROWS_PER_CHECK = 256
LARGE_RESULT = 64 * 2**20  # bytes


@dataclass(frozen=True)
class SliceStack:
    """Slices and their brain masks, read by index as the networks want them.

    A sample is a slice, or a volume, whose axial slices then follow one another.

    Attributes
    ----------
    values : ndarray of shape (n, H, W), (n, C, H, W), (n, C, D, H, W) or (n, n_features)
        As the user gave them, possibly a memory map.
    image_shape : tuple (C, H, W)
        Channels, height and width of a slice.
    intensity_range : tuple (low, high)
        What is mapped to 0..1.
    brain_mask : ndarray of bool with the axes of ``values`` without channels, or None
        True = brain. None = where a value of any channel is above the low end of ``intensity_range``, the
        background.
    rows : ndarray of int or None
        The slices of ``values`` that belong to this stack; None = all.
    """

    values: np.ndarray
    image_shape: tuple[int, int, int]
    intensity_range: tuple[float, float]
    brain_mask: np.ndarray | None = None
    rows: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values) * self.depth if self.rows is None else len(self.rows)

    @property
    def depth(self) -> int:
        """Slices in a sample."""
        return self.values.shape[2] if self.values.ndim == 5 else 1

    @property
    def samples(self) -> np.ndarray:
        """Which sample each slice is of."""
        return (np.arange(len(self)) if self.rows is None else self.rows) // self.depth

    @property
    def is_flat(self) -> bool:
        """Whether a sample came as one row of numbers."""
        return self.values.ndim == 2

    def subset(self, rows: np.ndarray) -> SliceStack:
        """The slices ``rows`` of this stack, (n,) int, still unread."""
        return replace(self, rows=rows if self.rows is None else self.rows[rows])

    def selected(self) -> np.ndarray:
        """Its slices of ``values``; all samples as they came where it has all."""
        return self.values if self.rows is None else self._take(self.values, np.arange(len(self)))

    def spread(self, groups) -> np.ndarray | None:
        """``groups`` of samples, (n_samples,), as groups of slices; unless there are several, by volume."""
        if groups is None:
            return self.samples if self.depth > 1 else None
        groups = np.asarray(groups)
        if self.depth > 1 and len(groups) != len(self.values):
            raise ValueError(
                f"groups must have one entry for each of {len(self.values)} volumes, got {len(groups)}. "
                f"Give each volume's subject."
            )
        if self.depth == 1:
            return groups
        return groups[self.samples] if len(np.unique(groups)) > 1 else self.samples

    def rows_to_train_on(self, rows: np.ndarray) -> np.ndarray:
        """Those of the slices ``rows`` that show brain, if they are of volumes; without any, all."""
        if self.depth == 1:
            return rows
        useful = rows[self.subset(rows).rows_with_brain()]
        return useful if len(useful) else rows

    def rows_with_brain(self) -> np.ndarray:
        """Which of its slices show any brain."""
        rows = np.arange(len(self))
        chunks = (rows[start : start + ROWS_PER_CHECK] for start in range(0, len(rows), ROWS_PER_CHECK))
        found = [chunk[self.brain(chunk).any(axis=(1, 2, 3))] for chunk in chunks]
        return np.concatenate([rows[:0], *found])

    def images(self, index) -> np.ndarray:
        """Slices ``index``: float32 (len(index), C, H, W) in 0..1, or beyond where the range is exceeded."""
        values, (low, high) = self._take(self.values, index), self.intensity_range
        if (low, high) != (0.0, 1.0):
            values = (values.astype(np.float64) - low) / (high - low)
        values = values.astype(np.float32)
        if self.is_flat:  # after scaling: the padding is background in any range
            values = _fold(values, math.prod(self.image_shape))
        return values.reshape(-1, *self.image_shape)

    def brain(self, index) -> np.ndarray:
        """Brain masks of the slices ``index``: bool (len(index), 1, H, W)."""
        _, height, width = self.image_shape
        if self.brain_mask is not None:
            chosen = self._take(self.brain_mask, index).astype(bool)
            return _fold(chosen.reshape(len(chosen), -1), height * width).reshape(-1, 1, height, width)
        values = np.asarray(self._take(self.values, index) > self.intensity_range[0])
        if self.is_flat:
            values = _fold(values, math.prod(self.image_shape))
        return np.asarray(values.reshape(-1, *self.image_shape).any(axis=1, keepdims=True))

    @cached_property
    def digest(self) -> str:
        """A hash of the samples, as text: equal for equal samples, whatever holds them."""
        settings = (self.values.dtype.str, self.values.shape[1:], self.image_shape, self.intensity_range)
        digest = hashlib.blake2b(repr((len(self), self.brain_mask is None, *settings)).encode())
        for start in range(0, len(self), ROWS_PER_CHECK):
            index = np.arange(start, min(start + ROWS_PER_CHECK, len(self)))
            digest.update(np.ascontiguousarray(self._take(self.values, index)).data)
            if self.brain_mask is not None:
                digest.update(np.ascontiguousarray(self._take(self.brain_mask, index), dtype=bool).data)
        return digest.hexdigest()

    def new_maps(self, dtype) -> np.ndarray:
        """Room for a map of each slice, (n, H, W) of ``dtype``.

        Where the slices are not in memory and the maps are many, it is a memory map of a file without a name,
        which is gone when the array is.

        Raises
        ------
        OSError
            If the disk has no room for it.
        """
        shape = (len(self), *self.image_shape[1:])
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if _mapping_of(self.values) is None or n_bytes < LARGE_RESULT:
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile() as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not the process's end later
                try:
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                except OSError as error:
                    raise OSError(
                        f"TMPDIR must have room for {n_bytes} bytes of maps, got {tempfile.gettempdir()} "
                        f"({error}). Free the disk, set TMPDIR to another, or predict fewer slices at a time."
                    ) from error
            return np.memmap(file, dtype, "w+", shape=shape)

    def unfold(self, maps: np.ndarray) -> np.ndarray:
        """``maps`` (n, H, W) in the samples' layout: (n, D, H, W) of volumes, flat rows of flat samples."""
        if self.values.ndim == 5:
            return maps.reshape(-1, self.depth, *maps.shape[1:])
        if not self.is_flat:
            return maps
        n_pixels = math.ceil(self.values.shape[1] / self.image_shape[0])
        return maps.reshape(len(maps), -1)[:, :n_pixels]

    def _take(self, array: np.ndarray, index) -> np.ndarray:
        index = np.asarray(index) if self.rows is None else self.rows[np.asarray(index)]
        if self.values.ndim == 5:
            sample, place = np.divmod(index, self.depth)
            taken = array[sample, :, place] if array.ndim == 5 else array[sample, place]
        else:
            taken = np.asarray(array[index])
        release_pages(array)
        return taken


def release_pages(array: np.ndarray) -> None:
    """Unmap what was read or written of a memory map, which counts as the process's memory until then.

    The system keeps the file in its cache nevertheless. Changes of a copy-on-write map would be lost.
    """
    mapping = _mapping_of(array)
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
        with suppress(OSError):  # pages that are locked
            mapping.madvise(mmap.MADV_DONTNEED)


def _mapping_of(array: np.ndarray) -> mmap.mmap | None:
    """What maps an array's file into memory, if it has one that is shared with the file."""
    owner: Any = array
    mode = None
    while isinstance(owner, np.ndarray):
        mode, owner = getattr(owner, "mode", mode), owner.base
    return owner if mode in ("r", "r+", "w+") and isinstance(owner, mmap.mmap) else None


def _fold(rows: np.ndarray, n_values: int) -> np.ndarray:
    """Pad flat rows with background up to ``n_values``."""
    return np.pad(rows, ((0, 0), (0, n_values - rows.shape[1])))
