"""Weights as networks, others' and our own: read strictly, by name, without running any code in them."""

from __future__ import annotations

import importlib
import json
import numbers
import os
import re
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from madad._random import isolated_seed
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
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
SAVED_WEIGHTS = {"autoencoder": "autoencoder.safetensors", "denoiser": "denoiser.safetensors"}  # of madad
# Whole names: the hub's patterns let * match slashes, and a pipeline's other networks are large.
HUB_WEIGHTS = (
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    SAVED_WEIGHTS["autoencoder"],
)
HUB_CONFIGS = ("config.json", "vae/config.json")

_HUB_ID = r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?"
_STEM = "encoder.conv_in.weight"  # in both foreign layouts
_COMPVIS, _DIFFUSERS = "encoder.down.0.block.0.", "encoder.down_blocks.0.resnets.0."
_TRAINING_ONLY = ("loss.", "model_ema.")
# What tells the two kinds of network apart, by how a name ends and by whole names.
_OF_AUTOENCODERS = (_STEM, "encoder.stem.conv.weight")
_OF_UNETS = {"input_blocks.0.0.weight", "noise_head.conv.weight"}

# The weights that see image channels, and on which axis.
_READ_IMAGE = {"encoder.stem.conv.weight": 1, "to_latent.weight": 1}
_WRITE_IMAGE = {
    "decoder.head.conv.weight": 0,
    "decoder.head.conv.bias": 0,
    "to_image.weight": 1,
    "to_image.bias": 0,
}

_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "shortcut",
}


def kind_of_weights(source, *, hub_cache=None) -> str:
    """Which of our two networks a file or directory holds, told by the names of its tensors.

    Parameters
    ----------
    source, hub_cache
        As in `load_autoencoder` and `load_unet`.

    Returns
    -------
    {"autoencoder", "denoiser"}
        What `load_autoencoder` or `load_unet` reads. Nothing is said of the weights' number and shape.

    Raises
    ------
    FileNotFoundError, ValueError, OSError, ImportError
        As `load_autoencoder`; ValueError also if it holds neither, or both as a saved detector does.
    """
    path = _local_path(source, hub_cache)
    if is_saved(path):
        kinds = [kind for kind, name in SAVED_WEIGHTS.items() if (path / name).is_file()]
        found = sorted(entry.name for entry in path.iterdir())
    else:
        names = {name.removeprefix("module.") for name in read_weights(path)}
        kinds = ["autoencoder"] if any(name.endswith(_OF_AUTOENCODERS) for name in names) else []
        kinds += ["denoiser"] if names & _OF_UNETS else []
        found = sorted(names)[:5]
    if len(kinds) != 1:
        raise ValueError(
            f"source must hold either an autoencoder or a denoiser, got {path} with "
            f"{' and '.join(kinds) or 'neither'} ({found}). Say which is meant, or check the file."
        )
    return kinds[0]


def is_saved(path) -> bool:
    """Whether a path is a directory that madad wrote: a detector's, or one with a network alone."""
    return _read_config(Path(path) / "config.json").get("format") == "madad"


def load_unet(source, *, n_heads: int | None = None) -> MaskedUNet:
    """A masked U-Net from a directory of ours or from the original's weights.

    Parameters
    ----------
    source : path-like
        A directory written by a detector's ``save`` or by ``madad convert``, the ``denoiser.safetensors`` in
        it, or what `load_original_unet` reads.
    n_heads : int or None
        As in `load_original_unet`. Directories of ours tell it themselves.

    Returns
    -------
    MaskedUNet
        In evaluation mode, on the CPU. `madad.MaskedDiffusionAnomalyDetector` takes it as ``denoiser``.

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_original_unet`, or if the directory holds no such network, or one with other ``n_heads``.
    """
    network = _load_saved(Path(source), "denoiser", MaskedUNet, UNetConfig)
    if network is None:
        return load_original_unet(source, n_heads=n_heads)
    if n_heads not in (None, network.config.n_heads):
        raise ValueError(
            f"n_heads must be the saved network's {network.config.n_heads}, got {n_heads}. Leave it out."
        )
    return network


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
    tensors = _without_prefix(read_weights(path), "module.")
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
    network = _build(MaskedUNet, config)
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        ours = _original_name(name, n_res_blocks)
        if ours.endswith("attention.qkv.weight") or ours.endswith("attention.qkv.bias"):
            value = _by_kind_then_head(value, config.n_heads)
        if ".attention." in ours and ours.endswith("weight") and value.ndim == 3:
            value = value[..., None]  # 1-d convolutions over tokens
        renamed[ours] = -value if ours.startswith("noise_head.conv.") else value
    return _fill(network, renamed, path)


