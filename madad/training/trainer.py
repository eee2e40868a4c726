"""The trainer: optimises a module against a loss. It knows no network and no data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from sklearn.base import BaseEstimator
from torch import Tensor, nn
from tqdm.auto import tqdm

PRECISIONS = ("auto", "float32", "bfloat16")
Loss = Callable[[nn.Module, Tensor, torch.Generator], tuple[Tensor, dict[str, Tensor]]]


class Trainer(BaseEstimator):
    """AdamW with warm-up and cosine decay, moving average of the weights, clipping and mixed precision.

    Parameters
    ----------
    max_epochs : int
        Passes over the samples.
    max_steps : int or None
        Upper bound on optimiser steps, whatever the number of epochs.
    max_time : float or None
        Upper bound in seconds of wall-clock time. The learning rate then decays with the time that has
        passed; results depend on the machine.
    batch_size : int or None
        None = 32, or fewer where samples are large.
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
    """

    def __init__(
        self,
        max_epochs: int = 100,
        *,
        max_steps: int | None = None,
        max_time: float | None = None,
        batch_size: int | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_fraction: float = 0.05,
        ema_decay: float = 0.995,
        gradient_clip: float | None = 1.0,
        precision: str = "auto",
    ):
        self.max_epochs = max_epochs
        self.max_steps = max_steps
        self.max_time = max_time
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_fraction = warmup_fraction
        self.ema_decay = ema_decay
        self.gradient_clip = gradient_clip
        self.precision = precision

    def optimise(
        self,
        module: nn.Module,
        loss: Loss,
        n_samples: int,
        *,
        generator: torch.Generator,
        batch_size: int = 32,
        description: str = "training",
        verbose: bool = False,
    ) -> list[dict]:
        """Train ``module`` in place; it ends in evaluation mode with the averaged weights.

        Parameters
        ----------
        module : nn.Module
            On the device to train on.
        loss : callable (module, index, generator) -> (loss, parts)
            ``index`` holds the samples of the batch; ``parts`` are named terms for the history.
        n_samples : int
        generator : torch.Generator
            The only source of randomness: order of the samples, and whatever ``loss`` draws.
        batch_size : int
            Used where the trainer's own is None.
        description : str
            Label of the progress bar.
        verbose : bool
            Show the bar with loss and time left.

        Returns
        -------
        history : list of dict
            Per epoch: ``step``, ``loss``, each part, ``learning_rate``, ``samples_per_second``.
        """
        self.check()
        batch_size = min(self.batch_size or batch_size, n_samples)
        n_batches = n_samples // batch_size
        total_steps = min(self.max_epochs * n_batches, self.max_steps or math.inf)
        device = next(module.parameters()).device
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        average = _MovingAverage(module, self.ema_decay)
        dtype = self._autocast_dtype(device)

        history, step, start = [], 0, time.monotonic()
        module.train()
        total = total_steps if self.max_time is None else None  # by time, the number of steps is open
        with tqdm(total=total, desc=description, disable=not verbose, unit="step") as bar:
            while step < total_steps and not self._out_of_time(start):
                totals: dict[str, Tensor | float] = {}
                epoch_start, first = time.monotonic(), step
                order = torch.randperm(n_samples, generator=generator)
                for index in order[: n_batches * batch_size].split(batch_size):
                    if step >= total_steps or self._out_of_time(start):
                        break
                    rate = self._learning_rate(self._progress(step, total_steps, start))
                    for group in optimiser.param_groups:
                        group["lr"] = rate
                    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                        value, parts = loss(module, index, generator)
                    optimiser.zero_grad(set_to_none=True)
                    value.backward()
                    if self.gradient_clip is not None:
                        nn.utils.clip_grad_norm_(parameters, self.gradient_clip)
                    optimiser.step()
                    average.update(step)
                    for name, part in {"loss": value.detach(), **parts}.items():
                        totals[name] = totals.get(name, 0.0) + part
                    step += 1
                    bar.update()
                if step == first:  # the time ran out between two epochs
                    break
                record = {name: float(total) / (step - first) for name, total in totals.items()}
                seconds = max(time.monotonic() - epoch_start, 1e-9)
                speed = (step - first) * batch_size / seconds
                history.append({"step": step, **record, "learning_rate": rate, "samples_per_second": speed})
                bar.set_postfix(loss=f"{record['loss']:.4f}")
                _check_loss(record["loss"], step)
        average.copy_to_module()
        module.eval()
        return history

    def check(self) -> None:
        """Refuse parameters outside their ranges."""
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be one of {PRECISIONS}, got {self.precision!r}. Use 'auto' or 'float32'."
            )
        for name in ("max_epochs", "max_steps", "batch_size", "max_time"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}. Give a number above 0 or None.")
        if self.max_epochs is None:
            raise ValueError("max_epochs must be positive, got None. Bound training by max_steps besides.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate!r}. Try 0.001.")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be 0 or more, got {self.weight_decay!r}. Use 0 for none.")
        for name in ("warmup_fraction", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must lie in 0..1 without 1, got {getattr(self, name)!r}. 0 switches it off."
                )
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(
                f"gradient_clip must be positive or None, got {self.gradient_clip!r}. None switches it off."
            )

    def _out_of_time(self, start: float) -> bool:
        return self.max_time is not None and time.monotonic() - start >= self.max_time

    def _progress(self, step: int, total_steps: float, start: float) -> float:
        elapsed = 0.0 if self.max_time is None else (time.monotonic() - start) / self.max_time
        return max(step / total_steps, min(elapsed, 1.0))

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


class _MovingAverage:
    """Exponential moving average of a module's parameters, faster at the beginning."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.current = [p for p in module.parameters() if p.requires_grad]
        self.averaged = [p.detach().clone() for p in self.current] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        if self.averaged:
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.averaged, [p.detach() for p in self.current], weight)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        for parameter, averaged in zip(self.current, self.averaged, strict=False):
            parameter.copy_(averaged)


def _check_loss(value: float, step: int) -> None:
    if not math.isfinite(value):
        raise FloatingPointError(
            f"loss must stay finite, got {value} at step {step}. Lower the trainer's learning_rate."
        )
