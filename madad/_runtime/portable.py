"""How parts describe and rebuild themselves, so that `madad.saving` writes them without knowing their types.

Two pairs of methods are all that it asks for:

``to_config() -> dict`` and ``from_config(config)``
    What was chosen: arguments of the constructor, without what belongs to one machine or one run. Estimators
    have it, and what they take as parameters: a trainer, a corruption, the shape of a network.
``to_saved() -> (description, tensors)`` and ``from_saved(description, tensors)``
    What was learnt besides, of a network or of a fitted estimator: a value and arrays by name. A detector
    gives such arrays for each of its files.

What they give are values: None, truth values, numbers, texts, tuples, lists, dicts whose keys are texts, and
other parts. Anything else is refused when a model is saved. A part that a file may name as a parameter stands
in `madad.saving.json_values.PARTS` too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from madad._runtime.random import isolated_seed
from madad._runtime.tensors import state_from_numpy, state_to_numpy


@dataclasses.dataclass(frozen=True)
class PortableDataclass:
    """A frozen dataclass whose fields describe it."""

    def to_config(self) -> dict[str, Any]:
        """The value of each field by its name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The equal of what gave ``config`` by `to_config`."""
        return cls(**config)


class PortableNetwork(nn.Module):
    """A network that its ``config``, the one argument of its constructor, and its weights describe."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def to_saved(self) -> tuple[Any, dict[str, np.ndarray]]:
        """The network's ``config``, and its weights as arrays by name.

        Raises
        ------
        TypeError
            If they are not those of such a network, since someone changed a layer.
        """
        weights = state_to_numpy(self)
        with torch.device("meta"):  # shapes alone: nothing is drawn or allocated
            expected = type(self)(self.config)
        shapes = {(name, tuple(value.shape)) for name, value in expected.state_dict().items()}
        if changed := sorted(shapes ^ {(name, value.shape) for name, value in weights.items()}):
            raise TypeError(
                f"{type(self).__name__} must have the weights of its config to be saved, got {changed[:4]} "
                f"in one and not in the other. Keep such a network with torch.save."
            )
        return self.config, weights

    @classmethod
    def from_saved(cls, description: Any, tensors: dict[str, np.ndarray]) -> Self:
        """The network of a config ``description`` with the weights ``tensors``, ready to predict.

        No draw of the global generator is used up.
        """
        with isolated_seed(0):  # building a network draws weights
            network = cls(description)
        return state_from_numpy(network, tensors).eval()