def load_autoencoder(source, *, image_channels: int | None = None, hub_cache=None) -> AutoencoderKL:
    """A KL autoencoder from wherever it lies, in whichever layout it is found to be.

    Parameters
    ----------
    source : path-like or str
        What `load_compvis_autoencoder` or `load_diffusers_autoencoder` reads, also as a whole pickled module
        such as the original MAD-AD repository's; a directory written by a detector's ``save`` or by
        ``madad convert``; or, where no such path exists, a repository on the Hugging Face hub,
        ``"owner/name"`` or ``"owner/name@revision"``, of which only safetensors weights and their config are
        downloaded.
    image_channels : int or None
        What the network is brought to by `to_image_channels`. None = as published.
    hub_cache : path-like or None
        Where downloads are kept. None = the hub's own cache, below ``HF_HOME``.

    Returns
    -------
    AutoencoderKL
        In evaluation mode, on the CPU.

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_original_unet`, or if the layout is none of these.
    OSError
        If the hub does not give the repository.
    ImportError
        If the repository's name is given and huggingface_hub is not installed.
    """
    path = _local_path(source, hub_cache)
    network = _load_saved(path, "autoencoder", AutoencoderKL, AutoencoderConfig)
    if network is None:
        tensors = _autoencoder_part(read_weights(path))
        if any(name.startswith(_COMPVIS) for name in tensors):
            network = _from_compvis(tensors, path)
        elif any(name.startswith(_DIFFUSERS) for name in tensors):
            network = _from_diffusers(tensors, path)
        else:
            raise ValueError(
                f"source must hold a KL autoencoder of CompVis ({_COMPVIS}*) or diffusers ({_DIFFUSERS}*) or "
                f"be a directory that madad saved, got {path} with {sorted(tensors)[:5]} and "
                f"{max(0, len(tensors) - 5)} names more. Check that the file is of this kind of network."
            )
    return network if image_channels is None else to_image_channels(network, image_channels)


def to_image_channels(network: AutoencoderKL, n: int) -> AutoencoderKL:
    """The same autoencoder for one image channel instead of several, or for several instead of one.

    Parameters
    ----------
    network : AutoencoderKL
        Its number of image channels is called C below.
    n : int
        C or 1; any number if C is 1.

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
    converted = _build(AutoencoderKL, replace(network.config, image_channels=int(n)))
    converted.load_state_dict(state)
    return converted.to(network.quant.weight.device).train(network.training)


def load_compvis_autoencoder(path) -> AutoencoderKL:
    """A KL autoencoder in CompVis' latent-diffusion layout (``encoder.down.0.block.0.norm1.weight``).

    Accepts ``.safetensors``, ``.ckpt`` and ``.pt`` files, or a directory with one. Of a whole
    latent-diffusion checkpoint only ``first_stage_model.*`` is read; what only training needs, ``loss.*`` and
    ``model_ema.*``, is ignored. Parameters, returns and errors as `load_original_unet`.
    """
    return _from_compvis(_autoencoder_part(read_weights(path)), path)


def load_diffusers_autoencoder(path) -> AutoencoderKL:
    """A KL autoencoder in the layout of diffusers' ``AutoencoderKL``.

    Accepts the weight file, or a directory with it (``vae/`` inside is found too); a ``config.json`` beside
    it is checked against what the weights say. Parameters, returns and errors as `load_original_unet`.
    """
    return _from_diffusers(_autoencoder_part(read_weights(path)), path)


def read_weights(path) -> dict[str, Tensor]:
    """Named tensors of a weight file, or of the one in a directory: as stored, whatever the network.

    Parameters and errors as `load_original_unet`.
    """
    path = Path(path)
    if path.is_dir():
        path = _weight_file_in(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"path must name a weight file or a directory with one, got {path}. Check the path."
        )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} must be a safetensors file, got one that cannot be read ({error}). "
                f"Download it again."
            ) from error
    return read_pickled_tensors(path)


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
    _require(tensors, _STEM, path)
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
    return _fill(_build(AutoencoderKL, config), fused, path)


def _autoencoder_part(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An autoencoder's weights by their bare names, out of whatever it was wrapped in or trained with."""
    prefixes = [name.removesuffix(_STEM) for name in tensors if name.endswith(_STEM)]
    prefix = min(prefixes, key=lambda found: ("first_stage_model." not in found, len(found)), default="")
    part = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    return {name: value for name, value in part.items() if not name.startswith(_TRAINING_ONLY)}


