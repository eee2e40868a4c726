"""The trainer: optimises a module against a loss. It knows no network and no data."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, cast

import torch
from sklearn.base import BaseEstimator
from torch import nn

from madad._runtime.distributed import join
from madad.training.callbacks import TrainingState
from madad.training.checkpoint import CheckpointFile, fingerprint
from madad.training.loop import Loss, Plan, RivalLoss, TrainingLoop
from madad.training.run import TrainingRun
from madad.training.settings import DEFAULTS, RULES, Settings
from madad.training.signals import graceful_stop
from madad.training.weights import channels_last, recomputing


class Trainer(BaseEstimator):
    """AdamW with warm-up and cosine decay, moving average of the weights, clipping and mixed precision.

    None, in any parameter, is the default of what is trained: for the two stages of a
    `madad.MaskedDiffusionAnomalyDetector` what its preset has (``"autoencoder_training"`` and
    ``"denoiser_training"`` of `madad.presets.PRESETS`), for baselines their own, and for what these leave
    open, for a `madad.LatentAutoencoder` fitted alone and for `optimise` the default that is named here
    (`madad.training.settings.DEFAULTS`).

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
            rule = RULES[name]
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
        settings = self._settings()
        n_batches = n_samples // settings.batch_size_of(n_samples, batch_size)
        total_steps = settings.steps_of(n_batches)
        if math.isfinite(settings.max_time) or settings.validate_every != "epoch" or math.isinf(total_steps):
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
        settings = self._settings()
        validates = validation_loss is not None and n_validation > 0
        _check_call(settings, rival, rival_loss, validates)
        device = next(module.parameters()).device
        plan = Plan(
            settings,
            forward=cast(nn.Module, torch.compile(module)) if settings.compile else module,
            loss=loss,
            rival_loss=rival_loss,
            validation_loss=validation_loss if validates else None,
            n_samples=n_samples,
            n_validation=n_validation if validates else 0,
            batch_size=settings.batch_size_of(n_samples, batch_size),
            dtype=_autocast_dtype(settings.precision, device),
            stage=description,
        )
        team = join(device)
        networks = [network for network in (module, rival) if network is not None]
        with (
            graceful_stop() as stop,
            channels_last(networks if settings.channels_last else ()),
            recomputing(networks if settings.activation_checkpointing else ()),
        ):
            run = TrainingRun(
                module,
                rival,
                generator,
                team=team,
                batch_size=plan.batch_size,
                learning_rate=settings.learning_rate,
                weight_decay=settings.weight_decay,
                ema_decay=settings.ema_decay,
            )
            file = _checkpoint_file(run, plan, identity)
            saved = file.read() if file is not None and settings.resume == "auto" else None
            if (saved := team.broadcast_state(saved)) is not None:
                run.restore(*saved)
            run.train(not run.finished)
            if not run.finished:
                TrainingLoop(run, plan, file, stop).go(verbose and team.is_first)
        return run.history

    def _settings(self) -> Settings:
        """The parameters where none is left open, checked."""
        return Settings(**self.resolved().get_params(deep=False))


def _check_call(
    settings: Settings, rival: nn.Module | None, rival_loss: RivalLoss | None, validates: bool
) -> None:
    """Refuse arguments of `Trainer.optimise` that do not go together, or not with a parameter."""
    if (rival is None) != (rival_loss is None):
        raise ValueError(
            f"rival and rival_loss must be given together, got {rival!r} and {rival_loss!r}. Give both."
        )
    if math.isfinite(settings.patience) and not validates:
        raise ValueError(
            f"patience must be math.inf where nothing is validated, got {settings.patience!r}. Set the "
            f"trainer's validation_fraction to 0.1, say, or patience to math.inf."
        )


def _checkpoint_file(run: TrainingRun, plan: Plan, identity: str) -> CheckpointFile | None:
    """The file of a run, named by all that decides it; None where none is kept, or not by this process."""
    directory = plan.settings.checkpoint_dir
    if directory is None or not run.share.team.is_first:
        return None
    left_out = (*Trainer.HOUSEKEEPING, "callbacks")  # callbacks: the next process knows them by no name
    decisive = {name: value for name, value in sorted(vars(plan.settings).items()) if name not in left_out}
    asked = (plan.stage, plan.n_samples, plan.n_validation, plan.batch_size, identity)
    settings = {"trainer": decisive, "task": asked, "trained": run.trained}
    tensors = run.values() | {"generator": run.generator.get_state()}
    return CheckpointFile(directory, plan.stage, fingerprint(settings, tensors))


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Of mixed precision; None = none."""
    if precision == "bfloat16":
        return torch.bfloat16
    if precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return None
