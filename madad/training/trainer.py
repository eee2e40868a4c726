"""The trainer: optimises a module against a loss. It knows no network and no data."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import cast

import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn
from tqdm.auto import tqdm

from madad._runtime.distributed import join
from madad._runtime.random import isolated_seed
from madad.training.callbacks import TrainingState
from madad.training.checkpoint import CheckpointFile, fingerprint
from madad.training.run import TrainingRun, peak_memory_mib
from madad.training.signals import StopRequest, graceful_stop
from madad.training.weights import channels_last, recomputing

CLOCKS = ("wall", "cpu")
PRECISIONS = ("auto", "float32", "bfloat16")
VALIDATION_SEED = 0
NOT_DECISIVE = (
    *("checkpoint_dir", "checkpoint_every_s", "resume", "callbacks"),
    "activation_checkpointing",
)
_LOSS_NAMES = {"module": "loss", "rival": "rival_loss"}
Loss = Callable[[nn.Module, Tensor, torch.Generator, int], tuple[Tensor, dict[str, Tensor]]]
RivalLoss = Callable[[nn.Module, Tensor, torch.Generator, int], tuple[Tensor, dict[str, Tensor]] | None]


class TrainingStoppedWarning(UserWarning):
    """A signal ended a training before it was done."""


@dataclass(frozen=True)
class _Task:
    """One call of `Trainer.optimise`; ``forward`` is the module, or what is compiled of it."""

    forward: nn.Module
    loss: Loss
    rival_loss: RivalLoss | None
    validation_loss: Loss | None
    n_samples: int
    n_validation: int
    batch_size: int
    n_batches: int
    total_steps: float
    validate_every: int
    dtype: torch.dtype | None
    stage: str

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def validates_at(self, step: int) -> bool:
        return self.validation_loss is not None and step % self.validate_every == 0

    def ends_record_at(self, step: int) -> bool:
        return step % self.n_batches == 0 or self.validates_at(step)


class Trainer(BaseEstimator):
    """AdamW with warm-up and cosine decay, moving average of the weights, clipping and mixed precision.

    Parameters
    ----------
    max_epochs : int
        Passes over the samples.
    max_steps : int or None
        Upper bound on optimiser steps, whatever the number of epochs.
    max_time : float or None
        Upper bound in seconds, those before an interruption included. The learning rate then decays with the
        time that has passed; results depend on the machine.
    clock : {"wall", "cpu"}
        What ``max_time`` and ``checkpoint_every_s`` count and speeds are given in: seconds of a clock on the
        wall, or those in which a CPU worked for the process, all its threads together. Other jobs on a shared
        machine do not use up the latter, and a GPU's work hardly does: use it on CPUs.
    batch_size : int or None
        Samples of a step, of all processes together. None = 32, or fewer where samples are large.
    learning_rate : float
        Peak learning rate.
    weight_decay : float
        AdamW's decoupled weight decay.
    warmup_fraction : float
        Share of training over which the learning rate rises linearly.
    ema_decay : float
        Decay of the exponential moving average that the module ends with; 0 switches it off.
    gradient_clip : float or None
        Largest norm of the gradient.
    precision : {"auto", "float32", "bfloat16"}
        ``"auto"`` is bfloat16 on a GPU that has it and float32 elsewhere. bfloat16 on a CPU pays where
        the CPU has matrix units for it.
    validation_fraction : float
        Share of the samples that an estimator holds out to choose the weights by; 0 = none.
    validate_every : int or None
        Steps between two validations. None = each epoch. The last step is followed by one in any case.
    patience : int or None
        Stop after so many validations in a row without a lower loss.
    checkpoint_dir : path-like or None
        Where runs are written down, a file for each. The same call finds its file again: it goes on where
        an interrupted run was, and reads a finished one back at once.
    checkpoint_every_s : float
        Seconds between two checkpoints; 0 = after each step.
    resume : {"auto", False}
        ``False`` starts anew and overwrites the checkpoint.
    callbacks : tuple of callables (state) -> None or "stop"
        Called with a `TrainingState` after each record of the history. ``"stop"`` ends the training, as if
        its last step were done.
    compile : bool
        Run the module through ``torch.compile``.
    channels_last : bool
        Keep the weights in channels-last format while training.

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

    def __init__(
        self,
        max_epochs: int = 100,
        *,
        max_steps: int | None = None,
        max_time: float | None = None,
        clock: str = "wall",
        batch_size: int | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_fraction: float = 0.05,
        ema_decay: float = 0.995,
        gradient_clip: float | None = 1.0,
        precision: str = "auto",
        validation_fraction: float = 0.0,
        validate_every: int | None = None,
        patience: int | None = None,
        checkpoint_dir: str | os.PathLike | None = None,
        checkpoint_every_s: float = 300.0,
        resume: str | bool = "auto",
        callbacks=(),
        compile: bool = False,
        channels_last: bool = False,
        accumulate: int = 1,
        activation_checkpointing: bool = False,
    ):
        self.max_epochs = max_epochs
        self.max_steps = max_steps
        self.max_time = max_time
        self.clock = clock
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.ema_decay = ema_decay
        self.gradient_clip = gradient_clip
        self.precision = precision
        self.validation_fraction = validation_fraction
        self.validate_every = validate_every
        self.patience = patience
        self.checkpoint_dir = checkpoint_dir
        self.checkpoint_every_s = checkpoint_every_s
        self.resume = resume
        self.callbacks = callbacks
        self.compile = compile
        self.channels_last = channels_last
        self.accumulate = accumulate
        self.activation_checkpointing = activation_checkpointing

    def to_config(self) -> dict:
        """The parameters without those of one run; see `madad._runtime.portable`."""
        of_one_run = ("checkpoint_dir", "callbacks")
        parameters = self.get_params(deep=False)
        return {name: value for name, value in parameters.items() if name not in of_one_run}

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
        generator : torch.Generator
            The only source of randomness: order of the samples, and whatever ``loss`` draws. Dropout draws
            from torch's global one; see `madad._runtime.random.isolated_seed`. ``loss`` is to draw from the
            one that it is given: of several processes each has another at each step.
        batch_size : int
            Used where the trainer's own is None.
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
        self.check()
        validates = validation_loss is not None and n_validation > 0
        if (rival is None) != (rival_loss is None):
            raise ValueError(
                f"rival and rival_loss must be given together, got {rival!r} and {rival_loss!r}. Give both."
            )
        if self.patience is not None and not validates:
            raise ValueError(
                f"patience must be None where nothing is validated, got {self.patience!r}. Set the trainer's "
                f"validation_fraction to 0.1, say, or patience to None."
            )
        batch_size, n_batches, total_steps = self._extent(n_samples, batch_size)
        task = _Task(
            forward=cast(nn.Module, torch.compile(module)) if self.compile else module,
            loss=loss,
            rival_loss=rival_loss,
            validation_loss=validation_loss if validates else None,
            n_samples=n_samples,
            n_validation=n_validation if validates else 0,
            batch_size=batch_size,
            n_batches=n_batches,
            total_steps=total_steps,
            validate_every=self.validate_every or n_batches,
            dtype=self._autocast_dtype(next(module.parameters()).device),
            stage=description,
        )
        team = join(next(module.parameters()).device)
        networks = [network for network in (module, rival) if network is not None]
        with (
            graceful_stop() as stop,
            channels_last(networks if self.channels_last else ()),
            recomputing(networks if self.activation_checkpointing else ()),
        ):
            run = TrainingRun(
                module,
                rival,
                generator,
                team=team,
                batch_size=batch_size,
                learning_rate=self.learning_rate,
                weight_decay=self.weight_decay,
                ema_decay=self.ema_decay,
            )
            file = self._checkpoint_file(run, task, identity)
            saved = file.read() if file is not None and self.resume == "auto" else None
            if (saved := team.broadcast_state(saved)) is not None:
                run.restore(*saved)
            run.train(not run.finished)
            if not run.finished:
                self._train(run, task, file, stop, verbose and team.leads)
        return run.history

    def max_records(self, n_samples: int, batch_size: int = 32) -> int | None:
        """The most records that `optimise` may give with these arguments; None where that is open."""
        self.check()
        _, n_batches, total_steps = self._extent(n_samples, batch_size)
        if self.max_time is not None or self.validate_every is not None or math.isinf(total_steps):
            return None
        return -(-math.ceil(total_steps) // n_batches)

    def _extent(self, n_samples: int, batch_size: int) -> tuple[int, int, float]:
        """Samples per batch, batches per epoch, and steps that are allowed."""
        batch_size = min(self.batch_size or batch_size, n_samples)
        n_batches = n_samples // batch_size
        return batch_size, n_batches, min(self.max_epochs * n_batches, self.max_steps or math.inf)

    def check(self) -> None:
        """Refuse parameters outside their ranges."""
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {PRECISIONS}, got {self.precision!r}. Use 'auto' or 'float32'."
            )
        if self.clock not in CLOCKS:
            raise ValueError(f"clock must be one of {CLOCKS}, got {self.clock!r}. Use 'wall'.")
        if not (isinstance(self.accumulate, Integral) and int(self.accumulate) > 0):
            raise ValueError(
                f"accumulate must be a whole number above 0, got {self.accumulate!r}. 1 is none."
            )
        for name in ("max_epochs", "max_steps", "batch_size", "max_time"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}. Give a number above 0 or None.")
        if self.max_epochs is None:
            raise ValueError("max_epochs must be positive, got None. Bound training by max_steps besides.")
        for name in ("validate_every", "patience"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and int(value) > 0):
                raise ValueError(f"{name} must be a whole number above 0 or None, got {value!r}. Try 10.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}. Try 0.001.")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more, got {self.weight_decay!r}. Use 0 for none.")
        for name in ("warmup_fraction", "ema_decay", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must lie in 0..1 without 1, got {getattr(self, name)!r}. 0 switches it off."
                )
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(
                f"gradient_clip must be positive or None, got {self.gradient_clip!r}. None switches it off."
            )
        self._check_surroundings()

    def _check_surroundings(self) -> None:
        """Refuse what is wrong with the parameters that do not decide what is learnt."""
        if not (self.checkpoint_dir is None or isinstance(self.checkpoint_dir, str | os.PathLike)):
            raise TypeError(
                f"checkpoint_dir must be a path or None, got {self.checkpoint_dir!r}. Name a directory."
            )
        if not self.checkpoint_every_s >= 0:
            raise ValueError(
                f"checkpoint_every_s must be 0 or more, got {self.checkpoint_every_s!r}. 300 is five minutes."
            )
        if self.resume not in ("auto", False):
            raise ValueError(
                f"resume must be 'auto' or False, got {self.resume!r}. 'auto' goes on where it can."
            )
        if not isinstance(self.callbacks, list | tuple) or not all(map(callable, self.callbacks)):
            raise TypeError(
                f"callbacks must be a tuple of callables, got {self.callbacks!r}. Give (callback,)."
            )
        for name in ("compile", "channels_last", "activation_checkpointing"):
            if getattr(self, name) not in (True, False):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}. Use False.")

    def _checkpoint_file(self, run: TrainingRun, task: _Task, identity: str) -> CheckpointFile | None:
        if self.checkpoint_dir is None or not run.share.team.leads:
            return None
        decisive = {name: value for name, value in self.get_params().items() if name not in NOT_DECISIVE}
        asked = (task.stage, task.n_samples, task.n_validation, task.batch_size, identity)
        settings = {"trainer": decisive, "task": asked, "trained": run.trained}
        tensors = run.values() | {"generator": run.generator.get_state()}
        return CheckpointFile(self.checkpoint_dir, task.stage, fingerprint(settings, tensors))

    def _train(
        self,
        run: TrainingRun,
        task: _Task,
        file: CheckpointFile | None,
        stop: StopRequest,
        verbose: bool,
    ) -> None:
        """Go on until all is done or a signal comes; what a step entails is over when the next one begins.

        Whatever decides how it goes on is the same in all processes of a team, or none would know the others'
        next step.
        """
        team = run.share.team
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        run.start = self._now() - run.elapsed_s
        first, written_s = run.step, run.elapsed_s
        total = task.total_steps if self.max_time is None else None  # by time, the number of steps is open
        with tqdm(total=total, initial=first, desc=task.stage, disable=not verbose, unit="step") as bar:
            while True:
                stopped, run.elapsed_s = stop.agree(team, self._now() - run.start)
                done = run.step >= task.total_steps or self._time_spent(run) >= 1
                if run.totals and (done or task.ends_record_at(run.step)):
                    self._record(run, task)
                    bar.set_postfix(loss=f"{run.history[-1]['loss']:.4f}")
                    done = self._review(run, task, done)
                    stopped, _ = stop.agree(team)
                if done or (stopped and run.step > first):
                    break
                due = run.step > first and run.elapsed_s - written_s >= self.checkpoint_every_s
                if file is not None and due:
                    file.write(*run.state())
                    written_s = run.elapsed_s
                self._step(run, task)
                bar.update()
        run.finished = done
        if done:
            run.settle()
        if file is not None:
            file.write(*run.state())
        if not done:
            self._stop(run, task, file, stop)

    def _stop(self, run: TrainingRun, task: _Task, file: CheckpointFile | None, stop: StopRequest) -> None:
        """Leave a module that can be used, and say how to go on."""
        if run.totals:
            self._record(run, task)
        run.settle()
        advice = "Set the trainer's checkpoint_dir to be able to go on from there."
        if file is not None and file.path.exists():
            advice = f"Make the same call again to go on from {file.path}."
        advice = run.share.team.broadcast(advice)
        by = stop.signal.name if stop.signal is not None else "a signal"
        warnings.warn(
            f"{task.stage} was stopped by {by} at step {run.step} of {task.total_steps}. {advice}",
            TrainingStoppedWarning,
            stacklevel=4,
        )

    def _step(self, run: TrainingRun, task: _Task) -> None:
        """One step of the module, and one of its rival where its loss asks for it."""
        place = run.step % task.n_batches
        if place == 0 or run.order is None:
            run.order = torch.randperm(task.n_samples, generator=run.generator)
        index = run.share.of(run.order[place * task.batch_size : (place + 1) * task.batch_size])
        run.set_learning_rate(self._learning_rate(self._progress(run, task)))
        run.forget_gradients()
        losses: dict[str, tuple[nn.Module, RivalLoss]] = {"module": (task.forward, task.loss)}
        if task.rival_loss is not None:
            losses["rival"] = (run.networks["rival"], task.rival_loss)
        terms: dict[str, Tensor] = {}
        with run.share.draws(run.step) as generator:
            for part in index.tensor_split(min(self.accumulate, len(index))):
                weight = len(part) / len(index)
                for role, (network, loss) in losses.items():
                    with task.autocast(run.device):
                        answer = loss(network, part, generator, run.step)
                    if answer is not None:
                        value, parts = answer
                        run.backward(role, weight * value)
                        parts = {_LOSS_NAMES[role]: value.detach(), **parts}
                        terms |= {name: terms.get(name, 0.0) + weight * term for name, term in parts.items()}
        for role in losses:
            if _LOSS_NAMES[role] in terms:
                run.descend(role, self.gradient_clip)
        run.average.update(run.step)
        run.add(terms)
        run.step += 1

    def _record(self, run: TrainingRun, task: _Task) -> None:
        n_seen = run.counts["loss"] * task.batch_size
        record = run.close_record()  # waits for the device
        run.elapsed_s = self._now() - run.start
        record["learning_rate"] = run.learning_rate
        record["samples_per_second"] = n_seen / max(run.elapsed_s - run.record_start_s, 1e-9)
        record["peak_memory_mib"] = peak_memory_mib(run.device)
        record |= run.share.team.broadcast(record)
        run.record_start_s = run.elapsed_s
        for name in ("loss", "rival_loss"):
            if not math.isfinite(record.get(name, 0.0)):
                raise FloatingPointError(
                    f"{name} must stay finite, got {record[name]} at step {run.step}. "
                    f"Lower the trainer's learning_rate."
                )

    def _review(self, run: TrainingRun, task: _Task, done: bool) -> bool:
        """Validate and ask the callbacks; True ends training."""
        if task.validation_loss is not None and (done or task.validates_at(run.step)):
            self._validate(run, task, task.validation_loss)
        done = done or (self.patience is not None and run.n_unimproved >= self.patience)
        asked = self._asks_to_stop(run, task) if run.share.team.leads else False
        run.record_start_s = run.elapsed_s = self._now() - run.start
        return run.share.team.broadcast(done or asked)

    def _asks_to_stop(self, run: TrainingRun, task: _Task) -> bool:
        """Call all callbacks; whether any of them ends training."""
        epoch, asked = math.ceil(run.step / task.n_batches), False
        for callback in self.callbacks:
            record, module = dict(run.history[-1]), run.networks["module"]
            answer = callback(TrainingState(task.stage, run.step, epoch, task.total_steps, record, module))
            if not (answer is None or (isinstance(answer, str) and answer == "stop")):
                raise ValueError(
                    f"a callback must return None or 'stop', got {answer!r} from {callback!r}. Return 'stop' "
                    f"to end the training."
                )
            asked = asked or answer == "stop"
        return asked

    def _validate(self, run: TrainingRun, task: _Task, loss: Loss) -> None:
        """Judge the averaged weights by their mean loss, with the same draws each time."""
        generator = torch.Generator(run.generator.device).manual_seed(VALIDATION_SEED)
        total: Tensor | float = 0.0
        run.train(False)
        with run.average.in_module(), isolated_seed(VALIDATION_SEED):
            with torch.no_grad(), task.autocast(run.device):
                for index in torch.arange(task.n_validation).split(task.batch_size):
                    value, _ = loss(task.forward, index, generator, run.step)
                    total = total + len(index) * value
            run.judge(run.share.team.broadcast(float(total) / task.n_validation))
        run.train()

    def _now(self) -> float:
        return time.process_time() if self.clock == "cpu" else time.monotonic()

    def _time_spent(self, run: TrainingRun) -> float:
        return 0.0 if self.max_time is None else run.elapsed_s / self.max_time

    def _progress(self, run: TrainingRun, task: _Task) -> float:
        return max(run.step / task.total_steps, min(self._time_spent(run), 1.0))

    def _learning_rate(self, progress: float) -> float:
        """Linear rise, then half a cosine down to 1 % of the peak."""
        if progress < self.warmup_fraction:
            return self.learning_rate * max(progress / self.warmup_fraction, 0.01)
        decayed = (progress - self.warmup_fraction) / (1 - self.warmup_fraction)
        return self.learning_rate * max(0.5 * (1 + math.cos(math.pi * decayed)), 0.01)

    def _autocast_dtype(self, device: torch.device) -> torch.dtype | None:
        if self.precision == "bfloat16":
            return torch.bfloat16
        if self.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.bfloat16
        return None
