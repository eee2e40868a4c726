"""Weights that others published, read into our networks: strictly, by name, without running their code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from madad._unpickling import read_pickled_tensors
from madad.nn import AutoencoderConfig, AutoencoderKL, MaskedUNet, UNetConfig

Network = TypeVar("Network", bound=nn.Module)

LATENT_SCALE = 0.18215  # what Stable Diffusion's latents are multiplied by
ORIGINAL_HEADS = {64: 4, 128: 4, 192: 6, 256: 8, 320: 10}  # by base channels
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "model.safetensors",
    "model.ckpt",
)

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "shortcut",
}


def load_original_unet(path, *, n_heads: int | None = None) -> MaskedUNet:
    """The original MAD-AD U-Net as a `MaskedUNet`.

    Parameters
    ----------
    path : path-like
        State dict (``.safetensors``, ``.pt``) or whole pickled module (``.pt``), or a directory with one.
    n_heads : int or None
        The weights do not tell. None = the original's for its sizes (64 to 320 base channels), else 4.

    Returns
    -------
    MaskedUNet
        In evaluation mode; its mask head gives P(noised) where the original's gave P(clean): weight and
        bias of that head's last convolution change sign.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, it is damaged, or names are missing or unknown (all are listed).
    """
    tensors = _without_prefix(_read(path), "module.")
    _require(tensors, "input_blocks.0.0.weight", path)
    base, latent_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    widths, n_res_blocks, attention_levels = _original_levels(tensors, path)
    config = UNetConfig(
        latent_channels=latent_channels,
        base_channels=base,
        channel_multipliers=tuple(width // base for width in widths),
        n_res_blocks=n_res_blocks,
        attention_levels=attention_levels,
        n_heads=n_heads or ORIGINAL_HEADS.get(base, 4),
    )
    network = MaskedUNet(config)
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        ours = _original_name(name, n_res_blocks)
        if ours.endswith("attention.qkv.weight") or ours.endswith("attention.qkv.bias"):
            value = _by_kind_then_head(value, config.n_heads)
        if ".attention." in ours and ours.endswith("weight") and value.ndim == 3:
            value = value[..., None]  # 1-d convolutions over tokens
        renamed[ours] = -value if ours.startswith("noise_head.conv.") else value
    return _fill(network, renamed, path)


def load_compvis_autoencoder(path) -> AutoencoderKL:
    """A KL autoencoder in CompVis' latent-diffusion layout (``encoder.down.0.block.0.norm1.weight``).

    Accepts ``.safetensors``, ``.ckpt`` and ``.pt`` files, or a directory with one. Of a whole
    latent-diffusion checkpoint only ``first_stage_model.*`` is read; training-only ``loss.*`` is ignored.
    Parameters, returns and errors as `load_original_unet`.
    """
    tensors = _read(path)
    if any(name.startswith("first_stage_model.") for name in tensors):
        tensors = {name: value for name, value in tensors.items() if name.startswith("first_stage_model.")}
        tensors = _without_prefix(tensors, "first_stage_model.")
    tensors = {name: value for name, value in tensors.items() if not name.startswith("loss.")}
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


def load_diffusers_autoencoder(path) -> AutoencoderKL:
    """A KL autoencoder in the layout of diffusers' ``AutoencoderKL``.

    Accepts the weight file, or a directory with it (``vae/`` inside is found too); a ``config.json`` beside
    it is checked against what the weights say. Parameters, returns and errors as `load_original_unet`.
    """
    tensors = _read(path)
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
    _require(tensors, "encoder.conv_in.weight", path)
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
    _require(fused, "encoder.head.conv.weight", path)
    for i in range(n_levels):
        _require(fused, f"encoder.levels.{i}.0.conv1.weight", path)
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
    return _fill(AutoencoderKL(config), fused, path)


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


def _original_levels(tensors: dict[str, Tensor], path) -> tuple[list[int], int, tuple[int, ...]]:
    """Widths, residual blocks per level and levels with attention of the original U-Net's way down."""
    widths, attention, blocks = [], [], 0
    n_blocks = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"input_blocks\.(\d+)\.", name)))
    for k in range(1, n_blocks):
        if f"input_blocks.{k}.0.op.weight" in tensors:
            continue
        if k == 1 or f"input_blocks.{k - 1}.0.op.weight" in tensors:
            _require(tensors, f"input_blocks.{k}.0.in_layers.2.weight", path)
            widths.append(tensors[f"input_blocks.{k}.0.in_layers.2.weight"].shape[0])
            if f"input_blocks.{k}.1.qkv.weight" in tensors:
                attention.append(len(widths) - 1)
        blocks += 1
    return widths, blocks // len(widths), tuple(attention)


