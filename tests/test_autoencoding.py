import pickle

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

from madad.autoencoding import LatentAutoencoder
from madad.datasets import make_brain_slices
from madad.nn import AUTOENCODER_SIZES, AutoencoderConfig
from madad.reconstruction import structure_distance
from madad.testing import tiny_autoencoder
from madad.training import Trainer

SLICES = make_brain_slices(24, size=32, random_state=0).images
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def fitted():
    return tiny_autoencoder(intensity_range=(0.0, 1.0)).fit(SLICES)


@pytest.fixture(scope="module")
def two_channels():
    images = np.stack([SLICES, 1 - SLICES], axis=1) * (SLICES > 0)[:, None]
    return images, tiny_autoencoder(latent_channels=4, intensity_range=(0.0, 1.0)).fit(images)


def error_in_brain(images, slices=SLICES):
    return float(np.abs(images - slices)[slices > 0].mean())


def state_of(autoencoder):
    return {name: value.clone() for name, value in autoencoder.network_.state_dict().items()}


def same_states(a, b):
    a, b = state_of(a), state_of(b)
    return all(torch.equal(a[name], b[name]) for name in a)


# Properties


@parametrize_with_checks([tiny_autoencoder()])
def test_scikit_learns_contract(estimator, check):
    check(estimator)


def test_training_improves_on_principal_components_and_far_on_the_mean():
    def error_after(**training):
        trainer = Trainer(ema_decay=0.0, batch_size=8, **training)
        autoencoder = LatentAutoencoder("tiny", trainer=trainer, random_state=0).fit(SLICES)
        return error_in_brain(autoencoder.inverse_transform(autoencoder.transform(SLICES)))

    trained = error_after(max_epochs=60, learning_rate=5e-3)
    components = error_after(max_epochs=1, max_steps=1, learning_rate=1e-9)
    mean = error_in_brain(np.broadcast_to(SLICES.mean(axis=0), SLICES.shape))
    assert trained < 0.85 * components and trained < 0.75 * mean


def test_history_falls_and_names_its_terms():
    trainer = Trainer(15, batch_size=8, learning_rate=3e-3)
    history = LatentAutoencoder("tiny", trainer=trainer, random_state=0).fit(SLICES).history_
    assert {"loss", "l1", "structure", "kl"} <= set(history[0])
    assert history[-1]["loss"] < history[0]["loss"]
    for record in history:
        total = record["l1"] + record["structure"] + 1e-6 * record["kl"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)


