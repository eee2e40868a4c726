"""KL autoencoders as CompVis and diffusers write them, and other numbers of image channels for them."""

from __future__ import annotations

import numbers
import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from madad._runtime.files import read_json
from madad.nn import AutoencoderConfig, AutoencoderKL
from madad.pretrained.weight_files import DOWNLOAD_AGAIN, build, fill, read_weights, require

STEM = "encoder.conv_in.weight"  # in both foreign layouts
COMPVIS, DIFFUSERS = "encoder.down.0.block.0.", "encoder.down_blocks.0.resnets.0."
_TRAINING_ONLY = ("loss.", "model_ema.")

# The weights that see image channels, and on which axis.
_READ_IMAGE = {"encoder.stem.conv.weight": 1, "to_latent.weight": 1}
_WRITE_IMAGE = {
    "decoder.head.conv.weight": 0,
    "decoder.head.conv.bias": 0,
    "to_image.weight": 1,
    "to_image.bias": 0,
}


def load_compvis_autoencoder(path) -> AutoencoderKL:
    """Load a KL autoencoder in CompVis' latent-diffusion layout (``encoder.down.0.block.0.norm1.weight``).

    Parameters
    ----------
    path : path-like
        A ``.safetensors``, ``.ckpt`` or ``.pt`` file, or a directory with one. Of a whole latent-diffusion
        checkpoint only ``first_stage_model.*`` is read; what only training needs, ``loss.*`` and
        ``model_ema.*``, is ignored.

    Returns
    -------
    AutoencoderKL
        In evaluation mode, on the CPU.

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_original_unet`.
    """
    return from_compvis(autoencoder_part(read_weights(path)), path)


def load_diffusers_autoencoder(path) -> AutoencoderKL:
    """Load a KL autoencoder in the layout of diffusers' ``AutoencoderKL``.

    Parameters
    ----------
    path : path-like
        The weight file, or a directory with it (``vae/`` inside is found too). A ``config.json`` beside it
        is checked against what the weights say.

    Returns
    -------
    AutoencoderKL
        In evaluation mode, on the CPU.

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_original_unet`; ValueError also if the ``config.json`` disagrees with the weights.
    """
    return from_diffusers(autoencoder_part(read_weights(path)), path)


def to_image_channels(network: AutoencoderKL, n: int) -> AutoencoderKL:
    """The same autoencoder for one image channel instead of several, or for several instead of one.

    Parameters
    ----------
    network : AutoencoderKL
        The autoencoder to convert; its number of image channels is called C below.
    n : int
        Number of image channels of the result: C or 1, or any number from 1 if C is 1.

    Returns
    -------
    AutoencoderKL
        ``network`` itself if n is C, else a new one.

    Raises
    ------
    TypeError, ValueError
        If ``n`` is no whole number, or none of these.

    Notes
    -----
    C to 1: input kernels are summed over the channels, output kernels and biases averaged. A grey image then
    has the posterior of the image that repeats it C times, and is decoded to the mean of its channels.
    1 to n: input kernels are divided by n and repeated, output kernels and biases repeated. An image then
    has the posterior of the mean of its channels, and is decoded to n equal ones.
    """
    given = network.config.image_channels
    if not isinstance(n, numbers.Integral):
        raise TypeError(f"n must be a whole number of image channels, got {n!r}. Use 1.")
    if n == given:
        return network
    if n < 1 or 1 not in (n, given):
        possible = "at least 1" if given == 1 else f"1 or {given}"
        raise ValueError(
            f"n must be {possible} where the network's image channels are {given}, got {n}. From several to "
            f"several, convert to 1 first."
        )
    state = network.state_dict()
    for name, axis in (_READ_IMAGE | _WRITE_IMAGE).items():
        if name in state:
            by_channel = state[name].cpu().double().unflatten(axis, (given, -1))
            if name in _READ_IMAGE:
                one = by_channel.sum(axis, keepdim=True) / n
            else:
                one = by_channel.mean(axis, keepdim=True)
            state[name] = one.repeat_interleave(n, axis).flatten(axis, axis + 1)
    converted = build(AutoencoderKL, replace(network.config, image_channels=int(n)))
    converted.load_state_dict(state)
    return converted.to(network.quant.weight.device).train(network.training)


