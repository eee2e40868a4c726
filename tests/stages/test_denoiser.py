import gc
import itertools
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import madad.stages.latent_cache
from madad.base.check_slices import check_slices
from madad.datasets import make_brain_slices
from madad.diffusion import (
    CORRUPTIONS,
    EitherMask,
    MaskedDiffusionObjective,
    RandomBlobs,
    RandomPatches,
    SmoothOffset,
)
from madad.nn import UNET_SIZES, MaskedUNet
from madad.stages.denoiser import MASK_SHAPES, make_denoiser, make_objective, train_denoiser
from madad.stages.latent_cache import cache_latents
from madad.testing import tiny_autoencoder
from madad.training import Trainer

IMAGES = make_brain_slices(10, size=32, random_state=0).images
STACK = check_slices(IMAGES)
OBJECTIVE = {
    "n_timesteps": 10,
    "corruption": "mixture",
    "mask_shape": "either",
    "mask_ratio": 0.4,
    "mask_patch_sizes": (1, 2, 4, 8),
    "mask_patch_probabilities": (0.25, 0.25, 0.25, 0.25),
    "brain_rule": "paper",
    "mask_loss": "bce",
    "mask_loss_weight": 0.1,
}
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def autoencoder():
    return tiny_autoencoder(intensity_range=(0.0, 1.0)).fit(IMAGES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Training


def train(
    autoencoder,
    *,
    denoiser="tiny",
    seed=0,
    objective=OBJECTIVE,
    stack=STACK,
    cache_directory=None,
    **training,
):
    trainer = Trainer(**({"max_epochs": 3, "batch_size": 8, "learning_rate": 3e-3} | training))
    return train_denoiser(
        autoencoder,
        stack,
        denoiser=denoiser,
        objective=make_objective(**objective),
        trainer=trainer,
        seed=seed,
        cache_directory=cache_directory,
    )


def test_one_seed_gives_one_denoiser_and_leaves_the_global_generator_alone(autoencoder):
    before = torch.get_rng_state()
    (a, history_a), (b, history_b), (c, _) = (train(autoencoder, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
    assert [record["loss"] for record in history_a] == [record["loss"] for record in history_b]


def test_training_lowers_the_loss_and_both_of_its_terms(autoencoder):
    denoiser, history = train(autoencoder, max_epochs=40, ema_decay=0.0)
    assert not denoiser.training and {p.device.type for p in denoiser.parameters()} == {"cpu"}
    for name in ("loss", "z0", "mask"):
        values = [record[name] for record in history]
        assert np.mean(values[-5:]) < 0.75 * np.mean(values[:2])
    for record in history:
        expected = record["z0"] + OBJECTIVE["mask_loss_weight"] * record["mask"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def all_large(monkeypatch):
    monkeypatch.setattr(madad.stages.latent_cache, "LARGE_CACHE", 0)


def open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0


def test_training_from_a_file_is_bitwise_that_from_memory(autoencoder, tmp_path, all_large):
    options = {"validation_fraction": 0.2, "max_epochs": 2}
    here, history = train(autoencoder, **options)
    before = open_files()
    there, same_history = train(autoencoder, cache_directory=tmp_path / "cache", **options)
    assert list((tmp_path / "cache").iterdir()) == [] and open_files() == before
    assert all(torch.equal(p, q) for p, q in zip(here.parameters(), there.parameters(), strict=True))
    for name in ("loss", "validation_loss"):
        assert [record[name] for record in history] == [record[name] for record in same_history]


def test_no_file_stays_after_an_error(autoencoder, tmp_path, all_large):
    def fail(state):
        assert list(tmp_path.iterdir()) == []  # not even while it is read: it has no name
        raise RuntimeError("stop")

    before = open_files()
    with pytest.raises(RuntimeError, match="stop"):
        train(autoencoder, cache_directory=tmp_path, callbacks=[fail])
    gc.collect()
    assert list(tmp_path.iterdir()) == [] and open_files() == before


def test_the_autoencoder_is_frozen(autoencoder):
    before = {name: value.clone() for name, value in autoencoder.network_.state_dict().items()}
    train(autoencoder)
    for name, value in autoencoder.network_.state_dict().items():
        assert torch.equal(value, before[name])


class Noting(nn.Module):
    """Answers with the noisy latent itself, and notes how many distinct positions it was shown."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.batches = []

    def forward(self, z_t, t):
        self.batches.append(z_t.detach())
        return self.scale * z_t, self.scale * z_t[:, :1]


@pytest.mark.parametrize("flip, n_batches", [(True, 4), (False, 2)])
def test_training_sees_every_slice_and_its_mirror_image(autoencoder, flip, n_batches):
    nothing_masked = OBJECTIVE | {"mask_shape": "patches", "mask_ratio": 0.0}
    cache = cache_latents(autoencoder, STACK, flip=flip, generator=seeded())
    module = Noting()
    trained, _ = train_denoiser(
        autoencoder,
        STACK,
        denoiser=module,
        objective=make_objective(**nothing_masked),
        trainer=Trainer(1, batch_size=5),
        seed=0,
        flip=flip,
    )
    assert trained is module and len(module.batches) == n_batches
    seen = torch.cat(module.batches).flatten(1)
    # without masks a batch is draws from the posteriors, and these are narrow
    nearest = torch.cdist(seen, cache.mean.flatten(1)).argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(len(cache)))


def test_another_process_finds_the_checkpoint(autoencoder, tmp_path):
    """Tensors and networks are told apart by content, not by where they are."""
    train(autoencoder, checkpoint_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    copied = pickle.loads(pickle.dumps(autoencoder))
    copied.history_ = []  # timings do not count
    train(copied, checkpoint_dir=tmp_path, stack=check_slices(IMAGES.copy()), callbacks=[pytest.fail])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("change", ["weights", "scale", "slices", "objective", "seed"])
def test_whatever_is_learnt_from_names_the_checkpoint(autoencoder, tmp_path, change):
    train(autoencoder, checkpoint_dir=tmp_path, max_steps=1)
    other, options = pickle.loads(pickle.dumps(autoencoder)), {}
    if change == "weights":
        with torch.no_grad():
            next(other.network_.decoder.parameters()).add_(1e-6)
    elif change == "scale":
        other.latent_scale_ = np.nextafter(other.latent_scale_, np.float32(9))
    else:
        options = {
            "slices": {"stack": check_slices(IMAGES[::-1])},
            "objective": {"objective": OBJECTIVE | {"mask_loss_weight": 0.2}},
            "seed": {"seed": 1},
        }[change]
    train(other, checkpoint_dir=tmp_path, max_steps=1, **options)
    assert len(list(tmp_path.iterdir())) == 2


# What the parameters describe


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_denoisers_by_name_and_shape_have_the_latents_channels(name):
    for wanted in (name, UNET_SIZES[name]):
        unet = make_denoiser(wanted, 3)
        assert isinstance(unet, MaskedUNet)
        assert unet.config.latent_channels == 3
        assert unet.config.base_channels == UNET_SIZES[name].base_channels
    module = Noting()
    assert make_denoiser(module, 3) is module


def test_an_own_shape_is_used(autoencoder):
    config = replace(UNET_SIZES["tiny"], base_channels=4, channel_multipliers=(1,), norm_groups=2)
    denoiser, _ = train(autoencoder, denoiser=config, max_steps=1)
    assert denoiser.config.base_channels == 4 and denoiser.config.latent_channels == 2


@pytest.mark.parametrize(
    ("corruption", "mask_shape"),
    list(zip([*CORRUPTIONS, SmoothOffset()], itertools.cycle(MASK_SHAPES), strict=False)),
)
def test_corruptions_and_mask_shapes_go_by_name(corruption, mask_shape):
    objective = make_objective(**OBJECTIVE | {"corruption": corruption, "mask_shape": mask_shape})
    assert isinstance(objective, MaskedDiffusionObjective)
    assert objective.corruption == (CORRUPTIONS[corruption] if isinstance(corruption, str) else corruption)
    shapes = {"patches": RandomPatches, "blobs": RandomBlobs, "either": EitherMask}
    assert type(objective.masking) is shapes[mask_shape]
    z0, brain = torch.randn(6, 2, 8, 8, generator=seeded()), torch.ones(6, 1, 8, 8)
    brain[:, :, :, :3] = 0
    z_t, noise_mask, t = objective.noise(z0, brain, seeded())
    moved = (z_t != z0).any(dim=1, keepdim=True)
    assert noise_mask.any() and not noise_mask[brain == 0].any()
    assert torch.equal(moved, noise_mask.bool())
    assert ((1 <= t) & (t <= 10)).all()


def test_an_objectives_knobs_are_its_arguments():
    knobs = {
        "n_timesteps": 7,
        "mask_shape": "patches",
        "mask_ratio": [0.1, 0.3],
        "mask_patch_sizes": [1, 3],
        "mask_patch_probabilities": [0.75, 0.25],
        "brain_rule": "original",
        "mask_loss": "mse",
        "mask_loss_weight": 0.5,
    }
    objective = make_objective(**OBJECTIVE | knobs)
    assert objective.schedule.n_timesteps == 7
    assert objective.masking == RandomPatches((0.1, 0.3), (1, 3), (0.75, 0.25))
    assert (objective.brain_rule, objective.mask_loss, objective.mask_loss_weight) == ("original", "mse", 0.5)


def test_equal_probabilities_fit_any_number_of_sizes():
    changes = {"mask_shape": "patches", "mask_patch_sizes": (2, 4), "mask_patch_probabilities": None}
    objective = make_objective(**OBJECTIVE | changes)
    assert objective.masking == RandomPatches(OBJECTIVE["mask_ratio"], (2, 4), None)


@pytest.mark.parametrize(
    "knob, value",
    [
        ("corruption", "salt"),
        ("mask_shape", "stars"),
        ("mask_loss_weight", -0.1),
        ("mask_loss_weight", float("nan")),
        ("mask_ratio", 1.5),
        ("mask_patch_sizes", (0, 1)),
        ("mask_patch_probabilities", (0.5, 0.25, 0.25)),
        ("n_timesteps", 0),
    ],
)
def test_wrong_knobs_of_the_objective_are_refused(knob, value):
    with pytest.raises(ValueError, match=f"^{knob} must be") as caught:
        make_objective(**OBJECTIVE | {knob: value})
    assert f"got {value!r}" in str(caught.value)


def test_a_mask_loss_that_does_not_exist_is_refused(autoencoder):
    with pytest.raises(ValueError, match="mask_loss must be .*got 'hinge'"):
        train(autoencoder, objective=OBJECTIVE | {"mask_loss": "hinge"})
    with pytest.raises(ValueError, match="brain_rule must be .*got 'mine'"):
        train(autoencoder, objective=OBJECTIVE | {"brain_rule": "mine"})


@pytest.mark.parametrize("value", ["huge", 3, None])
def test_a_denoiser_that_does_not_exist_is_refused(value):
    with pytest.raises(ValueError, match=r"denoiser must be one of \[.*'tiny'\], a UNetConfig or") as caught:
        make_denoiser(value, 4)
    assert f"got {value!r}" in str(caught.value)
