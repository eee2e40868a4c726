"""One scan: whose it is, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Scan:
    """Files of one person in one session, all on the grid of the image that is read with them.

    Attributes
    ----------
    subject : str
        Name of the person, letters and digits: what data are split by.
    images : mapping of str to Path
        Contrast ("T1", "T1CE", "T2", "PD", "FLAIR") to NIfTI file.
    lesion_mask : Path, default=None
        Labels; any value above 0 is lesion. None: not known, or a healthy person.
    brain_mask : Path, default=None
        Labels; any value above 0 is brain. None: the images are skull-stripped, or cannot be read yet.
    session : str, default=None
        Name of the visit, letters and digits. None: there is one alone.
    """

    subject: str
    images: Mapping[str, Path]
    lesion_mask: Path | None = None
    brain_mask: Path | None = None
    session: str | None = None


def scan_name(scan):
    """Name a scan as BIDS does.

    Parameters
    ----------
    scan : Scan
        Whose `subject` and `session` make the name.

    Returns
    -------
    str
        ``sub-01``, or with a session ``sub-01_ses-2``.
    """
    return f"sub-{scan.subject}" + (f"_ses-{scan.session}" if scan.session else "")
