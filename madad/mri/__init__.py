"""Volumes as they come from the scanner: files, brains, template, intensities, slices, and the way back."""

from madad.mri.brain import find_brain
from madad.mri.healthy_intensities import HealthyIntensities
from madad.mri.intensity import correct_bias, normalize_intensity
from madad.mri.nifti import Volume, check_same_grid, read_volume, same_grid, write_like
from madad.mri.registration import AffineRegistration, register_affine
from madad.mri.slice_geometry import SliceGeometry
from madad.mri.volume_preprocessor import PreprocessedVolume, VolumePreprocessor
from madad.mri.volume_slicer import VolumeSlicer

__all__ = [
    "AffineRegistration",
    "HealthyIntensities",
    "PreprocessedVolume",
    "SliceGeometry",
    "Volume",
    "VolumePreprocessor",
    "VolumeSlicer",
    "check_same_grid",
    "correct_bias",
    "find_brain",
    "normalize_intensity",
    "read_volume",
    "register_affine",
    "same_grid",
    "write_like",
]
