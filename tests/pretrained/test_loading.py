"""Foreign weights against small functional implementations of the foreign networks, and against arrays."""

import json
import math
import os
import re
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from madad.diffusion import MaskedDDIM, NoiseSchedule, masked_diffusion_loss
from madad.nn import AutoencoderConfig, AutoencoderKL
from madad.pretrained.loading import (
    is_saved,
    kind_of_weights,
    load_autoencoder,
    load_compvis_autoencoder,
    load_diffusers_autoencoder,
    load_unet,
    to_image_channels,
)
from madad.pretrained.original_unet import load_original_unet
from madad.pretrained.weight_files import read_weights
from madad.testing import tiny_detector

GROUPS = 32  # of every group norm in all three layouts: the narrowest network has 32 channels


class Weights(dict):
    """Random weights by foreign name, and the layers that use them."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def add(self, name, c_in, c_out, *kernel):
        self[f"{name}.weight"] = self.random(c_out, c_in, *kernel) / math.sqrt(c_in * math.prod(kernel))
        self[f"{name}.bias"] = 0.1 * self.random(c_out)

    def add_norm(self, name, channels):
        self[f"{name}.weight"] = 1 + 0.2 * self.random(channels)
        self[f"{name}.bias"] = 0.2 * self.random(channels)

    def conv(self, name, x, **options):
        weight = self[f"{name}.weight"]
        return F.conv2d(x, weight, self[f"{name}.bias"], padding=weight.shape[-1] // 2, **options)

    def norm(self, name, x, eps):
        return F.group_norm(x, GROUPS, self[f"{name}.weight"], self[f"{name}.bias"], eps)


# The original MAD-AD U-Net (guided-diffusion's trunk)


def original_unet_weights(base=32, multipliers=(1, 2), n_res=1, attention_levels=(0, 1), latent_channels=3):
    weights = Weights()

    def residual(name, c_in, c_out):
        weights.add_norm(f"{name}.in_layers.0", c_in)
        weights.add(f"{name}.in_layers.2", c_in, c_out, 3, 3)
        weights.add(f"{name}.emb_layers.1", 4 * base, c_out)
        weights.add_norm(f"{name}.out_layers.0", c_out)
        weights.add(f"{name}.out_layers.3", c_out, c_out, 3, 3)
        if c_in != c_out:
            weights.add(f"{name}.skip_connection", c_in, c_out, 1, 1)

    def attention(name, channels):
        weights.add_norm(f"{name}.norm", channels)
        weights.add(f"{name}.qkv", channels, 3 * channels, 1)
        weights.add(f"{name}.proj_out", channels, channels, 1)

    weights.add("time_embed.0", base, 4 * base)
    weights.add("time_embed.2", 4 * base, 4 * base)
    weights.add("input_blocks.0.0", latent_channels, base, 3, 3)
    channels, skips, k = base, [base], 1
    for level, multiplier in enumerate(multipliers):
        for _ in range(n_res):
            residual(f"input_blocks.{k}.0", channels, base * multiplier)
            channels = base * multiplier
            if level in attention_levels:
                attention(f"input_blocks.{k}.1", channels)
            skips.append(channels)
            k += 1
        if level < len(multipliers) - 1:
            weights.add(f"input_blocks.{k}.0.op", channels, channels, 3, 3)
            skips.append(channels)
            k += 1
    residual("middle_block.0", channels, channels)
    attention("middle_block.1", channels)
    residual("middle_block.2", channels, channels)
    k = 0
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for i in range(n_res + 1):
            residual(f"output_blocks.{k}.0", channels + skips.pop(), base * multiplier)
            channels = base * multiplier
            layer = 1
            if level in attention_levels:
                attention(f"output_blocks.{k}.1", channels)
                layer = 2
            if level and i == n_res:
                weights.add(f"output_blocks.{k}.{layer}.conv", channels, channels, 3, 3)
            k += 1
    weights.add_norm("out.0", base)
    weights.add("out.2", base, latent_channels, 3, 3)
    weights.add_norm("mt_out.0", base)
    weights.add("mt_out.1", base, 1, 3, 3)
    return weights


def original_unet(weights, z, t_zero_based, n_heads):
    """What the original computes: `z0_hat` and the logit of P(clean)."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def residual(name, x):
        hidden = F.silu(weights.norm(f"{name}.in_layers.0", x, 1e-5))
        hidden = weights.conv(f"{name}.in_layers.2", hidden)
        hidden = hidden + linear(f"{name}.emb_layers.1", F.silu(embedding))[:, :, None, None]
        hidden = F.silu(weights.norm(f"{name}.out_layers.0", hidden, 1e-5))
        hidden = weights.conv(f"{name}.out_layers.3", hidden)
        skip = f"{name}.skip_connection"
        return hidden + (weights.conv(skip, x) if f"{skip}.weight" in weights else x)

    def attention(name, x):
        """The legacy order: channels belong to heads first, then to queries, keys and values."""
        batch, channels, *_ = x.shape
        tokens = weights.norm(f"{name}.norm", x, 1e-5).flatten(2)
        qkv = F.conv1d(tokens, weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"])
        per_head = channels // n_heads
        q, k, v = qkv.reshape(batch * n_heads, 3 * per_head, -1).split(per_head, dim=1)
        scores = torch.einsum("bct,bcs->bts", q, k / per_head**0.5).softmax(dim=-1)
        attended = torch.einsum("bts,bcs->bct", scores, v).reshape(batch, channels, -1)
        out = F.conv1d(attended, weights[f"{name}.proj_out.weight"], weights[f"{name}.proj_out.bias"])
        return x + out.view_as(x)

    def layer(name, x):
        if f"{name}.in_layers.0.weight" in weights:
            return residual(name, x)
        if f"{name}.qkv.weight" in weights:
            return attention(name, x)
        if f"{name}.op.weight" in weights:
            return weights.conv(f"{name}.op", x, stride=2)
        if f"{name}.conv.weight" in weights:
            return weights.conv(f"{name}.conv", x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        return x

    def blocks(part):
        return range(1 + max(int(m[1]) for name in weights if (m := re.match(rf"{part}\.(\d+)\.", name))))

    half = weights["time_embed.0.weight"].shape[1] // 2
    angles = t_zero_based[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    embedding = linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    embedding = linear("time_embed.2", F.silu(embedding))
    x, skips = weights.conv("input_blocks.0.0", z), []
    skips.append(x)
    for k in blocks("input_blocks")[1:]:
        x = layer(f"input_blocks.{k}.1", layer(f"input_blocks.{k}.0", x))
        skips.append(x)
    for i in range(3):
        x = layer(f"middle_block.{i}", x)
    for k in blocks("output_blocks"):
        x = torch.cat([x, skips.pop()], dim=1)
        for i in range(3):
            x = layer(f"output_blocks.{k}.{i}", x)
    z0_hat = weights.conv("out.2", F.silu(weights.norm("out.0", x, 1e-5)))
    return z0_hat, weights.conv("mt_out.1", weights.norm("mt_out.0", x, 1e-5))


UNETS = [
    ({}, 4),
    ({"multipliers": (1, 2, 2), "attention_levels": (1,), "n_res": 2, "latent_channels": 4}, 2),
    ({"multipliers": (1,), "attention_levels": ()}, 1),
]


@pytest.mark.parametrize(("shape", "n_heads"), UNETS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_original_unet_computes_the_same(tmp_path, shape, n_heads, suffix):
    weights = original_unet_weights(**shape)
    path = tmp_path / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(dict(weights), path)
    unet = load_original_unet(path, n_heads=n_heads)
    z = torch.randn(3, unet.config.latent_channels, 8, 12, generator=weights.generator)
    t_zero_based = torch.tensor([0, 4, 9])
    with torch.no_grad():
        z0_hat, noise_logit = unet(z, t_zero_based + 1)
    expected, clean_logit = original_unet(weights, z, t_zero_based, n_heads)
    assert not unet.training and unet.config.n_heads == n_heads
    close(z0_hat, expected)
    close(noise_logit, -clean_logit)
    close(torch.sigmoid(noise_logit), 1 - torch.sigmoid(clean_logit))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_number_of_heads_changes_the_function_and_defaults_to_the_originals(tmp_path):
    weights = original_unet_weights()
    save_file(weights, tmp_path / "a.safetensors")
    assert load_original_unet(tmp_path / "a.safetensors").config.n_heads == 4
    save_file(original_unet_weights(192, (1,), 1, ()), tmp_path / "b.safetensors")
    assert load_original_unet(tmp_path / "b.safetensors").config.n_heads == 6
    z, t = torch.randn(1, 3, 8, 8, generator=weights.generator), torch.ones(1)
    with torch.no_grad():
        two, four = (load_original_unet(tmp_path / "a.safetensors", n_heads=n)(z, t)[0] for n in (2, 4))
    assert not torch.allclose(two, four, atol=1e-3)
    with pytest.raises(ValueError, match="n_heads must divide the number of channels 32, got 5"):
        load_original_unet(tmp_path / "a.safetensors", n_heads=5)


def module_of(weights):
    """A tree of modules whose parameters have the given names."""
    root = nn.Module()
    for name, value in weights.items():
        *parents, last = name.split(".")
        module = root
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(last, nn.Parameter(value))
    return root


@pytest.mark.parametrize(
    "wrap",
    [
        lambda module: module,
        lambda module: {"model": module, "optimizer": {"lr": 1e-4}},
        lambda module: {f"module.{name}": value for name, value in module.state_dict().items()},
        lambda module: {"model": {}, "ema": module.state_dict(), "epoch": 3},
    ],
    ids=["module", "checkpoint", "distributed", "ema"],
)
def test_checkpoints_of_the_original_load(tmp_path, monkeypatch, wrap):
    """Also whole pickled modules whose class is nowhere to be imported from."""
    weights = original_unet_weights()
    gone = types.ModuleType("gone_package")
    gone.UNetModel = type("UNetModel", (nn.Module,), {"__module__": "gone_package"})
    module = module_of(weights)
    module.__class__ = gone.UNetModel
    monkeypatch.setitem(sys.modules, "gone_package", gone)
    torch.save(wrap(module), tmp_path / "model.pt")
    monkeypatch.delitem(sys.modules, "gone_package")
    save_file(weights, tmp_path / "weights.safetensors")
    found, expected = (load_original_unet(tmp_path / n) for n in ("model.pt", "weights.safetensors"))
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


# CompVis' and diffusers' autoencoders


def compvis_weights(base=32, multipliers=(1, 2), n_res=1, c=3, image_channels=1, mid_attention=True):
    weights = Weights()

    def block(name, c_in, c_out):
        weights.add_norm(f"{name}.norm1", c_in)
        weights.add(f"{name}.conv1", c_in, c_out, 3, 3)
        weights.add_norm(f"{name}.norm2", c_out)
        weights.add(f"{name}.conv2", c_out, c_out, 3, 3)
        if c_in != c_out:
            weights.add(f"{name}.nin_shortcut", c_in, c_out, 1, 1)

    def middle(side, channels):
        block(f"{side}.mid.block_1", channels, channels)
        if mid_attention:
            weights.add_norm(f"{side}.mid.attn_1.norm", channels)
            for part in ("q", "k", "v", "proj_out"):
                weights.add(f"{side}.mid.attn_1.{part}", channels, channels, 1, 1)
        block(f"{side}.mid.block_2", channels, channels)

    last = len(multipliers) - 1
    weights.add("encoder.conv_in", image_channels, base, 3, 3)
    channels = base
    for level, multiplier in enumerate(multipliers):
        for i in range(n_res):
            block(f"encoder.down.{level}.block.{i}", channels, base * multiplier)
            channels = base * multiplier
        if level < last:
            weights.add(f"encoder.down.{level}.downsample.conv", channels, channels, 3, 3)
    middle("encoder", channels)
    weights.add_norm("encoder.norm_out", channels)
    weights.add("encoder.conv_out", channels, 2 * c, 3, 3)
    weights.add("decoder.conv_in", c, channels, 3, 3)
    middle("decoder", channels)
    for level, multiplier in reversed(list(enumerate(multipliers))):
        for i in range(n_res + 1):
            block(f"decoder.up.{level}.block.{i}", channels, base * multiplier)
            channels = base * multiplier
        if level > 0:
            weights.add(f"decoder.up.{level}.upsample.conv", channels, channels, 3, 3)
    weights.add_norm("decoder.norm_out", channels)
    weights.add("decoder.conv_out", channels, image_channels, 3, 3)
    weights.add("quant_conv", 2 * c, 2 * c, 1, 1)
    weights.add("post_quant_conv", c, c, 1, 1)
    return weights


def compvis_autoencoder(weights, x):
    """Mean, log-variance and the reconstruction of the mean."""

    def block(name, x):
        hidden = weights.conv(f"{name}.conv1", F.silu(weights.norm(f"{name}.norm1", x, 1e-6)))
        hidden = weights.conv(f"{name}.conv2", F.silu(weights.norm(f"{name}.norm2", hidden, 1e-6)))
        shortcut = f"{name}.nin_shortcut"
        return hidden + (weights.conv(shortcut, x) if f"{shortcut}.weight" in weights else x)

    def middle(side, x):
        x = block(f"{side}.mid.block_1", x)
        name = f"{side}.mid.attn_1"
        if f"{name}.q.weight" in weights:
            normed = weights.norm(f"{name}.norm", x, 1e-6)
            q, k, v = (weights.conv(f"{name}.{part}", normed).flatten(2) for part in "qkv")
            scores = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(dim=2)
            x = x + weights.conv(f"{name}.proj_out", (v @ scores.transpose(1, 2)).view_as(x))
        return block(f"{side}.mid.block_2", x)

    def count(pattern):
        return len({m[1] for name in weights if (m := re.match(pattern, name))})

    n_levels, n_res = count(r"encoder\.down\.(\d+)"), count(r"encoder\.down\.0\.block\.(\d+)")
    h = weights.conv("encoder.conv_in", x)
    for level in range(n_levels):
        for i in range(n_res):
            h = block(f"encoder.down.{level}.block.{i}", h)
        if level < n_levels - 1:  # padded to the right and below only
            name = f"encoder.down.{level}.downsample.conv"
            h = F.conv2d(F.pad(h, (0, 1, 0, 1)), weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2)
    h = F.silu(weights.norm("encoder.norm_out", middle("encoder", h), 1e-6))
    mean, logvar = weights.conv("quant_conv", weights.conv("encoder.conv_out", h)).chunk(2, dim=1)
    h = middle("decoder", weights.conv("decoder.conv_in", weights.conv("post_quant_conv", mean)))
    for level in reversed(range(n_levels)):
        for i in range(n_res + 1):
            h = block(f"decoder.up.{level}.block.{i}", h)
        if level > 0:
            h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            h = weights.conv(f"decoder.up.{level}.upsample.conv", h)
    h = F.silu(weights.norm("decoder.norm_out", h, 1e-6))
    return mean, logvar, weights.conv("decoder.conv_out", h)


def in_diffusers_layout(weights, spelling=("to_q", "to_k", "to_v", "to_out.0")):
    """CompVis' names in diffusers' words; its attention is made of linear layers."""
    n_levels = len({m[1] for name in weights if (m := re.match(r"encoder\.down\.(\d+)", name))})
    renamed = {}
    for name, value in weights.items():
        name = re.sub(r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets.", name)
        name = re.sub(r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0.", name)
        if match := re.match(r"decoder\.up\.(\d+)\.", name):
            name = name.replace(match[0], f"decoder.up_blocks.{n_levels - 1 - int(match[1])}.")
            name = name.replace(".block.", ".resnets.").replace(".upsample.", ".upsamplers.0.")
        for i in (1, 2):
            name = name.replace(f".mid.block_{i}.", f".mid_block.resnets.{i - 1}.")
        if ".mid.attn_1." in name:
            name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.").replace(".norm.", ".group_norm.")
            for theirs, word in zip(("q", "k", "v", "proj_out"), spelling, strict=True):
                name = name.replace(f".attentions.0.{theirs}.", f".attentions.0.{word}.")
            value = value.flatten(1) if value.ndim == 4 else value
        name = name.replace(".nin_shortcut.", ".conv_shortcut.").replace(".norm_out.", ".conv_norm_out.")
        renamed[name] = value.clone()
    return renamed


AUTOENCODERS = [
    {},
    {"multipliers": (1, 2, 2), "n_res": 2, "c": 4, "image_channels": 3},
    {"multipliers": (1, 1, 2), "mid_attention": False},
]


def check_autoencoder(network, weights):
    factor, channels = network.config.factor, network.config.image_channels
    x = torch.randn(2, channels, 4 * factor, 3 * factor, generator=weights.generator)
    with torch.no_grad():
        posterior = network.encode(x)
        reconstruction = network.decode(posterior.mean)
    found = (posterior.mean, posterior.logvar, reconstruction)
    for array, expected in zip(found, compvis_autoencoder(weights, x), strict=True):
        close(array, expected)
    assert not network.training


@pytest.mark.parametrize("shape", AUTOENCODERS)
def test_compvis_autoencoder_computes_the_same(tmp_path, shape):
    weights = compvis_weights(**shape)
    save_file(weights, tmp_path / "a.safetensors")
    check_autoencoder(load_compvis_autoencoder(tmp_path / "a.safetensors"), weights)


def test_first_stage_of_a_latent_diffusion_checkpoint_is_found(tmp_path):
    weights = compvis_weights()
    others = {
        "model.diffusion_model.out.weight": torch.ones(1),
        "first_stage_model.loss.logvar": torch.ones(1),
    }
    state = {f"first_stage_model.{name}": value for name, value in weights.items()} | others
    torch.save({"state_dict": state, "global_step": 3}, tmp_path / "model.ckpt")
    check_autoencoder(load_compvis_autoencoder(tmp_path), weights)


@pytest.mark.parametrize("shape", AUTOENCODERS)
@pytest.mark.parametrize(
    "spelling", [("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")]
)
def test_diffusers_autoencoder_computes_the_same(tmp_path, shape, spelling):
    weights = compvis_weights(**shape)
    save_file(in_diffusers_layout(weights, spelling), tmp_path / "diffusion_pytorch_model.safetensors")
    check_autoencoder(load_diffusers_autoencoder(tmp_path), weights)


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
def test_diffusers_config_must_agree_with_the_weights(tmp_path, in_vae, config, message):
    folder = tmp_path / "vae" if in_vae else tmp_path
    folder.mkdir(exist_ok=True)
    save_file(in_diffusers_layout(compvis_weights()), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if message is None:
        assert load_diffusers_autoencoder(tmp_path).config.channel_multipliers == (1, 2)
    else:
        with pytest.raises(ValueError, match=message):
            load_diffusers_autoencoder(tmp_path)


# Whatever autoencoder it is


class Hostile:
    """Calls `os.system` when unpickled the usual way."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def save_whole_module(weights, path, monkeypatch):
    """A whole module, as the original repository publishes it; its class is nowhere to be imported from."""
    gone = types.ModuleType("gone_package")
    gone.AutoencoderKL = type("AutoencoderKL", (nn.Module,), {"__module__": "gone_package"})
    module = module_of(weights | {"loss.logvar": torch.ones(1)})
    module.loss.register_buffer("shift", torch.ones(1))
    module.attack = Hostile(f"touch {path.parent / 'marker'}")
    module.__class__ = gone.AutoencoderKL
    monkeypatch.setitem(sys.modules, "gone_package", gone)
    torch.save(module, path)
    monkeypatch.delitem(sys.modules, "gone_package")
    return path


def in_latent_diffusion(weights):
    """A checkpoint with the other networks of a pipeline, one of which is an autoencoder too."""
    other = compvis_weights(base=64)
    state = {f"first_stage_model.{name}": value for name, value in weights.items()}
    state |= {f"cond_stage_model.{name}": value for name, value in other.items()}
    state |= {"model.diffusion_model.out.weight": torch.ones(1), "model_ema.decay": torch.ones(1)}
    return {"global_step": 3, "state_dict": state}


def wrapped(prefix, weights, others=()):
    named = {f"{prefix}{name}": value for name, value in weights.items()}
    return named | {name: torch.ones(1) for name in others}


def write_pipeline(weights, folder):
    (folder / "vae").mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [32, 64]}))
    save_file(in_diffusers_layout(weights), folder / "vae" / "diffusion_pytorch_model.safetensors")


LAYOUTS = {
    "compvis": lambda w, d, _: save_file(w, d / "a.safetensors"),
    "compvis checkpoint": lambda w, d, _: torch.save({"epoch": 3, "state_dict": dict(w)}, d / "a.ckpt"),
    "compvis ema": lambda w, d, _: save_file(
        wrapped("", w, ["model_ema.decay", "loss.a"]), d / "a.safetensors"
    ),
    "compvis distributed": lambda w, d, _: torch.save(wrapped("module.", w), d / "a.pt"),
    "compvis module": lambda w, d, patch: save_whole_module(w, d / "a.pt", patch),
    "latent diffusion": lambda w, d, _: torch.save(in_latent_diffusion(w), d / "a.ckpt"),
    "diffusers": lambda w, d, _: save_file(in_diffusers_layout(w), d / "a.safetensors"),
    "diffusers module": lambda w, d, patch: save_whole_module(in_diffusers_layout(w), d / "a.pt", patch),
    "diffusers pipeline": lambda w, d, _: write_pipeline(w, d),
}


@pytest.mark.parametrize("write", LAYOUTS.values(), ids=list(LAYOUTS))
def test_layout_is_found_out(tmp_path, monkeypatch, write):
    weights, state = compvis_weights(), torch.get_rng_state()
    write(weights, tmp_path, monkeypatch)
    check_autoencoder(load_autoencoder(tmp_path), weights)
    if len(files := [path for path in tmp_path.iterdir() if path.is_file()]) == 1 and files[0].stem == "a":
        check_autoencoder(load_autoencoder(str(files[0])), weights)
    assert not (tmp_path / "marker").exists()
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_becomes_single(tmp_path):
    weights = compvis_weights()
    for name, value in weights.items():
        weights[name] = value.half()
    save_file(weights, tmp_path / "a.safetensors")
    network = load_autoencoder(tmp_path)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    assert torch.equal(network.quant.weight, weights["quant_conv.weight"].float())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    images = np.random.default_rng(0).uniform(0.1, 1, (4, 16, 16)).astype(np.float32)
    detector = tiny_detector(random_state=0).fit(images)
    path = tmp_path_factory.mktemp("saved") / "model"
    detector.save(path)
    return detector, path


def test_autoencoder_of_a_saved_detector(saved):
    detector, path = saved
    for source in (path, path / "autoencoder.safetensors"):
        network = load_autoencoder(source)
        assert network.config == detector.autoencoder_.config_ and not network.training
        torch.testing.assert_close(
            network.state_dict(), detector.autoencoder_.network_.state_dict(), rtol=0, atol=0
        )
    with pytest.raises(ValueError, match="source must hold a KL autoencoder.*denoiser.safetensors with"):
        load_autoencoder(path / "denoiser.safetensors")


def test_unet_of_a_saved_detector(saved):
    detector, path = saved
    for source in (path, str(path), path / "denoiser.safetensors"):
        network = load_unet(source)
        assert network.config == detector.denoiser_.config and not network.training
        torch.testing.assert_close(network.state_dict(), detector.denoiser_.state_dict(), rtol=0, atol=0)
    assert load_unet(path, n_heads=detector.denoiser_.config.n_heads).config == detector.denoiser_.config
    with pytest.raises(ValueError, match="n_heads must be the saved network's 2, got 8. Leave it out"):
        load_unet(path, n_heads=8)


@pytest.mark.parametrize("n_heads", [None, 2])
def test_unets_of_others_are_read_by_the_same_function(tmp_path, n_heads):
    save_file(original_unet_weights(), tmp_path / "a.safetensors")
    found, expected = (
        load(tmp_path / "a.safetensors", n_heads=n_heads) for load in (load_unet, load_original_unet)
    )
    assert found.config == expected.config
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match="path must name a weight file or a directory .*nowhere"):
        load_unet(tmp_path / "nowhere")


def test_a_saved_directory_without_the_network_that_is_wanted(saved, tmp_path):
    (tmp_path / "config.json").write_text('{"format": "madad", "class": "Some"}')
    for load, name in ((load_autoencoder, "autoencoder"), (load_unet, "denoiser")):
        message = (
            rf"source must hold {name}.safetensors, got .*, a saved Some with \['config.json'\]. Check which"
        )
        with pytest.raises(FileNotFoundError, match=message):
            load(tmp_path)


def test_what_madad_saved_is_told_from_what_it_did_not(saved, tmp_path):
    assert is_saved(saved[1]) and is_saved(str(saved[1]))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "nowhere"):
        assert not is_saved(path)


KINDS = {
    "original": ("denoiser", lambda: original_unet_weights()),
    "distributed": ("denoiser", lambda: {f"module.{k}": v for k, v in original_unet_weights().items()}),
    "compvis": ("autoencoder", lambda: compvis_weights()),
    "diffusers": ("autoencoder", lambda: in_diffusers_layout(compvis_weights())),
    "latent diffusion": (
        "autoencoder",
        lambda: wrapped(
            "first_stage_model.", compvis_weights(), ["model.diffusion_model.input_blocks.0.0.weight"]
        ),
    ),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_kinds_are_told_by_the_names_of_the_weights(tmp_path, name, suffix):
    kind, weights = KINDS[name]
    path = tmp_path / f"a{suffix}"
    save_file(weights(), path) if suffix == ".safetensors" else torch.save(dict(weights()), path)
    assert kind_of_weights(path) == kind_of_weights(str(tmp_path)) == kind


def test_kinds_of_saved_networks(saved, tmp_path):
    _, path = saved
    for kind in ("autoencoder", "denoiser"):
        assert kind_of_weights(path / f"{kind}.safetensors") == kind
        folder = tmp_path / kind
        folder.mkdir()
        for name in ("config.json", f"{kind}.safetensors"):
            (folder / name).symlink_to(path / name)
        assert kind_of_weights(folder) == kind
    message = r"source must hold either .*model with autoencoder and denoiser \(\[.*'config.json'.*Say which"
    with pytest.raises(ValueError, match=message):
        kind_of_weights(path)


def test_weights_of_no_kind(tmp_path):
    save_file({"b.weight": torch.zeros(1), "a.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"with neither \(\['a.weight', 'b.weight'\]\)"):
        kind_of_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="source must name a weight file.*'nowhere'"):
        kind_of_weights("nowhere")


def test_weights_are_read_as_they_are_stored(tmp_path):
    weights = {"a": torch.arange(3, dtype=torch.float16), "b.c": torch.zeros(0, dtype=torch.int64)}
    save_file(weights, tmp_path / "a.safetensors")
    found = read_weights(tmp_path)
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in weights.items()
    }
    torch.testing.assert_close(found, weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json must be JSON, got a damaged file"),
        ("[]", "config.json must hold a JSON object, got list"),
        ('{"format": "madad"}', "config.json must describe the autoencoder beside it.*KeyError"),
        (
            '{"format": "madad", "autoencoder": {"network": {"fields": {"n_heads": 3}}}}',
            "config.json must describe the autoencoder beside it.*n_heads.*Upgrade madad",
        ),
        (
            '{"format": "madad", "autoencoder": {"network": {"fields": {"base_channels": 32}}}}',
            r"must hold exactly the weights of AutoencoderKL.*missing \['decoder",
        ),
    ],
)
def test_damaged_saved_detector(saved, tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "autoencoder.safetensors").symlink_to(saved[1] / "autoencoder.safetensors")
    with pytest.raises(ValueError, match=message):
        load_autoencoder(tmp_path)


def test_unknown_layout_says_what_was_looked_for_and_what_was_found(tmp_path):
    for weights, found in (
        (original_unet_weights(), r"\['input_blocks.0.0.bias', .*'\] and \d+ names more"),
        (wrapped("a.", {}, ["b.weight"]), r"\['b.weight'\] and 0 names more"),
    ):
        save_file(weights, tmp_path / "a.safetensors")
        message = r"source must .*encoder.down.0.block.0.\*.*encoder.down_blocks.0.resnets.0.\*.*madad saved"
        with pytest.raises(ValueError, match=message + ".*a.safetensors with " + found):
            load_autoencoder(tmp_path / "a.safetensors")


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_missing_and_unknown_weights_are_listed_whatever_the_layout(tmp_path, layout):
    _, weights, name, ours = LOADERS[layout]
    weights = dict(weights())
    weights["extra.weight"] = weights.pop(name)
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"missing \['{ours}'\], unknown \['extra.weight'\]"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "no/where/at_all", "weights/nowhere.ckpt", "./a/b", "a/b c"])
def test_sources_that_are_neither_path_nor_repository(source):
    with pytest.raises(
        FileNotFoundError, match=f"source must name a weight file.*'{source}'. Check the path"
    ):
        load_autoencoder(source)


def test_sources_of_other_types():
    with pytest.raises(TypeError, match="source must be a path or the name of a hub repository, got 3"):
        load_autoencoder(3)


# From the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A huggingface_hub without a network; what was asked of it is in its `calls`."""
    fake = types.ModuleType("huggingface_hub")
    fake.calls, fake.snapshot = [], tmp_path / "snapshot"
    fake.snapshot.mkdir()

    def snapshot_download(repo_id, **options):
        fake.calls.append((repo_id, options))
        return str(fake.snapshot)

    fake.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.mark.parametrize("revision", [None, "v1.0", "refs/pr/3"])
def test_repositories_are_downloaded(hub, tmp_path, revision):
    weights = compvis_weights()
    write_pipeline(weights, hub.snapshot)
    source = "some-body/kl_f8.mse" + (f"@{revision}" if revision else "")
    check_autoencoder(load_autoencoder(source, hub_cache=tmp_path), weights)
    ((repo_id, options),) = hub.calls
    assert repo_id == "some-body/kl_f8.mse"
    assert options["revision"] == revision and options["cache_dir"] == tmp_path
    patterns = options["allow_patterns"]
    assert {"config.json", "vae/diffusion_pytorch_model.safetensors"} <= set(patterns)
    assert all(
        pattern.endswith(("config.json", ".safetensors")) and "*" not in pattern for pattern in patterns
    )


def test_the_kind_of_a_repositorys_weights(hub, tmp_path):
    write_pipeline(compvis_weights(), hub.snapshot)
    assert kind_of_weights("some-body/kl_f8", hub_cache=tmp_path) == "autoencoder"
    assert hub.calls[0][1]["cache_dir"] == tmp_path


def test_existing_paths_come_before_repositories(hub, tmp_path):
    weights = compvis_weights()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    save_file(weights, tmp_path / "owner" / "name" / "a.safetensors")
    check_autoencoder(load_autoencoder("owner/name"), weights)
    assert hub.calls == []


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no snapshot"), ConnectionError("off"), Exception("x" * 999)]
)
def test_what_the_hub_does_not_give_is_an_oserror(hub, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(OSError, match="source must be an existing path or .*'owner/name@v1'") as raised:
        load_autoencoder("owner/name@v1")
    message = str(raised.value)
    assert type(error).__name__ in message and len(message) < 700
    assert "HF_HOME" in message and "download it elsewhere and pass the directory" in message


def test_repositories_without_weights_that_are_read(hub):
    (hub.snapshot / "config.json").write_text("{}")
    with pytest.raises(
        OSError, match="source must be a repository with one of .*'owner/name' without. Download"
    ):
        load_autoencoder("owner/name")


def test_missing_huggingface_hub_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"source must .*'owner/name'.*pip install \"madad\[hub\]\""):
        load_autoencoder("owner/name")


# Image channels

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


def test_published_weights_can_be_converted_when_they_are_loaded(tmp_path):
    save_file(compvis_weights(image_channels=3), tmp_path / "a.safetensors")
    found = load_autoencoder(tmp_path, image_channels=1)
    expected = to_image_channels(load_autoencoder(tmp_path), 1)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


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


# Errors

LOADERS = {
    "original": (load_original_unet, original_unet_weights, "out.2.bias", "z0_head.conv.bias"),
    "compvis": (load_compvis_autoencoder, compvis_weights, "decoder.norm_out.bias", "decoder.head.norm.bias"),
    "diffusers": (
        load_diffusers_autoencoder,
        lambda: in_diffusers_layout(compvis_weights()),
        "decoder.conv_norm_out.bias",
        "decoder.head.norm.bias",
    ),
}
all_loaders = pytest.mark.parametrize(
    ("load", "weights", "name", "ours"), LOADERS.values(), ids=list(LOADERS)
)


@all_loaders
def test_missing_unknown_and_misshapen_weights_are_all_listed(tmp_path, load, weights, name, ours):
    weights = dict(weights())
    weights["extra.weight"] = weights.pop(name)
    misshapen = next(key for key in weights if key.endswith(("norm1.bias", "out_layers.0.bias")))
    weights[misshapen] = torch.zeros(7)
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "a.safetensors")
    message = str(error.value)
    assert "a.safetensors must hold exactly the weights of" in message
    for part in (f"missing ['{ours}']", "unknown ['extra.weight']", "(7,) instead of"):
        assert part in message


@all_loaders
def test_no_missing_name_is_an_unclear_error(tmp_path, load, weights, name, ours):
    """Whichever single tensor is missing, also one that the shape is read from, the error is a ValueError."""
    weights = dict(weights())
    for missing in (name for name in weights if name.endswith("weight")):
        save_file(
            {key: value for key, value in weights.items() if key != missing}, tmp_path / "a.safetensors"
        )
        with pytest.raises(ValueError, match=r"a\.safetensors must hold .*missing \["):
            load(tmp_path / "a.safetensors")


@all_loaders
def test_weights_of_another_kind_are_refused(tmp_path, load, weights, name, ours):
    others = original_unet_weights() if load is not load_original_unet else compvis_weights()
    for tensors in ({"a.weight": torch.ones(1)}, others):
        save_file(dict(tensors), tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=r"a\.safetensors must hold .*missing \["):
            load(tmp_path / "a.safetensors")


@all_loaders
def test_paths(tmp_path, load, weights, name, ours):
    with pytest.raises(FileNotFoundError, match="path must name a weight file or a directory .*nowhere.pt"):
        load(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"path must name a directory with one weight file, .*\[\]"):
        load(tmp_path)
    (tmp_path / "readme.txt").write_text("no weights")
    save_file(dict(weights()), tmp_path / "one.safetensors")
    from_directory, from_file = load(str(tmp_path)), load(tmp_path / "one.safetensors")
    torch.testing.assert_close(from_directory.state_dict(), from_file.state_dict(), rtol=0, atol=0)
    torch.save(dict(weights()), tmp_path / "two.pt")
    with pytest.raises(FileNotFoundError, match=r"got .*\['one.safetensors', 'two.pt'\]. Name the file"):
        load(tmp_path)
    for damaged in ("one.safetensors", "two.pt"):
        content = (tmp_path / damaged).read_bytes()
        (tmp_path / damaged).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"{damaged} must be .*Download it again"):
            load(tmp_path / damaged)


# Against the outputs of the reference implementations


@pytest.fixture(scope="module")
def original(reference_dir):
    arrays = load_file(reference_dir / "mad_ad_reference_outputs.safetensors")
    return load_original_unet(reference_dir / "mad_ad_unet_ch32.safetensors"), arrays


@torch.no_grad()
def test_original_unet_reproduces_its_reference_outputs(original):
    unet, arrays = original
    z0_hat, noise_logit = unet(arrays["unet_z"], arrays["unet_t_zero_based"] + 1)
    close(z0_hat, arrays["unet_z0_hat"])
    close(1 - torch.sigmoid(noise_logit), arrays["unet_clean_probability"])


@torch.no_grad()
def test_losses_of_the_original_unet_are_reproduced(original):
    unet, arrays = original
    t, noise_mask = arrays["unet_t_zero_based"] + 1, 1 - arrays["fwd_keep_mask"]
    z0_hat, noise_logit = unet(arrays["fwd_z_t"], t)
    z0_loss, mask_loss = masked_diffusion_loss(arrays["fwd_z0"], z0_hat, noise_mask, noise_logit, "mse")
    close(z0_loss, arrays["loss_mse_per_sample"])
    close(mask_loss, arrays["loss_mask_mse_per_sample"])
    close(z0_loss + 0.001 * mask_loss, arrays["loss_total_per_sample"])


@torch.no_grad()
@pytest.mark.parametrize("n_steps", [5, 10])
def test_restorations_of_the_original_unet_are_reproduced(original, n_steps):
    unet, arrays = original
    schedule = NoiseSchedule.cosine(10)
    start, end = (arrays[f"ddim{n_steps}_eta0_{which}"] for which in ("start", "end"))
    close(MaskedDDIM(n_steps).restore(unet, start, schedule).z_restored, end)
    if n_steps == 5:
        times = [t + 1 for t in arrays["timesteps_5_zero_based"].tolist()]
        assert sorted(schedule.timesteps(5)) == sorted(times)


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
def test_autoencoders_reproduce_their_reference_outputs(reference_dir, layout, load):
    network = load(reference_dir / f"{layout}_kl_f8_ch32.safetensors")
    arrays = load_file(reference_dir / f"{layout}_kl_f8_outputs.safetensors")
    posterior = network.encode(arrays["x"])
    close(posterior.mean, arrays["mean"])
    close(posterior.logvar, arrays["logvar"])
    close(network.decode(posterior.mean), arrays["reconstruction_of_mean"])
