"""What a user hands in, checked once and read by batch: no torch here, and never a copy of the whole."""

from __future__ import annotations

import math

import numpy as np

from madad.base.slice_stack import ROWS_PER_CHECK, SliceStack, release_pages

RANGE_TOLERANCE = 1e-5
INTEGER_RANGES = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}


def check_slices(
    X, *, image_shape=None, intensity_range=(0.0, 1.0), brain_mask=None, input_name: str = "X"
) -> SliceStack:
    """Check slices and masks and wrap them for reading by batch.

    Parameters
    ----------
    X : array-like or tensor of shape (n, H, W), (n, C, H, W), (n, C, D, H, W) or (n, n_features)
        Rows of ``n_features`` numbers are folded by ``image_shape``, by the exact square root, or padded
        with background to the next square.
    image_shape : tuple (H, W) or (C, H, W), optional
        What a flat row is folded to.
    intensity_range : (float, float) or "data"
        What is mapped to 0..1. Values outside raise. uint8 and uint16 arrays have their type's range
        instead of (0, 1). ``"data"`` takes the smallest and largest value of ``X``; later data may exceed it.
    brain_mask : array-like of bool, optional
        True = brain; shape of ``X`` without channels.
    input_name : str
        What errors call ``X``.

    Raises
    ------
    TypeError
        If ``X`` is not numeric.
    ValueError
        If a shape, a value or the mask does not fit.
    """
    values = _as_array(X, input_name)
    if values.ndim not in (2, 3, 4, 5):
        raise ValueError(
            f"{input_name} must have shape (n_samples, height, width), (n_samples, channels, height, width), "
            f"(n_samples, channels, depth, height, width) or (n_samples, n_features), got {values.shape}. "
            f"Reshape your data either as slices, volumes or flat; a single slice needs X[None]."
        )
    if 0 in values.shape:
        raise ValueError(
            f"{input_name} must hold at least one sample and one pixel, got shape {values.shape} "
            f"(0 sample(s) or 0 feature(s)) while a minimum of 1 is required. Check what was selected."
        )
    shape = _image_shape(values, image_shape, input_name)
    integer_range = INTEGER_RANGES.get(values.dtype.name)
    if isinstance(intensity_range, str) and intensity_range == "data":
        low, high = _data_range(values, input_name)
        intensity_range = (low, high if high > low else low + 1.0)
    else:
        _check_intensity_range(intensity_range)
        if tuple(intensity_range) == (0.0, 1.0) and integer_range:
            intensity_range = integer_range
        else:
            _check_range(values, intensity_range, input_name)
    mask = None if brain_mask is None else _check_brain_mask(brain_mask, values, shape, input_name)
    return SliceStack(values, shape, (float(intensity_range[0]), float(intensity_range[1])), mask)


def as_numpy(X, name: str = "X") -> np.ndarray:
    """An array or tensor as an array; memory maps and device tensors included."""
    if hasattr(X, "detach"):  # a torch tensor, without importing torch
        X = X.detach().cpu()
        X = X.float() if str(X.dtype) == "torch.bfloat16" else X
    try:
        return np.asarray(X)
    except ValueError as error:
        raise ValueError(f"{name} must hold slices of one shape, got {error} Pad or crop them.") from None


def _as_array(X, name: str) -> np.ndarray:
    if hasattr(X, "toarray"):
        raise TypeError(
            f"Sparse data was passed for {name}, but dense data is required. Use '.toarray()' to convert it."
        )
    values = as_numpy(X, name)
    if values.dtype.kind == "O":
        try:
            values = values.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} must be numeric, got objects ({error}). Stack equal slices.") from None
    if values.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} must be real, got {values.dtype}. Take np.abs.")
    if values.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be numeric, got {values.dtype}. Convert it to float32 in 0..1.")
    return values


def _check_intensity_range(intensity_range) -> None:
    try:
        low, high = (float(end) for end in intensity_range)
        fits = -math.inf < low < high < math.inf
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"intensity_range must be 'data' or (low, high) with finite low < high, got {intensity_range!r}. "
            f"Use (0.0, 1.0)."
        )


