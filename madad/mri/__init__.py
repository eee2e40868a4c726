"""Geometry and intensities of MR images: NumPy in, NumPy out, no torch."""
