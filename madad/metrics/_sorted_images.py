"""The brain pixels of many images, each image sorted once, in memory or in a file."""

import tempfile
import weakref
from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Levels(NamedTuple):
    """Values of the lesion pixels in a range.

    Attributes
    ----------
    values : ndarray of shape (n_levels,)
        Distinct values below `high`, ascending.
    counts : ndarray of shape (n_levels,), int
        How many lesion pixels have each.
    high : floating
        Upper end of the range, which is not in it.
    """

    values: NDArray
    counts: NDArray
    high: np.floating


class _Image(NamedTuple):
    n_lesion: int
    n_healthy: int
    dtype: np.dtype
    kept: NDArray | int  # lesion values, then healthy ones, each ascending; or where these are in the file


class SortedImages:
    """Images by their sorted brain pixels; a file, without a name, is gone when it is closed.

    Parameters
    ----------
    directory : path, default=None
        Folder for the file. None keeps the pixels in memory.
    """

    def __init__(self, directory: str | PathLike | None = None):
        self.dtype = np.dtype(np.float32)  # float64 as soon as one of the images is
        self._images: list[_Image] = []
        self._file = None
        if directory is not None:
            if not Path(directory).is_dir():
                raise ValueError(f"directory must be a folder, got {str(directory)!r}. Create it first.")
            self._file = tempfile.TemporaryFile(dir=Path(directory))
            self._end = 0
            self._close = weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self._images)

    def add(self, images: Iterable[tuple[NDArray, NDArray]]) -> None:
        """Keep images, all or, after an error, none.

        Parameters
        ----------
        images : iterable of (ndarray, ndarray)
            Values of the lesion pixels and of the other brain pixels of each, in any order.
        """
        added = [self._keep(np.sort(lesion), np.sort(healthy)) for lesion, healthy in images]
        self.dtype = np.result_type(self.dtype, *{image.dtype for image in added})
        self._images += added

    def close(self) -> None:
        """Let go of the pixels."""
        self._images = []
        if self._file is not None:
            self._close()

    @property
    def n_lesion(self) -> NDArray:
        """Lesion pixels of each image, (n,)."""
        return np.array([image.n_lesion for image in self._images], dtype=np.int64)

    @property
    def n_healthy(self) -> NDArray:
        """Other brain pixels of each image, (n,)."""
        return np.array([image.n_healthy for image in self._images], dtype=np.int64)

    def lesion(self, i: int) -> NDArray:
        """Read the lesion pixels of an image.

        Parameters
        ----------
        i : int
            Number of the image, from 0.

        Returns
        -------
        ndarray of shape (n_lesion,)
            Values of the map there, ascending.
        """
        return self._read(self._images[i], 0, self._images[i].n_lesion)

    def healthy(self, i: int) -> NDArray:
        """Read the other brain pixels of an image.

        Parameters
        ----------
        i : int
            Number of the image, from 0.

        Returns
        -------
        ndarray of shape (n_healthy,)
            Values of the map there, ascending.
        """
        return self._read(self._images[i], self._images[i].n_lesion, self._images[i].n_healthy)

    def counts_at(self, i: int, thresholds: NDArray) -> tuple[NDArray, NDArray]:
        """Count the predicted pixels of an image.

        Parameters
        ----------
        i : int
            Number of the image, from 0.
        thresholds : ndarray of shape (n,)
            Thresholds of the type `dtype`.

        Returns
        -------
        n_overlap, n_predicted : ndarray of shape (n,), int
            How many lesion pixels, and how many pixels of all, reach each threshold.
        """
        n_overlap = n_reaching(self.lesion(i), thresholds)
        return n_overlap, n_overlap + n_reaching(self.healthy(i), thresholds)

    def lesion_levels(self, size: int) -> Iterator[Levels]:
        """Go through the distinct lesion values of all images from high to low, in ranges.

        Parameters
        ----------
        size : int
            About how many lesion pixels a range holds at most.

        Yields
        ------
        Levels
            The next lower range.

        Notes
        -----
        Every `stride`-th value of each image is a sample; a range holds so few of them that the pixels in
        between are not too many. The pixels of one value, in the same range, are not gathered but counted.
        """
        with_lesion = np.flatnonzero(self.n_lesion).tolist()
        stride = max(1, size // (2 * len(with_lesion)))
        sample = np.sort(np.concatenate([self.lesion(i)[::stride] for i in with_lesion]))
        lows = np.unique(sample[:: max(1, size // (2 * stride))])
        highs = np.append(lows[1:], self.dtype.type(np.inf))
        for low, high in zip(lows[::-1], highs[::-1], strict=True):
            found = [runs(between(self.lesion(i), low, high)) for i in with_lesion]
            values, inverse = np.unique(np.concatenate([each[0] for each in found]), return_inverse=True)
            counts = np.bincount(inverse, weights=np.concatenate([each[1] for each in found]))
            yield Levels(values, counts.astype(np.int64), high)

    def _keep(self, lesion: NDArray, healthy: NDArray) -> _Image:
        kept: NDArray | int
        if self._file is None:
            kept = np.concatenate([lesion, healthy])
        else:
            kept = self._end
            self._file.seek(kept)
            self._end += self._file.write(lesion.data) + self._file.write(healthy.data)
            self._file.flush()  # a full disk is of this image, not of the next
        return _Image(lesion.size, healthy.size, lesion.dtype, kept)

    def _read(self, image: _Image, start: int, n: int) -> NDArray:
        if isinstance(image.kept, int):
            assert self._file is not None
            values = np.empty(n, image.dtype)
            self._file.seek(image.kept + start * image.dtype.itemsize)
            self._file.readinto(values.data)
        else:
            values = image.kept[start : start + n]
        return values.astype(self.dtype, copy=False)


def n_reaching(ascending: NDArray, thresholds: NDArray) -> NDArray:
    """Count the values at or above each threshold.

    Parameters
    ----------
    ascending : ndarray of shape (n_values,)
        Values in ascending order.
    thresholds : ndarray of shape (n,)
        Thresholds of the same dtype, or else NumPy converts the values.

    Returns
    -------
    ndarray of shape (n,), int
        How many values reach each threshold.
    """
    return len(ascending) - np.searchsorted(ascending, thresholds, side="left")


def between(ascending: NDArray, low: np.floating, high: np.floating) -> NDArray:
    """Cut a range out of sorted values.

    Parameters
    ----------
    ascending : ndarray of shape (n_values,)
        Values in ascending order.
    low, high : floating
        Ends of the range.

    Returns
    -------
    ndarray
        A view of the values with ``low <= value < high``.
    """
    return ascending[slice(*np.searchsorted(ascending, np.array([low, high])))]


def runs(ascending: NDArray) -> tuple[NDArray, NDArray]:
    """Count equal values.

    Parameters
    ----------
    ascending : ndarray of shape (n_values,)
        Values in ascending order.

    Returns
    -------
    values : ndarray of shape (n,)
        Distinct values, ascending.
    counts : ndarray of shape (n,), int
        How often each occurs.
    """
    starts = np.flatnonzero(np.append(True, ascending[1:] != ascending[:-1])[: len(ascending)])
    return ascending[starts], np.diff(starts, append=len(ascending))
