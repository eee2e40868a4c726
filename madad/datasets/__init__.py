"""Slices to train and to test on: generated ones, and readers of real ones."""

from madad.datasets.cohorts import find_atlas, find_bids, find_brats, find_ixi
from madad.datasets.find_scans import find_scans
from madad.datasets.nifti_slices import load_scans
from madad.datasets.npz_slices import crop_to_brain, load_slices
from madad.datasets.png_slices import load_png_slices
from madad.datasets.scan import Scan, scan_name
from madad.datasets.synthetic import make_brain_slices

__all__ = [
    "Scan",
    "crop_to_brain",
    "find_atlas",
    "find_bids",
    "find_brats",
    "find_ixi",
    "find_scans",
    "load_png_slices",
    "load_scans",
    "load_slices",
    "make_brain_slices",
    "scan_name",
]
