"""From a scan on disk to its contrasts on the model's grid."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from madad.datasets import Scan
from madad.mri import (
    PreprocessedVolume,
    VolumePreprocessor,
    check_same_grid,
    read_volume,
    same_grid,
)

NAMES = {
    "T1": ("", "T1w"),
    "T2": ("", "T2w"),
    "PD": ("", "PDw"),
    "FLAIR": ("", "FLAIR"),
    "T1CE": ("ce-gadolinium", "T1w"),
}
"""Contrast to what BIDS calls it: an entity, if any, and the suffix."""


def preprocess_scan(
    preprocessor: VolumePreprocessor, scan: Scan, contrasts: Sequence[str] | None = None
) -> dict[str, PreprocessedVolume]:
    """Preprocess the contrasts of a person, all on one grid.

    Parameters
    ----------
    preprocessor : VolumePreprocessor
        How the brain is found, placed and scaled.
    scan : Scan
        Files of one person in one session.
    contrasts : sequence of str or None, default=None
        The contrasts wanted, in the order wanted. None = all, those of `NAMES` first and in its order.

    Returns
    -------
    dict of str to PreprocessedVolume
        The volume of each contrast, all on one grid and with one brain mask.

    Notes
    -----
    The contrast that the others are brought to, and whose brain is theirs, is the first in the order of
    `NAMES` that the scan has, or with a brain mask the first on the mask's grid: whichever contrasts are
    asked for, so that a contrast is prepared alike in training and later.

    Raises
    ------
    ValueError
        If a contrast is missing or a file cannot be used; see `VolumePreprocessor.preprocess_contrasts`.
    """
    names = in_order(scan.images) if contrasts is None else list(contrasts)
    missing = [name for name in names if name not in scan.images]
    if missing:
        raise ValueError(
            f"contrasts must be among those of sub-{scan.subject}, got {missing}, with {sorted(scan.images)} "
            "there. Add the files, or leave the subject out."
        )
    reference = _reference(scan)
    needed = [reference, *(name for name in names if name != reference)]
    images = [scan.images[name] for name in needed]
    found = dict(zip(needed, preprocessor.preprocess_contrasts(images, scan.brain_mask), strict=True))
    return {name: found[name] for name in names}


def _reference(scan: Scan) -> str:
    """The contrast that the others are brought to."""
    names = in_order(scan.images)
    if scan.brain_mask is None or len(names) == 1:
        return names[0]
    mask = read_volume(scan.brain_mask)
    return next((name for name in names if same_grid(read_volume(scan.images[name]), mask)), names[0])


def bids_name(contrast: str) -> tuple[str, str]:
    """Tell what BIDS calls a contrast.

    Parameters
    ----------
    contrast : str
        Name of the contrast, one of `NAMES`.

    Returns
    -------
    entity : str
        An entity, such as "ce-gadolinium", or "".
    suffix : str
        The suffix of file names, such as "T1w".

    Raises
    ------
    ValueError
        If BIDS has no name for it here.
    """
    try:
        return NAMES[contrast]
    except KeyError:
        raise ValueError(
            f"contrast must be one of {sorted(NAMES)}, got {contrast!r}. Name the files accordingly."
        ) from None


def registration_warnings(volume: PreprocessedVolume) -> list[str]:
    """Say what a reader should know of how a volume was brought to its grid.

    Parameters
    ----------
    volume : PreprocessedVolume
        The volume, with its registration if there was one.

    Returns
    -------
    list of str
        A sentence if the registration is poor, else nothing.
    """
    registration = volume.registration
    if registration is None or not registration.is_poor:
        return []
    overlap = "unknown" if registration.overlap is None else f"{registration.overlap:.3f}"
    return [
        f"Poor registration: overlap of the brains {overlap}, similarity {registration.similarity:.3f}; "
        "look at it before use."
    ]


def lesion_on_grid(scan: Scan, volumes: Iterable[PreprocessedVolume]) -> np.ndarray:
    """Bring a scan's lesion mask to the grid of its preprocessed volumes.

    Parameters
    ----------
    scan : Scan
        A scan with a lesion mask, drawn on any of its contrasts.
    volumes : iterable of PreprocessedVolume
        Contrasts of the scan.

    Returns
    -------
    ndarray of shape (X, Y, Z), bool
        True = lesion, on the grid that the volumes share.

    Raises
    ------
    ValueError
        If the mask is on the grid of none of the contrasts, or cannot be read.
    """
    mask = read_volume(scan.lesion_mask)
    volumes = list(volumes)
    drawn_on = next((volume for volume in volumes if same_grid(volume.source, mask)), None)
    if drawn_on is None:
        check_same_grid(volumes[0].source, mask)  # raises
        drawn_on = volumes[0]
    return drawn_on.from_source(mask.values > 0)


def in_order(names) -> list[str]:
    """Put contrasts in the order of `NAMES`, then those of other names.

    Parameters
    ----------
    names : collection of str
        Contrasts in any order.

    Returns
    -------
    list of str
        The same contrasts in one order.
    """
    known = [name for name in NAMES if name in names]
    return known + sorted(set(names) - set(known))
