from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from madad._runtime.portable import PortableDataclass, PortableNetwork


@dataclass(frozen=True)
class Shape(PortableDataclass):
    width: int = 2
    sizes: tuple[int, ...] = (1, 3)


class Line(PortableNetwork):
    def __init__(self, config):
        super().__init__(config)
        self.line = nn.Linear(config.width, 1)
        self.norm = nn.BatchNorm1d(1)  # with buffers


class Wider(Line):
    """Whoever changes a layer after it is built."""

    def widen(self):
        self.line = nn.Linear(5, 1)
        return self


def test_a_dataclass_comes_back_from_its_fields():
    shape = Shape(width=7)
    assert shape.to_config() == {"width": 7, "sizes": (1, 3)}
    assert Shape.from_config(shape.to_config()) == shape != Shape()


def test_a_network_comes_back_from_its_config_and_its_weights_and_draws_nothing():
    network = Line(Shape(width=4)).train()
    description, tensors = network.to_saved()
    assert description is network.config
    assert all(isinstance(value, np.ndarray) for value in tensors.values())
    before = torch.get_rng_state()
    again = Line.from_saved(description, tensors)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(again) is Line and again.config == Shape(width=4) and not again.training
    states = network.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("description", [Shape(), Shape(width=6)])
def test_weights_of_another_config_are_refused(description):
    _, tensors = Line(Shape(width=4)).to_saved()
    with pytest.raises((RuntimeError, ValueError), match=r"line\.weight"):
        Line.from_saved(description, tensors)


def test_a_network_that_its_config_does_not_describe_is_refused():
    assert Wider(Shape()).to_saved()[1].keys() == Line(Shape()).state_dict().keys()
    with pytest.raises(TypeError, match=r"^Wider must have the weights of its config .*line\.weight"):
        Wider(Shape()).widen().to_saved()
