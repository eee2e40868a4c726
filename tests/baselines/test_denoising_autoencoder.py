import numpy as np
import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from madad import Trainer
from madad.baselines.denoising_autoencoder import DenoisingAutoencoder, coarse_noise
from madad.datasets import make_brain_slices
from madad.nn import UNetConfig


@pytest.fixture(scope="module")
def healthy():
    return make_brain_slices(24, size=32, random_state=0)


@pytest.fixture(scope="module")
def fitted(healthy):
    """Never change it."""
    return tiny_baseline().fit(healthy.images, groups=healthy.subjects)


def tiny_baseline(**overrides):
    defaults = {"denoiser": "tiny", "trainer": brief(20), "batch_size": 4, "random_state": 0}
    return DenoisingAutoencoder(**(defaults | overrides))


def brief(steps):
    return Trainer(10**6, max_steps=steps, batch_size=8, learning_rate=3e-3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# The noise


@pytest.mark.parametrize("size", [(24, 24), (24, 18), (5, 30)])
def test_noise_is_a_coarse_grid_stretched_and_rolled(size):
    height, width = size
    n, channels, resolution = 3, 2, 6
    found = coarse_noise((n, channels, height, width), resolution, seeded()).numpy()
    generator = seeded()
    grid = [max(1, round(resolution * side / max(size))) for side in size]
    coarse = torch.randn(n, channels, *grid, generator=generator).double().numpy()
    down = torch.randint(height, (n,), generator=generator).tolist()
    right = torch.randint(width, (n,), generator=generator).tolist()
    places = [np.linspace(0, points - 1, side) for points, side in zip(grid, size, strict=True)]
    for i in range(n):
        for c in range(channels):
            values = coarse[i, c]
            axes = [np.arange(max(2, points)) for points in grid]
            values = np.pad(values, [(0, len(a) - p) for a, p in zip(axes, grid, strict=True)], mode="edge")
            stretched = RegularGridInterpolator(axes, values)(tuple(np.meshgrid(*places, indexing="ij")))
            expected = np.roll(stretched, (-down[i], -right[i]), (0, 1))
            np.testing.assert_allclose(found[i, c], expected, atol=1e-5)


def test_noise_has_the_grids_variance_and_every_slice_its_own():
    noise = coarse_noise((400, 1, 16, 16), 16, seeded())
    assert noise.std() == pytest.approx(1, abs=0.02) and noise.mean() == pytest.approx(0, abs=0.02)
    assert len({tuple(row) for row in noise.flatten(1).tolist()}) == 400
    smooth = coarse_noise((100, 1, 64, 64), 4, seeded())
    assert smooth.diff(dim=-1)[..., 0, :].abs().median() < 0.1 < smooth.std()


# The loss


class Scaled(nn.Module):
    """Takes 0.9 of what it is given for clean, and remembers it."""

    def forward(self, x, t):
        self.x, self.t = x, t
        return 0.9 * x, None


def test_loss_is_the_squared_error_inside_the_brain():
    x = 2 * torch.rand(3, 2, 16, 12, generator=seeded(1)) - 1
    brain = torch.zeros(3, 1, 16, 12)
    brain[:, :, 4:12, 3:10] = 1
    baseline, unet = DenoisingAutoencoder(noise_std=0.3, noise_resolution=5), Scaled()
    loss = baseline._loss(unet, x, brain, seeded())
    inside = np.broadcast_to(brain.numpy() > 0, x.shape)
    noise = coarse_noise(x.shape, 5, seeded()).double().numpy()
    noisy = x.double().numpy() + np.where(inside, 0.6 * noise, 0)  # 0.3 on 0..1
    np.testing.assert_allclose(unet.x, noisy, atol=1e-6)
    assert (unet.t == 1).all() and np.array_equal(unet.x.numpy()[~inside], x.numpy()[~inside])
    assert loss.item() == pytest.approx(np.mean((0.9 * noisy - x.numpy())[inside] ** 2), rel=1e-5)


def test_loss_without_brain_is_nothing():
    x, brain = torch.zeros(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    assert DenoisingAutoencoder()._loss(Scaled(), x, brain, seeded()) == 0


# The estimator


@parametrize_with_checks(
    [
        DenoisingAutoencoder(
            denoiser="tiny", trainer=Trainer(1, max_steps=2), intensity_range="data", random_state=0
        )
    ]
)
def test_scikit_learn_check(estimator, check):
    check(estimator)


def test_maps_are_what_the_network_changes(healthy):
    X = np.stack([healthy.images, healthy.images[..., ::-1]], axis=1)
    baseline = tiny_baseline(smoothing_px=0).fit(X)
    with torch.inference_mode():
        x = torch.from_numpy(2 * X - 1)
        clean = baseline.denoiser_.eval()(x, torch.ones(len(x), dtype=torch.long))[0].double().numpy()
    difference = np.abs(X - np.clip((clean + 1) / 2, 0, 1)).mean(axis=1)
    expected = np.where(X.any(axis=1), difference, 0)
    np.testing.assert_allclose(baseline.predict_maps(X), expected, atol=1e-5)


def test_maps_do_not_depend_on_company_or_order(fitted, healthy, two_threads):
    X = healthy.images
    maps = fitted.predict_maps(X)
    for rows in (np.array([7]), np.arange(24)[::-1], np.array([3, 3, 20, 1, 0])):
        np.testing.assert_array_equal(fitted.predict_maps(X[rows]), maps[rows])
    assert 0 < maps.max() <= 1 and maps.min() == 0 and not maps[X == 0].any()


def test_one_seed_one_result_and_noise_of_its_own(fitted, healthy):
    before = torch.get_rng_state()
    twin, other = (
        tiny_baseline(**changed).fit(healthy.images, groups=healthy.subjects)
        for changed in ({}, {"noise_std": 0.5})
    )
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(twin.predict_maps(healthy.images), fitted.predict_maps(healthy.images))
    assert not np.array_equal(other.predict_maps(healthy.images), twin.predict_maps(healthy.images))


def test_a_pasted_square_is_found(healthy):
    config = UNetConfig(
        base_channels=16,
        channel_multipliers=(1, 2),
        n_res_blocks=1,
        attention_levels=(),
        patch_size=2,
        norm_groups=4,
    )
    baseline = tiny_baseline(denoiser=config, trainer=brief(150), noise_resolution=8)
    baseline.fit(healthy.images, groups=healthy.subjects)
    X = healthy.images.copy()
    X[:, 13:18, 13:18] = 1
    assert (baseline.score_samples(X) < baseline.score_samples(healthy.images)).mean() > 0.9
    maps = baseline.predict_maps(X)
    assert maps[:, 14:17, 14:17].mean() > 3 * maps[maps > 0].mean()


def test_save_and_load(healthy, tmp_path):
    baseline = tiny_baseline(trainer=brief(2), noise_std=0.1, contamination=0.1)
    baseline.fit(healthy.images, groups=healthy.subjects).save(tmp_path / "model")
    loaded = DenoisingAutoencoder.load(tmp_path / "model")
    before, after = (estimator.get_params(deep=False) for estimator in (baseline, loaded))
    assert before.pop("trainer").get_params() == after.pop("trainer").get_params()
    assert before | {"batch_size": None} == after | {"batch_size": None}
    for call in ("predict_maps", "predict_masks", "decision_function", "predict"):
        np.testing.assert_array_equal(
            getattr(loaded, call)(healthy.images), getattr(baseline, call)(healthy.images)
        )
    assert loaded.history_ == baseline.history_
    refitted = loaded.fit(healthy.images, groups=healthy.subjects)
    np.testing.assert_array_equal(
        refitted.predict_maps(healthy.images), baseline.predict_maps(healthy.images)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_std", 0.0),
        ("noise_std", float("nan")),
        ("noise_resolution", 0),
        ("noise_resolution", 2.5),
        ("smoothing_px", -1.0),
        ("denoiser", "huge"),
    ],
)
def test_parameters_outside_their_ranges_are_named(name, value, healthy):
    with pytest.raises(ValueError, match=rf"(?s)^{name} must .*, got {value!r}\. (Use|The paper)"):
        tiny_baseline(**{name: value}).fit(healthy.images)
