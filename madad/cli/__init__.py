"""The ``madad`` command: every command is a module with ``add_command`` (its arguments) and ``run``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from madad._runtime.version import __version__
from madad.cli import convert, demo, evaluate, fit, info, predict, preprocess

COMMANDS = (demo, preprocess, fit, predict, evaluate, convert, info)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str or None
        None = those of the process.

    Returns
    -------
    int
        The exit status: 0 = done, 1 = done, but some scans failed, 2 = an error that the user can mend,
        130 = interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"madad: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("madad: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="madad", description="Anomaly detection in brain MRI, trained on healthy slices."
    )
    parser.add_argument("--version", action="version", version=f"madad {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return parser
