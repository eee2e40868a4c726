"""Random weights in the foreign layouts, and small functional implementations of the foreign networks."""

import json
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

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


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


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


def wrapped(prefix, weights, others=()):
    named = {f"{prefix}{name}": value for name, value in weights.items()}
    return named | {name: torch.ones(1) for name in others}


def write_pipeline(weights, folder):
    (folder / "vae").mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [32, 64]}))
    save_file(in_diffusers_layout(weights), folder / "vae" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="session")
def foreign():
    """The functions of this file."""
    return sys.modules[__name__]
