"""What every estimator is: slices that were checked, and detectors that score their maps."""

from madad.base.check_slices import check_slices
from madad.base.map_detector import AnomalyMapDetector
from madad.base.network_batches import NetworkBatch, network_batches
from madad.base.slice_estimator import SliceEstimator
from madad.base.slice_stack import SliceStack

__all__ = [
    "AnomalyMapDetector",
    "NetworkBatch",
    "SliceEstimator",
    "SliceStack",
    "check_slices",
    "network_batches",
]
