"""Weights as networks, others' and our own: read strictly, by name, without running any code in them."""

from __future__ import annotations

from pathlib import Path

from madad._runtime.files import read_json
from madad.nn import AutoencoderConfig, AutoencoderKL, MaskedUNet, UNetConfig
from madad.pretrained.kl_autoencoders import (
    COMPVIS,
    DIFFUSERS,
    STEM,
    autoencoder_part,
    from_compvis,
    from_diffusers,
    to_image_channels,
)
from madad.pretrained.original_unet import load_original_unet
from madad.pretrained.weight_files import (
    DOWNLOAD_AGAIN,
    SAVED_WEIGHTS,
    Network,
    build,
    fill,
    local_path,
    read_weights,
)
from madad.saving.json_values import from_json
from madad.saving.model_folder import CONFIG, FORMAT, read_config

# What tells the two kinds of network apart, by how a name ends and by whole names.
_OF_AUTOENCODERS = (STEM, "encoder.stem.conv.weight")
_OF_UNETS = {"input_blocks.0.0.weight", "noise_head.conv.weight"}


def kind_of_weights(source, *, hub_cache=None) -> str:
    """Which of our two networks a file or directory holds, told by the names of its tensors.

    Parameters
    ----------
    source : path-like or str
        What `load_autoencoder` or `load_unet` reads.
    hub_cache : path-like or None, default=None
        Folder where downloads are kept. None = the hub's own cache, below ``HF_HOME``.

    Returns
    -------
    {"autoencoder", "denoiser"}
        What `load_autoencoder` or `load_unet` reads. Nothing is said of the weights' number and shape.

    Raises
    ------
    FileNotFoundError, ValueError, OSError, ImportError
        As `load_autoencoder`; ValueError also if it holds neither, or both as a saved detector does.
    """
    path = local_path(source, hub_cache)
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
    """Tell whether a path is a directory that madad wrote: a detector's, or one with a network alone.

    Parameters
    ----------
    path : path-like
        A file or a directory; it need not exist.

    Returns
    -------
    bool
        True if the path has a ``config.json`` of madad in it.

    Raises
    ------
    ValueError
        If there is a ``config.json`` that is damaged.
    """
    config = Path(path) / CONFIG
    return config.is_file() and read_json(config, DOWNLOAD_AGAIN).get("format") == FORMAT


def load_unet(source, *, n_heads: int | None = None) -> MaskedUNet:
    """A masked U-Net from a directory of ours or from the original's weights.

    Parameters
    ----------
    source : path-like
        A directory written by a detector's ``save`` or by ``madad convert``, the ``denoiser.safetensors`` in
        it, or what `load_original_unet` reads.
    n_heads : int or None, default=None
        Attention heads, as in `load_original_unet`. Directories of ours tell it themselves.

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
    image_channels : int or None, default=None
        Number of image channels that the network is brought to by `to_image_channels`. None = as published.
    hub_cache : path-like or None, default=None
        Folder where downloads are kept. None = the hub's own cache, below ``HF_HOME``.

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
    path = local_path(source, hub_cache)
    network = _load_saved(path, "autoencoder", AutoencoderKL, AutoencoderConfig)
    if network is None:
        tensors = autoencoder_part(read_weights(path))
        if any(name.startswith(COMPVIS) for name in tensors):
            network = from_compvis(tensors, path)
        elif any(name.startswith(DIFFUSERS) for name in tensors):
            network = from_diffusers(tensors, path)
        else:
            raise ValueError(
                f"source must hold a KL autoencoder of CompVis ({COMPVIS}*) or diffusers ({DIFFUSERS}*) or "
                f"be a directory that madad saved, got {path} with {sorted(tensors)[:5]} and "
                f"{max(0, len(tensors) - 5)} names more. Check that the file is of this kind of network."
            )
    return network if image_channels is None else to_image_channels(network, image_channels)


def _load_saved(path: Path, part: str, kind: type[Network], config_class: type) -> Network | None:
    """One network of a directory that madad wrote; None if it is no such directory."""
    folder = path.parent if path.name == SAVED_WEIGHTS[part] else path
    if not is_saved(folder):
        return None
    config, file = read_config(folder), folder / SAVED_WEIGHTS[part]
    if not file.is_file():
        raise FileNotFoundError(
            f"source must hold {file.name}, got {folder}, a saved {config.get('class')} with "
            f"{sorted(entry.name for entry in folder.iterdir())}. Check which network is meant."
        )
    weights = {name: value for name, value in read_weights(file).items() if not name.startswith("latent_")}
    try:
        description = config[part]["network"] if part == "autoencoder" else config[part]
        if description["__class__"] != config_class.__name__:
            raise TypeError(f"{description['__class__']} instead of {config_class.__name__}")
        return fill(build(kind, from_json(description)), weights, folder)
    except (KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"{folder / CONFIG} must describe the {part} beside it, got what cannot be read "
            f"({type(error).__name__}: {error}). Upgrade madad, or save the model again."
        ) from error
