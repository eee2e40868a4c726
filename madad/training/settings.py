"""What a training is done with: a value for each parameter of a trainer, and the values that it may have."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

from madad.training.callbacks import TrainingState

CLOCKS = ("wall", "cpu")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Settings:
    """The parameters of a `madad.training.Trainer` where none is left open, with their defaults.

    Attributes
    ----------
    max_epochs, max_steps, max_time, clock, batch_size, learning_rate, weight_decay, warmup_fraction :
        See `madad.training.Trainer`.
    ema_decay, gradient_clip, precision, validation_fraction, validate_every, patience :
        See `madad.training.Trainer`.
    checkpoint_dir, checkpoint_every_s, resume, callbacks :
        See `madad.training.Trainer`.
    compile, channels_last, accumulate, activation_checkpointing :
        See `madad.training.Trainer`.
    """

    max_epochs: float = 100
    max_steps: float = math.inf
    max_time: float = math.inf
    clock: str = "wall"
    batch_size: int | str = "auto"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    warmup_fraction: float = 0.05
    ema_decay: float = 0.995
    gradient_clip: float = 1.0
    precision: str = "auto"
    validation_fraction: float = 0.0
    validate_every: int | str = "epoch"
    patience: float = math.inf
    checkpoint_dir: str | os.PathLike | None = None
    checkpoint_every_s: float = 300.0
    resume: str | bool = "auto"
    callbacks: Sequence[Callable[[TrainingState], str | None]] = ()
    compile: bool = False
    channels_last: bool = False
    accumulate: int = 1
    activation_checkpointing: bool = False

    def batch_size_of(self, n_samples: int, default: int) -> int:
        """Samples of a step; never more than there are."""
        return min(default if isinstance(self.batch_size, str) else self.batch_size, n_samples)

    def steps_of(self, n_batches: int) -> float:
        """Steps that are allowed where an epoch has ``n_batches``."""
        return min(self.max_epochs * n_batches, self.max_steps)

    def validation_period(self, n_batches: int) -> int:
        """Steps between two validations where an epoch has ``n_batches``."""
        return n_batches if isinstance(self.validate_every, str) else self.validate_every


DEFAULTS: Mapping[str, Any] = MappingProxyType({field.name: field.default for field in fields(Settings)})
"""What a parameter of `madad.training.Trainer` is where neither the user nor the stage says otherwise."""


@dataclass(frozen=True)
class Rule:
    """The values that a parameter may have, and what is said about others.

    Attributes
    ----------
    allows : callable (value) -> bool
        Whether it may have the value.
    constraint, advice : str
        What it must be, and what to do.
    error : type of Exception
        What is raised.
    """

    allows: Callable[[Any], bool]
    constraint: str
    advice: str
    error: type[Exception] = ValueError


def _positive(value) -> bool:
    return isinstance(value, Real) and float(value) > 0


def _whole(value) -> bool:
    return isinstance(value, Integral) and int(value) > 0


def _fraction(value) -> bool:
    return isinstance(value, Real) and 0 <= float(value) < 1


def _one_of(names: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


_BOUND = Rule(_positive, "be positive", "Give a number above 0; math.inf is no bound.")
_FRACTION = Rule(_fraction, "lie in 0..1 without 1", "0 switches it off.")
_SWITCH = Rule(lambda value: value in (True, False), "be True or False", "Use False.")
RULES = {
    "max_epochs": _BOUND,
    "max_steps": _BOUND,
    "max_time": _BOUND,
    "clock": Rule(_one_of(CLOCKS), f"be one of {CLOCKS}", "Use 'wall'."),
    "batch_size": Rule(
        lambda value: _whole(value) or _one_of(("auto",))(value),
        "be a whole number above 0 or 'auto'",
        "Use 'auto'.",
    ),
    "learning_rate": Rule(_positive, "be positive", "Try 0.001."),
    "weight_decay": Rule(
        lambda value: isinstance(value, Real) and float(value) >= 0, "be 0 or more", "Use 0 for none."
    ),
    "warmup_fraction": _FRACTION,
    "ema_decay": _FRACTION,
    "validation_fraction": _FRACTION,
    "gradient_clip": Rule(_positive, "be positive", "math.inf switches it off."),
    "precision": Rule(_one_of(PRECISIONS), f"be one of {PRECISIONS}", "Use 'auto' or 'float32'."),
    "validate_every": Rule(
        lambda value: _whole(value) or _one_of(("epoch",))(value),
        "be a whole number above 0 or 'epoch'",
        "Try 10.",
    ),
    "patience": Rule(
        lambda value: _whole(value) or value == math.inf,
        "be a whole number above 0 or math.inf",
        "Try 10; math.inf switches it off.",
    ),
    "checkpoint_dir": Rule(
        lambda value: isinstance(value, str | os.PathLike),
        "be a path or None",
        "Name a directory.",
        error=TypeError,
    ),
    "checkpoint_every_s": Rule(
        lambda value: isinstance(value, Real) and float(value) >= 0, "be 0 or more", "300 is five minutes."
    ),
    "resume": Rule(
        lambda value: value in ("auto", False), "be 'auto' or False", "'auto' goes on where it can."
    ),
    "callbacks": Rule(
        lambda value: isinstance(value, list | tuple) and all(map(callable, value)),
        "be a tuple of callables",
        "Give (callback,).",
        error=TypeError,
    ),
    "compile": _SWITCH,
    "channels_last": _SWITCH,
    "activation_checkpointing": _SWITCH,
    "accumulate": Rule(_whole, "be a whole number above 0", "1 is none."),
}
"""The values that each parameter may have."""
