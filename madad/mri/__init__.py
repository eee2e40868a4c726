"""Scans before they are slices for a network; today the intensity scale."""

from madad.mri.intensity import normalize_intensity

__all__ = ["normalize_intensity"]
