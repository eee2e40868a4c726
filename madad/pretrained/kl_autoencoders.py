"""KL autoencoders as CompVis and diffusers write them."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from madad.nn import AutoencoderConfig, AutoencoderKL
from madad.pretrained.weight_files import build, fill, read_foreign_config, require

_STEM = "encoder.conv_in.weight"  # in both foreign layouts
_COMPVIS, _DIFFUSERS = "encoder.down.0.block.0.", "encoder.down_blocks.0.resnets.0."
_TRAINING_ONLY = ("loss.", "model_ema.")


def _from_compvis(tensors: dict[str, Tensor], path) -> AutoencoderKL:
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


def _from_diffusers(tensors: dict[str, Tensor], path) -> AutoencoderKL:
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
    require(tensors, _STEM, path)
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


def _autoencoder_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's weights by their bare names, out of whatever it was wrapped in or trained with."""
    prefixes = [name.removesuffix(_STEM) for name in tensors if name.endswith(_STEM)]
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
        config = read_foreign_config(file)
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
