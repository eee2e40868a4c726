"""Where weights are, and how a network is filled with them."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from textwrap import shorten
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from madad._runtime.random import isolated_seed
from madad.pretrained.unpickling import read_pickled_tensors

Network = TypeVar("Network", bound=nn.Module)
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
DOWNLOAD_AGAIN = "Download it again."
_HUB_ID = r"(\w[\w.-]*/\w[\w.-]*)(?:@(\S+))?"


def read_weights(path) -> dict[str, Tensor]:
    """Read the named tensors of a weight file, or of the one in a directory, whatever the network.

    Parameters
    ----------
    path : path-like
        A ``.safetensors`` file, or a pickled one (``.pt``, ``.pth``, ``.ckpt``, ``.bin``), or a directory
        that holds one weight file, itself or in ``vae/``.

    Returns
    -------
    dict of str to Tensor
        Tensors by name, as stored, on the CPU.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or a directory does not hold exactly one.
    ValueError
        If the file is damaged or holds no tensors.
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
                f"{path} must be a safetensors file, got one that cannot be read ({error}). {DOWNLOAD_AGAIN}"
            ) from error
    return read_pickled_tensors(path)


def local_path(source, hub_cache) -> Path:
    """Find the weights that a source names, and download them if need be.

    Parameters
    ----------
    source : path-like or str
        A file or directory; or, where none of that name exists, a repository of the Hugging Face hub,
        ``"owner/name"`` or ``"owner/name@revision"``.
    hub_cache : path-like or None
        Folder where downloads are kept. None = the hub's own cache.

    Returns
    -------
    Path
        ``source`` if it exists, else the local copy of the repository.

    Raises
    ------
    TypeError
        If ``source`` is no path.
    FileNotFoundError
        If nothing of that name exists and it cannot be a repository, or the repository has no weights.
    OSError
        If the hub does not give the repository.
    ImportError
        If huggingface_hub is needed and not installed.
    """
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


def build(kind: type[Network], config) -> Network:
    """Build a network without a draw from the global generator.

    Parameters
    ----------
    kind : type
        Class of the network.
    config : AutoencoderConfig or UNetConfig
        What the class is called with.

    Returns
    -------
    Module
        The network, with weights that mean nothing yet.
    """
    with isolated_seed(0):  # building a network draws weights
        return kind(config)


def fill(network: Network, tensors: dict[str, Tensor], path) -> Network:
    """Put weights into a network: exactly those that it has.

    Parameters
    ----------
    network : Module
        Filled in place, in its own dtype.
    tensors : dict of str to Tensor
        Weights by the network's own names.
    path : path-like
        Where they are from, for the message.

    Returns
    -------
    Module
        ``network``, in evaluation mode.

    Raises
    ------
    ValueError
        If a name is missing or unknown, or a shape is another; all of them are listed.
    """
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


def require(tensors: dict[str, Tensor], name: str, path) -> None:
    """Raise ValueError where a tensor is missing.

    Parameters
    ----------
    tensors : dict of str to Tensor
        Tensors by name, of one file.
    name : str
        The one that must be there.
    path : path-like
        Where they are from, for the message.
    """
    if name not in tensors:
        raise ValueError(
            f"{path} must hold {name}, got other names: missing ['{name}'], unknown {sorted(tensors)[:20]}. "
            f"Check that the file is of this kind of network."
        )


def without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename tensors.

    Parameters
    ----------
    tensors : dict of str to Tensor
        Tensors by name, with or without the prefix.
    prefix : str
        What is taken off the names that begin with it.

    Returns
    -------
    dict of str to Tensor
        The same tensors, in the same order.
    """
    return {name.removeprefix(prefix): value for name, value in tensors.items()}
