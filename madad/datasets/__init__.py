"""Slices to train and to test on: generated ones, and readers of real ones."""

from madad.datasets.slices import crop_to_brain, load_slices
from madad.datasets.synthetic import make_brain_slices

__all__ = ["crop_to_brain", "load_slices", "make_brain_slices"]
