"""Foreign autoencoders against small functional implementations of them, and against arrays."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from madad.nn import AutoencoderConfig, AutoencoderKL
from madad.pretrained.kl_autoencoders import (
    load_compvis_autoencoder,
    load_diffusers_autoencoder,
    to_image_channels,
)
from madad.pretrained.loading import load_autoencoder

AUTOENCODERS = [
    {},
    {"multipliers": (1, 2, 2), "n_res": 2, "c": 4, "image_channels": 3},
    {"multipliers": (1, 1, 2), "mid_attention": False},
]


@pytest.mark.parametrize("shape", AUTOENCODERS)
def test_compvis_autoencoder_computes_the_same(foreign, tmp_path, shape):
    weights = foreign.compvis_weights(**shape)
    save_file(weights, tmp_path / "a.safetensors")
    foreign.check_autoencoder(load_compvis_autoencoder(tmp_path / "a.safetensors"), weights)


def test_first_stage_of_a_latent_diffusion_checkpoint_is_found(foreign, tmp_path):
    weights = foreign.compvis_weights()
    others = {
        "model.diffusion_model.out.weight": torch.ones(1),
        "first_stage_model.loss.logvar": torch.ones(1),
    }
    state = {f"first_stage_model.{name}": value for name, value in weights.items()} | others
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    foreign.check_autoencoder(load_compvis_autoencoder(tmp_path), weights)


@pytest.mark.parametrize("shape", AUTOENCODERS)
@pytest.mark.parametrize(
    "spelling", [("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")]
)
def test_diffusers_autoencoder_computes_the_same(foreign, tmp_path, shape, spelling):
    weights = foreign.compvis_weights(**shape)
    save_file(
        foreign.in_diffusers_layout(weights, spelling), tmp_path / "diffusion_pytorch_model.safetensors"
    )
    foreign.check_autoencoder(load_diffusers_autoencoder(tmp_path), weights)


@pytest.mark.parametrize("in_vae", [False, True])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_out_channels": [32, 64], "norm_num_groups": 32, "latent_channels": 3}, None),
        ({"_class_name": "AutoencoderKL"}, None),
        ({"block_out_channels": [32, 128]}, r"config.json must .*block_out_channels \[32, 128\].*\[32, 64\]"),
        ({"norm_num_groups": 16}, "config.json must .*norm_num_groups 16.* 32"),
        ({"latent_channels": 4}, "config.json must .*latent_channels 4.* 3"),
    ],
)
def test_diffusers_config_must_agree_with_the_weights(foreign, tmp_path, in_vae, config, message):
    folder = tmp_path / "vae" if in_vae else tmp_path
    folder.mkdir(exist_ok=True)
    save_file(
        foreign.in_diffusers_layout(foreign.compvis_weights()), folder / "diffusion_pytorch_model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config))
    if message is None:
        assert load_diffusers_autoencoder(tmp_path).config.channel_multipliers == (1, 2)
    else:
        with pytest.raises(ValueError, match=message):
            load_diffusers_autoencoder(tmp_path)


SHAPES = {
    "plain": {"base_channels": 8, "channel_multipliers": (1, 2), "norm_groups": 4},
    "folded": {"patch_size": 2, "base_channels": 8, "channel_multipliers": (1, 2), "norm_groups": 4},
    "linear": {
        "patch_size": 4,
        "base_channels": 8,
        "channel_multipliers": (1,),
        "norm_groups": 4,
        "linear_shortcut": True,
    },
}

all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))


def random_network(image_channels, shape):
    """Weights of the size that they are initialised with, every one of them random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(image_channels)
        network = AutoencoderKL(AutoencoderConfig(image_channels=image_channels, n_res_blocks=1, **shape))
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1) if parameter.ndim == 1 else None
    return network.eval()


def images(*shape):
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1


def nearly(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
@all_shapes
@pytest.mark.parametrize("channels", [2, 3])
def test_grey_images_are_those_that_repeat_their_channel(shape, channels):
    network = random_network(channels, shape)
    grey_network, x = to_image_channels(network, 1), images(2, 1, 16, 24)
    found, expected = grey_network.encode(x), network.encode(x.expand(-1, channels, -1, -1))
    assert grey_network.config.image_channels == 1 and not grey_network.training
    nearly(found.mean, expected.mean)
    nearly(found.logvar, expected.logvar)
    nearly(grey_network.decode(expected.mean), network.decode(expected.mean).mean(dim=1, keepdim=True))
    assert expected.mean.std() > 0.01 and network.decode(expected.mean).std(dim=1).mean() > 0.01


@torch.no_grad()
@all_shapes
def test_several_channels_are_read_as_their_mean_and_written_as_equals(shape):
    network, x = random_network(1, shape), images(2, 3, 16, 24)
    wide_network = to_image_channels(network, np.int64(3))
    found, expected = wide_network.encode(x), network.encode(x.mean(dim=1, keepdim=True))
    nearly(found.mean, expected.mean)
    nearly(found.logvar, expected.logvar)
    nearly(wide_network.decode(expected.mean), network.decode(expected.mean).expand(-1, 3, -1, -1))
    back = to_image_channels(wide_network, 1)
    torch.testing.assert_close(back.state_dict(), network.state_dict(), rtol=1e-6, atol=1e-7)


def test_conversion_leaves_the_network_as_it_was():
    network = random_network(3, SHAPES["linear"]).train()
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    assert to_image_channels(network, 3) is network
    assert to_image_channels(network, 1).training
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert network.config.image_channels == 3 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("given", "n", "error", "message"),
    [
        (3, 2, ValueError, "n must be 1 or 3 where the network's image channels are 3, got 2"),
        (2, 0, ValueError, "n must be 1 or 2 .*, got 0. .*convert to 1 first"),
        (1, -1, ValueError, "n must be at least 1 .*, got -1"),
        (3, 1.0, TypeError, "n must be a whole number of image channels, got 1.0"),
    ],
)
def test_other_numbers_of_channels_are_refused(given, n, error, message):
    with pytest.raises(error, match=message):
        to_image_channels(random_network(given, SHAPES["plain"]), n)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layout", "load"),
    [
        ("compvis", load_compvis_autoencoder),
        ("diffusers", load_diffusers_autoencoder),
        ("compvis", load_autoencoder),
        ("diffusers", load_autoencoder),
    ],
)
def test_autoencoders_reproduce_their_reference_outputs(foreign, reference_dir, layout, load):
    network = load(reference_dir / f"{layout}_kl_f8_ch32.safetensors")
    arrays = load_file(reference_dir / f"{layout}_kl_f8_outputs.safetensors")
    posterior = network.encode(arrays["x"])
    foreign.close(posterior.mean, arrays["mean"])
    foreign.close(posterior.logvar, arrays["logvar"])
    foreign.close(network.decode(posterior.mean), arrays["reconstruction_of_mean"])
