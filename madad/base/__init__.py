"""What every estimator is: slices that were checked, and detectors that score their maps."""
