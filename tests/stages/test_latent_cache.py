import os

import numpy as np
import pytest
import torch

import madad.stages.latent_cache
from madad import SliceAugmentation
from madad.base.check_slices import check_slices
from madad.datasets import make_brain_slices
from madad.stages.latent_cache import LatentCache, RowsOnDisk, cache_latents
from madad.testing import tiny_autoencoder

IMAGES = make_brain_slices(10, size=32, random_state=0).images
STACK = check_slices(IMAGES)


@pytest.fixture(scope="module")
def autoencoder():
    return tiny_autoencoder(intensity_range=(0.0, 1.0)).fit(IMAGES)


@pytest.fixture
def in_threes(autoencoder):
    """Encodes three slices at a time, so that ten slices make batches of which the last is filled up."""
    autoencoder.batch_size = 3
    yield autoencoder
    autoencoder.batch_size = None


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows_of(tensor):
    return {row.numpy().tobytes() for row in tensor}


def test_the_cache_holds_the_scaled_posterior(in_threes):
    cache = cache_latents(in_threes, STACK, flip=False, generator=seeded())
    assert len(cache) == 10
    np.testing.assert_array_equal(cache.mean, in_threes.transform(IMAGES))
    with torch.inference_mode():
        posterior = in_threes.network_.encode(torch.from_numpy(IMAGES)[:, None] * 2 - 1)
    scale = in_threes.latent_scale_[:, None, None]
    np.testing.assert_allclose(cache.logvar, posterior.logvar.numpy() + 2 * np.log(scale), atol=1e-4)
    fraction = (IMAGES > 0).reshape(10, 8, 4, 8, 4).mean(axis=(2, 4))
    np.testing.assert_allclose(cache.brain_fraction[:, 0], fraction, atol=1e-6)
    assert not cache.mean.is_inference()


@pytest.mark.parametrize("batch_size", [3, None])
def test_mirrored_copies_are_the_encoded_mirrored_slices(autoencoder, batch_size):
    autoencoder.batch_size = batch_size
    try:
        cache = cache_latents(autoencoder, STACK, flip=True, generator=seeded())
        mirrored = cache_latents(
            autoencoder, check_slices(IMAGES[..., ::-1].copy()), flip=False, generator=seeded()
        )
        plain = cache_latents(autoencoder, STACK, flip=False, generator=seeded())
    finally:
        autoencoder.batch_size = None
    assert len(cache) == 20
    for name in ("mean", "logvar", "brain_fraction"):
        expected = rows_of(getattr(plain, name)) | rows_of(getattr(mirrored, name))
        assert rows_of(getattr(cache, name)) == expected
        assert rows_of(getattr(plain, name)) != rows_of(getattr(mirrored, name))


def test_rows_of_the_cache_belong_together(in_threes):
    cache = cache_latents(in_threes, STACK, flip=True, generator=seeded())
    by_mean = {mean.numpy().tobytes(): i for i, mean in enumerate(cache.mean)}
    for images in (IMAGES, IMAGES[..., ::-1].copy()):
        alone = cache_latents(in_threes, check_slices(images), flip=False, generator=seeded())
        for mean, logvar, fraction in zip(alone.mean, alone.logvar, alone.brain_fraction, strict=True):
            i = by_mean[mean.numpy().tobytes()]
            assert torch.equal(cache.logvar[i], logvar) and torch.equal(cache.brain_fraction[i], fraction)


def test_augmented_copies_join_the_slices_and_their_mirror_images(in_threes):
    augmentation = SliceAugmentation(n_copies=2)
    cache = cache_latents(in_threes, STACK, flip=True, augmentation=augmentation, generator=seeded())
    plain = cache_latents(in_threes, STACK, flip=True, generator=seeded())
    assert len(cache) == 3 * len(plain) and rows_of(plain.mean) < rows_of(cache.mean)
    assert rows_of(plain.brain_fraction) < rows_of(cache.brain_fraction)  # the copies' masks move with them
    again = cache_latents(in_threes, STACK, flip=True, augmentation=augmentation, generator=seeded())
    assert torch.equal(cache.mean, again.mean)


