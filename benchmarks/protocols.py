"""Who is trained on and who is tested, split by subject: setting 1, setting 2 and whole volumes.

``s1``: train on a healthy cohort, test on the middle axial slices of another cohort that have a lesion.
``s2``: one cohort; train on lesion-free slices of some subjects, test on each other subject's slice with the
largest lesion. ``volume``: as ``s2``, tested on all slices of a subject, which count as one image.

A protocol finds its cohorts in a folder: the ``.npz`` files of slices that this project's numbers come from
(see `NPZ`), or else what `madad.datasets` has readers for: ``IXI/`` and ``ATLAS/`` (s1); BraTS, BIDS or the
original's PNG files (s2, volume). Labels are resampled by the nearest pixel; maps and truth are
restricted to the brain mask.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import numpy as np
from sklearn.utils import Bunch

from madad.datasets import (
    crop_to_brain,
    find_atlas,
    find_bids,
    find_brats,
    find_ixi,
    load_png_slices,
    load_scans,
    load_slices,
    make_brain_slices,
)
from madad.metrics import size_strata

NPZ = {"s1": ("ixi_t1_2mm.npz", "brats_multicontrast.npz"), "s2": ("lgg_flair.npz",)}
SPLITS = Path(__file__).parent / "splits"
TEST_SHARE, VALIDATION_SHARE = 27 / 79, 12 / 79
MIN_LESION_PX = 15  # at 128 pixels; smaller lesions are not tested on
LEVELS = (0.4, 0.8)  # the middle axial slices: share of the brain's height, from below
BRAIN_LEVELS = (0.35, 0.92)  # slices with enough brain, for s2
SHARED = ("images", "brain_masks", "lesion_masks", "subjects")


@dataclass(frozen=True)
class Protocol:
    """Healthy slices to train on, and slices to test on.

    Attributes
    ----------
    name : str
    train, test : Bunch
        ``images``, ``brain_masks``, ``lesion_masks`` (n, H, W) and ``subjects`` (n,).
    description : dict
        What a report says of the data: files, sizes, numbers of slices and subjects, a hash of the test
        subjects' identifiers.
    by_volume : bool
        All slices of a subject count as one image.
    grid_px : int
        Side of the square grid whose pixels these are, before slices were cropped to the brain; what a
        lesion's size refers to.
    """

    name: str
    train: Bunch
    test: Bunch
    description: dict = field(default_factory=dict)
    by_volume: bool = False
    grid_px: int = 128

    @property
    def lesion_sizes(self) -> np.ndarray:
        """Class of each test slice by its lesion: none, small, medium or large (`size_strata`)."""
        masks = self.test.lesion_masks
        uncropped = self.grid_px / math.sqrt(masks[0].size)
        return size_strata(masks, reference_size=128 / uncropped)


def load_protocol(
    name: str, data: Path, *, contrast: str | None = None, size: int = 128, validation: bool = False
) -> Protocol:
    """Read the cohorts of a protocol from a folder.

    Parameters
    ----------
    name : {"s1", "s2", "volume"}
    data : Path
        Folder with the cohorts.
    contrast : str, optional
        None = T1 for s1, FLAIR for the others.
    size : int
        Pixels of the square grid of s2 and volume, before slices are cropped to the brain.
    validation : bool
        Test on subjects that were set aside from the training subjects, and leave the test subjects out: for
        choosing anything. s2 and volume only.
    """
    contrast = (contrast or ("T1" if name == "s1" else "FLAIR")).upper()
    if name == "s1":
        if validation:
            raise ValueError("validation must be False for s1, got True. Its healthy cohort has no lesions.")
        train, test, files = _two_cohorts(data, contrast, size)
    elif name in ("s2", "volume"):
        train, test, files = _one_cohort(data, contrast, size, validation, whole=name == "volume")
    else:
        raise ValueError(f"protocol must be s1, s2 or volume, got {name!r}. Choose one of them.")
    grid_px = 128 if files == list(NPZ["s1"]) else size  # 2 mm, as 128 pixels of a head
    height, width = test.images.shape[1:]
    description = {
        "protocol": name,
        "files": files,
        "contrast": contrast,
        "subset": "validation" if validation else "test",
        "slice_px": [height, width],
        "n_train": len(train.images),
        "n_train_subjects": len(np.unique(train.subjects)),
        "n_test": len(test.images),
        "n_test_subjects": len(np.unique(test.subjects)),
        "test_subjects_sha256": sha256("\n".join(np.unique(test.subjects)).encode()).hexdigest(),
        "restricted_to": "brain mask",
    }
    return Protocol(name, take(train), take(test), description, by_volume=name == "volume", grid_px=grid_px)


def quick_protocol() -> Protocol:
    """Generated slices of 64 pixels: 240 healthy subjects, 40 others with a lesion each. Nothing is read."""
    healthy = make_brain_slices(240, size=64, random_state=0)
    lesioned = make_brain_slices(40, size=64, lesions=1.0, lesion_radius=(0.1, 0.14), random_state=1)
    description = {
        "protocol": "quick",
        "files": ["generated"],
        "slice_px": [64, 64],
        "n_train": len(healthy.images),
        "n_test": len(lesioned.images),
        "restricted_to": "brain mask",
    }
    return Protocol("quick", take(healthy), take(lesioned), description, grid_px=64)


def split_subjects(subjects: np.ndarray, split: str | None = None) -> dict[str, np.ndarray]:
    """Subjects to train on, to validate with and to test on.

    Parameters
    ----------
    subjects : ndarray of str
        One per slice.
    split : str, optional
        Name of a file in ``benchmarks/splits``. None = by the order of the identifiers' hashes, which every
        reader of the same cohort finds again without a file.

    Returns
    -------
    dict
        ``train``, ``validation`` and ``test``: sorted identifiers.

    Raises
    ------
    ValueError
        If the file's subjects are not those of the data.
    """
    known = {_hash(subject): subject for subject in np.unique(subjects)}
    if split is None:
        order = sorted(known)
        n_test, n_validation = round(TEST_SHARE * len(order)), round(VALIDATION_SHARE * len(order))
        parts = np.split(np.array(order), [n_test, n_test + n_validation])
        roles = dict(zip(("test", "validation", "train"), parts, strict=True))
    else:
        path = SPLITS / f"{split}.json"
        roles = json.loads(path.read_text())["subjects"]
        listed = {identifier for part in roles.values() for identifier in part}
        if listed != set(known):
            raise ValueError(
                f"data must hold the subjects of {path.name}, got {len(set(known) - listed)} unknown ones "
                f"and {len(listed - set(known))} missing. Use the data that the split was made for."
            )
    return {role: np.array(sorted(known[identifier] for identifier in part)) for role, part in roles.items()}


def take(data: Bunch, rows=slice(None)) -> Bunch:
    """Rows of the arrays that are needed."""
    return Bunch(**{name: data[name][rows] for name in SHARED})


def at_levels(data: Bunch, levels: tuple[float, float] = LEVELS) -> Bunch:
    """The slices at some levels of the brain; all where the level is unknown."""
    if data.z_frac is None:
        return take(data)
    return take(data, np.flatnonzero((data.z_frac >= levels[0]) & (data.z_frac <= levels[1])))


def cropped_to_brains(*cohorts: Bunch, multiple: int = 16) -> list[Bunch]:
    """Cohorts in the smallest window, its sides multiples of a number, that holds the brain of each slice."""
    window = []
    for axis in (1, 2):
        longest = 1
        for data in cohorts:
            used = data.brain_masks.any(axis=3 - axis)
            first, last = used.argmax(axis=1), used.shape[1] - 1 - used[:, ::-1].argmax(axis=1)
            longest = max(longest, int((last - first + 1)[used.any(axis=1)].max(initial=1)))
        window.append(-(-longest // multiple) * multiple)
    cropped = [crop_to_brain(data, tuple(window)) for data in cohorts]
    return [
        Bunch(**data | {"brain_masks": data.get("own_brain_masks", data.brain_masks)}) for data in cropped
    ]


def _as_volumes(data: Bunch) -> Bunch:
    """The same slices with the brain of all of a subject's in each: a crop then leaves a volume straight."""
    unions = data.brain_masks.copy()
    for subject in np.unique(data.subjects):
        own = data.subjects == subject
        unions[own] = data.brain_masks[own].any(axis=0)
    return Bunch(**data | {"brain_masks": unions, "own_brain_masks": data.brain_masks})


