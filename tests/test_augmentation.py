import numpy as np
import pytest
import torch

from madad import IntensityAugmentation
from madad._random import generator_from


def slices(n=6, channels=1):
    generator = torch.Generator().manual_seed(3)
    images = 0.2 + 0.4 * torch.rand(n, channels, 12, 14, generator=generator)
    brain = torch.zeros(n, 1, 12, 14, dtype=torch.bool)
    brain[..., 2:10, 3:12] = True
    return torch.where(brain, images, 0.0) * 2 - 1, brain


def test_copies_are_seeded_and_leave_the_background_and_the_input_alone():
    x, brain = slices()
    before = x.clone()
    first = IntensityAugmentation()(x, brain, generator_from(0))
    assert torch.equal(x, before)
    assert torch.equal(first, IntensityAugmentation()(x, brain, generator_from(0)))
    assert not torch.equal(first, IntensityAugmentation()(x, brain, generator_from(1)))
    assert torch.equal(first[~brain], x[~brain])
    assert first.min() >= -1 and first.max() <= 1


def test_without_spread_nothing_changes():
    x, brain = slices()
    same = IntensityAugmentation(log_gamma=0.0, log_gain=0.0, log_bias=0.0)(x, brain, generator_from(0))
    torch.testing.assert_close(same, x)


def test_gamma_turns_about_the_mean_of_the_brain():
    x, brain = slices(200)
    varied = IntensityAugmentation(log_gamma=0.3, log_gain=0.0, log_bias=0.0)(x, brain, generator_from(0))
    for before, after, inside in zip(x[:5], varied[:5], brain[:5], strict=True):
        y, z = ((image[inside].numpy().astype(np.float64) + 1) / 2 for image in (before, after))
        mean = y.mean()
        gamma = np.log(z / mean) / np.log(y / mean)
        assert np.ptp(gamma[np.abs(y - mean) > 0.02]) < 1e-2  # one exponent for the slice


@pytest.mark.parametrize("name", ["log_gain", "log_bias"])
def test_spread_of_the_factors(name):
    x, brain = slices(400)
    spreads = {"log_gamma": 0.0, "log_gain": 0.0, "log_bias": 0.0} | {name: 0.1}
    varied = IntensityAugmentation(**spreads)(x, brain, generator_from(0))
    logs = torch.log((varied[:, 0, 5, 6] + 1) / (x[:, 0, 5, 6] + 1))
    assert float(logs.mean()) == pytest.approx(0.0, abs=0.02)
    assert 0.05 < float(logs.std()) < 0.13
