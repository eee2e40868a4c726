"""What several commands write and print."""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from madad._runtime.files import write_text
from madad.nn import (
    AUTOENCODER_SIZES,
    UNET_SIZES,
    AutoencoderConfig,
    AutoencoderKL,
    MaskedUNet,
    UNetConfig,
)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table whole or not at all.

    Parameters
    ----------
    path : Path
        The file to write.
    header : sequence of str
        Cells of the first line.
    rows : iterable of sequence
        Cells of the others.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def table(methods: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> str:
    """Lay out numbers as text, a row for each method.

    Parameters
    ----------
    methods : mapping of str to mapping of str to float
        Numbers by method and by column; at least one method.
    columns : sequence of str
        Which numbers to show.

    Returns
    -------
    str
        Lines of equal length after an empty one.
    """
    width = max(map(len, methods))
    lines = ["", " " * width + "".join(f"  {name:>18}" for name in columns)]
    for name, values in methods.items():
        lines.append(f"{name:<{width}}" + "".join(f"  {values[column]:18.3f}" for column in columns))
    return "\n".join(lines)


def network_facts(network: AutoencoderKL | MaskedUNet) -> dict[str, Any]:
    """Say what a network is.

    Parameters
    ----------
    network : AutoencoderKL or MaskedUNet
        The network, whatever its weights.

    Returns
    -------
    dict
        Facts by name, ready to be printed or for JSON.
    """
    config = network.config
    facts = {
        "network": type(network).__name__,
        "size": _size_name(config),
        "parameters": sum(p.numel() for p in network.parameters()),
        "latent_channels": config.latent_channels,
    }
    if isinstance(config, AutoencoderConfig):
        facts |= {"image_channels": config.image_channels, "latent_factor": config.factor}
    return facts | {"config": asdict(config)}


def _size_name(config: AutoencoderConfig | UNetConfig) -> str | None:
    """Our name for a shape; what the data or the training decide, the name leaves open."""
    sizes: Mapping[str, Any] = UNET_SIZES
    free: tuple[str, ...] = ("latent_channels", "dropout")
    if isinstance(config, AutoencoderConfig):
        sizes, free = AUTOENCODER_SIZES, ("image_channels",)
    for name, known in sizes.items():
        if replace(known, **{field: getattr(config, field) for field in free}) == config:
            return name
    return None


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note how long the block took.

    Parameters
    ----------
    seconds : dict of str to float
        Where it is noted, in seconds.
    stage : str
        Name under which it is noted.
    """
    start = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - start


def positive_seconds(text: str) -> float:
    """Read the positive number in ``text``, what an option gives; argparse says so where it is another."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value
