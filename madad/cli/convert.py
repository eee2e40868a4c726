"""``madad convert``: weights that others published, as a directory of ours."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from madad.cli._output import network_facts
from madad.nn import AutoencoderKL, MaskedUNet
from madad.pretrained.loading import kind_of_weights, load_autoencoder, load_unet
from madad.saving.model_card import listing
from madad.saving.saved_detector import NETWORK_USES, check_network_path, save_network

PARTS = ("autoencoder", "denoiser")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``convert`` and its arguments.

    Parameters
    ----------
    commands : argparse subparsers
        The commands of ``madad``, to which it is added.
    """
    convert = commands.add_parser(
        "convert",
        help="foreign weights to a directory of ours",
        description="Reads an autoencoder of CompVis, diffusers or the original MAD-AD repository, or the "
        "original's U-Net, without running any code in the file, and writes config.json and safetensors.",
    )
    convert.add_argument(
        "source", metavar="SOURCE", help="a weight file, a directory with one, or a hub repository OWNER/NAME"
    )
    convert.add_argument("out", metavar="OUT", type=Path, help="new directory to write")
    convert.add_argument("--part", choices=PARTS, help="which network, instead of by the weights' names")
    convert.add_argument(
        "--image-channels", type=int, metavar="N", help="bring an autoencoder to so many image channels"
    )
    convert.add_argument(
        "--n-heads", type=int, metavar="N", help="attention heads of a U-Net: its weights do not tell"
    )
    convert.add_argument("--json", action="store_true", help="print JSON")
    convert.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read, write, and say what it was.

    Parameters
    ----------
    options : argparse.Namespace
        The arguments that `add_command` added.

    Returns
    -------
    int
        The exit status. 0: done.
    """
    check_network_path(options.out)
    network = _load(options, options.part or kind_of_weights(options.source))
    save_network(network, options.out)
    facts = network_facts(network) | {
        "source": options.source,
        "out": str(options.out),
        "use": NETWORK_USES[type(network).__name__].replace("path", repr(str(options.out))),
    }
    print(json.dumps(facts, indent=2) if options.json else listing(facts))
    return 0


def _load(options: argparse.Namespace, part: str) -> AutoencoderKL | MaskedUNet:
    if part == "autoencoder":
        _refuse("--n-heads", options.n_heads, "a denoiser")
        return load_autoencoder(options.source, image_channels=options.image_channels)
    _refuse("--image-channels", options.image_channels, "an autoencoder")
    return load_unet(options.source, n_heads=options.n_heads)


def _refuse(name: str, value: int | None, network: str) -> None:
    if value is not None:
        raise ValueError(f"{name} must be given for {network} only, got {value}. Leave it out.")