def test_samples_have_the_mean_and_variance_of_the_posterior():
    mean, logvar = torch.tensor([[3.0, -1.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [-2.0, -30.0]])
    cache = LatentCache(mean[:, :, None, None], logvar[:, :, None, None], torch.ones(2, 1, 1, 1))
    index = torch.tensor([1, 0]).repeat(20_000)
    drawn = cache.sample(index, seeded())[..., 0, 0].double().numpy().reshape(20_000, 2, 2)
    np.testing.assert_allclose(drawn.mean(axis=0), mean[[1, 0]], atol=0.04)
    np.testing.assert_allclose(drawn.std(axis=0), (logvar[[1, 0]] / 2).exp(), rtol=0.03)
    assert torch.equal(cache.sample(index, seeded(1)), cache.sample(index, seeded(1)))
    assert not torch.equal(cache.sample(index, seeded(1)), cache.sample(index, seeded(2)))


# In a file


@pytest.fixture
def all_large(monkeypatch):
    monkeypatch.setattr(madad.stages.latent_cache, "LARGE_CACHE", 0)


@pytest.mark.parametrize("augmentation", [None, SliceAugmentation(n_copies=1)])
def test_a_cache_in_a_file_has_the_rows_of_the_one_in_memory(in_threes, tmp_path, all_large, augmentation):
    options = {"flip": True, "augmentation": augmentation}
    here = cache_latents(in_threes, STACK, generator=seeded(), **options)
    there = cache_latents(in_threes, STACK, generator=seeded(), directory=tmp_path / "new", **options)
    assert isinstance(here.mean, torch.Tensor) and isinstance(there.mean, RowsOnDisk)
    assert len(there) == len(here) == 20 * (1 if augmentation is None else 2)
    for index in (torch.arange(len(here)), torch.tensor([7, 0, 7, 19]), torch.tensor([], dtype=torch.int64)):
        for name in ("mean", "logvar", "brain_fraction"):
            assert torch.equal(getattr(there, name)[index], getattr(here, name)[index])
        assert torch.equal(there.sample(index, seeded()), here.sample(index, seeded()))
    assert there.mean.shape == here.mean.shape


def test_only_a_large_cache_with_a_place_goes_to_a_file(autoencoder, tmp_path, monkeypatch):
    options = {"flip": False, "generator": seeded()}
    size = 4 * 10 * (2 + 2 + 1) * 8 * 8  # bytes: ten slices, two channels each and the brain's share
    monkeypatch.setattr(madad.stages.latent_cache, "LARGE_CACHE", size - 1)
    assert isinstance(cache_latents(autoencoder, STACK, directory=tmp_path, **options).mean, RowsOnDisk)
    assert isinstance(cache_latents(autoencoder, STACK, **options).mean, torch.Tensor)
    monkeypatch.setattr(madad.stages.latent_cache, "LARGE_CACHE", size)
    assert isinstance(cache_latents(autoencoder, STACK, directory=tmp_path, **options).mean, torch.Tensor)


def test_the_size_of_the_cache_is_said_beforehand_if_asked_for(autoencoder, tmp_path, monkeypatch, capsys):
    for directory, place in ((None, "in memory (cpu)"), (tmp_path, f"on disk, below {tmp_path}")):
        monkeypatch.setattr(madad.stages.latent_cache, "LARGE_CACHE", 0)
        options = {"flip": True, "generator": seeded(), "directory": directory}
        cache = cache_latents(autoencoder, STACK, verbose=True, **options)
        parts = (cache.mean, cache.logvar, cache.brain_fraction)
        mebibytes = sum(4 * np.prod(part.shape) for part in parts) / 2**20
        said = capsys.readouterr().err
        assert said == f"latents of 10 slices, 2 of each: {mebibytes:.1f} MiB {place}\n"
        cache_latents(autoencoder, STACK, **options)
        assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error(autoencoder, tmp_path, all_large, monkeypatch):
    full = open("/dev/full", "w+b", buffering=0)
    monkeypatch.setattr(madad.stages.latent_cache.tempfile, "TemporaryFile", lambda **options: full)
    with pytest.raises(
        OSError, match=r"cache_directory must have room for 5120 bytes, got .*No space"
    ) as error:
        cache_latents(autoencoder, STACK, flip=False, generator=seeded(), directory=tmp_path)
    assert str(tmp_path) in str(error.value)
