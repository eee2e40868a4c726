"""Weights as networks, others' and our own: read strictly, by name, without running any code in them."""

from __future__ import annotations

import numbers
from dataclasses import replace
from pathlib import Path
from typing import Any

from madad.nn import AutoencoderConfig, AutoencoderKL, MaskedUNet, UNetConfig
from madad.pretrained.kl_autoencoders import (
    _COMPVIS,
    _DIFFUSERS,
    _STEM,
    _autoencoder_part,
    _from_compvis,
    _from_diffusers,
)
from madad.pretrained.original_unet import load_original_unet
from madad.pretrained.weight_files import (
    SAVED_WEIGHTS,
    Network,
    _local_path,
    build,
    fill,
    read_foreign_config,
    read_weights,
)

LATENT_SCALE = 0.18215  # what Stable Diffusion's latents are multiplied by

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
    return read_foreign_config(Path(path) / "config.json").get("format") == "madad"


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
    converted = build(AutoencoderKL, replace(network.config, image_channels=int(n)))
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


def _load_saved(path: Path, part: str, kind: type[Network], config_class: type) -> Network | None:
    """One network of a directory that madad wrote; None if it is no such directory."""
    folder = path.parent if path.name == SAVED_WEIGHTS[part] else path
    if not is_saved(folder):
        return None
    config, file = read_foreign_config(folder / "config.json"), folder / SAVED_WEIGHTS[part]
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
        return fill(build(kind, config_class(**plain)), weights, folder)
    except (KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} must describe the {part} beside it, got what cannot be read "
            f"({type(error).__name__}: {error}). Upgrade madad, or save the model again."
        ) from error
