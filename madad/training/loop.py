"""The loop of a training: steps, records, validations, and when it stops."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from madad._runtime.random import isolated_seed
from madad.training.callbacks import TrainingState
from madad.training.checkpoint import CheckpointFile
from madad.training.run import TrainingRun, peak_memory_mib
from madad.training.settings import Settings
from madad.training.signals import StopRequest

VALIDATION_SEED = 0
_LOSS_NAMES = {"module": "loss", "rival": "rival_loss"}
Loss = Callable[[nn.Module, Tensor, torch.Generator, int], tuple[Tensor, dict[str, Tensor]]]
RivalLoss = Callable[[nn.Module, Tensor, torch.Generator, int], tuple[Tensor, dict[str, Tensor]] | None]


class TrainingStoppedWarning(UserWarning):
    """A signal ended a training before it was done."""


@dataclass(frozen=True)
class Plan:
    """What a training is to do: what one call of `Trainer.optimise` asks for, with the trainer's parameters.

    Attributes
    ----------
    settings : Settings
        The trainer's parameters.
    forward : nn.Module
        The module, or what is compiled of it.
    loss, rival_loss, validation_loss, n_samples, n_validation :
        See `Trainer.optimise`.
    batch_size : int
        Samples per step.
    dtype : torch.dtype or None
        Of mixed precision; None = none.
    stage : str
        The ``description`` given to `Trainer.optimise`.
    """

    settings: Settings
    forward: nn.Module
    loss: Loss
    rival_loss: RivalLoss | None
    validation_loss: Loss | None
    n_samples: int
    n_validation: int
    batch_size: int
    dtype: torch.dtype | None
    stage: str

    @property
    def n_batches(self) -> int:
        """Steps per epoch."""
        return self.n_samples // self.batch_size

    @property
    def total_steps(self) -> float:
        """What epochs and steps allow."""
        return self.settings.steps_of(self.n_batches)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision in which losses are computed."""
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def validates_at(self, step: int) -> bool:
        """Whether a validation follows after so many steps."""
        period = self.settings.validation_period(self.n_batches)
        return self.validation_loss is not None and step % period == 0

    def ends_record_at(self, step: int) -> bool:
        """Whether a record of the history ends after so many steps."""
        return step % self.n_batches == 0 or self.validates_at(step)

    def now(self) -> float:
        """Seconds of the clock that counts."""
        return time.process_time() if self.settings.clock == "cpu" else time.monotonic()

    def learning_rate_at(self, progress: float) -> float:
        """Linear rise, then half a cosine down to 1 % of the peak; ``progress`` is 0..1."""
        peak, warmup = self.settings.learning_rate, self.settings.warmup_fraction
        if progress < warmup:
            return peak * max(progress / warmup, 0.01)
        decayed = (progress - warmup) / (1 - warmup)
        return peak * max(0.5 * (1 + math.cos(math.pi * decayed)), 0.01)


