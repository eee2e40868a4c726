from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from madad.base.check_slices import check_slices
from madad.datasets import make_brain_slices
from madad.diffusion import MaskedDDIM, NoiseSchedule
from madad.maps import MapRecipe, RestoredBatch
from madad.maps.differences import image_map, latent_map, mask_map, upsample_map
from madad.maps.smoothing import finish_map
from madad.stages.restoration import repair_batch_size, restore_batches
from madad.testing import tiny_autoencoder

IMAGES = make_brain_slices(7, size=32, random_state=0).images[:, :30, :29]  # padded to 32 x 32 inside
SCHEDULE = NoiseSchedule.cosine(10)
RECIPE = MapRecipe(smoothing_px=1.0)


class Fake(nn.Module):
    """Restores everything it flags to zero, the healthy mean, and flags where ``flag(z)`` is above 0."""

    def __init__(self, flag):
        super().__init__()
        self.flag = flag
        self.sizes = []

    def forward(self, z_t, t):
        self.sizes.append(len(z_t))
        return torch.zeros_like(z_t), self.flag(z_t)


def never(z):
    return torch.full_like(z[:, :1], -50.0)


def always(z):
    return torch.full_like(z[:, :1], 50.0)


def by_value(z):
    return 5 * z[:, :1]


@pytest.fixture(scope="module")
def autoencoder():
    return tiny_autoencoder(intensity_range=(0.0, 1.0)).fit(IMAGES)


def restore(
    autoencoder, flag, images=IMAGES, *, batch_size=4, decode="changed", brain_mask=None, eta=0.0, seed=0
):
    """All fields over all batches, and the size of every forward pass."""
    denoiser = Fake(flag)
    batches = list(
        restore_batches(
            autoencoder,
            denoiser,
            check_slices(images, brain_mask=brain_mask),
            MaskedDDIM(3, eta, 0.5, "trailing"),
            SCHEDULE,
            batch_size=batch_size,
            seed=seed,
            device=torch.device("cpu"),
            decode=decode,
        )
    )
    starts = np.cumsum([0] + [len(batch.brain) for batch in batches])
    axis = {"noise_probability": 1}
    joined = {
        name: np.concatenate([getattr(batch, name) for batch in batches], axis.get(name, 0))
        for name in RestoredBatch._fields
        if name not in ("decoded", "reconstruction", "restored")
    }
    images = {
        name: [getattr(batch, name) for batch in batches if getattr(batch, name).size]
        for name in ("reconstruction", "restored")
    }
    joined |= {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in images.items()}
    joined["decoded"] = np.concatenate(
        [batch.decoded + start for batch, start in zip(batches, starts, strict=False)]
    )
    return RestoredBatch(**joined), denoiser.sizes


# Properties


def test_where_nothing_is_flagged_nothing_changes(autoencoder):
    batch, _ = restore(autoencoder, never)
    np.testing.assert_array_equal(batch.z_restored, batch.z)
    assert batch.decoded.size == batch.restored.size == batch.reconstruction.size == 0
    for kind in ("image", "latent"):
        for difference in ("absolute", "squared", "relative"):
            recipe = replace(RECIPE, anomaly_map=kind, map_difference=difference)
            assert not recipe.maps_of(batch, 4).any()
    with_images, _ = restore(autoencoder, never, decode="restored")
    assert replace(RECIPE, reference="input").maps_of(with_images, 4).any()


def test_a_slice_without_flags_beside_flagged_ones_does_not_change_either(autoencoder):
    def all_but_the_first(z):
        logit = always(z)
        logit[0] = -50.0
        return logit

    batch, _ = restore(autoencoder, all_but_the_first, batch_size=7)
    np.testing.assert_array_equal(batch.decoded, np.arange(1, 7))
    maps = RECIPE.maps_of(batch, 4)
    assert not maps[0].any() and all(one.any() for one in maps[1:])


def test_a_perfect_denoiser_restores_all_that_is_flagged(autoencoder):
    batch, _ = restore(autoencoder, always)
    brain = np.pad(IMAGES > 0, ((0, 0), (0, 2), (0, 3))).reshape(7, 8, 4, 8, 4).any(axis=(2, 4))
    brain = np.broadcast_to(brain[:, None], batch.z.shape)
    np.testing.assert_allclose(batch.z_restored[brain], 0, atol=1e-6)
    np.testing.assert_array_equal(batch.z_restored[~brain], batch.z[~brain])