def _original_name(name: str, n_res_blocks: int) -> str:
    """One of the original U-Net's names in ours; unknown names come back as they are."""
    for theirs, ours in (
        ("time_embed.", "time_embedding."),
        ("input_blocks.0.0.", "stem.conv."),
        ("out.0.", "z0_head.norm."),
        ("out.2.", "z0_head.conv."),
        ("mt_out.0.", "noise_head.norm."),
        ("mt_out.1.", "noise_head.conv."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    match = re.match(r"(input_blocks|output_blocks|middle_block)\.(\d+)\.(.*)", name)
    if match is None:
        return name
    part, k, rest = match[1], int(match[2]), match[3]
    if part == "middle_block":
        place = {0: "middle1.residual", 1: "middle1.attention", 2: "middle2.residual"}.get(k)
        return name if place is None else f"{place}.{_block_name(rest)}"
    level, block = divmod(k - (part == "input_blocks"), n_res_blocks + 1)
    side = "down" if part == "input_blocks" else "up"
    layer, _, inner = rest.partition(".")
    if inner.startswith(("op.", "conv.")):
        return f"{side}.{level}.resample.conv.{inner.partition('.')[2]}"
    kind = {"0": "residual", "1": "attention"}.get(layer, layer)
    return f"{side}.{level}.blocks.{block}.{kind}.{_block_name(inner)}"


def _block_name(inner: str) -> str:
    for theirs, ours in (*_RESIDUAL.items(), ("proj_out", "out")):
        if inner.startswith(theirs + "."):
            return ours + inner.removeprefix(theirs)
    return inner


def _by_kind_then_head(value: Tensor, n_heads: int) -> Tensor:
    """The original orders qkv by head, then kind; ours by kind, then head."""
    rows = value.shape[0]
    by_head = value.view(n_heads, 3, rows // (3 * n_heads), *value.shape[1:])
    return by_head.transpose(0, 1).reshape(value.shape)


def _read(path) -> dict[str, Tensor]:
    """Named float32 tensors of a weight file, or of the one in a directory."""
    path = Path(path)
    if path.is_dir():
        path = _weight_file_in(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"path must name a weight file or a directory with one, got {path}. Check the path."
        )
    if path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} must be a safetensors file, got one that cannot be read ({error}). "
                f"Download it again."
            ) from error
    else:
        tensors = read_pickled_tensors(path)
    return {name: value.float() for name, value in tensors.items()}


def _weight_file_in(directory: Path) -> Path:
    for folder in (directory, directory / "vae"):
        for name in WEIGHT_FILES:
            if (folder / name).is_file():
                return folder / name
    suffixes = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
    found = [file for file in sorted(directory.iterdir()) if file.suffix in suffixes]
    if len(found) != 1:
        raise FileNotFoundError(
            f"path must name a directory with one weight file, got {directory} with "
            f"{[file.name for file in found]}. Name the file."
        )
    return found[0]


def _fill(network: Network, tensors: dict[str, Tensor], path) -> Network:
    """Load strictly; the error lists what is missing, unknown or of another shape."""
    wanted = network.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    unknown = sorted(tensors.keys() - wanted.keys())
    misshapen = sorted(
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in wanted.keys() & tensors.keys()
        if tensors[name].shape != wanted[name].shape
    )
    if missing or unknown or misshapen:
        raise ValueError(
            f"{path} must hold exactly the weights of {type(network).__name__}, got missing {missing}, "
            f"unknown {unknown}, other shapes {misshapen}. Check that the file is of this kind of network."
        )
    network.load_state_dict(tensors)
    return network.eval()


def _require(tensors: dict[str, Tensor], name: str, path) -> None:
    if name not in tensors:
        raise ValueError(
            f"{path} must hold {name}, got other names: missing ['{name}'], unknown {sorted(tensors)[:20]}. "
            f"Check that the file is of this kind of network."
        )


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def _count(tensors: dict[str, Tensor], pattern: str) -> int:
    return len({m[1] for name in tensors if (m := re.match(pattern, name))})


def _check_diffusers_config(path, network: AutoencoderKL) -> None:
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    for file in (folder / "config.json", folder / "vae" / "config.json"):
        if file.is_file():
            config = json.loads(file.read_text())
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
