"""The U-Net of the published MAD-AD code."""

from __future__ import annotations

import re

from torch import Tensor

from madad.nn import MaskedUNet, UNetConfig
from madad.pretrained.weight_files import build, fill, read_weights, require, without_prefix

ORIGINAL_HEADS = {64: 4, 128: 4, 192: 6, 256: 8, 320: 10}  # by base channels
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
    n_heads : int or None, default=None
        Attention heads, which the weights do not tell. None = the original's for its sizes (64 to 320 base
        channels), else 4.

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
    tensors = without_prefix(read_weights(path), "module.")
    require(tensors, "input_blocks.0.0.weight", path)
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
    network = build(MaskedUNet, config)
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        ours = _original_name(name, n_res_blocks)
        if ours.endswith("attention.qkv.weight") or ours.endswith("attention.qkv.bias"):
            value = _by_kind_then_head(value, config.n_heads)
        if ".attention." in ours and ours.endswith("weight") and value.ndim == 3:
            value = value[..., None]  # 1-d convolutions over tokens
        renamed[ours] = -value if ours.startswith("noise_head.conv.") else value
    return fill(network, renamed, path)


def _original_levels(tensors: dict[str, Tensor], path) -> tuple[list[int], int, tuple[int, ...]]:
    """Widths, residual blocks per level and levels with attention of the original U-Net's way down."""
    widths, attention, blocks = [], [], 0
    n_blocks = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"input_blocks\.(\d+)\.", name)))
    for k in range(1, n_blocks):
        if f"input_blocks.{k}.0.op.weight" in tensors:
            continue
        if k == 1 or f"input_blocks.{k - 1}.0.op.weight" in tensors:
            require(tensors, f"input_blocks.{k}.0.in_layers.2.weight", path)
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
