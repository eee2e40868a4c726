from dataclasses import replace

import pytest
import torch

from madad.nn import UNET_SIZES, MaskedUNet

TINY = UNET_SIZES["tiny"]
CONFIGS = {
    "tiny": TINY,
    "attention": replace(TINY, attention_levels=(0, 1), n_res_blocks=2, latent_channels=2),
    "three levels": replace(TINY, channel_multipliers=(1, 2, 2)),
    "patches": replace(TINY, patch_size=2, latent_channels=3),
}


def network(config=TINY, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskedUNet(config).eval()


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("size", "millions"), [("XS", 16.1), ("S", 64.5), ("M", 145.0), ("L", 257.7), ("XL", 402.7)]
)
def test_parameter_counts_are_the_published_ones(size, millions):
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in MaskedUNet(UNET_SIZES[size]).parameters())
    assert round(n_parameters / 1e6, 1) == millions


def test_activation_checkpointing_gives_the_same_gradients_bit_by_bit():
    gradients = []
    for again in (False, True):
        unet = network(replace(CONFIGS["attention"], dropout=0.3)).train()
        for part in unet.modules():
            if hasattr(part, "recompute"):
                part.recompute = again
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            z0_hat, logit = unet(random_tensor(2, 2, 8, 8), torch.tensor([1, 5]))
        (z0_hat.square().sum() + logit.sum()).backward()
        gradients.append([parameter.grad for parameter in unet.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("size", UNET_SIZES)
def test_every_size_divides_into_heads_and_groups(size):
    config = UNET_SIZES[size]
    widths = [config.base_channels * m for m in config.channel_multipliers]
    assert all(width % config.norm_groups == 0 for width in widths)
    with_attention = [*(widths[i] for i in config.attention_levels), widths[-1]]
    assert all(width % config.n_heads == 0 for width in with_attention)
    with torch.device("meta"):
        MaskedUNet(config)(torch.empty(1, 4, 8, 8), torch.ones(1))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("size", [(8, 8), (1, 9)])
def test_latents_of_any_size_are_padded_by_their_border_and_cropped(config, size):
    unet, z = network(config), random_tensor(2, config.latent_channels, *size)
    t = torch.tensor([1, 7])
    below, right = -size[0] % config.multiple, -size[1] % config.multiple
    by_hand = torch.cat([z, *[z[:, :, -1:]] * below], dim=2)
    by_hand = torch.cat([by_hand, *[by_hand[..., -1:]] * right], dim=3)
    for answer, channels, padded in zip(
        unet(z, t), (config.latent_channels, 1), unet(by_hand, t), strict=True
    ):
        assert answer.shape == (2, channels, *size)
        assert torch.equal(answer, padded[..., : size[0], : size[1]])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_time_matters_to_both_heads_and_per_sample(config):
    unet, z = network(config), random_tensor(1, config.latent_channels, 8, 8).repeat(3, 1, 1, 1)
    for answer in unet(z, torch.tensor([1, 10, 1])):
        assert not torch.allclose(answer[0], answer[1], atol=1e-5)
        torch.testing.assert_close(answer[0], answer[2])


def test_samples_of_a_batch_do_not_see_each_other():
    unet, z, t = network(CONFIGS["attention"]), random_tensor(4, 2, 8, 8), torch.tensor([1, 4, 7, 10])
    alone = [unet(z[i : i + 1], t[i : i + 1]) for i in range(4)]
    for k, answer in enumerate(unet(z, t)):
        torch.testing.assert_close(answer, torch.cat([single[k] for single in alone]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradient_reaches_every_parameter(config):
    unet = network(config).train()
    z0_hat, noise_logit = unet(random_tensor(2, config.latent_channels, 7, 5), torch.tensor([2, 9]))
    (z0_hat.square().sum() + noise_logit.square().sum()).backward()
    without = [
        name
        for name, parameter in unet.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert without == []


def test_heads_share_the_trunk_only():
    unet, z, t = network(), random_tensor(1, 4, 8, 8), torch.ones(1)
    z0_hat, noise_logit = unet(z, t)
    with torch.no_grad():
        unet.noise_head.conv.bias += 3
    again, shifted = unet(z, t)
    assert torch.equal(again, z0_hat)
    torch.testing.assert_close(shifted, noise_logit + 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_heads": 3}, "n_heads must divide the number of channels 16, got 3"),
        ({"norm_groups": 5}, r"num_channels .*must be divisible by num_groups"),
    ],
)
def test_heads_and_groups_that_do_not_divide_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        MaskedUNet(replace(TINY, **changes))
