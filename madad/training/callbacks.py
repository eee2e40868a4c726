"""What a training tells its callbacks, and the callback that draws it in TensorBoard."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class TrainingState:
    """What a callback is told.

    Attributes
    ----------
    stage : str
        The ``description`` given to `Trainer.optimise`.
    step, epoch : int
        Steps done, and the epoch of the last of them, from 1.
    total_steps : float
        What ``max_epochs`` and ``max_steps`` allow; time may run out before.
    record : dict
        A copy of the history's last record.
    module : nn.Module
        With the weights that are being trained, not their average.
    """

    stage: str
    step: int
    epoch: int
    total_steps: float
    record: dict
    module: nn.Module


@dataclass
class TensorBoard:
    """Callback of a `madad.training.Trainer` that writes each record's numbers, one directory per stage.

    Parameters
    ----------
    log_dir : path-like
        What ``tensorboard --logdir`` is given.

    Raises
    ------
    ImportError
        When it is called and the package tensorboard is missing.
    """

    log_dir: str | os.PathLike
    _writers: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, state: TrainingState) -> None:
        """Write the last record of ``state``."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard must have the package tensorboard, got none. pip install tensorboard"
            ) from error
        if state.stage not in self._writers:
            self._writers[state.stage] = SummaryWriter(os.path.join(self.log_dir, state.stage))
        writer = self._writers[state.stage]
        for name, value in state.record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                writer.add_scalar(name, value, state.step)
        writer.flush()

    def __getstate__(self):
        """State without open files: a copy opens its own."""
        return {"log_dir": self.log_dir, "_writers": {}}
