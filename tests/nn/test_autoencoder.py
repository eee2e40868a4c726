from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch.distributions import Normal, kl_divergence

from madad.nn import AUTOENCODER_SIZES, AutoencoderConfig, AutoencoderKL
from madad.nn.autoencoder import DiagonalGaussian

TINY = AUTOENCODER_SIZES["tiny"]
CONFIGS = {
    "tiny": TINY,
    "levels": AutoencoderConfig(2, 3, 4, (1, 2, 2), n_res_blocks=1, norm_groups=2),
    "levels and patches": AutoencoderConfig(1, 2, 4, (1, 2), 1, 2, False, 4, True),
}


def network(config=TINY, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(config).eval()


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("cells", [(2, 2), (3, 1)])
def test_factor_relates_images_and_latents(config, cells):
    autoencoder = network(config)
    x = random_tensor(2, config.image_channels, *(config.factor * side for side in cells))
    posterior = autoencoder.encode(x)
    assert posterior.mean.shape == posterior.logvar.shape == (2, config.latent_channels, *cells)
    assert autoencoder.decode(posterior.mean).shape == x.shape


def test_factors_of_the_named_sizes():
    factors = {name: config.factor for name, config in AUTOENCODER_SIZES.items()}
    assert factors == {"kl-f8": 8, "fast-f2": 2, "fast-f4": 4, "fast-f8": 8, "tiny": 4}


def test_kl_f8_has_stable_diffusions_number_of_parameters():
    with torch.device("meta"):
        of_colour = AutoencoderKL(replace(AUTOENCODER_SIZES["kl-f8"], image_channels=3))
    assert sum(parameter.numel() for parameter in of_colour.parameters()) == 83_653_863


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradient_reaches_every_parameter(config):
    autoencoder = network(config).train()
    x = random_tensor(2, config.image_channels, 2 * config.factor, config.factor)
    reconstruction, posterior = autoencoder(x, torch.Generator().manual_seed(0))
    (reconstruction.square().sum() + posterior.kl().sum()).backward()
    assert [n for n, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_encoder_sees_moves_of_whole_latent_positions_alike():
    autoencoder = network(replace(TINY, norm_groups=1))
    x = torch.full((1, 1, 160, 160), -1.0)  # the border's padding must not reach the block
    x[..., 72:80, 72:80] = random_tensor(1, 1, 8, 8)
    moved = autoencoder.encode(x.roll((8, 4), dims=(2, 3))).mean
    expected = autoencoder.encode(x).mean.roll((2, 1), dims=(2, 3))
    inside = (..., slice(11, -11), slice(11, -11))
    torch.testing.assert_close(moved[inside], expected[inside], rtol=1e-4, atol=1e-4)
    assert moved[inside].std() > 0.01


def test_forward_decodes_one_seeded_sample():
    autoencoder, x = network(), random_tensor(2, 1, 8, 8)
    reconstruction, posterior = autoencoder(x, torch.Generator().manual_seed(3))
    sample = autoencoder.encode(x).sample(torch.Generator().manual_seed(3))
    assert torch.equal(reconstruction, autoencoder.decode(sample))
    assert torch.equal(posterior.mean, autoencoder.encode(x).mean)
    other, _ = autoencoder(x, torch.Generator().manual_seed(4))
    assert not torch.equal(other, reconstruction)


# The posterior


def test_kl_equals_torch_distributions():
    mean, logvar = random_tensor(3, 2, 4, 5), 2 * random_tensor(3, 2, 4, 5, seed=1)
    of_each = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(torch.zeros(()), torch.ones(())))
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), of_each.sum(dim=(1, 2, 3)))
    assert DiagonalGaussian(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).kl() == 0


def test_sample_is_seeded_and_has_the_moments():
    mean, logvar = torch.full((1, 1, 200, 200), 2.0), torch.full((1, 1, 200, 200), np.log(9.0))
    posterior = DiagonalGaussian(mean, logvar)
    sample = posterior.sample(torch.Generator().manual_seed(0))
    assert torch.equal(sample, posterior.sample(torch.Generator().manual_seed(0)))
    assert not torch.equal(sample, posterior.sample(torch.Generator().manual_seed(1)))
    assert sample.mean() == pytest.approx(2, abs=0.1) and sample.std() == pytest.approx(3, rel=0.03)


