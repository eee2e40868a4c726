"""What `save` and `load` keep is tested with the detector; here what they refuse, part by part."""

import json
import pickle
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.frozen import FrozenEstimator
from torch import nn

from madad import MaskedDiffusionAnomalyDetector, SliceAugmentation
from madad.diffusion import ForeignLatents, GaussianNoise, Mixture, SmoothOffset
from madad.mri import HealthyIntensities
from madad.nn import AUTOENCODER_SIZES, UNET_SIZES, AutoencoderConfig, AutoencoderKL, MaskedUNet, UNetConfig
from madad.pretrained.loading import load_autoencoder, load_unet
from madad.saving.model_card import ModelCard
from madad.saving.saved_detector import load_card, save_network
from madad.stages.autoencoder import LatentAutoencoder
from madad.testing import tiny_autoencoder, tiny_detector
from madad.training import Trainer

X = np.random.default_rng(0).random((12, 16, 16), dtype=np.float32)


@pytest.fixture(scope="module")
def fitted():
    return tiny_detector().fit(X)


@pytest.fixture(scope="module")
def saved_once(fitted, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "model"
    fitted.save(path)
    return path


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy, to be changed and replaced."""
    return shutil.copytree(saved_once, tmp_path / "model")


@pytest.mark.parametrize(
    "part, wrong",
    [
        (("denoiser",), 5),
        (("denoiser", "fields", "norm_groups"), 0),
        (("denoiser", "fields", "base_channels"), 12),
        (("autoencoder", "network"), None),
        (("autoencoder", "fitted"), {}),
        (("fitted", "image_shape_"), {"__class__": "Popen", "fields": {}}),
        (("parameters", "no_such_parameter"), 1),
    ],
)
def test_parts_that_do_not_fit_raise_one_clear_error(part, wrong, saved):
    config = json.loads((saved / "config.json").read_text())
    place = config
    for name in part[:-1]:
        place = place[name]
    place[part[-1]] = wrong
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model|Popen") as error:
        MaskedDiffusionAnomalyDetector.load(saved)
    assert len(str(error.value)) < 2000


def test_nested_parameters_lose_their_device_and_generator_but_nothing_else(tmp_path):
    autoencoder = tiny_autoencoder(
        device=torch.device("cpu"), random_state=np.random.RandomState(0), kl_weight=1e-3
    )
    corruption = Mixture((ForeignLatents(), SmoothOffset(noise=0.5)), (0.25, 0.75))
    detector = tiny_detector(
        autoencoder=autoencoder, corruption=corruption, augmentation=SliceAugmentation(n_copies=1)
    ).fit(X)
    detector.save(tmp_path / "model")
    loaded = MaskedDiffusionAnomalyDetector.load(tmp_path / "model")
    assert loaded.corruption == corruption and loaded.augmentation == SliceAugmentation(n_copies=1)
    assert (loaded.autoencoder.device, loaded.autoencoder.random_state) == ("auto", None)
    assert loaded.autoencoder.kl_weight == 1e-3
    np.testing.assert_array_equal(loaded.predict_maps(X), detector.predict_maps(X))
    assert detector.autoencoder is autoencoder and autoencoder.device == torch.device("cpu")


class Squares(nn.Module):
    """A perceptual distance that is an object with weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x_hat, x):
        return self.weight.mean() * (x_hat - x).square().mean()


def no_answer(state):
    return None


def of_this_machine(directory):
    """A trainer with what neither another machine nor another process has."""
    return Trainer(2, max_steps=4, checkpoint_dir=directory, callbacks=(no_answer,), validation_fraction=0.25)


