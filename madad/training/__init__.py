"""The trainer that both stages share: it knows no network and no data."""

from madad.training.callbacks import TensorBoard, TrainingState
from madad.training.loop import TrainingStoppedWarning
from madad.training.signals import StopRequest, graceful_stop
from madad.training.trainer import Trainer

__all__ = [
    "StopRequest",
    "TensorBoard",
    "Trainer",
    "TrainingState",
    "TrainingStoppedWarning",
    "graceful_stop",
]