def from_compvis(tensors: dict[str, Tensor], path) -> AutoencoderKL:
    """Build an autoencoder from weights in CompVis' layout.

    Parameters
    ----------
    tensors : dict of str to Tensor
        Weights by bare name, as from `autoencoder_part`.
    path : path-like
        Where they are from, for the messages.

    Returns
    -------
    AutoencoderKL
        In evaluation mode, on the CPU.
    """
    n_levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    rules = [
        (r"encoder\.down\.(\d+)\.block\.(\d+)\.", r"encoder.levels.\1.\2."),
        (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.levels.\1.RESAMPLE."),
        (r"decoder\.up\.(\d+)\.block\.(\d+)\.", r"decoder.levels.FLIP\1.\2."),
        (r"decoder\.up\.(\d+)\.upsample\.", r"decoder.levels.FLIP\1.RESAMPLE."),
        (r"\.mid\.block_(\d)\.", r".middle.block\1."),
        (r"\.mid\.attn_1\.", ".middle.attention."),
        (r"\.proj_out\.", ".out."),
        (r"\.nin_shortcut\.", ".shortcut."),
        (r"\.norm_out\.", ".head.norm."),
    ]
    return _autoencoder(tensors, rules, n_levels, path)


def from_diffusers(tensors: dict[str, Tensor], path) -> AutoencoderKL:
    """Build an autoencoder from weights in diffusers' layout.

    Parameters
    ----------
    tensors : dict of str to Tensor
        Weights by bare name, as from `autoencoder_part`.
    path : path-like
        Where they are from, for the messages and for a ``config.json`` to check against.

    Returns
    -------
    AutoencoderKL
        In evaluation mode, on the CPU.
    """
    n_levels = _count(tensors, r"encoder\.down_blocks\.(\d+)\.")
    rules = [
        (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"encoder.levels.\1.\2."),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.levels.\1.RESAMPLE."),
        (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", r"decoder.levels.\1.\2."),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"decoder.levels.\1.RESAMPLE."),
        (r"\.mid_block\.resnets\.0\.", ".middle.block1."),
        (r"\.mid_block\.resnets\.1\.", ".middle.block2."),
        (r"\.mid_block\.attentions\.0\.", ".middle.attention."),
        (r"\.group_norm\.", ".norm."),
        (r"\.(?:to_q|query)\.", ".q."),
        (r"\.(?:to_k|key)\.", ".k."),
        (r"\.(?:to_v|value)\.", ".v."),
        (r"\.(?:to_out\.0|proj_attn)\.", ".out."),
        (r"\.conv_shortcut\.", ".shortcut."),
        (r"\.conv_norm_out\.", ".head.norm."),
    ]
    network = _autoencoder(tensors, rules, n_levels, path)
    _check_diffusers_config(path, network)
    return network


def _autoencoder(tensors: dict[str, Tensor], rules, n_levels: int, path) -> AutoencoderKL:
    """Rename by rules, fuse queries, keys and values, read the shape off the weights, fill."""
    require(tensors, STEM, path)
    rules = [
        *rules,
        (r"^(encoder|decoder)\.conv_in\.", r"\1.stem.conv."),
        (r"^(encoder|decoder)\.conv_out\.", r"\1.head.conv."),
        (r"^quant_conv\.", "quant."),
        (r"^post_quant_conv\.", "post_quant."),
    ]
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[re.sub(r"FLIP(\d+)", lambda m: str(n_levels - 1 - int(m[1])), name)] = value
    n_res_blocks = 1 + max(
        (int(m[1]) for name in renamed if (m := re.match(r"encoder\.levels\.0\.(\d+)\.", name))), default=0
    )
    resampled = {
        name.replace("RESAMPLE", str(n_res_blocks + name.startswith("decoder"))): value
        for name, value in renamed.items()
    }
    fused = _fuse_qkv(resampled)
    require(fused, "encoder.head.conv.weight", path)
    for i in range(n_levels):
        require(fused, f"encoder.levels.{i}.0.conv1.weight", path)
    base, image_channels = fused["encoder.stem.conv.weight"].shape[:2]
    widths = [fused[f"encoder.levels.{i}.0.conv1.weight"].shape[0] for i in range(n_levels)]
    config = AutoencoderConfig(
        image_channels=image_channels,
        latent_channels=fused["encoder.head.conv.weight"].shape[0] // 2,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        n_res_blocks=n_res_blocks,
        mid_attention="encoder.middle.attention.qkv.weight" in fused,
    )
    return fill(build(AutoencoderKL, config), fused, path)


def autoencoder_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pick an autoencoder's weights out of whatever it was wrapped in or trained with.

    Parameters
    ----------
    tensors : dict of str to Tensor
        All tensors of a file, in either layout.

    Returns
    -------
    dict of str to Tensor
        Those of the autoencoder by their bare names, ``encoder.conv_in.weight`` and the like.
    """
    prefixes = [name.removesuffix(STEM) for name in tensors if name.endswith(STEM)]
    prefix = min(prefixes, key=lambda found: ("first_stage_model." not in found, len(found)), default="")
    part = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    return {name: value for name, value in part.items() if not name.startswith(_TRAINING_ONLY)}


def _fuse_qkv(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Three 1x1 convolutions or linear maps q, k, v become one, in this order."""
    fused = {}
    for name, value in tensors.items():
        match = re.fullmatch(r"(.*\.attention)\.(q|k|v|out)\.(weight|bias)", name)
        if match is None:
            fused[name] = value
            continue
        stem, part, kind = match.groups()
        siblings = [f"{stem}.{letter}.{kind}" for letter in "qkv"]
        if part == "out" or not all(sibling in tensors for sibling in siblings):
            parts = [value]
        elif part == "q":
            parts = [tensors[sibling] for sibling in siblings]
        else:
            continue
        joined = torch.cat(parts)
        target = f"{stem}.qkv.{kind}" if len(parts) == 3 else name
        fused[target] = joined[:, :, None, None] if kind == "weight" and joined.ndim == 2 else joined
    return fused


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return len({m[1] for name in tensors if (m := re.match(pattern, name))})


def _check_diffusers_config(path, network: AutoencoderKL) -> None:
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    for file in (folder / "config.json", folder / "vae" / "config.json"):
        config = read_json(file, DOWNLOAD_AGAIN) if file.is_file() else {}
        found = network.config
        of_weights = {
            "block_out_channels": [found.base_channels * m for m in found.channel_multipliers],
            "latent_channels": found.latent_channels,
            "norm_num_groups": found.norm_groups,  # the weights do not tell; ours has always 32
        }
        for key, value in of_weights.items():
            if config.get(key, value) != value:
                raise ValueError(
                    f"{file} must agree with the weights, got {key} {config[key]} where the network read "
                    f"from them has {value}. Put the two that belong together into one directory."
                )
