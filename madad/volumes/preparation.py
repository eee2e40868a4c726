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
    scan : Scan
    contrasts : sequence of str or None
        Which, and in which order; None = all, those of `NAMES` first and in its order.

    Returns
    -------
    dict of str to PreprocessedVolume

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
    """Entity and suffix of a contrast in BIDS names; a ValueError says which contrasts have one."""
    try:
        return NAMES[contrast]
    except KeyError:
        raise ValueError(
            f"contrast must be one of {sorted(NAMES)}, got {contrast!r}. Name the files accordingly."
        ) from None


def registration_warnings(volume: PreprocessedVolume) -> list[str]:
    """What a reader should know of how a volume was brought to its grid."""
    registration = volume.registration
    if registration is None or not registration.is_poor:
        return []
    overlap = "unknown" if registration.overlap is None else f"{registration.overlap:.3f}"
    return [
        f"Poor registration: overlap of the brains {overlap}, similarity {registration.similarity:.3f}; "
        "look at it before use."
    ]


def lesion_on_grid(scan: Scan, volumes: Iterable[PreprocessedVolume]) -> np.ndarray:
    """A scan's lesion mask on the grid of its preprocessed volumes; it may be drawn on any contrast."""
    mask = read_volume(scan.lesion_mask)
    volumes = list(volumes)
    drawn_on = next((volume for volume in volumes if same_grid(volume.source, mask)), None)
    if drawn_on is None:
        check_same_grid(volumes[0].source, mask)  # raises
        drawn_on = volumes[0]
    return drawn_on.from_source(mask.values > 0)


def in_order(names) -> list[str]:
    """Contrasts in the order of `NAMES`, then those of other names."""
    known = [name for name in NAMES if name in names]
    return known + sorted(set(names) - set(known))
