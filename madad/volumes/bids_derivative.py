"""A folder of results in the layout of a BIDS derivative: names, sidecars, tables, a row for each failure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from madad._runtime.files import read_json, write_json, write_text
from madad._runtime.version import __version__
from madad.datasets import Scan, scan_name

BIDS_VERSION = "1.10.0"
DESCRIPTION = "dataset_description.json"
ERRORS = "errors.tsv"
ERROR_COLUMNS = ("participant_id", "session_id", "error", "message")
_STATE = ".madad"
# What BIDS has no names for yet, and what is ours alone.
_IGNORED = ("*_statmap.*", "*_xfm.*", "/*.tsv", ".*.tmp", "**/.*.tmp", f"{_STATE}/")


_README = """# {name}

Written by madad {version}, command `madad {step}`, as a BIDS derivative: a folder `sub-<label>` (and in it
`ses-<label>`) for each person, a JSON file beside each image that says what it was made from and how, tables
(`.tsv`) made from these, and `errors.tsv` with a row for each scan that failed when it was last tried;
results of an earlier time stay. The parameters are in `dataset_description.json`. Running the same command
again does what is missing.

For research use only. Not a medical device.
"""


class Derivative:
    """One step's results of a cohort, in a folder that a BIDS validator accepts as a derivative.

    Parameters
    ----------
    root : path-like
        The folder, which need not exist yet.

    Attributes
    ----------
    root : Path
        The folder as it was given.

    Notes
    -----
    A scan is done when its sidecar is there, which is written last. Tables are made anew from the sidecars,
    so that several processes which share the scans, or an interrupted and a second run, leave the same bytes
    as one run. Every file appears whole or not at all.
    """

    def __init__(self, root):
        self.root = Path(root)

    def start(self, *, name: str, step: str, parameters: dict, source, overwrite: bool = False) -> None:
        """Make the folder ready to be written to.

        Parameters
        ----------
        name : str
            Name of the dataset, for its description.
        step : str
            The command that writes, such as "predict".
        parameters : dict
            What the results depend on beside the scans, ready for JSON. A folder with results of other ones
            is refused, since one table would mix them.
        source : path-like
            Folder that the scans lie in; Sources in sidecars are relative to it.
        overwrite : bool, default=False
            Take the folder over although its results have other parameters; they are removed, so that an
            interrupted run is not gone on with among them.

        Raises
        ------
        FileExistsError
            If there is something else in the folder, or results of other scans or with other parameters.
        OSError
            If it cannot be written to.
        """
        link = Path(source).resolve().as_uri()
        if self.check(step=step, parameters=parameters, source=source, overwrite=overwrite):
            for outdated in (*self.root.glob("sub-*"), *self.root.glob(_STATE)):
                with suppress(FileNotFoundError):  # another process does the same
                    shutil.rmtree(outdated)
        self.root.mkdir(parents=True, exist_ok=True)
        description = {
            "Name": name,
            "BIDSVersion": BIDS_VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "madad", "Version": __version__, "Description": f"madad {step}"}],
            "SourceDatasets": [{"URL": link}],
            "DatasetLinks": {"raw": link},
            "madad": {"step": step, "parameters": parameters},
        }
        write_json(self.root / DESCRIPTION, description)  # first: a process beside this one looks for it
        write_text(self.root / "README.md", _README.format(name=name, version=__version__, step=step))
        write_text(self.root / ".bidsignore", "\n".join(_IGNORED) + "\n")

    def check(self, *, step: str, parameters: dict, source, overwrite: bool = False) -> bool:
        """Refuse what `start` refuses, and write nothing.

        Parameters
        ----------
        step : str
            The command that would write, as in `start`.
        parameters : dict
            What its results would depend on, as in `start`.
        source : path-like
            Folder that the scans lie in, as in `start`.
        overwrite : bool, default=False
            Whether the folder would be taken over, as in `start`.

        Returns
        -------
        bool
            Whether there are results with other parameters, which ``overwrite`` removes.

        Raises
        ------
        FileExistsError
            If there is something else in the folder, or results of other scans or with other parameters.
        """
        link = Path(source).resolve().as_uri()
        is_folder = self.root.is_dir()
        if not self.root.exists() or (is_folder and all(one.name[0] == "." for one in self.root.iterdir())):
            return False
        before = self.description() if (self.root / DESCRIPTION).is_file() else {}
        mine = before.get("madad", {})
        if mine.get("step") != step:
            raise FileExistsError(
                f"OUT must be new, empty or results of madad {step}, got {self.root}, which holds something "
                "else. Choose another folder."
            )
        if before["DatasetLinks"]["raw"] != link:
            raise FileExistsError(
                f"OUT must hold results of the same IN, got {self.root} with those of "
                f"{before['DatasetLinks']['raw']}. Choose another folder."
            )
        has_other = mine.get("parameters") != json.loads(json.dumps(parameters))
        if has_other and not overwrite:
            changed = changes(mine.get("parameters", {}), parameters)
            raise FileExistsError(
                f"OUT must hold results of the same parameters, got {self.root} with {changed}. "
                "Choose another folder, or give --overwrite."
            )
        return has_other

    def description(self) -> dict:
        """Read the dataset description.

        Returns
        -------
        dict
            What `start` wrote.

        Raises
        ------
        FileNotFoundError, ValueError
            If it is missing or damaged.
        """
        return read_json(self.root / DESCRIPTION)

    def path(self, scan: Scan, ending: str, space: str | None = None, *, entity: str = "") -> Path:
        """Tell where a file of a scan goes.

        Parameters
        ----------
        scan : Scan
            Whose subject and session name the folder and the file.
        ending : str
            Suffix and extension, such as "T1w.nii.gz", with entities that come after the space.
        space : str or None, default=None
            Label of the space. None = the scan's own, which is not named.
        entity : str, default=""
            An entity that comes before the space, such as "ce-gadolinium".

        Returns
        -------
        Path
            ``sub-01/ses-1/anat/sub-01_ses-1[_entity][_space-X]_<ending>`` in the folder.
        """
        folder = self.root / f"sub-{scan.subject}"
        folder = folder if scan.session is None else folder / f"ses-{scan.session}"
        parts = (scan_name(scan), entity, "" if space is None else f"space-{space}", ending)
        return folder / "anat" / "_".join(part for part in parts if part)

    def clear(self, scan: Scan) -> None:
        """Make the scan's folder, without what earlier runs wrote of the scan, whole or half.

        Parameters
        ----------
        scan : Scan
            The scan that is about to be done.
        """
        self.remove(scan)
        self.path(scan, "x").parent.mkdir(parents=True, exist_ok=True)

    def remove(self, scan: Scan) -> None:
        """Take away what there is of the scan: sidecars first, so that it is not done in between.

        Parameters
        ----------
        scan : Scan
            The scan whose results go.
        """
        folder, name = self.path(scan, "x").parent, scan_name(scan)
        of_scan = [*folder.glob(f"{name}_*"), *folder.glob(f".{name}_*.tmp")]
        for path in sorted(of_scan, key=lambda path: path.suffix != ".json"):
            path.unlink(missing_ok=True)

    def source_uri(self, path) -> str:
        """Name a file of the source.

        Parameters
        ----------
        path : path-like
            A file that results are made from.

        Returns
        -------
        str
            The file's BIDS URI; of a file that a link leads out of the source, its file URI.
        """
        for known in (Path(path).parent.resolve() / Path(path).name, Path(os.path.abspath(path))):
            if known.is_relative_to(self._source()):
                return f"bids:raw:{known.relative_to(self._source()).as_posix()}"
        return Path(path).resolve().as_uri()

    def source_path(self, uri: str) -> Path:
        """Find the file that `source_uri` named.

        Parameters
        ----------
        uri : str
            A BIDS URI of the source, or a file URI.

        Returns
        -------
        Path
            The file, which may be gone.
        """
        if uri.startswith("file:"):
            return Path(unquote(urlparse(uri).path))
        return self._source() / uri.removeprefix("bids:raw:")

    def _source(self) -> Path:
        return Path(unquote(urlparse(self.description()["DatasetLinks"]["raw"]).path))

    def is_made_from(self, sidecar: Path, images: Sequence) -> bool:
        """Tell whether a sidecar is there, and names these files as its sources.

        Parameters
        ----------
        sidecar : Path
            The JSON file with which a result is done.
        images : sequence of path-like
            The files that it should name.

        Returns
        -------
        bool
            False if there is no sidecar.

        Raises
        ------
        FileExistsError
            If it names others: results of another person of the same name, who may not be taken for this one.
        """
        try:
            before = read_json(sidecar).get("Sources")
        except FileNotFoundError:
            return False
        now = [self.source_uri(image) for image in images]
        if before != now:
            raise FileExistsError(
                f"OUT must hold results of the same scans, got {sidecar.name} made from {before}, not {now}. "
                "Choose another folder, rename the subject, or give --overwrite."
            )
        return True

    def sidecars(self, ending: str) -> Iterator[tuple[Path, dict]]:
        """Read sidecars.

        Parameters
        ----------
        ending : str
            How their names end, such as "_desc-preproc_T1w.json".

        Yields
        ------
        path : Path
            A sidecar, in ascending order.
        content : dict
            What the sidecar holds.
        """
        for path in sorted(self.root.glob(f"sub-*/**/*{ending}")):
            if not path.name.startswith("."):
                with suppress(FileNotFoundError):  # another process writes it anew
                    yield path, read_json(path)

    def write_table(self, name: str, columns: Iterable[str], rows: Callable[[], Iterable[dict]]) -> None:
        """Write a table of what is there, and again until it is: others may have added to it meanwhile.

        Parameters
        ----------
        name : str
            Name of the file in the folder.
        columns : iterable of str
            Headers, which are the keys of the rows.
        rows : callable
            Returns an iterable of dicts, from what is in the folder at the moment of the call.
        """
        while True:
            text = table_text(columns, rows())
            path = self.root / name
            if path.is_file() and path.read_text(encoding="utf-8") == text:
                return
            write_text(path, text)

    def fail(self, scan: Scan, error: BaseException) -> None:
        """Note that a scan failed; `write_errors` makes the table.

        Parameters
        ----------
        scan : Scan
            The scan that could not be done.
        error : BaseException
            Why it could not be done.
        """
        row = failure_row(scan, error)
        self._failure(scan).parent.mkdir(parents=True, exist_ok=True)
        write_json(self._failure(scan), row)

    def has_failed(self, scan: Scan) -> bool:
        """Tell whether a scan failed when it was last tried.

        Parameters
        ----------
        scan : Scan
            The scan that is asked about.

        Returns
        -------
        bool
            True after `fail` and before `succeed`; results of an earlier time may be there.
        """
        return self._failure(scan).is_file()

    def succeed(self, scan: Scan) -> None:
        """Forget an earlier failure of the scan.

        Parameters
        ----------
        scan : Scan
            The scan that is done.
        """
        self._failure(scan).unlink(missing_ok=True)

    def _failure(self, scan: Scan) -> Path:
        return self.root / _STATE / "errors" / f"{scan_name(scan)}.json"

    def write_errors(self) -> None:
        """Write ``errors.tsv``: one row for each scan that failed and has not succeeded since."""
        self.write_table(ERRORS, ERROR_COLUMNS, self._errors)

    def _errors(self) -> Iterator[dict]:
        for path in sorted((self.root / _STATE / "errors").glob("*.json")):
            with suppress(FileNotFoundError):  # another process's scan has succeeded meanwhile
                yield read_json(path)


def participant(scan: Scan) -> dict[str, str | None]:
    """Tell whose row of a table it is.

    Parameters
    ----------
    scan : Scan
        The scan that the row is of.

    Returns
    -------
    dict of str to str or None
        ``participant_id`` and ``session_id``, which is None without a session.
    """
    session = None if scan.session is None else f"ses-{scan.session}"
    return {"participant_id": f"sub-{scan.subject}", "session_id": session}


def failure_row(scan: Scan, error: BaseException) -> dict[str, str | None]:
    """Make a row for a scan that failed.

    Parameters
    ----------
    scan : Scan
        The scan that could not be done.
    error : BaseException
        Why it could not be done.

    Returns
    -------
    dict of str to str or None
        The cells of `ERROR_COLUMNS`.
    """
    message = " ".join(str(error).split())
    return {**participant(scan), "error": type(error).__name__, "message": message}


def changes(before: dict, after: dict) -> str:
    """Say what differs between two sets of parameters.

    Parameters
    ----------
    before, after : dict
        Parameters by name, ready for JSON.

    Returns
    -------
    str
        Such as ``bias_field False, not True``; empty if nothing differs.
    """
    after = json.loads(json.dumps(after))
    names = [name for name in (*before, *after) if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {before.get(name)!r}, not {after.get(name)!r}" for name in dict.fromkeys(names))


def table_text(columns: Iterable[str], rows: Iterable[dict]) -> str:
    """Write rows as BIDS wants tables.

    Parameters
    ----------
    columns : iterable of str
        Headers, which are the keys of the rows.
    rows : iterable of dict
        Cells by column; those that are missing or None become ``n/a``.

    Returns
    -------
    str
        Lines with tabs between the columns, the first with the headers.
    """
    columns = list(columns)
    lines = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "".join("\t".join(line) + "\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(str(value).split()) or "n/a"
