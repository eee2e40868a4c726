"""Small trainings and their parts, for the tests of this folder: see conftest.py."""

import math

import torch
from torch import nn

from madad._runtime.random import isolated_seed
from madad.training import Trainer

N = 24
HERE = __file__  # what warnings name, as `train` and `everything` call the trainer
PLAIN = {"warmup_fraction": 0.0, "ema_decay": 0.0, "weight_decay": 0.0, "gradient_clip": math.inf}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


POINTS = torch.randn(N, 3, generator=seeded(1))
TARGETS = POINTS @ torch.tensor([1.0, -2.0, 0.5]) + 0.7


def line():
    """A linear model that starts at zero."""
    module = nn.Linear(3, 1)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    return module


def squared_error(module, index, generator, step):
    error = (module(POINTS[index])[:, 0] - TARGETS[index]).square().mean()
    return error, {"root": error.detach().sqrt()}


def noisy_error(module, index, generator, step):
    noise = 0.1 * torch.randn(len(index), 3, generator=generator)
    return (module(POINTS[index] + noise)[:, 0] - TARGETS[index]).square().mean(), {}


def own_line(rival, index, generator, step):
    return squared_error(rival, index, generator, step)


def train(trainer, module=None, loss=squared_error, *, seed=0, **options):
    module = line() if module is None else module
    return module, trainer.optimise(module, loss, N, generator=seeded(seed), **options)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def recorded(loss=squared_error, sink=None):
    """The loss, noting the index and the weights at each call."""

    def wrapped(module, index, generator, step):
        sink.append((index.clone(), weights(module).clone()))
        return loss(module, index, generator, step)

    return wrapped


def without_speeds(history):
    return [
        {
            name: value
            for name, value in record.items()
            if name not in ("samples_per_second", "peak_memory_mib")
        }
        for record in history
    ]


class Clock:
    """Time that passes by ``tick`` at each look."""

    def __init__(self, tick):
        self.now, self.tick = 0.0, tick

    def monotonic(self):
        self.now += self.tick
        return self.now


class Interruption(Exception):
    """Stands for whatever ends a process."""


def interrupt():
    raise Interruption


IMAGES = torch.randn(N, 3, 4, 4, generator=seeded(4))


def everything(directory, seen=None, *, at=(), happens=None, **options):
    """Train with all that has a state: buffers, dropout, averages, draws, a rival, validation."""

    def loss(module, index, generator, step):
        if seen is not None:
            seen.append(step)
        if step in at:
            happens()
        noise = torch.randn(len(index), 3, 4, 4, generator=generator)
        output = module(IMAGES[index] + 0.1 * noise)
        term = (output - IMAGES[index, :1]).square().mean()
        return term - 0.01 * rival(output).mean(), {"term": term.detach(), "half": 0.5, "plain": step / 3}

    def rival_loss(network, index, generator, step):
        if step % 4 == 1:
            return None
        real = network(IMAGES[index, :1] + torch.randn(1, generator=generator))
        return (real - 1).square().mean(), {"real": real.detach().mean()}

    def validation_loss(module, index, generator, step):
        noise = torch.randn(len(index), 3, 4, 4, generator=generator)
        return (module(IMAGES[index] + noise) - 0.8).square().mean(), {}

    with isolated_seed(5):
        module = nn.Sequential(
            *(
                nn.Conv2d(3, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.SiLU(),
                nn.Dropout(0.3),
                nn.Conv2d(4, 1, 1),
            )
        )
        rival = nn.Conv2d(1, 1, 3)
        settings = {
            "max_epochs": 4,
            "batch_size": 5,
            "learning_rate": 0.1,
            "ema_decay": 0.7,
            "validate_every": 3,
            "patience": 9,
        }
        trainer = Trainer(checkpoint_dir=directory, **(settings | {"checkpoint_every_s": 0} | options))
        generator = seeded(6)
        with isolated_seed(7):
            history = trainer.optimise(
                module,
                loss,
                N,
                generator=generator,
                rival=rival,
                rival_loss=rival_loss,
                validation_loss=validation_loss,
                n_validation=7,
            )
            after = [torch.rand(3), torch.rand(3, generator=generator)]
    state = [*module.state_dict().values(), *rival.state_dict().values(), *after]
    return torch.cat([value.double().flatten() for value in state]), without_speeds(history)


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1] and list(map(list, a[1])) == list(map(list, b[1]))
