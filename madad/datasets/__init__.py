"""Slices to try, test and train on: synthetic ones, and readers of real ones."""

from madad.datasets.slices import load_slices
from madad.datasets.synthetic import make_brain_slices

__all__ = ["load_slices", "make_brain_slices"]