class TrainingLoop:
    """The algorithm of a training: it takes a run on its way, until all is done or a signal comes.

    Parameters
    ----------
    run : TrainingRun
        All that changes.
    plan : Plan
        All that does not.
    file : CheckpointFile or None
        Where the run is written down.
    stop : StopRequest
        What a signal leaves.
    """

    def __init__(self, run: TrainingRun, plan: Plan, file: CheckpointFile | None, stop: StopRequest):
        self.run, self.plan, self.file, self.stop = run, plan, file, stop

    def go(self, verbose: bool) -> None:
        """Go on until all is done or a signal comes; what a step entails is over when the next one begins.

        Whatever decides how it goes on is the same in all processes of a team, or none would know the others'
        next step.
        """
        run, plan, team = self.run, self.plan, self.run.share.team
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)
        run.start = plan.now() - run.elapsed_s
        first, written_s = run.step, run.elapsed_s
        # by time, the number is open
        total = plan.total_steps if math.isinf(plan.settings.max_time) else None
        with tqdm(total=total, initial=first, desc=plan.stage, disable=not verbose, unit="step") as bar:
            while True:
                stopped, run.elapsed_s = self.stop.agree(team, plan.now() - run.start)
                done = run.step >= plan.total_steps or self._time_spent() >= 1
                if run.totals and (done or plan.ends_record_at(run.step)):
                    self._record()
                    bar.set_postfix(loss=f"{run.history[-1]['loss']:.4f}")
                    done = self._review(done)
                    stopped, _ = self.stop.agree(team)
                if done or (stopped and run.step > first):
                    break
                due = run.step > first and run.elapsed_s - written_s >= plan.settings.checkpoint_every_s
                if self.file is not None and due:
                    self.file.write(*run.state())
                    written_s = run.elapsed_s
                self._step()
                bar.update()
        run.finished = done
        if done:
            run.settle()
        if self.file is not None:
            self.file.write(*run.state())
        if not done:
            self._end_early()

    def _step(self) -> None:
        """One step of the module, and one of its rival where its loss asks for it."""
        run, plan = self.run, self.plan
        place = run.step % plan.n_batches
        if place == 0 or run.order is None:
            run.order = torch.randperm(plan.n_samples, generator=run.generator)
        index = run.share.of(run.order[place * plan.batch_size : (place + 1) * plan.batch_size])
        run.set_learning_rate(plan.learning_rate_at(self._progress()))
        run.forget_gradients()
        losses: dict[str, tuple[nn.Module, RivalLoss]] = {"module": (plan.forward, plan.loss)}
        if plan.rival_loss is not None:
            losses["rival"] = (run.networks["rival"], plan.rival_loss)
        terms: dict[str, Tensor] = {}
        with run.share.draws(run.step) as generator:
            for part in index.tensor_split(min(plan.settings.accumulate, len(index))):
                weight = len(part) / len(index)
                for role, (network, loss) in losses.items():
                    with plan.autocast(run.device):
                        answer = loss(network, part, generator, run.step)
                    if answer is not None:
                        value, parts = answer
                        run.backward(role, weight * value)
                        parts = {_LOSS_NAMES[role]: value.detach(), **parts}
                        terms |= {name: terms.get(name, 0.0) + weight * term for name, term in parts.items()}
        for role in losses:
            if _LOSS_NAMES[role] in terms:
                run.descend(role, plan.settings.gradient_clip)
        run.average.update(run.step)
        run.add(terms)
        run.step += 1

    def _record(self) -> None:
        """Close the history's record of the steps since the last one."""
        run, plan = self.run, self.plan
        n_seen = run.counts["loss"] * plan.batch_size
        record = run.close_record()  # waits for the device
        run.elapsed_s = plan.now() - run.start
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

    def _review(self, done: bool) -> bool:
        """Validate and ask the callbacks; True ends training."""
        run, plan = self.run, self.plan
        if plan.validation_loss is not None and (done or plan.validates_at(run.step)):
            self._validate(plan.validation_loss)
        done = done or run.n_unimproved >= plan.settings.patience
        asked = self._asks_to_stop() if run.share.team.is_first else False
        run.record_start_s = run.elapsed_s = plan.now() - run.start
        return run.share.team.broadcast(done or asked)

    def _validate(self, loss: Loss) -> None:
        """Judge the averaged weights by their mean loss, with the same draws each time."""
        run, plan = self.run, self.plan
        generator = torch.Generator(run.generator.device).manual_seed(VALIDATION_SEED)
        total: Tensor | float = 0.0
        run.train(False)
        with run.average.in_module(), isolated_seed(VALIDATION_SEED):
            with torch.no_grad(), plan.autocast(run.device):
                for index in torch.arange(plan.n_validation).split(plan.batch_size):
                    value, _ = loss(plan.forward, index, generator, run.step)
                    total = total + len(index) * value
            run.judge(run.share.team.broadcast(float(total) / plan.n_validation))
        run.train()

    def _asks_to_stop(self) -> bool:
        """Call all callbacks; whether any of them ends training."""
        run, plan, asked = self.run, self.plan, False
        epoch = math.ceil(run.step / plan.n_batches)
        for callback in plan.settings.callbacks:
            record, module = dict(run.history[-1]), run.networks["module"]
            answer = callback(TrainingState(plan.stage, run.step, epoch, plan.total_steps, record, module))
            if not (answer is None or (isinstance(answer, str) and answer == "stop")):
                raise ValueError(
                    f"a callback must return None or 'stop', got {answer!r} from {callback!r}. Return 'stop' "
                    f"to end the training."
                )
            asked = asked or answer == "stop"
        return asked

    def _end_early(self) -> None:
        """Leave a module that can be used, and say how to go on."""
        run, plan, file = self.run, self.plan, self.file
        if run.totals:
            self._record()
        run.settle()
        advice = "Set the trainer's checkpoint_dir to be able to go on from there."
        if file is not None and file.path.exists():
            advice = f"Make the same call again to go on from {file.path}."
        advice = run.share.team.broadcast(advice)
        of = f" of {plan.total_steps}" if math.isfinite(plan.total_steps) else ""  # by time, it is open
        by = self.stop.signal.name if self.stop.signal is not None else "a signal"
        warnings.warn(
            f"{plan.stage} was stopped by {by} at step {run.step}{of}. {advice}",
            TrainingStoppedWarning,
            stacklevel=4,
        )

    def _time_spent(self) -> float:
        """Share of ``max_time``."""
        return self.run.elapsed_s / self.plan.settings.max_time

    def _progress(self) -> float:
        """Share of the training that is done, 0..1, by steps or by time, whichever is further."""
        return max(self.run.step / self.plan.total_steps, min(self._time_spent(), 1.0))
