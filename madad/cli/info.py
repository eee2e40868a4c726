"""``madad info``: what a saved model, a converted network, a weight file or a scan is."""

from __future__ import annotations

import argparse
import json
import warnings
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import ornt2axcodes

from madad.cli._output import network_facts
from madad.datasets import crop_to_brain, load_slices
from madad.detector import MaskedDiffusionAnomalyDetector
from madad.mri import read_volume
from madad.mri.brain import is_stripped
from madad.nn import AutoencoderKL, MaskedUNet
from madad.pretrained.loading import is_saved, kind_of_weights, load_autoencoder, load_unet
from madad.pretrained.weight_files import read_weights
from madad.saving.model_card import listing
from madad.saving.model_folder import CARD, read_card, read_config
from madad.saving.saved_detector import NETWORK_USES

SCAN_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".hdr.gz", ".img.gz")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``info`` and its arguments.

    Parameters
    ----------
    commands : argparse subparsers
        The commands of ``madad``, to which it is added.
    """
    info = commands.add_parser(
        "info",
        help="what a saved model, a converted network, a weight file or a scan is",
        description="Shape, sizes, training and thresholds of a saved model; kind and size of a network's "
        "weights; grid, intensities and skull of a scan. With --data, the quality of a saved model's "
        "autoencoder on the healthy slices of a file.",
    )
    info.add_argument(
        "path",
        metavar="MODEL|FILE",
        type=Path,
        help="directory that save() or madad convert wrote, a weight file, or a NIfTI file",
    )
    info.add_argument("--data", type=Path, help="an .npz file of slices; those with a lesion are left out")
    info.add_argument("--image", default="image", help="name of the image array in the .npz file")
    info.add_argument("--center", default="median", help="scale of a subject: median or mode of the brain")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what is at a path.

    Parameters
    ----------
    options : argparse.Namespace
        The arguments that `add_command` added.

    Returns
    -------
    int
        The exit status. 0: done.
    """
    facts = _facts(options)
    print(json.dumps(facts, indent=2) if options.json else listing(facts))
    return 0


def _facts(options: argparse.Namespace) -> dict[str, Any]:
    path = options.path
    if not path.exists():
        raise FileNotFoundError(
            f"path must name a model directory, a weight file or a NIfTI file, got {path}. "
            f"Check spelling and folder."
        )
    found = read_config(path).get("class") if is_saved(path) else None
    if found is not None and found not in list(NETWORK_USES):
        return _of_detector(options)
    if options.data is not None:
        raise ValueError(f"--data must be given for a saved detector only, got {path}. Leave it out.")
    if path.name.lower().endswith(SCAN_SUFFIXES):
        return _of_scan(path)
    return _of_weights(path)


def _of_detector(options: argparse.Namespace) -> dict[str, Any]:
    detector = MaskedDiffusionAnomalyDetector.load(options.path)
    autoencoder = detector.autoencoder_
    channels, height, width = detector.image_shape_
    facts: dict[str, Any] = {
        "preset": detector.preset_,
        "slices": f"{channels} x {height} x {width}",
        "latents": " x ".join(map(str, autoencoder.latent_shape_)),
        "map_threshold": detector.map_threshold_,
        "offset": detector.offset_,
    }
    for stage, network, history in (
        ("autoencoder", autoencoder.network_, autoencoder.history_),
        ("denoiser", detector.denoiser_, detector.history_),
    ):
        last = {name: value for name, value in history[-1].items() if isinstance(value, Real)}
        facts[stage] = {"parameters": sum(p.numel() for p in network.parameters()), **last}
    if options.data is not None:
        images, brain_masks = _healthy_slices(options, (height, width))
        facts["quality"] = autoencoder.score_report(images, brain_mask=brain_masks)
        facts["quality"]["n_slices"] = len(images)
    if (options.path / CARD).is_file():
        facts["card"] = read_card(options.path)
    return facts


def _of_weights(path: Path) -> dict[str, Any]:
    """Of a weight file, or of a directory with one: ours or others'."""
    kind = kind_of_weights(path)
    network: AutoencoderKL | MaskedUNet = load_autoencoder(path) if kind == "autoencoder" else load_unet(path)
    return {"kind": kind, "tensors": len(read_weights(path))} | network_facts(network)


def _of_scan(path: Path) -> dict[str, Any]:
    """Grid and intensities along the axes of the file, as `read_volume` gives them: NaN has become 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it tells of what is counted below
        volume = read_volume(path)
    axes = volume.orientation[:, 0].astype(int)
    return {
        "shape": [volume.shape[axis] for axis in axes],
        "spacing_mm": [round(volume.spacing_mm[axis], 4) for axis in axes],
        "axis_codes": "".join(ornt2axcodes(volume.orientation)),
        "dtype": volume.header.get_data_dtype().name,
        "intensity_min": float(volume.values.min()),
        "intensity_max": float(volume.values.max()),
        "not_finite": volume.n_not_finite,
        "skull_stripped": is_stripped(volume.values, volume.affine),
    }


def _healthy_slices(options: argparse.Namespace, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Images and brain masks of a file's slices without a lesion, on the model's grid."""
    data = load_slices(options.data, image=options.image, size=max(shape), center=options.center)
    data = crop_to_brain(data, shape) if shape[0] != shape[1] else data
    rows = np.flatnonzero(data.lesion_masks.sum(axis=(1, 2)) == 0)
    return data.images[rows], data.brain_masks[rows]
