"""Scans of a cohort one after the other: a share of them, a row for each that fails, and what was done."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from madad._runtime.files import read_json
from madad.cli._readers import Load, read_ahead
from madad.datasets import Scan, find_scans, scan_name
from madad.volumes.bids_derivative import DESCRIPTION, Derivative
from madad.volumes.prepared_folder import STEP as PREPROCESS

OF_ONE_SCAN = (ValueError, TypeError, OSError, RuntimeError, MemoryError)
"""Errors that cost a row, and not the cohort."""
_FATAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""What the next scan would meet as well: no space, no quota, a read-only disk."""
Item = TypeVar("Item")


@dataclass
class Tally:
    """What became of the scans.

    Attributes
    ----------
    done, skipped : list of str
        Names of the scans that were done now, and of those that had been done before.
    failed : dict of str to str
        Message of the error by the scan's name.
    warned : dict of str to list of str
        Warnings by the scan's name, of those that were done.
    """

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    warned: dict[str, list[str]] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """The command's exit status: 1 if a scan failed, else 0."""
        return 1 if self.failed else 0

    def report(self, options: argparse.Namespace, out: Path) -> None:
        """Print it.

        Parameters
        ----------
        options : argparse.Namespace
            With ``json``, which asks for JSON, and ``dry_run``.
        out : Path
            The folder of results.
        """
        if options.json:
            facts = {"out": str(out), "dry_run": options.dry_run, **vars(self)}
            print(json.dumps(facts, indent=2))
            return
        for name, found in self.warned.items():
            print(f"{name}: warning: {' '.join(found)}", file=sys.stderr)
        for name, message in self.failed.items():
            print(f"{name}: failed: {message}", file=sys.stderr)
        done = "to do" if options.dry_run else "done"
        print(f"{len(self.done)} {done}, {len(self.skipped)} skipped, {len(self.failed)} failed: {out}")


def add_cohort_arguments(parser: argparse.ArgumentParser, *, default_readers: str = "0") -> None:
    """Add the arguments of the commands that go over scans.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Parser of the command.
    default_readers : str, default="0"
        What the help says of the number of readers without ``--readers``.
    """
    parser.add_argument("--overwrite", action="store_true", help="do again what is done already")
    parser.add_argument("--shard", type=shard, metavar="i/N", help="do the i-th of N parts, counted from 1")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, write nothing")
    parser.add_argument(
        "--readers",
        type=n_readers,
        metavar="N",
        help=f"processes that prepare the next scans; 0 = this one alone (default: {default_readers})",
    )
    add_output_arguments(parser)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--quiet``.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Parser of the command.
    """
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def n_readers(text: str) -> int:
    """Read a whole number from 0.

    Parameters
    ----------
    text : str
        What the user wrote.

    Returns
    -------
    int
        The number that was meant.
    """
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, got {text!r}; for example 2")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """Read a share.

    Parameters
    ----------
    text : str
        What the user wrote, such as ``2/8``.

    Returns
    -------
    part, n : int
        Number of the part from 1, and of all parts.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    part, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= n:
        raise argparse.ArgumentTypeError(f"must be i/N with 1 <= i <= N, got {text!r}; for example 1/2")
    return part, n


def share_of(items: Sequence[Item], options: argparse.Namespace) -> list[Item]:
    """Pick the part of the items that this process does: ``--shard``, or RANK of WORLD_SIZE, or all.

    Parameters
    ----------
    items : sequence
        All items, the same and in the same order in each process.
    options : argparse.Namespace
        What the command was given, with ``shard``: which part of how many, or None.

    Returns
    -------
    list
        Every n-th of the items.

    Raises
    ------
    ValueError
        If RANK and WORLD_SIZE make no share.
    """
    part, n = options.shard or _shard_of_environment()
    return list(items[part - 1 :: n])


def _shard_of_environment() -> tuple[int, int]:
    rank, size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or size is None:  # of another program: one alone says nothing of a share
        return 1, 1
    try:
        return shard(f"{int(rank) + 1}/{size}")
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ValueError(
            f"RANK must be a number from 0 and below WORLD_SIZE, got {rank!r} and {size!r}. "
            "Unset them, or give --shard."
        ) from error


def is_preprocessed(inputs: Sequence[Path]) -> bool:
    """Tell whether IN is a folder that ``madad preprocess`` wrote.

    Parameters
    ----------
    inputs : sequence of Path
        What the user gave as IN.

    Returns
    -------
    bool
        False also for several folders.
    """
    if len(inputs) != 1 or not (inputs[0] / DESCRIPTION).is_file():
        return False
    return read_json(inputs[0] / DESCRIPTION).get("madad", {}).get("step") == PREPROCESS


def raw_scans(
    inputs: Sequence[Path], contrast: str | None, out: Path | None = None
) -> tuple[list[Scan], Path]:
    """Find scans as they came.

    Parameters
    ----------
    inputs : sequence of Path
        What the user gave as IN.
    contrast : str or None
        Contrast of the images whose names tell none.
    out : Path or None, default=None
        Folder of results, if there is one.

    Returns
    -------
    scans : list of Scan
        One for each subject and session.
    source : Path
        The folder that results name their files relative to.

    Raises
    ------
    ValueError
        If an input is a part of what madad made, or the next run would take its own results, in ``out``, for
        scans.
    """
    searched = [folder for folder in inputs if out is not None and _would_be_searched(folder, out)]
    if out is not None and searched:
        raise ValueError(
            f"OUT must not be searched for scans, got {out}, which lies in {searched[0]}. Choose a folder "
            f"beside it, or {searched[0] / 'derivatives' / out.name}."
        )
    for path in inputs:
        _refuse_results(path)
    scans = find_scans(inputs, contrast=contrast)
    is_bids = len(inputs) == 1 and (inputs[0] / DESCRIPTION).is_file()
    return scans, inputs[0] if is_bids else Path(Path(os.path.abspath(inputs[0])).anchor)