def _image_shape(values: np.ndarray, image_shape, name: str) -> tuple[int, int, int]:
    if image_shape is not None and not _is_image_shape(image_shape):
        raise ValueError(
            f"image_shape must be (height, width) or (channels, height, width) in positive integers, "
            f"got {image_shape!r}. Use None for data with image axes or square slices."
        )
    if values.ndim > 2:
        found = _with_channels(values.shape[1:2] + values.shape[-2:] if values.ndim > 3 else values.shape[1:])
        wanted = None if image_shape is None else _with_channels(image_shape)
        if wanted is not None and wanted != found:
            raise ValueError(
                f"image_shape must agree with {name}, got {tuple(image_shape)} and {name} of shape "
                f"{values.shape}. Leave image_shape=None for data with image axes."
            )
        return found
    n_features = values.shape[1]
    if image_shape is None:
        side = math.isqrt(n_features - 1) + 1  # rounded up
        return 1, side, side
    folded = _with_channels(image_shape)
    if math.prod(folded) != n_features:
        raise ValueError(
            f"image_shape must hold as many pixels as {name} has features, got {tuple(image_shape)} for "
            f"{n_features} features. Give (height, width) or (channels, height, width)."
        )
    return folded


def _is_image_shape(shape) -> bool:
    try:
        return len(shape) in (2, 3) and all(int(side) == side and side > 0 for side in shape)
    except (TypeError, ValueError):
        return False


def _with_channels(shape) -> tuple[int, int, int]:
    channels, height, width = (1, *(int(side) for side in shape))[-3:]
    return channels, height, width


def _chunks(values: np.ndarray):
    for start in range(0, len(values), ROWS_PER_CHECK):
        yield np.asarray(values[start : start + ROWS_PER_CHECK])
        release_pages(values)


def _data_range(values: np.ndarray, name: str) -> tuple[float, float]:
    low, high = math.inf, -math.inf
    for chunk in _chunks(values):
        smallest, largest = float(chunk.min()), float(chunk.max())
        if not (math.isfinite(smallest) and math.isfinite(largest)):
            raise ValueError(
                f"Input {name} contains NaN or infinity; {name} must be finite, got values from "
                f"{smallest} to {largest}. Replace them, for example by np.nan_to_num."
            )
        low, high = min(low, smallest), max(high, largest)
    return low, high


def _check_range(values: np.ndarray, intensity_range, name: str) -> None:
    low, high = _data_range(values, name)
    slack = RANGE_TOLERANCE * (intensity_range[1] - intensity_range[0])
    if low < intensity_range[0] - slack or high > intensity_range[1] + slack:
        raise ValueError(
            f"{name} must lie in {intensity_range[0]:g}..{intensity_range[1]:g}, got values from {low:g} to "
            f"{high:g}. Scale it with madad.mri.normalize_intensity, or set intensity_range."
        )


def _check_brain_mask(brain_mask, values: np.ndarray, shape, name: str) -> np.ndarray:
    mask = as_numpy(brain_mask, "brain_mask")
    n, (_, height, width) = len(values), shape
    expected = {
        2: (n, math.ceil(values.shape[1] / shape[0])),
        5: (n, *values.shape[2:]),
    }.get(values.ndim, (n, height, width))
    if values.ndim > 3 and mask.shape == (n, 1, *expected[1:]):
        mask = mask[:, 0]
    if mask.shape != expected:
        raise ValueError(
            f"brain_mask must have shape {expected} to go with {name} of shape {values.shape}, "
            f"got {mask.shape}. Give one mask per sample."
        )
    if mask.dtype != bool and not all(np.isin(chunk, (0, 1)).all() for chunk in _chunks(mask)):
        raise ValueError(
            f"brain_mask must be boolean or hold only 0 and 1, got {mask.dtype} with other values. "
            f"Use mask > 0."
        )
    return mask