@pytest.mark.parametrize("shared, perceptual", [(False, None), (True, "efficientnet-lite0")])
def test_what_only_training_needs_stays_behind(saved, tmp_path, shared, perceptual):
    trainer = of_this_machine(tmp_path / "runs")
    autoencoder = tiny_autoencoder(
        init=saved,
        perceptual=perceptual,
        perceptual_weight=0.0,
        adversarial_weight=0.25,
        adversarial_start=100,
        learn_logvar=True,
        pixel_loss="charbonnier",
        augmentation=SliceAugmentation(n_copies=1),
        trainer=trainer,
    )
    slices = np.pad(X, ((0, 0), (4, 4), (4, 4)))  # the discriminator's smallest
    given = FrozenEstimator(autoencoder.fit(slices)) if shared else autoencoder
    detector = tiny_detector(autoencoder=given, trainer=of_this_machine(tmp_path / "runs")).fit(slices)
    detector.save(tmp_path / "again")
    loaded = MaskedDiffusionAnomalyDetector.load(tmp_path / "again")
    for part in (loaded.autoencoder_, loaded.autoencoder.estimator if shared else loaded.autoencoder):
        assert part.init == str(saved)
        assert part.perceptual == perceptual
        for name in ("perceptual_weight", "adversarial_weight", "adversarial_start", "learn_logvar"):
            assert getattr(part, name) == getattr(autoencoder, name)
        assert (part.pixel_loss, part.augmentation) == ("charbonnier", SliceAugmentation(n_copies=1))
        assert part.trainer.checkpoint_dir is None and part.trainer.callbacks is None
        assert part.trainer.validation_fraction == 0.25
    assert loaded.trainer.checkpoint_dir is None and loaded.trainer.callbacks is None
    assert loaded.autoencoder_.history_ == detector.autoencoder_.history_
    assert loaded.autoencoder_.history_[-1]["logvar"] is not None
    np.testing.assert_array_equal(loaded.predict_maps(slices), detector.predict_maps(slices))
    # the detector itself keeps what it was given
    assert (autoencoder.init, autoencoder.perceptual) == (saved, perceptual)
    assert autoencoder.trainer is trainer and trainer.callbacks == (no_answer,)
    assert trainer.checkpoint_dir == tmp_path / "runs"


def test_a_loaded_detector_can_be_saved_and_fitted_again(saved, tmp_path):
    options = {"init": saved, "trainer": of_this_machine(tmp_path / "runs")}
    tiny_detector(autoencoder=tiny_autoencoder(**options)).fit(X).save(tmp_path / "again")
    loaded = MaskedDiffusionAnomalyDetector.load(tmp_path / "again")
    maps = loaded.predict_maps(X)
    loaded.save(tmp_path / "once more")
    np.testing.assert_array_equal(
        MaskedDiffusionAnomalyDetector.load(tmp_path / "once more").predict_maps(X), maps
    )
    assert loaded.fit(X).predict_maps(X).shape == maps.shape


def test_of_a_network_to_start_from_the_shape_is_saved(tmp_path):
    given = MaskedUNet(UNetConfig(latent_channels=2, base_channels=8, norm_groups=4, n_heads=2))
    detector = tiny_detector(denoiser=given).fit(X)
    detector.save(tmp_path / "model")
    loaded = MaskedDiffusionAnomalyDetector.load(tmp_path / "model")
    assert loaded.denoiser == given.config and detector.denoiser is given
    np.testing.assert_array_equal(loaded.predict_maps(X), detector.predict_maps(X))


# What load could not rebuild


class Ones:
    """An own corruption that is no dataclass."""

    def fill(self, z0, generator):
        return torch.ones_like(z0)


@dataclass(frozen=True)
class Constant:
    """An own corruption that could be taken for one of ours."""

    value: float = 1.0

    def fill(self, z0, generator):
        return torch.full_like(z0, self.value)


@dataclass(frozen=True)
class QuietNoise(GaussianNoise):
    pass


class OwnTrainer(Trainer):
    pass


class OwnAutoencoder(LatentAutoencoder):
    pass


class OwnUNet(MaskedUNet):
    pass


class OwnShape(AutoencoderConfig):
    pass


def squares(x_hat, x):
    return (x_hat - x).square().mean()


