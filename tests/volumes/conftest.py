"""A cohort of small healthy brains, some with a lesion, and models of it."""

import sys

import nibabel as nib
import numpy as np
import pytest

from madad.mri import (
    PreprocessedVolume,
    VolumePreprocessor,
    VolumeSlicer,
    read_volume,
)
from madad.testing import tiny_detector
from madad.volumes.fitting import HealthyVolume, fit_volumes

SHAPE = (22, 26, 14)

SUBJECTS = ("a", "b", "c", "d", "d", "e", "f", "g")

WITH_LESION = {1, 5}

PREPROCESSOR = VolumePreprocessor(template=False, center=None)


def prepared(seed, *, spacing_mm=(1.0, 1.0, 2.0), shape=SHAPE, registration=None):
    """A brain of noise around 0.4, a little larger or smaller than others."""
    rng = np.random.default_rng(seed)
    values = np.zeros(shape, np.float32)
    inside = tuple(slice(2 + seed % 2, n - 2) for n in shape)
    values[inside] = rng.uniform(0.2, 0.6, values[inside].shape)
    affine = np.diag([*spacing_mm, 1.0])
    affine[2, 3] = -14
    volume = read_volume(nib.Nifti1Image(values, affine))
    return PreprocessedVolume(volume, volume, "given", registration)


def lesion_of(seed):
    if seed not in WITH_LESION:
        return None
    lesion = np.zeros(SHAPE, bool)
    lesion[8:12, 8:12, 4 + seed % 3 : 7] = True
    return lesion


def read(i):
    return HealthyVolume([prepared(i)], lesion_of(i))


def read_two(i):
    return HealthyVolume([prepared(i), prepared(i + 100)], lesion_of(i))


def slicer():
    return VolumeSlicer(range_mm=(-4, 4), shape=(32, 32))


def fit(read=read, subjects=SUBJECTS, detector=None, **changed):
    defaults = {
        "contrasts": ("T1",),
        "preprocessor": PREPROCESSOR,
        "slicer": slicer(),
        "aggregation": {"median_slices": 3},
    }
    detector = tiny_detector(calibration_fraction=0.4) if detector is None else detector
    return fit_volumes(detector, subjects, read, **(defaults | changed))


@pytest.fixture(scope="session")
def model():
    return fit()


@pytest.fixture(scope="session")
def two_contrasts():
    return fit(read_two, contrasts=("T1", "FLAIR"), data={"site": "here"})


@pytest.fixture(scope="session")
def cohort():
    """The functions and constants of this file."""
    return sys.modules[__name__]
