"""Everything that changes while a module is trained: as objects, and as tensors and JSON to take up again."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, nn

from madad._runtime.distributed import Team
from madad.training.batch_share import Share
from madad.training.weights import MovingAverage, copy_values, values_of

BETAS = {"module": (0.9, 0.999), "rival": (0.5, 0.9)}
FACTS = (
    *("step", "finished", "elapsed_s", "record_start_s", "learning_rate"),
    *("history", "best_loss", "n_unimproved"),
)


class TrainingRun:
    """A module and its rival on their way, with all that decides how they go on.

    Parameters
    ----------
    module : nn.Module
        What is trained, on its device.
    rival : nn.Module or None
        Trained alternately with the module.
    generator : torch.Generator
        Of the samples' order and of what losses draw.
    team : Team
        Its first process gives all of them its initial weights and the state of its generator.
    batch_size : int
        Samples of a step of all processes together, 1 or more for each.
    learning_rate, weight_decay, ema_decay : float
        See `madad.training.Trainer`.

    Attributes
    ----------
    share : Share
        What this process does of each step.
    networks, optimisers : dict
        By role: ``"module"`` and, where there is one, ``"rival"``.
    step : int
        How many steps are done.
    finished : bool
        Nothing is left to do: the module has its final weights.
    start, elapsed_s, record_start_s : float
        When training began by the monotonic clock, as if it had never been interrupted; seconds of training
        so far; and those before the current record.
    history : list of dict
        The records so far; see `madad.training.Trainer.optimise`.
    order : Tensor of shape (n_samples,) or None
        The samples of the current epoch.
    best_loss, n_unimproved : float, int
        The lowest validation loss, and the number of validations since.
    """

    def __init__(
        self,
        module: nn.Module,
        rival: nn.Module | None,
        generator: torch.Generator,
        *,
        team: Team,
        batch_size: int,
        learning_rate: float,
        weight_decay: float,
        ema_decay: float,
    ):
        self.networks = {"module": module} if rival is None else {"module": module, "rival": rival}
        self.generator = generator
        self.device = next(module.parameters()).device
        team.copy_(self.values().values())
        generator.set_state(team.broadcast(generator.get_state()))
        self.share = Share(team, batch_size, generator)
        self.optimisers = {
            role: torch.optim.AdamW(
                [p for p in network.parameters() if p.requires_grad],
                lr=learning_rate,
                weight_decay=weight_decay,
                betas=BETAS[role],
            )
            for role, network in self.networks.items()
        }
        self.average = MovingAverage(module, ema_decay)
        self.step, self.finished = 0, False
        self.start = self.elapsed_s = self.record_start_s = 0.0
        self.learning_rate = learning_rate
        self.history: list[dict] = []
        self.totals: dict[str, Tensor | float] = {}
        self.counts: dict[str, int] = {}
        self.order: Tensor | None = None
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.n_unimproved = math.inf, 0

    def train(self, mode: bool = True) -> None:
        """Put the networks into training or evaluation mode."""
        for network in self.networks.values():
            network.train(mode)

    def set_learning_rate(self, rate: float) -> None:
        """Give all optimisers the rate of the next step."""
        self.learning_rate = rate
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = rate

    def forget_gradients(self) -> None:
        """Begin a step."""
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)

    def backward(self, role: str, value: Tensor) -> None:
        """Add the gradient of a loss to that of one network, and to no other that it goes through."""
        value.backward(inputs=self.optimisers[role].param_groups[0]["params"])

    def descend(self, role: str, gradient_clip: float) -> None:
        """One step of one optimiser down the gradients that were added up."""
        optimiser = self.optimisers[role]
        self.share.average_gradients(optimiser.param_groups[0]["params"])
        if math.isfinite(gradient_clip):
            nn.utils.clip_grad_norm_(optimiser.param_groups[0]["params"], gradient_clip)
        optimiser.step()

    def add(self, parts: dict[str, Tensor]) -> None:
        """Add a step's values to the record; they stay on their device, so that no step waits for it."""
        for name, part in self.share.averages(parts, self.device).items():
            self.totals[name] = self.totals.get(name, 0.0) + part
            self.counts[name] = self.counts.get(name, 0) + 1

    def close_record(self) -> dict:
        """Append the mean of each part, over the steps that had it, to the history."""
        means = {name: float(total) / self.counts[name] for name, total in self.totals.items()}
        self.history.append({"step": self.step, **means})
        self.totals, self.counts = {}, {}
        return self.history[-1]

    def judge(self, validation_loss: float) -> None:
        """Note a validation in the last record; the module's present weights are kept if it is the best."""
        self.history[-1]["validation_loss"] = validation_loss
        if not validation_loss < self.best_loss:
            self.n_unimproved += 1
            return
        self.best_loss, self.n_unimproved = validation_loss, 0
        self.best = {name: value.clone() for name, value in values_of(self.networks["module"]).items()}
        for record in self.history:
            record.pop("best", None)
        self.history[-1]["best"] = True

    def settle(self) -> None:
        """Give the module its best validated weights, else the averaged ones; all processes have the same."""
        if self.best:
            copy_values(self.best, values_of(self.networks["module"]))
        else:
            self.average.copy_to_module()
        self.share.team.copy_(self.values().values())  # buffers: each process kept its own
        self.train(False)

    def values(self) -> dict[str, Tensor]:
        """Weights and buffers of the networks."""
        return {
            f"{role}/{name}": value
            for role, network in self.networks.items()
            for name, value in values_of(network).items()
        }

    @property
    def trained(self) -> list[str]:
        """The weights that are not frozen."""
        return [
            f"{role}/{name}"
            for role, network in self.networks.items()
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        ]

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors on the CPU that share no memory, and the rest for JSON; once finished, what is left."""
        tensors = self.values() | {f"random/{name}": state for name, state in self._random_states().items()}
        facts = {name: getattr(self, name) for name in FACTS}
        facts["totals"] = {name: (float(total), self.counts[name]) for name, total in self.totals.items()}
        if not self.finished:
            for role, optimiser in self.optimisers.items():
                for i, parameter in enumerate(optimiser.param_groups[0]["params"]):
                    moments = optimiser.state[parameter].items()
                    tensors |= {f"{role}.optimiser/{i}/{name}": moment for name, moment in moments}
            tensors |= {f"average/{i}": value for i, value in enumerate(self.average.averaged)}
            tensors |= {f"best/{name}": value for name, value in self.best.items()}
            if self.order is not None:
                tensors["order"] = self.order
        layout = torch.contiguous_format
        return {
            name: value.detach().to("cpu", copy=True, memory_format=layout) for name, value in tensors.items()
        }, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict) -> None:
        """Take up what `state` gave: from here on all goes as it would have gone."""

        def group(prefix: str) -> dict[str, Tensor]:
            names = [name for name in tensors if name.startswith(prefix)]
            return {name.removeprefix(prefix): tensors[name] for name in names}

        for name in FACTS:
            setattr(self, name, facts[name])
        for name, (total, count) in facts["totals"].items():
            self.totals[name], self.counts[name] = total, count
        for role, network in self.networks.items():
            copy_values(group(f"{role}/"), values_of(network))
        self._set_random_states(group("random/"))
        if self.finished:
            return
        for role, optimiser in self.optimisers.items():
            for name, value in group(f"{role}.optimiser/").items():
                i, moment = name.split("/")
                parameter = optimiser.param_groups[0]["params"][int(i)]
                same_layout = torch.empty_like(parameter, requires_grad=False)
                optimiser.state[parameter][moment] = value if moment == "step" else same_layout.copy_(value)
        copy_values(group("average/"), {str(i): value for i, value in enumerate(self.average.averaged)})
        self.best, self.order = group("best/"), tensors.get("order")

    def _random_states(self) -> dict[str, Tensor]:
        states = {"generator": self.generator.get_state(), "cpu": torch.get_rng_state()}
        return states | ({"cuda": torch.cuda.get_rng_state(self.device)} if self._on_cuda else {})

    def _set_random_states(self, states: dict[str, Tensor]) -> None:
        self.generator.set_state(states["generator"])
        torch.set_rng_state(states["cpu"])
        if self._on_cuda and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)

    @property
    def _on_cuda(self) -> bool:
        return self.device.type == "cuda"


def peak_memory_mib(device: torch.device) -> float | None:
    """On a GPU since training began; on a CPU the process's own, None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