def test_latents_have_zero_mean_and_unit_variance_over_the_brain(fitted):
    latents = fitted.transform(SLICES)
    assert latents.dtype == np.float32
    brain = (SLICES > 0).reshape(24, 8, 4, 8, 4).any(axis=(2, 4))
    inside = latents.transpose(0, 2, 3, 1)[brain].astype(np.float64)
    np.testing.assert_allclose(inside.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(inside.var(axis=0), 1, atol=1e-3)


def test_the_brain_mask_says_where_statistics_are_taken():
    left = np.zeros(SLICES.shape, bool)
    left[:, :, :16] = True
    autoencoder = tiny_autoencoder(intensity_range=(0.0, 1.0)).fit(SLICES, brain_mask=left)
    inside = autoencoder.transform(SLICES)[..., :4].transpose(0, 2, 3, 1).reshape(-1, 2).astype(np.float64)
    np.testing.assert_allclose(inside.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(inside.var(axis=0), 1, atol=1e-3)


def test_empty_slices_among_others_do_not_move_the_statistics():
    """With one slice per batch, too: background serves only where no slice has brain."""
    autoencoder = tiny_autoencoder(batch_size=1).fit(np.concatenate([SLICES, 0 * SLICES[:3]]))
    latents = autoencoder.transform(SLICES).transpose(0, 2, 3, 1)
    inside = latents[(SLICES > 0).reshape(24, 8, 4, 8, 4).any(axis=(2, 4))].astype(np.float64)
    np.testing.assert_allclose(inside.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(inside.var(axis=0), 1, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_constant_slices_and_a_single_one_are_taken(value):
    X = np.full((1, 16, 16), value)
    autoencoder = tiny_autoencoder(intensity_range=(0.0, 1.0)).fit(X)
    images = autoencoder.inverse_transform(autoencoder.transform(X))
    np.testing.assert_allclose(images, X, atol=0.2)


def test_inverse_transform_gives_slices_in_the_unit_range(fitted):
    images = fitted.inverse_transform(100 * RNG.normal(size=(3, 2, 8, 8)))
    assert images.shape == (3, 32, 32) and images.dtype == np.float32
    assert images.min() == 0 and images.max() == 1


def test_inverse_transform_undoes_transform_about(fitted):
    images = fitted.inverse_transform(fitted.transform(SLICES))
    assert error_in_brain(images) < 0.12
    shuffled = fitted.inverse_transform(fitted.transform(SLICES)[::-1])
    np.testing.assert_array_equal(shuffled, images[::-1])


def test_odd_sizes_are_padded_and_cropped():
    slices = np.pad(SLICES, ((0, 0), (0, 0), (1, 1)))[:, 1:-1]
    autoencoder = tiny_autoencoder(intensity_range=(0.0, 1.0)).fit(slices)
    latents = autoencoder.transform(slices)
    assert latents.shape[1:] == autoencoder.latent_shape_ == (2, 8, 9)
    images = autoencoder.inverse_transform(latents)
    assert images.shape == (24, 30, 34) and error_in_brain(images, slices) < 0.12
    x = torch.from_numpy(np.pad(slices, ((0, 0), (0, 2), (0, 2))))[:, None] * 2 - 1
    with torch.inference_mode():
        mean = autoencoder.network_.encode(x).mean.numpy()
    shift, scale = (v[:, None, None] for v in (autoencoder.latent_shift_, autoencoder.latent_scale_))
    np.testing.assert_allclose(latents, (mean - shift) * scale, atol=1e-4)


def test_channels_are_kept_apart(two_channels):
    images, autoencoder = two_channels
    back = autoencoder.inverse_transform(autoencoder.transform(images))
    assert back.shape == images.shape
    for channel in range(2):
        assert error_in_brain(back[:, channel], images[:, channel]) < 0.1


def test_flat_rows_are_the_same_slices():
    options = {"intensity_range": (0.0, 1.0), "image_shape": (32, 32)}
    a, b = tiny_autoencoder(**options).fit(SLICES), tiny_autoencoder(**options).fit(SLICES.reshape(24, -1))
    assert same_states(a, b)
    np.testing.assert_array_equal(a.transform(SLICES), b.transform(SLICES.reshape(24, -1)))
    np.testing.assert_array_equal(a.transform(SLICES.reshape(24, -1)), b.transform(SLICES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_and_memory_maps_are_read(fitted, tmp_path, dtype):
    expected = fitted.transform(SLICES)
    np.testing.assert_array_equal(fitted.transform(torch.from_numpy(SLICES).to(dtype)), expected)
    np.save(tmp_path / "slices.npy", SLICES)
    np.testing.assert_array_equal(fitted.transform(np.load(tmp_path / "slices.npy", mmap_mode="r")), expected)


def test_integers_are_the_same_slices_up_to_rounding(fitted):
    as_bytes = np.round(SLICES * 255).astype(np.uint8)
    np.testing.assert_array_equal(fitted.transform(as_bytes), fitted.transform(as_bytes / np.float32(255)))


# Invariance and determinism, bitwise


def test_latents_do_not_depend_on_batch_or_order(fitted):
    latents = fitted.transform(SLICES)
    order = RNG.permutation(24)
    np.testing.assert_array_equal(fitted.transform(SLICES[order]), latents[order])
    for part in (slice(0, 1), slice(5, 6), slice(7, 20)):
        np.testing.assert_array_equal(fitted.transform(SLICES[part]), latents[part])
    many = np.concatenate([SLICES, SLICES])  # two batches
    np.testing.assert_array_equal(fitted.transform(many), np.concatenate([latents, latents]))


def test_one_seed_gives_one_network_and_leaves_the_global_generator_alone(fitted):
    before = torch.get_rng_state()
    again = clone(fitted).fit(SLICES)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_states(fitted, again)
    np.testing.assert_array_equal(fitted.transform(SLICES), again.transform(SLICES))
    assert not same_states(fitted, clone(fitted).set_params(random_state=1).fit(SLICES))


def test_pickling_keeps_every_bit_and_holds_no_tensor(fitted):
    text = pickle.dumps(fitted)
    assert b"torch" not in text
    back = pickle.loads(text)
    assert not back.network_.training and same_states(back, fitted)
    np.testing.assert_array_equal(back.transform(SLICES), fitted.transform(SLICES))
    assert joblib.hash(back) == joblib.hash(fitted)
    assert "network_" not in pickle.loads(pickle.dumps(tiny_autoencoder())).__dict__


# Parameters


def test_parameters_and_clone(fitted):
    copy = clone(fitted)
    assert not hasattr(copy, "network_")
    assert copy.get_params()["trainer__max_steps"] == 10
    expected = {name: value for name, value in fitted.get_params().items() if name != "trainer"}
    assert {name: value for name, value in copy.get_params().items() if name != "trainer"} == expected


def test_fitting_leaves_parameters_alone(fitted):
    trainer = Trainer(1, max_steps=1)
    autoencoder = tiny_autoencoder(trainer=trainer).fit(SLICES[:4])
    assert autoencoder.trainer is trainer and vars(trainer) == vars(Trainer(1, max_steps=1))


@pytest.mark.parametrize("channels", [1, 3])
def test_latent_channels_override_the_size(channels):
    autoencoder = tiny_autoencoder(latent_channels=channels).fit(SLICES[:4])
    assert autoencoder.transform(SLICES[:4]).shape == (4, channels, 8, 8)


@pytest.mark.parametrize(
    "shape, size",
    [((16, 80), "fast-f2"), ((81, 16), "fast-f4"), ((16, 160), "fast-f4"), ((161, 16), "fast-f8")],
)
def test_the_automatic_size_goes_by_the_longer_side(shape, size):
    auto = LatentAutoencoder(trainer=Trainer(1, max_steps=1)).fit(RNG.random((2, *shape)))
    assert auto.config_ == AUTOENCODER_SIZES[size]
    assert auto.config_.factor == int(size[-1])


def test_a_size_may_be_a_shape():
    trainer = Trainer(1, max_steps=1)
    config = AutoencoderConfig(
        base_channels=8, channel_multipliers=(1, 1), n_res_blocks=1, norm_groups=4, mid_attention=False
    )
    shaped = LatentAutoencoder(config, trainer=trainer).fit(SLICES[:2])
    assert shaped.config_ == config and shaped.transform(SLICES[:2]).shape == (2, 4, 16, 16)


def test_progress_is_shown_on_request(capsys):
    tiny_autoencoder(verbose=True).fit(SLICES[:4])
    shown = capsys.readouterr().err
    assert "autoencoder" in shown and "loss=" in shown


# Errors


@pytest.mark.parametrize("value", ["huge", 8, None, Trainer])
def test_an_unknown_size_is_refused(value):
    with pytest.raises(ValueError, match="size must be 'auto', one of .*'tiny'") as caught:
        tiny_autoencoder(size=value).fit(SLICES)
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 3, 8, 8), (1, 2, 8, 7), (0, 2, 8, 8)])
def test_latents_of_another_shape_are_refused(fitted, shape):
    with pytest.raises(ValueError, match=r"Z must have shape \(n_samples, 2, 8, 8\)") as caught:
        fitted.inverse_transform(np.zeros(shape))
    assert f"got {shape}" in str(caught.value)


@pytest.mark.parametrize("shape, seen", [((2, 32, 30), (1, 32, 30)), ((2, 2, 32, 32), (2, 32, 32))])
def test_slices_of_another_shape_than_in_fit_are_refused(fitted, shape, seen):
    with pytest.raises(ValueError, match=r"X must have slices of shape \(1, 32, 32\).*as in fit") as caught:
        fitted.transform(np.zeros(shape))
    assert f"got {seen}" in str(caught.value)


def test_flat_rows_of_another_length_than_in_fit_are_refused(fitted):
    with pytest.raises(ValueError, match="X has 1023 features.*expecting 1024 features"):
        fitted.transform(SLICES.reshape(24, -1)[:, 1:])


@pytest.mark.parametrize("method", ["transform", "inverse_transform"])
def test_an_unfitted_autoencoder_says_so(method):
    with pytest.raises(NotFittedError, match="LatentAutoencoder instance is not fitted"):
        getattr(tiny_autoencoder(), method)(SLICES)


def test_bad_slices_are_refused_by_name(fitted):
    with pytest.raises(ValueError, match=r"X must lie in 0\.\.1, got values from 0 to 2"):
        fitted.transform(2 * SLICES / SLICES.max())
    with pytest.raises(ValueError, match=r"X must have shape .*got \(1, 1, 24, 32, 32\)"):
        fitted.transform(SLICES[None, None])
    with pytest.raises(ValueError, match="Input X contains NaN"):
        fitted.transform(np.where(SLICES > 0.5, np.nan, SLICES))
    with pytest.raises(ValueError, match=r"brain_mask must have shape \(24, 32, 32\).*got \(24, 8, 8\)"):
        tiny_autoencoder().fit(SLICES, brain_mask=np.ones((24, 8, 8)))


# Formula


@pytest.mark.parametrize("shape", [(2, 1, 8, 12), (3, 2, 7, 9), (1, 1, 4, 4)])
def test_structure_distance_is_the_mean_l1_of_gradients_at_three_scales(shape):
    x_hat, x = RNG.normal(size=(2, *shape))
    total = 0.0
    for scale in (1, 2, 4):
        height, width = shape[2] // scale, shape[3] // scale
        coarse = [
            image[..., : height * scale, : width * scale]
            .reshape(*shape[:2], height, scale, width, scale)
            .mean(axis=(3, 5))
            for image in (x_hat, x)
        ]
        for axis in (-1, -2):
            if coarse[0].shape[axis] > 1:
                total += np.abs(np.diff(coarse[0], axis=axis) - np.diff(coarse[1], axis=axis)).mean()
    got = structure_distance(torch.from_numpy(x_hat), torch.from_numpy(x))
    assert float(got) == pytest.approx(total / 6, rel=1e-12)


def test_structure_distance_ignores_a_constant_offset():
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(structure_distance(x + 0.3, x)) == pytest.approx(0, abs=1e-12)
    assert float(structure_distance(x.flip(-1), x)) > 0.1
