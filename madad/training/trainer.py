"""The trainer: optimises a module against a loss. It knows no network and no data."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast

import torch
from sklearn.base import BaseEstimator
from torch import nn

from madad._runtime.distributed import join
from madad.training.callbacks import TrainingState
from madad.training.checkpoint import CheckpointFile, fingerprint
from madad.training.loop import Loss, Plan, RivalLoss, TrainingLoop
from madad.training.run import TrainingRun
from madad.training.signals import graceful_stop
from madad.training.weights import channels_last, recomputing

CLOCKS = ("wall", "cpu")
PRECISIONS = ("auto", "float32", "bfloat16")

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "max_epochs": 100,
        "max_steps": math.inf,
        "max_time": math.inf,
        "clock": "wall",
        "batch_size": "auto",
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "warmup_fraction": 0.05,
        "ema_decay": 0.995,
        "gradient_clip": 1.0,
        "precision": "auto",
        "validation_fraction": 0.0,
        "validate_every": "epoch",
        "patience": math.inf,
        "checkpoint_dir": None,
        "checkpoint_every_s": 300.0,
        "resume": "auto",
        "callbacks": (),
        "compile": False,
        "channels_last": False,
        "accumulate": 1,
        "activation_checkpointing": False,
    }
)
"""What a parameter of `Trainer` is where neither the user nor the stage says otherwise."""


@dataclass(frozen=True)
class _Rule:
    """The values that a parameter may have, in code and in words, and what to do about others."""

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


_BOUND = _Rule(_positive, "be positive", "Give a number above 0; math.inf is no bound.")
_FRACTION = _Rule(_fraction, "lie in 0..1 without 1", "0 switches it off.")
_SWITCH = _Rule(lambda value: value in (True, False), "be True or False", "Use False.")
_RULES = {
    "max_epochs": _BOUND,
    "max_steps": _BOUND,
    "max_time": _BOUND,
    "clock": _Rule(_one_of(CLOCKS), f"be one of {CLOCKS}", "Use 'wall'."),
    "batch_size": _Rule(
        lambda value: _whole(value) or _one_of(("auto",))(value),
        "be a whole number above 0 or 'auto'",
        "Use 'auto'.",
    ),
    "learning_rate": _Rule(_positive, "be positive", "Try 0.001."),
    "weight_decay": _Rule(
        lambda value: isinstance(value, Real) and float(value) >= 0, "be 0 or more", "Use 0 for none."
    ),
    "warmup_fraction": _FRACTION,
    "ema_decay": _FRACTION,
    "validation_fraction": _FRACTION,
    "gradient_clip": _Rule(_positive, "be positive", "math.inf switches it off."),
    "precision": _Rule(_one_of(PRECISIONS), f"be one of {PRECISIONS}", "Use 'auto' or 'float32'."),
    "validate_every": _Rule(
        lambda value: _whole(value) or _one_of(("epoch",))(value),
        "be a whole number above 0 or 'epoch'",
        "Try 10.",
    ),
    "patience": _Rule(
        lambda value: _whole(value) or value == math.inf,
        "be a whole number above 0 or math.inf",
        "Try 10; math.inf switches it off.",
    ),
    "checkpoint_dir": _Rule(
        lambda value: isinstance(value, str | os.PathLike),
        "be a path or None",
        "Name a directory.",
        error=TypeError,
    ),
    "checkpoint_every_s": _Rule(
        lambda value: isinstance(value, Real) and float(value) >= 0, "be 0 or more", "300 is five minutes."
    ),
    "resume": _Rule(
        lambda value: value in ("auto", False), "be 'auto' or False", "'auto' goes on where it can."
    ),
    "callbacks": _Rule(
        lambda value: isinstance(value, list | tuple) and all(map(callable, value)),
        "be a tuple of callables",
        "Give (callback,).",
        error=TypeError,
    ),
    "compile": _SWITCH,
    "channels_last": _SWITCH,
    "activation_checkpointing": _SWITCH,
    "accumulate": _Rule(_whole, "be a whole number above 0", "1 is none."),
}


class Trainer(BaseEstimator):
    """AdamW with warm-up and cosine decay, moving average of the weights, clipping and mixed precision.

    None, in any parameter, is the default of what is trained: for the two stages of a
    `madad.MaskedDiffusionAnomalyDetector` what its preset has (``"autoencoder_training"`` and
    ``"denoiser_training"`` of `madad.presets.PRESETS`), for baselines their own, and for what these leave
    open, for a `madad.LatentAutoencoder` fitted alone and for `optimise` the default that is named here
    (`madad.training.trainer.DEFAULTS`).

    Parameters
    ----------
    max_epochs : float or None
        Passes over the samples, above 0. The first of ``max_epochs``, ``max_steps`` and ``max_time`` that is
        reached ends the training. A bound that is left at None still holds: ``Trainer(2)`` means two epochs
        at most, and no more steps than the preset has. ``math.inf`` switches a bound off. Default: 100.
    max_steps : float or None
        Steps of the optimiser, above 0. Default: ``math.inf``, no bound.
    max_time : float or None
        Seconds, above 0, those before an interruption included. With a bound, the learning rate decays with
        the time that has passed, and results depend on the machine. The ``max_time`` of a detector is for
        both its stages; the smaller of this and of the stage's share of it holds. Default: ``math.inf``, no
        bound.
    clock : {"wall", "cpu"} or None
        What ``max_time`` and ``checkpoint_every_s`` count and speeds are given in: seconds of a clock on the
        wall, or those in which a CPU worked for the process, all its threads together. Other jobs on a shared
        machine do not use up the latter, and a GPU's work hardly does: use it on CPUs. Default: ``"wall"``.
    batch_size : int, "auto" or None
        Samples of a step, above 0, of all processes together, and never more than there are. ``"auto"`` is
        32, or fewer where samples are large. Default: ``"auto"``.
    learning_rate : float or None
        Peak learning rate, above 0. Default: 0.001.
    weight_decay : float or None
        AdamW's decoupled weight decay, 0 or more. Default: 0.0001.
    warmup_fraction : float or None
        Share of training, 0..1 without 1, over which the learning rate rises linearly. Default: 0.05.
    ema_decay : float or None
        Decay, 0..1 without 1, of the exponential moving average of the weights that the module ends with; 0
        switches it off. Default: 0.995.
    gradient_clip : float or None
        Largest norm of the gradient of all weights together, above 0: a longer one is scaled down to it.
        ``math.inf`` switches it off. Default: 1.
    precision : {"auto", "float32", "bfloat16"} or None
        Of the losses' arithmetic; weights are float32. ``"auto"`` is bfloat16 on a GPU that has it and
        float32 elsewhere. bfloat16 on a CPU pays where the CPU has matrix units for it.
        Default: ``"auto"``.
    validation_fraction : float or None
        Share of the samples, 0..1 without 1, that an estimator holds out to choose the weights by.
        Default: 0, none.
    validate_every : int, "epoch" or None
        Steps between two validations, above 0; ``"epoch"`` is one after each epoch. The last step is followed
        by one in any case. Default: ``"epoch"``.
    patience : int, math.inf or None
        Validations in a row without a lower loss after which training stops, above 0.
        Default: ``math.inf``, never.
    checkpoint_dir : path-like or None
        Where runs are written down, a file for each. The same call finds its file again: it goes on where
        an interrupted run was, and reads a finished one back at once. Default: None, nowhere.
    checkpoint_every_s : float or None
        Seconds between two checkpoints; 0 = after each step, ``math.inf`` = at the end alone. Default: 300.
    resume : {"auto", False} or None
        ``"auto"`` goes on from a checkpoint; ``False`` starts anew and overwrites it.
        Default: ``"auto"``.
    callbacks : tuple or list of callables (state) -> None or "stop", or None
        Called with a `TrainingState` after each record of the history. ``"stop"`` ends the training, as if
        its last step were done. Default: none.
    compile : bool or None
        Run the module through ``torch.compile``. Default: False.
    channels_last : bool or None
        Keep the weights in channels-last format while training. Default: False.
    accumulate : int or None
        Parts, 1 or more, in which each batch is computed, one after the other. Their gradients are added up
        to that of the batch, so that memory is needed for one part alone: a step is the same but for rounding
        and for what its loss draws. Default: 1, all at once.
    activation_checkpointing : bool or None
        Keep the activations of few layers, and compute the others' a second time when gradients are due: less
        memory, more time, and the same weights bit by bit. It has an effect on networks whose blocks can, as
        those of `madad.nn` do. Default: False.

    Notes
    -----
    Under ``torchrun``, or where ``torch.distributed`` is initialised, the processes train together, and each
    calls the same with the same data. Each takes its share of every batch, so that ``batch_size``,
    ``learning_rate`` and the number of steps mean what they mean for one process; gradients are averaged over
    the batch, and all end with the same weights and the same history. Draws differ from those of another
    number of processes. Only the first process calls the callbacks, shows a bar, and reads and writes
    checkpoints, with which any number of processes may go on. A signal to one of them stops all. What a
    process starts itself, such as joblib's workers, trains alone.
    """

    HOUSEKEEPING: ClassVar = ("checkpoint_dir", "checkpoint_every_s", "resume", "activation_checkpointing")
    """Parameters that do not decide what is learnt."""

    SHARED: ClassVar = (*HOUSEKEEPING, "callbacks", "clock", "precision", "channels_last", "compile")
    """Parameters of a run and of its machine, alike for all stages of a fit.

    Those that are no housekeeping do decide what is learnt: a callback may stop, a clock may run out, and the
    rest change how numbers are rounded.
    """

    OF_ONE_RUN: ClassVar = ("checkpoint_dir", "callbacks")
    """Parameters that mean nothing in another process or on another machine."""

    validation_fraction: Any  # a float once it is resolved; estimators ask for it

    def __init__(
        self,
        max_epochs: float | None = None,
        *,
        max_steps: float | None = None,
        max_time: float | None = None,
        clock: str | None = None,
        batch_size: int | str | None = None,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        warmup_fraction: float | None = None,
        ema_decay: float | None = None,
        gradient_clip: float | None = None,
        precision: str | None = None,
        validation_fraction: float | None = None,
        validate_every: int | str | None = None,
        patience: float | None = None,
        checkpoint_dir: str | os.PathLike | None = None,
        checkpoint_every_s: float | None = None,
        resume: str | bool | None = None,
        callbacks: Sequence[Callable[[TrainingState], str | None]] | None = None,
        compile: bool | None = None,
        channels_last: bool | None = None,
        accumulate: int | None = None,
        activation_checkpointing: bool | None = None,
    ):
        self.max_epochs, self.max_steps, self.max_time, self.clock = max_epochs, max_steps, max_time, clock
        self.batch_size, self.learning_rate, self.weight_decay = batch_size, learning_rate, weight_decay
        self.warmup_fraction, self.ema_decay, self.gradient_clip = warmup_fraction, ema_decay, gradient_clip
        self.precision = precision
        self.validation_fraction, self.validate_every = validation_fraction, validate_every
        self.patience = patience
        self.checkpoint_dir, self.checkpoint_every_s = checkpoint_dir, checkpoint_every_s
        self.resume, self.callbacks = resume, callbacks
        self.compile, self.channels_last = compile, channels_last
        self.accumulate, self.activation_checkpointing = accumulate, activation_checkpointing

    def check(self) -> None:
        """Refuse parameters outside their ranges; None is in all of them.

        Raises
        ------
        ValueError, TypeError
            If a parameter has a value, or is of a type, that it cannot have.
        """
        for name, value in self._given().items():
            rule = _RULES[name]
            if not rule.allows(value):
                raise rule.error(f"{name} must {rule.constraint}, got {value!r}. {rule.advice}")

    def resolved(self, *, at_most_s: float = math.inf, **stage_defaults) -> Self:
        """The trainer of a stage: a checked copy in which nothing but ``checkpoint_dir`` may be None.

        Parameters
        ----------
        at_most_s : float
            Upper bound in seconds, beside the trainer's own ``max_time``.
        **stage_defaults
            What the stage has for parameters that are None; `DEFAULTS` has the rest.

        Raises
        ------
        ValueError, TypeError
            As `check`, and if nothing bounds the training.
        """
        self.check()
        values = {**DEFAULTS, **stage_defaults, **self._given()}
        values["max_time"] = min(values["max_time"], at_most_s)
        if math.isinf(min(values[name] for name in ("max_epochs", "max_steps", "max_time"))):
            raise ValueError(
                "max_epochs must be finite where max_steps and max_time are not, got inf. Give one of them."
            )
        return copy.copy(self).set_params(**values)

    def sharing(self, other: Trainer | None) -> Self:
        """A copy that has, where it has None, the `SHARED` parameters of ``other``, a trainer or None."""
        given = {} if other is None else other._given()
        shared = {name: value for name, value in given.items() if name in self.SHARED}
        return copy.copy(self).set_params(**(shared | self._given()))

    def portable(self) -> Self:
        """A copy without what means nothing in another process or on another machine."""
        return copy.copy(self).set_params(**dict.fromkeys(self.OF_ONE_RUN))

    def decisive(self) -> dict:
        """The parameters that decide what is learnt."""
        parameters = self.get_params(deep=False)
        return {name: value for name, value in parameters.items() if name not in self.HOUSEKEEPING}

    def _given(self) -> dict:
        return {name: value for name, value in self.get_params(deep=False).items() if value is not None}

    def max_records(self, n_samples: int, batch_size: int = 32) -> int | None:
        """The most records that `optimise` may give; None where that is open.

        Parameters
        ----------
        n_samples, batch_size : int
            As `optimise` is given them.
        """
        trainer: Any = self.resolved()
        _, n_batches, total_steps = trainer._extent(n_samples, batch_size)
        if math.isfinite(trainer.max_time) or trainer.validate_every != "epoch" or math.isinf(total_steps):
            return None
        return -(-math.ceil(total_steps) // n_batches)

    def to_config(self) -> dict:
        """The parameters without those of one run; see `madad._runtime.portable`."""
        parameters = self.get_params(deep=False)
        return {name: value for name, value in parameters.items() if name not in self.OF_ONE_RUN}

    @classmethod
    def from_config(cls, config: dict) -> Trainer:
        """A trainer with the parameters ``config`` that `to_config` gave."""
        return cls(**config)

    def optimise(
        self,
        module: nn.Module,
        loss: Loss,
        n_samples: int,
        *,
        generator: torch.Generator,
        batch_size: int = 32,
        rival: nn.Module | None = None,
        rival_loss: RivalLoss | None = None,
        validation_loss: Loss | None = None,
        n_validation: int = 0,
        description: str = "training",
        identity: str = "",
        verbose: bool = False,
    ) -> list[dict]:
        """Train ``module`` in place; it ends in evaluation mode with its best or its averaged weights.

        Parameters
        ----------
        module : nn.Module
            On the device to train on.
        loss : callable (module, index, generator, step) -> (loss, parts)
            The mean over the samples ``index`` of the batch; ``step`` counts the steps done before; ``parts``
            are named terms for the history.
        n_samples : int
            Number of samples to train on, 1 or more; ``loss`` is asked for 0..``n_samples - 1``.
        generator : torch.Generator
            The only source of randomness: order of the samples, and whatever ``loss`` draws. Dropout draws
            from torch's global one; see `madad._runtime.random.isolated_seed`. ``loss`` is to draw from the
            one that it is given: of several processes each has another at each step.
        batch_size : int
            Samples of a step, 1 or more, where the trainer's own is ``"auto"``.
        rival : nn.Module or None
            Trained alternately with the module, as a discriminator is, with an optimiser of its own.
        rival_loss : callable (rival, index, generator, step) -> (loss, parts) or None
            Called after each ``loss``, with the same samples and step; None = no step of the rival.
        validation_loss : callable (module, index, generator, step) -> (loss, parts)
            ``index`` counts the validation samples. The averaged weights are validated, with the same draws
            each time; the module ends with those that did best.
        n_validation : int
            Number of validation samples; 0 = no validation.
        description : str
            Label of the progress bar and start of the checkpoint's name.
        identity : str
            A hash of what the trainer cannot see: the data and the settings of the loss. Calls that differ
            in nothing else than this have different checkpoints.
        verbose : bool
            Show the bar with loss and time left.

        Returns
        -------
        history : list of dict
            A record at the end of each epoch and at each validation, about the steps since the one before:
            ``step``, ``loss``, each part, ``rival_loss`` and its parts, ``learning_rate``,
            ``samples_per_second``, ``peak_memory_mib`` (on a CPU that of the process, None where it is
            unknown), ``validation_loss``, and ``best`` in the record of the weights that were kept.

        Warns
        -----
        TrainingStoppedWarning
            If SIGINT or SIGTERM came: training stopped after a step, its checkpoint is written, and the
            module is as good as it got.

        Notes
        -----
        A resumed run ends with the weights and the history, bit by bit on a CPU, of one that was never
        interrupted. Checkpoints are found by the trainer's parameters, the arguments, the initial weights
        and the generator's state: other runs may share the directory.
        """
        trainer: Any = self.resolved()
        validates = validation_loss is not None and n_validation > 0
        trainer._check_call(rival, rival_loss, validates)
        device = next(module.parameters()).device
        plan = trainer._plan(
            forward=cast(nn.Module, torch.compile(module)) if trainer.compile else module,
            loss=loss,
            rival_loss=rival_loss,
            validation_loss=validation_loss if validates else None,
            n_samples=n_samples,
            n_validation=n_validation if validates else 0,
            batch_size=batch_size,
            dtype=trainer._autocast_dtype(device),
            stage=description,
        )
        team = join(device)
        networks = [network for network in (module, rival) if network is not None]
        with (
            graceful_stop() as stop,
            channels_last(networks if trainer.channels_last else ()),
            recomputing(networks if trainer.activation_checkpointing else ()),
        ):
            run = TrainingRun(
                module,
                rival,
                generator,
                team=team,
                batch_size=plan.batch_size,
                learning_rate=trainer.learning_rate,
                weight_decay=trainer.weight_decay,
                ema_decay=trainer.ema_decay,
            )
            file = trainer._checkpoint_file(run, plan, identity)
            saved = file.read() if file is not None and trainer.resume == "auto" else None
            if (saved := team.broadcast_state(saved)) is not None:
                run.restore(*saved)
            run.train(not run.finished)
            if not run.finished:
                TrainingLoop(run, plan, file, stop).go(verbose and team.is_first)
        return run.history

    def _check_call(
        self: Any, rival: nn.Module | None, rival_loss: RivalLoss | None, validates: bool
    ) -> None:
        """Refuse arguments of `optimise` that do not go together, or not with a parameter."""
        if (rival is None) != (rival_loss is None):
            raise ValueError(
                f"rival and rival_loss must be given together, got {rival!r} and {rival_loss!r}. Give both."
            )
        if math.isfinite(self.patience) and not validates:
            raise ValueError(
                f"patience must be math.inf where nothing is validated, got {self.patience!r}. Set the "
                f"trainer's validation_fraction to 0.1, say, or patience to math.inf."
            )

    def _extent(self: Any, n_samples: int, batch_size: int) -> tuple[int, int, float]:
        """Samples per batch, batches per epoch, and steps that are allowed."""
        batch_size = min(batch_size if self.batch_size == "auto" else self.batch_size, n_samples)
        n_batches = n_samples // batch_size
        return batch_size, n_batches, min(self.max_epochs * n_batches, self.max_steps)

    def _plan(self: Any, *, n_samples: int, batch_size: int, **asked) -> Plan:
        """What is asked for, with the extent of it and the parameters that the loop needs."""
        batch_size, n_batches, total_steps = self._extent(n_samples, batch_size)
        return Plan(
            **asked,
            n_samples=n_samples,
            batch_size=batch_size,
            n_batches=n_batches,
            total_steps=total_steps,
            validate_every=n_batches if self.validate_every == "epoch" else self.validate_every,
            max_time=self.max_time,
            clock=self.clock,
            learning_rate=self.learning_rate,
            warmup_fraction=self.warmup_fraction,
            gradient_clip=self.gradient_clip,
            accumulate=self.accumulate,
            patience=self.patience,
            checkpoint_every_s=self.checkpoint_every_s,
            callbacks=self.callbacks,
        )

    def _checkpoint_file(self, run: TrainingRun, plan: Plan, identity: str) -> CheckpointFile | None:
        if self.checkpoint_dir is None or not run.share.team.is_first:
            return None
        decisive = self.decisive()
        del decisive["callbacks"]  # they have no name that the next process knows them by
        asked = (plan.stage, plan.n_samples, plan.n_validation, plan.batch_size, identity)
        settings = {"trainer": decisive, "task": asked, "trained": run.trained}
        tensors = run.values() | {"generator": run.generator.get_state()}
        return CheckpointFile(self.checkpoint_dir, plan.stage, fingerprint(settings, tensors))

    def _autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        if self.precision == "bfloat16":
            return torch.bfloat16
        if self.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.bfloat16
        return None