def _load_saved(path: Path, part: str, kind: type[Network], config_class: type) -> Network | None:
    """One network of a directory that madad wrote; None if it is no such directory."""
    folder = path.parent if path.name == SAVED_WEIGHTS[part] else path
    if not is_saved(folder):
        return None
    config, file = _read_config(folder / "config.json"), folder / SAVED_WEIGHTS[part]
    if not file.is_file():
        raise FileNotFoundError(
            f"source must hold {file.name}, got {folder}, a saved {config.get('class')} with "
            f"{sorted(entry.name for entry in folder.iterdir())}. Check which network is meant."
        )
    weights = {name: value for name, value in read_weights(file).items() if not name.startswith("latent_")}
    try:
        description = config[part]["network"] if part == "autoencoder" else config[part]
        plain: dict[str, Any] = {
            key: tuple(value["__tuple__"]) if isinstance(value, dict) else value
            for key, value in description["fields"].items()
        }
        return _fill(_build(kind, config_class(**plain)), weights, folder)
    except (KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} must describe the {part} beside it, got what cannot be read "
            f"({type(error).__name__}: {error}). Upgrade madad, or save the model again."
        ) from error


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


def _local_path(source, hub_cache) -> Path:
    """``source`` if it exists, else where the hub's repository of that name was downloaded to."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source must be a path or the name of a hub repository, got {source!r}. Give one of them."
        )
    path = Path(source)
    if path.exists():
        return path
    named = re.fullmatch(_HUB_ID, source) if isinstance(source, str) else None
    if named is None or path.suffix in WEIGHT_SUFFIXES:
        raise FileNotFoundError(
            f"source must name a weight file, a directory with one, or a hub repository as 'owner/name', got "
            f"{str(source)!r}. Check the path."
        )
    return _download(named[1], named[2], hub_cache)


def _download(repository: str, revision: str | None, hub_cache) -> Path:
    """The local copy of a hub repository's autoencoder."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ImportError(
            f"source must be an existing path where huggingface_hub is not installed, got {repository!r}. "
            f'Install it: pip install "madad[hub]".'
        ) from error
    try:
        copy = hub.snapshot_download(
            repository, revision=revision, cache_dir=hub_cache, allow_patterns=[*HUB_CONFIGS, *HUB_WEIGHTS]
        )
    except Exception as error:  # those of its HTTP client are no OSErrors
        wanted = f"{repository}@{revision}" if revision else repository
        raise OSError(
            f"source must be an existing path or a repository that the hub gives, got {wanted!r} "
            f"({type(error).__name__}: {shorten(str(error), 300)}). Check the name and the connection, set "
            f"HF_HOME to a cache that has it, or download it elsewhere and pass the directory."
        ) from error
    if not any(Path(copy, name).is_file() for name in HUB_WEIGHTS):
        raise FileNotFoundError(
            f"source must be a repository with one of {list(HUB_WEIGHTS)}, got {repository!r} without. "
            f"Download its weight file and pass the path."
        )
    return Path(copy)


def _weight_file_in(directory: Path) -> Path:
    for folder in (directory, directory / "vae"):
        for name in WEIGHT_FILES:
            if (folder / name).is_file():
                return folder / name
    found = [file for file in sorted(directory.iterdir()) if file.suffix in WEIGHT_SUFFIXES]
    if len(found) != 1:
        raise FileNotFoundError(
            f"path must name a directory with one weight file, got {directory} with "
            f"{[file.name for file in found]}. Name the file."
        )
    return found[0]


def _build(kind: type[Network], config) -> Network:
    with isolated_seed(0):  # building a network draws weights
        return kind(config)


def _fill(network: Network, tensors: dict[str, Tensor], path) -> Network:
    """Load strictly, as float32; the error lists what is missing, unknown or of another shape."""
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
        config = _read_config(file)
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


def _read_config(file: Path) -> dict:
    """A JSON object; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} must be JSON, got a damaged file ({error}). Download it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(config).__name__}. Download it again.")
    return config