def _refuse_results(path: Path) -> None:
    """Raise ValueError for what madad itself has made: it would be prepared a second time."""
    path = Path(os.path.abspath(path))
    for folder in (path, *path.parents):
        if (folder / DESCRIPTION).is_file() and "madad" in read_json(folder / DESCRIPTION):
            raise ValueError(
                f"IN must be scans as they came, or one whole folder of madad preprocess, got {path}, which "
                f"is of the results in {folder}. Give {folder} alone if it is such a folder."
            )


def _would_be_searched(folder: Path, out: Path) -> bool:
    """Whether `find_scans` would go to ``out``: not in a BIDS folder, nor below a hidden one."""
    folder, out = Path(os.path.abspath(folder)), Path(os.path.abspath(out))
    if folder.is_file() or (folder / DESCRIPTION).is_file() or not out.is_relative_to(folder):
        return False
    return not any(part == "derivatives" or part[0] == "." for part in out.relative_to(folder).parts)


def begin(folder: Derivative, options: argparse.Namespace, name: str, **what) -> None:
    """Make OUT ready, or in a dry run say whether it would be refused.

    Parameters
    ----------
    folder : Derivative
        The folder of results.
    options : argparse.Namespace
        With ``dry_run`` and ``overwrite``.
    name : str
        Name of the dataset.
    **what
        ``step``, ``parameters`` and ``source`` of `Derivative.start`.
    """
    if options.dry_run:
        folder.check(overwrite=options.overwrite, **what)
    else:
        folder.start(name=name, overwrite=options.overwrite, **what)


def for_each(
    scans: Iterable[tuple[Scan, Load[Item]]],
    work: Callable[[Scan, Item, list[str]], Sequence[str]],
    *,
    is_done: Callable[[Scan], bool],
    folder: Derivative,
    options: argparse.Namespace,
    readers: int = 0,
) -> Tally:
    """Do the work for each scan that is not done yet.

    Parameters
    ----------
    scans : iterable of (Scan, callable)
        Each scan with what loads it.
    work : callable
        ``work(scan, loaded, noted)`` writes the results and returns warnings; ``noted`` came while loading.
    is_done : callable
        ``is_done(scan)`` tells whether all results of the scan are there.
    folder : Derivative
        Where failures are noted.
    options : argparse.Namespace
        With ``overwrite``, ``dry_run``, ``quiet``, ``json``.
    readers : int, default=0
        How many processes load the next scans; 0 = this one alone.

    Returns
    -------
    Tally
        What became of each scan; in a dry run, what would be done.

    Raises
    ------
    OSError
        If the disk is full or read-only: each scan after it would fail alike.
    """
    tally = Tally()
    todo: list[tuple[Scan, Load[tuple[Item, list[str]]]]] = []
    for scan, load in scans:
        if not options.overwrite and is_done(scan) and not folder.has_failed(scan):
            tally.skipped.append(scan_name(scan))
        else:
            todo.append((scan, partial(_noting, load)))
    if options.dry_run:
        tally.done = [scan_name(scan) for scan, _ in todo]
        return tally
    with read_ahead([load for _, load in todo], readers) as answers:
        for (scan, _), answer in zip(progress(todo, "scans", options), answers, strict=True):
            name = scan_name(scan)
            try:
                found = work(scan, *answer())
            except OF_ONE_SCAN as error:
                if is_fatal(error):
                    raise
                folder.fail(scan, error)
                tally.failed[name] = " ".join(str(error).split())
            else:
                folder.succeed(scan)
                tally.done.append(name)
                if found:
                    tally.warned[name] = list(found)
    return tally


def _noting(load: Load[Item]) -> tuple[Item, list[str]]:
    """What is loaded, and the warnings meanwhile."""
    with noted_warnings() as noted:
        loaded = load()
    return loaded, noted


def is_fatal(error: BaseException) -> bool:
    """Tell whether each scan after this one would fail alike.

    Parameters
    ----------
    error : BaseException
        Why a scan could not be done.

    Returns
    -------
    bool
        True for a disk that is full or read-only.
    """
    return isinstance(error, OSError) and error.errno in _FATAL


def progress(items: Sequence[Item], what: str, options: argparse.Namespace) -> Iterable[Item]:
    """Put items behind a progress bar on stderr, with the time left.

    Parameters
    ----------
    items : sequence
        What is gone through.
    what : str
        Text before the bar.
    options : argparse.Namespace
        With ``quiet`` and ``json``, either of which hides the bar.

    Returns
    -------
    iterable
        The same items.
    """
    return tqdm(items, desc=what, unit="file", disable=options.quiet or options.json, file=sys.stderr)


@contextmanager
def noted_warnings(texts: list[str] | None = None) -> Iterator[list[str]]:
    """Collect the texts of a block's warnings to users, each once, instead of showing them.

    Parameters
    ----------
    texts : list of str or None, default=None
        The list that they are added to. None = a new one.

    Yields
    ------
    list of str
        The list, filled when the block ends.
    """
    texts = [] if texts is None else texts
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        yield texts
    for one in found:
        if not issubclass(one.category, UserWarning):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        elif str(one.message) not in texts:
            texts.append(str(one.message))