def _hash(subject: str) -> str:
    return sha256(str(subject).encode()).hexdigest()[:16]


def _two_cohorts(data: Path, contrast: str, size: int) -> tuple[Bunch, Bunch, list[str]]:
    healthy, lesions = (data / name for name in NPZ["s1"])
    if healthy.is_file() and lesions.is_file():
        grid = {"spacing_mm": 2.0, "center": "mode"}
        if contrast != "T1":
            raise ValueError(f"contrast must be T1 for {healthy.name}, got {contrast!r}. Leave it out.")
        train, test = (
            load_slices(path, image=image, **grid)
            for path, image in ((healthy, "image"), (lesions, "image_t1"))
        )
        files, size = [healthy.name, lesions.name], 128  # 2 mm, as 128 pixels of a head
    elif not ((data / "IXI").is_dir() and (data / "ATLAS").is_dir()):
        raise ValueError(
            f"data must hold {healthy.name} and {lesions.name}, or the folders IXI and ATLAS, for s1, got "
            f"{data}. Give the folder that holds both cohorts."
        )
    else:
        grid = {"size": size, "spacing_mm": 256 / size, "center": "mode"}
        train = load_scans(find_ixi(data / "IXI"), contrast=contrast, z_range=LEVELS, every=4, **grid)
        test = load_scans(find_atlas(data / "ATLAS"), contrast=contrast, z_range=LEVELS, every=4, **grid)
        files = ["IXI", "ATLAS"]
    # Many slices set a subject's scale, so that a lesion that fills one does not.
    train, test = at_levels(train), at_levels(test)
    test = take(test, np.flatnonzero(test.lesion_masks.sum(axis=(1, 2)) >= MIN_LESION_PX * (size / 128) ** 2))
    train, test = cropped_to_brains(train, test)
    return train, test, files