def test_sample_of_a_given_generator_leaves_the_global_one_alone():
    before = torch.random.get_rng_state()
    network()(random_tensor(1, 1, 8, 8), torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_logvar_is_clamped():
    logvar = torch.tensor([-100.0, -30, 0, 20, 100]).view(1, 1, 1, 5)
    clamped = DiagonalGaussian(torch.zeros_like(logvar), logvar).logvar
    assert clamped.flatten().tolist() == [-30, -30, 0, 20, 20]


# The linear shortcut


def blocks_and_image(n_blocks, channels, factor, seed=0):
    """Correlated blocks with one mean per channel, and an image made of the first 6 of them."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(channels * factor**2,) * 2) * np.linspace(1, 0.05, channels * factor**2)
    flat = 0.1 * rng.normal(size=(n_blocks, channels * factor**2)) @ mixing.T
    flat += np.repeat(rng.uniform(-0.5, 0.5, channels), factor**2) - flat.mean(axis=0)
    blocks = torch.from_numpy(flat).float().view(n_blocks, channels, factor, factor)
    grid = blocks[:6].view(2, 3, channels, factor, factor)
    image = grid.permute(2, 0, 3, 1, 4).reshape(1, channels, 2 * factor, 3 * factor)
    return flat, blocks, image


@pytest.mark.parametrize("config", [TINY, replace(TINY, image_channels=2, latent_channels=5)])
def test_start_from_components_is_scikit_learns_whitened_pca(config):
    flat, blocks, image = blocks_and_image(300, config.image_channels, config.factor)
    autoencoder = network(config)
    autoencoder.start_from_components(blocks)
    pca = PCA(config.latent_channels, whiten=True).fit(flat)

    posterior = autoencoder.encode(image)
    scores = posterior.mean.detach().permute(0, 2, 3, 1).reshape(6, -1).numpy()
    expected = pca.transform(flat[:6]) * np.sqrt(300 / 299)  # variances over n, not n - 1
    np.testing.assert_allclose(np.abs(scores), np.abs(expected), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(posterior.logvar, torch.full_like(posterior.logvar, -8.0))

    restored = pca.inverse_transform(pca.transform(flat[:6])).astype(np.float32)
    grid = restored.reshape(2, 3, config.image_channels, config.factor, config.factor)
    expected = grid.transpose(2, 0, 3, 1, 4).reshape(image.shape)
    reconstruction = autoencoder.decode(posterior.mean).detach().numpy()
    np.testing.assert_allclose(reconstruction, expected, atol=1e-4)


def test_start_from_components_takes_more_latent_channels_than_pixels():
    config = AutoencoderConfig(1, 6, 4, (1,), 1, 2, False, 4, True)  # blocks of 4 pixels
    _, blocks, image = blocks_and_image(50, 1, 2)
    autoencoder = network(config)
    autoencoder.start_from_components(blocks)
    mean = autoencoder.encode(image).mean
    assert not mean[:, 4:].any()
    torch.testing.assert_close(autoencoder.decode(mean), image, rtol=1e-3, atol=1e-4)


def test_training_can_leave_the_components():
    """The convolutions that start at zero receive a gradient."""
    _, blocks, image = blocks_and_image(50, 1, 4)
    autoencoder = network()
    autoencoder.start_from_components(blocks)
    (autoencoder(image, torch.Generator().manual_seed(0))[0] - image).square().sum().backward()
    assert autoencoder.quant.weight.grad.any() and autoencoder.decoder.head.conv.weight.grad.any()


@pytest.mark.parametrize("shape", [(1, 1, 9, 8), (1, 1, 8, 10), (1, 2, 8, 8), (1, 8, 8)])
def test_encode_names_the_shape_it_cannot_take(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, .*divisible by 4, got") as error:
        network().encode(torch.zeros(shape))
    assert str(shape) in str(error.value)
