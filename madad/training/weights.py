"""Averages, memory formats and recomputation of a network's weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of a module's parameters, faster at the beginning.

    Parameters
    ----------
    module : nn.Module
        What is trained; parameters without gradients are left out.
    decay : float
        Share of the average that each step keeps, 0..1 without 1; 0 = no average.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.current = [p for p in module.parameters() if p.requires_grad]
        self.averaged = [p.detach().clone() for p in self.current] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the current weights."""
        if self.averaged:
            weight = 1 - min(self.decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.averaged, [p.detach() for p in self.current], weight)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Leave the averaged weights in the module."""
        for parameter, averaged in zip(self.current, self.averaged, strict=False):
            parameter.copy_(averaged)

    @contextmanager
    def in_module(self) -> Iterator[None]:
        """The averaged weights for a while."""
        current = [p.detach().clone() for p in self.current]
        self.copy_to_module()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.current, current, strict=True):
                    parameter.copy_(value)


@contextmanager
def channels_last(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the weights of 2-d convolutions in channels-last format for a while."""
    weights = [p for network in networks for p in network.parameters() if p.dim() == 4]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()


@contextmanager
def recomputing(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Have blocks that can (those with an attribute ``recompute``) forget their activations for a while."""
    parts = (part for network in networks for part in network.modules())
    blocks: list[Any] = [part for part in parts if hasattr(part, "recompute")]
    try:
        for block in blocks:
            block.recompute = True
        yield
    finally:
        for block in blocks:
            del block.recompute  # that of its class is left


def values_of(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, without gradients; shared ones once."""
    named = [*network.named_parameters(), *network.named_buffers()]
    return {name: value.detach() for name, value in named}


def copy_values(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Overwrite each of the targets by the source of its name."""
    for name, value in target.items():
        value.copy_(source[name])