def _one_cohort(
    data: Path, contrast: str, size: int, validation: bool, whole: bool
) -> tuple[Bunch, Bunch, list[str]]:
    slices, split, files = _slices_of(data, contrast, size)
    (slices,) = cropped_to_brains(_as_volumes(slices) if whole else slices)
    roles = split_subjects(slices.subjects, split)
    tested = roles["validation" if validation else "test"]
    trained = roles["train"] if validation else np.concatenate([roles["train"], roles["validation"]])
    area = slices.lesion_masks.sum(axis=(1, 2))
    train = np.flatnonzero(np.isin(slices.subjects, trained) & (area == 0))
    test = []
    for subject in tested:
        own = np.flatnonzero(slices.subjects == subject)
        largest = own[area[own].argmax()]
        if area[largest] >= MIN_LESION_PX * (size / 128) ** 2:
            test.extend(own if whole else [largest])
    if not test:
        raise ValueError(
            f"data must show a lesion of {MIN_LESION_PX} pixels or more in a slice, got none in "
            f"{len(tested)} test subjects ({', '.join(files)}). Check the lesion masks, or enlarge size."
        )
    return take(slices, train), take(slices, np.array(test)), files


def _slices_of(data: Path, contrast: str, size: int) -> tuple[Bunch, str | None, list[str]]:
    """All slices of the cohort in a folder, the name of its split, and what was read."""
    path = data / NPZ["s2"][0]
    if path.is_file():
        if contrast != "FLAIR":
            raise ValueError(f"contrast must be FLAIR for {path.name}, got {contrast!r}. Leave it out.")
        return load_slices(path, size=size, z_range=BRAIN_LEVELS), path.stem, [path.name]
    grid = {"size": size, "spacing_mm": 256 / size, "z_range": BRAIN_LEVELS}
    readers: dict[str, Callable[[], Bunch]] = {
        "BraTS": lambda: load_scans(find_brats(data), contrast=contrast, **grid),
        "BIDS": lambda: load_scans(find_bids(data), contrast=contrast, **grid),
        "PNG": lambda: load_png_slices(data, modality=contrast, size=size),
    }
    refusals = []
    for name, read in readers.items():
        try:
            return read(), None, [name]
        except ValueError as error:
            refusals.append(f"{name}: {error}")
    raise ValueError(
        f"data must hold {path.name} or a cohort in the layout of BraTS, BIDS or the original's PNG files, "
        f"got {data}. " + " ".join(refusals)
    )
