"""A process's share of a training that several run together: its samples, its draws, and what it averages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from madad._runtime.distributed import Team
from madad._runtime.random import derived_seed, isolated_seed


class Share:
    """What one process of a team does of each step; alone it does all, and nothing here has an effect.

    Parameters
    ----------
    team : Team
        The processes that train together, or one alone.
    batch_size : int
        Samples of a step in all processes together.
    shared : torch.Generator
        In the same state in all processes. It orders the samples, as it does for a process alone.

    Raises
    ------
    ValueError
        If there are more processes than samples.

    Notes
    -----
    Gradients are averaged here and not by DistributedDataParallel, whose hooks see only what one call of
    ``backward`` reaches: a loss of ours may call ``autograd.grad`` for itself or go around ``forward``.
    """

    def __init__(self, team: Team, batch_size: int, shared: torch.Generator):
        if batch_size < team.size:
            raise ValueError(
                f"batch_size must be at least 1 for each of {team.size} processes, got {batch_size} for all. "
                f"Start fewer processes, or give more samples a batch."
            )
        self.team, self.shared = team, shared
        self.weight = len(range(team.rank, batch_size, team.size)) / batch_size  # its part of a batch
        start = torch.Generator(shared.device)
        start.set_state(shared.get_state())
        self._seed = int(torch.randint(2**62, (), generator=start, device=shared.device))

    def of(self, index: Tensor) -> Tensor:
        """Give this process's samples of a batch."""
        return index[self.team.rank :: self.team.size]

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Make those of the whole batch of those of the shares: the same bits in all processes."""
        self.team.mean_((p.grad for p in parameters if p.grad is not None), self.weight)

    def averages(self, parts: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Values of a step over the whole batch; they stay on the device."""
        if self.team.size == 1:
            return parts
        values = (torch.as_tensor(part, device=device).detach() for part in parts.values())
        joined = torch.stack([value.reshape(()).float() for value in values])
        self.team.mean_([joined], self.weight)
        return dict(zip(parts, joined.unbind(), strict=True))

    @contextmanager
    def draws(self, step: int) -> Iterator[torch.Generator]:
        """What the losses of a step draw from: in a team not from the shared generator.

        It depends on the run, the step and the rank alone, and torch's global generator likewise: a run that
        goes on needs no state of each process.
        """
        if self.team.size == 1:
            yield self.shared
            return
        of_losses, of_modules = (derived_seed(self._seed, step, self.team.rank, kind) for kind in range(2))
        with isolated_seed(of_modules):
            yield torch.Generator(self.shared.device).manual_seed(of_losses)
