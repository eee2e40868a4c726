import numpy as np
import pytest
import torch

from madad import SliceAugmentation
from madad._runtime.random import generator_from


def slices(n=6, channels=1):
    generator = torch.Generator().manual_seed(3)
    images = 0.2 + 0.4 * torch.rand(n, channels, 12, 14, generator=generator)
    brain = torch.zeros(n, 1, 12, 14, dtype=torch.bool)
    brain[..., 2:10, 3:12] = True
    return torch.where(brain, images, 0.0) * 2 - 1, brain


STILL = {"rotation": 0.0, "log_scale": 0.0, "shear": 0.0, "translation": 0.0, "deformation": 0.0}
PLAIN = {"log_gamma": 0.0, "log_gain": 0.0, "log_bias": 0.0, "noise": 0.0}


def recoloured(x, brain, seed=0, **widths):
    return SliceAugmentation(**STILL, **(PLAIN | widths))(x, brain, generator_from(seed))[0]


def test_copies_are_seeded_and_leave_the_input_alone():
    x, brain = slices()
    before = x.clone(), brain.clone()
    first = SliceAugmentation()(x, brain, generator_from(0))
    assert torch.equal(x, before[0]) and torch.equal(brain, before[1])
    for one, same in zip(first, SliceAugmentation()(x, brain, generator_from(0)), strict=True):
        assert torch.equal(one, same)
    assert not torch.equal(first[0], SliceAugmentation()(x, brain, generator_from(1))[0])
    assert first[0].shape == x.shape and first[1].shape == brain.shape and first[1].dtype == torch.bool
    assert first[0].min() >= -1 and first[0].max() <= 1


def test_without_any_width_nothing_changes():
    x, brain = slices(channels=2)
    same, mask = SliceAugmentation(**STILL, **PLAIN)(x, brain, generator_from(0))
    torch.testing.assert_close(same, x)
    assert torch.equal(mask, brain)


def test_recolouring_leaves_the_background_alone():
    x, brain = slices()
    varied = recoloured(x, brain, log_gamma=0.3, log_gain=0.1, log_bias=0.1, noise=0.05)
    assert torch.equal(varied[~brain], x[~brain])
    assert not torch.equal(varied[brain], x[brain])


def square(n, side=41, channels=1):
    """A bright square that fills a brain of the same shape."""
    x = torch.full((n, channels, side, side), -1.0)
    x[..., 12:28, 14:26] = 0.5
    return x, (x[:, :1] > 0)


@pytest.mark.parametrize("name", sorted(STILL))
def test_each_movement_moves_image_and_mask_together(name):
    x, brain = square(32)
    width = {"rotation": 20.0, "deformation": 0.03}.get(name, 0.1)
    moved, mask = SliceAugmentation(**(STILL | {name: width}), **PLAIN)(x, brain, generator_from(0))
    changed = (moved - x).abs().amax(dim=(1, 2, 3)) > 0.1
    assert changed.float().mean() > 0.5
    overlap = ((moved > -0.25) == mask).float().mean()
    assert overlap > 0.985
    assert abs(float(mask.float().mean() / brain.float().mean()) - 1) < 0.1


def test_a_rotation_turns_about_the_middle_and_keeps_angles_on_oblong_slices():
    x = torch.full((64, 1, 41, 61), -1.0)
    x[..., 15:26, 25:36] = 1.0
    turned, _ = SliceAugmentation(**(STILL | {"rotation": 90.0}), **PLAIN)(x, x > 0, generator_from(0))
    inside = (turned > 0).float()
    rows = (inside * torch.arange(41).view(1, 1, -1, 1)).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3))
    columns = (inside * torch.arange(61)).sum(dim=(1, 2, 3)) / inside.sum(dim=(1, 2, 3))
    assert (rows - 20).abs().max() < 0.3 and (columns - 30).abs().max() < 0.3
    # a square stays one: the farthest corner of an 11 x 11 square is 5 to 5.5 sqrt(2) from the middle
    area = inside.sum(dim=(1, 2, 3))
    assert area.min() > 0.9 * 121 and area.max() < 1.1 * 121


def test_gamma_turns_about_the_mean_of_the_brain():
    x, brain = slices(200)
    varied = recoloured(x, brain, log_gamma=0.3)
    for before, after, inside in zip(x[:5], varied[:5], brain[:5], strict=True):
        y, z = ((image[inside].numpy().astype(np.float64) + 1) / 2 for image in (before, after))
        mean = y.mean()
        gamma = np.log(z / mean) / np.log(y / mean)
        assert np.ptp(gamma[np.abs(y - mean) > 0.02]) < 1e-2  # one exponent for the slice


@pytest.mark.parametrize("name", ["log_gain", "log_bias"])
def test_spread_of_the_factors(name):
    x, brain = slices(400)
    varied = recoloured(x, brain, **{name: 0.1})
    logs = torch.log((varied[:, 0, 5, 6] + 1) / (x[:, 0, 5, 6] + 1))
    assert float(logs.mean()) == pytest.approx(0.0, abs=0.02)
    assert 0.05 < float(logs.std()) < 0.13
