import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import madad
from madad._runtime.hashing import content_hash


def network(seed=0, dropout=0.1):
    generator = torch.Generator().manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(dropout))
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layers


def content():
    values = torch.arange(6.0)
    return {
        "network": network(),
        "half": values.bfloat16(),
        "scalar": torch.tensor(3),
        "array": np.arange(4),
        "settings": ("mixture", (0.0, 1.0), None),
    }


def test_equal_content_has_one_hash_wherever_it_is():
    value = content()
    assert content_hash(value) == content_hash(content()) == content_hash(copy.deepcopy(value))
    transposed = torch.arange(6.0).reshape(2, 3).T.contiguous()
    assert content_hash(transposed) == content_hash(torch.arange(6.0).reshape(2, 3).T)


def test_another_process_finds_the_same_hash():
    script = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(madad.__file__).parents[1])]!r}\n"
    )
    script += "import test_hashing; print(test_hashing.content_hash(test_hashing.content()))"
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == content_hash(content())


@pytest.mark.parametrize(
    "other",
    [
        {"network": network(1)},
        {"network": network(dropout=0.2)},
        {"half": torch.arange(6.0)},
        {"half": torch.arange(6.0).bfloat16().reshape(2, 3)},
        {"scalar": torch.tensor(4)},
        {"array": np.arange(4.0)},
        {"settings": ("mixture", (0.0, 1.0), 0)},
    ],
)
def test_other_content_has_another_hash(other):
    assert content_hash(content() | other) != content_hash(content())


def test_what_pickle_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="a parameter must be something that pickle can hold, got .*lambda"):
        content_hash({"perceptual": lambda x_hat, x: 0})