def test_positions_outside_the_brain_are_never_flagged(autoencoder):
    brain_mask = np.zeros(IMAGES.shape, bool)
    brain_mask[:, 8:20, 4:13] = True
    batch, _ = restore(autoencoder, always, brain_mask=brain_mask)
    inside = np.zeros((8, 8), bool)
    inside[2:5, 1:4] = True  # positions with any brain
    assert (batch.noise_probability[..., inside] > 0.99).all()
    assert not batch.noise_probability[..., ~inside].any()
    np.testing.assert_array_equal(batch.z_restored[..., ~inside], batch.z[..., ~inside])
    for kind in ("image", "latent", "mask"):
        maps = replace(RECIPE, anomaly_map=kind).maps_of(batch, 4)
        assert not maps[~brain_mask].any() and maps[brain_mask].any()


def test_batches_have_one_size_and_their_fields_hold_the_valid_slices_alone(autoencoder):
    batch, sizes = restore(autoencoder, by_value, batch_size=4)
    assert sizes == [4] * 6  # two batches, three steps
    assert [len(value) for value in batch] == [7, 7, 7, 7, 3, 7, 7, 7]
    np.testing.assert_array_equal(batch.brain, IMAGES > 0)
    np.testing.assert_allclose(batch.x[:, 0], 2 * IMAGES - 1, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_slice_is_bitwise_the_same_in_any_company(autoencoder, eta, two_threads):
    together, _ = restore(autoencoder, by_value, eta=eta)
    order = np.array([6, 2, 0, 5, 1, 4, 3])
    shuffled, _ = restore(autoencoder, by_value, IMAGES[order], eta=eta)
    alone, _ = restore(autoencoder, by_value, IMAGES[2:3], eta=eta)
    assert len(together.decoded) == 7
    for name in RestoredBatch._fields:
        if name == "decoded":
            continue
        a, b, c = (getattr(batch, name) for batch in (together, shuffled, alone))
        if name == "noise_probability":
            a, b, c = (value.swapaxes(0, 1) for value in (a, b, c))
        np.testing.assert_array_equal(b, a[order])
        np.testing.assert_array_equal(c, a[2:3])


def test_the_seed_decides_the_noise_of_the_steps(autoencoder):
    a, b, c = (restore(autoencoder, by_value, eta=1.0, seed=seed)[0].z_restored for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_without_decoding_there_are_no_images_but_latents_as_with(autoencoder):
    batch, _ = restore(autoencoder, by_value, decode="nothing")
    with_images, _ = restore(autoencoder, by_value)
    assert batch.restored.size == batch.reconstruction.size == batch.decoded.size == 0
    np.testing.assert_array_equal(batch.z_restored, with_images.z_restored)


def test_what_was_not_flagged_is_not_decoded_and_its_map_is_what_decoding_would_give(autoencoder):
    of_slices = restore(autoencoder, never)[0].z.mean(axis=(1, 2, 3))

    def some(z):  # the slices whose latents are above the middle one's on average
        above = z.mean(dim=(1, 2, 3), keepdim=True) > float(np.median(of_slices))
        return torch.where(above, 50.0, -50.0).expand(-1, 1, *z.shape[2:])

    changed, _ = restore(autoencoder, some)
    assert 0 < len(changed.decoded) < 7
    everything, _ = restore(autoencoder, some, decode="restored")
    np.testing.assert_array_equal(everything.decoded, np.arange(7))
    np.testing.assert_array_equal(everything.restored[changed.decoded], changed.restored)
    reconstruction = restore(autoencoder, never, decode="restored")[0].restored
    np.testing.assert_array_equal(reconstruction[changed.decoded], changed.reconstruction)
    raw = image_map(everything.restored, reconstruction, gamma=0.2)
    np.testing.assert_array_equal(RECIPE.maps_of(changed, 4), finish_map(raw, changed.brain, 1.0))


def test_only_flagged_slices_are_decoded_and_in_parts_of_one_size(autoencoder, monkeypatch):
    decode, calls = autoencoder.decode, []
    monkeypatch.setattr(autoencoder, "decode", lambda z: calls.append(len(z)) or decode(z))
    monkeypatch.setattr("madad.stages.restoration.repair_batch_size", lambda *_: 2)
    for flag, decoded, expected in (
        (never, "changed", []),
        (always, "changed", [2] * 8),
        (always, "restored", [2] * 4),
        (never, "restored", [2] * 4),
        (always, "nothing", []),
    ):
        restore(autoencoder, flag, decode=decoded)
        assert calls == expected
        calls.clear()


def test_repair_batch_size_is_a_power_of_two_up_to_the_batch_and_one_where_slices_are_heavy():
    cpu = torch.device("cpu")
    sizes = [repair_batch_size(16, cpu, needed) for needed in (1, 2**20, 3 * 2**20, 2**24, 2**30)]
    assert sizes == [16, 16, 4, 1, 1]
    assert [repair_batch_size(batch, torch.device("cuda"), 1) for batch in (1, 16, 256)] == [1, 4, 64]


def test_an_unknown_kind_of_decoding_is_refused(autoencoder):
    with pytest.raises(ValueError, match="^decode must be one of .* got 'both'"):
        restore(autoencoder, never, decode="both")


def test_bfloat16_moves_latents_and_images_a_little(autoencoder):
    options = {"batch_size": 4, "seed": 0, "device": torch.device("cpu")}
    stack, sampler = check_slices(IMAGES), MaskedDDIM(2)
    exact, rough = (
        next(restore_batches(autoencoder, Fake(always), stack, sampler, SCHEDULE, precision=one, **options))
        for one in ("float32", "bfloat16")
    )
    assert rough.z.dtype == rough.restored.dtype == np.float32
    for name in ("z", "reconstruction"):
        moved = np.abs(getattr(rough, name) - getattr(exact, name))
        assert 0 < moved.max() < 0.1


def test_networks_return_to_their_mode_and_the_global_generator_is_left_alone(autoencoder):
    before = torch.get_rng_state()
    denoiser = Fake(by_value).train()
    stack = check_slices(IMAGES)
    options = {"batch_size": 4, "seed": 0, "device": torch.device("cpu")}
    for _ in restore_batches(autoencoder, denoiser, stack, MaskedDDIM(2, 1.0), SCHEDULE, **options):
        assert denoiser.training and not torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), before)