UNREBUILDABLE = {
    "own corruption": ("corruption", Ones(), f"<{__name__}.Ones object"),
    "own dataclass": ("corruption", Constant(), "Constant(value=1.0)"),
    "own corruption among ours": (
        r"corruption\.corruptions\[1\]",
        Mixture((GaussianNoise(), Constant())),
        "Constant(value=1.0)",
    ),
    "subclass of a corruption": ("corruption", QuietNoise(), "QuietNoise()"),
    "subclass of Trainer": ("trainer", OwnTrainer(1), "OwnTrainer(max_epochs=1)"),
    "own augmentation": ("augmentation", squares, "<function squares"),
    "own module to start from": ("denoiser", nn.Linear(1, 1), "Linear(in_features=1"),
    "subclass to start from": ("denoiser", OwnUNet(UNET_SIZES["tiny"]), "OwnUNet( (time_embedding)"),
    "subclass of the autoencoder": ("autoencoder", OwnAutoencoder("tiny"), "OwnAutoencoder(size='tiny')"),
    "own shape": (r"autoencoder\.size", LatentAutoencoder(OwnShape()), "OwnShape(image_channels=1"),
    "own callable": (
        r"autoencoder\.perceptual",
        LatentAutoencoder("tiny", perceptual=squares),
        "<function squares",
    ),
    "own module": (r"autoencoder\.perceptual", LatentAutoencoder(perceptual=Squares()), "Squares()"),
    "own trainer in it": (
        r"autoencoder\.trainer",
        LatentAutoencoder(trainer=OwnTrainer(1)),
        "OwnTrainer(max_epochs=1)",
    ),
    "array": ("mask_patch_sizes", np.array([1, 2]), "array([1, 2])"),
}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_refused(detector, saved, name, value, advice):
    before = contents(saved.parent)
    for path in (saved, saved.parent / "new"):
        with pytest.raises(TypeError, match=f"^{name} must (be|have) .*to be saved.*{advice}") as caught:
            detector.save(path)
        assert value in str(caught.value)
    assert contents(saved.parent) == before and [entry.name for entry in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", UNREBUILDABLE)
def test_a_parameter_that_load_could_not_rebuild_is_refused_by_save(kind, saved):
    """Whatever load would refuse: the error names the parameter and its value, and nothing is written."""
    name, value, shown = UNREBUILDABLE[kind]
    detector = MaskedDiffusionAnomalyDetector.load(saved).set_params(**{name.split("\\")[0]: value})
    check_refused(detector, saved, name, f"got {shown}", "or keep the estimator with joblib")


@pytest.mark.parametrize("part", ["denoiser_", "autoencoder_"])
def test_a_network_with_other_layers_than_its_config_says_is_refused(part, saved):
    detector = MaskedDiffusionAnomalyDetector.load(saved)
    network = detector.denoiser_ if part == "denoiser_" else detector.autoencoder_.network_
    network.extra = nn.Linear(1, 1)
    check_refused(detector, saved, type(network).__name__, "('extra.bias', (1,))", "Keep such a network")


def test_an_autoencoder_is_still_shared_after_pickling(saved):
    detector = MaskedDiffusionAnomalyDetector.load(saved)
    detector.autoencoder = FrozenEstimator(detector.autoencoder_)
    pickle.loads(pickle.dumps(detector)).save(saved)
    loaded = MaskedDiffusionAnomalyDetector.load(saved)
    assert loaded.autoencoder.estimator is loaded.autoencoder_
    np.testing.assert_array_equal(loaded.predict_maps(X), detector.predict_maps(X))


def test_another_shared_autoencoder_than_the_one_fitted_with_is_refused(saved):
    given = FrozenEstimator(tiny_autoencoder(batch_size=2))
    detector = MaskedDiffusionAnomalyDetector.load(saved).set_params(autoencoder=given)
    check_refused(detector, saved, "autoencoder", "batch_size=2", "Fit the detector again")


@pytest.mark.parametrize("shared", [False, True])
def test_a_fitted_part_that_load_could_not_rebuild_is_refused_by_save(shared, saved):
    parts = {
        "denoiser": OwnUNet(UNET_SIZES["tiny"]),
        "autoencoder": OwnAutoencoder("tiny"),
    }
    for name, part in parts.items():
        detector = MaskedDiffusionAnomalyDetector.load(saved)
        setattr(detector, f"{name}_", part)
        check_refused(detector, saved, name, f"got {type(part).__name__}", "Keep the estimator with joblib")
    detector = MaskedDiffusionAnomalyDetector.load(saved)
    if shared:
        detector.autoencoder = FrozenEstimator(detector.autoencoder_)
    detector.autoencoder_.perceptual = squares
    check_refused(
        detector, saved, r"autoencoder\.perceptual", f"got {squares!r}", "None where that is possible"
    )
    detector.autoencoder_.perceptual = None  # as it says
    detector.save(saved)


# The card


@pytest.fixture
def card():
    rng = np.random.default_rng(0)
    healthy = HealthyIntensities(
        4, rng.random(9), *(rng.random((2, 3, 4), dtype=np.float32) for _ in range(2))
    )
    return ModelCard(contrasts=("T1",), data={"subjects": 4}, volume_threshold=0.1, healthy={"T1": healthy})


def test_a_card_comes_back_with_its_healthy_intensities(saved, card):
    detector = MaskedDiffusionAnomalyDetector.load(saved)
    detector.save(saved, card=card)  # replaces the model
    back = load_card(saved)
    assert back.to_json() == card.to_json()
    for name, values in card.healthy["T1"].to_arrays().items():
        np.testing.assert_array_equal(back.healthy["T1"].to_arrays()[name], values)
    back.healthy["T1"].total += 1  # may be added to
    assert "subjects: 4" in (saved / "README.md").read_text()
    np.testing.assert_array_equal(
        MaskedDiffusionAnomalyDetector.load(saved).predict_maps(X), detector.predict_maps(X)
    )
    detector.save(saved)
    assert load_card(saved) == ModelCard() and not (saved / "healthy.safetensors").exists()


def test_without_a_card_people_read_that_preprocessing_is_not_known(saved):
    assert load_card(saved) == ModelCard()
    text = (saved / "README.md").read_text()
    assert text.startswith("# model\n") and "For research use only" in text
    assert "## Preprocessing\n\nNot known: arrays were given to `fit`." in text
    assert "class: MaskedDiffusionAnomalyDetector" in text and "map_threshold: " in text


def test_a_missing_or_damaged_card_is_named(saved, card):
    MaskedDiffusionAnomalyDetector.load(saved).save(saved, card=card)
    (saved / "healthy.safetensors").write_bytes(b"damage")
    with pytest.raises(ValueError, match="healthy.safetensors must be a safetensors file, got a damaged one"):
        load_card(saved)
    (saved / "card.json").write_text("{}")
    (saved / "healthy.safetensors").unlink()
    with pytest.raises(ValueError, match="card.json must hold what was written beside the model"):
        load_card(saved)
    (saved / "card.json").unlink()
    with pytest.raises(FileNotFoundError, match="card.json must exist, got no such file"):
        load_card(saved)
    MaskedDiffusionAnomalyDetector.load(saved)  # models of earlier versions have none


# A network alone


NETWORKS = {
    "autoencoder": (
        AutoencoderKL,
        AUTOENCODER_SIZES["tiny"],
        load_autoencoder,
        r"autoencoder=LatentAutoencoder\(init=path\)",
    ),
    "denoiser": (
        MaskedUNet,
        UNET_SIZES["tiny"],
        load_unet,
        r"denoiser=madad.pretrained.load_unet\(path\)",
    ),
}
all_networks = pytest.mark.parametrize("part", NETWORKS)


@all_networks
def test_a_network_comes_back_bit_by_bit(part, tmp_path):
    kind, config, load, _ = NETWORKS[part]
    network = kind(config)
    save_network(network, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", f"{part}.safetensors"}
    for source in (tmp_path / "out", tmp_path / "out" / f"{part}.safetensors"):
        found = load(source)
        assert type(found) is kind and found.config == config and not found.training
        torch.testing.assert_close(found.state_dict(), network.state_dict(), rtol=0, atol=0)


@all_networks
def test_a_network_alone_is_no_detector_and_says_how_it_is_used(part, tmp_path):
    kind, config, _, use = NETWORKS[part]
    save_network(kind(config), tmp_path / "out")
    message = f"out must hold a Masked.*got a network alone, '{kind.__name__}'. Fit a detector with it: {use}"
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionAnomalyDetector.load(tmp_path / "out")


@all_networks
def test_a_network_replaces_networks_only(part, saved, tmp_path):
    kind, config, _, _ = NETWORKS[part]
    for part_before in NETWORKS:
        save_network(NETWORKS[part_before][0](NETWORKS[part_before][1]), tmp_path / "out")
        save_network(kind(config), tmp_path / "out")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", f"{part}.safetensors"}
    message = (
        "path must be new, empty or hold a network alone, got .* with a 'MaskedDiffusionAnomalyDetector'"
    )
    with pytest.raises(FileExistsError, match=message):
        save_network(kind(config), saved)
    MaskedDiffusionAnomalyDetector.load(saved)


def test_other_networks_are_not_saved(tmp_path):
    class Mine(MaskedUNet):
        pass

    for network in (nn.Linear(1, 1), Mine(UNET_SIZES["tiny"])):
        with pytest.raises(TypeError, match="network must be one of .*'MaskedUNet'.*, got (Linear|Mine)"):
            save_network(network, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [["AutoencoderKL"], None, {}, 3])
def test_a_damaged_class_is_one_clear_error(saved, wrong):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"class": wrong}))
    with pytest.raises(ValueError, match="model must hold a MaskedDiffusionAnomalyDetector, got "):
        MaskedDiffusionAnomalyDetector.load(saved)
    with pytest.raises(FileExistsError):
        save_network(MaskedUNet(UNET_SIZES["tiny"]), saved)