# Formulas


def test_the_reconstruction_and_the_restored_image_are_decoded_latents(autoencoder):
    batch, _ = restore(autoencoder, by_value)
    np.testing.assert_allclose(batch.z, autoencoder.transform(IMAGES), atol=1e-5)
    for z, images in ((batch.z, batch.reconstruction), (batch.z_restored, batch.restored)):
        expected = autoencoder.inverse_transform(z)
        np.testing.assert_allclose(np.clip((images[:, 0] + 1) / 2, 0, 1), expected, atol=1e-5)


def test_maps_are_those_of_their_formula(autoencoder):
    batch, _ = restore(autoencoder, by_value)
    expected = {
        ("image", "reconstruction"): image_map(batch.restored, batch.reconstruction, gamma=0.2),
        ("image", "input"): image_map(batch.restored, batch.x, gamma=0.2),
        ("latent", "input"): upsample_map(latent_map(batch.z_restored, batch.z), 4, 30, 29),
        ("mask", "input"): upsample_map(mask_map(batch.noise_probability), 4, 30, 29),
    }
    for (kind, reference), raw in expected.items():
        recipe = replace(RECIPE, anomaly_map=kind, reference=reference)
        maps = recipe.maps_of(restore(autoencoder, by_value, decode=recipe.decode)[0], 4)
        np.testing.assert_array_equal(maps, finish_map(raw, batch.brain, 1.0))
        assert maps.dtype == np.float32 and maps.shape == IMAGES.shape and 0 < maps.max() <= 1
        assert not maps[IMAGES <= 0].any()
    squared = replace(RECIPE, map_difference="squared").maps_of(batch, 4)
    raw = image_map(batch.restored, batch.reconstruction, gamma=0.2, difference="squared")
    np.testing.assert_array_equal(squared, finish_map(raw, batch.brain, 1.0))


# Errors


def test_more_steps_than_times_are_refused(autoencoder):
    batches = restore_batches(
        autoencoder,
        Fake(never),
        check_slices(IMAGES),
        MaskedDDIM(11),
        SCHEDULE,
        batch_size=4,
        seed=0,
        device=torch.device("cpu"),
        decode="nothing",
    )
    with pytest.raises(ValueError, match=r"n_steps must lie in 1\.\.10, .*got 11"):
        next(batches)
