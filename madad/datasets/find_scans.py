"""Which files belong together in what a command is given: files, tables, BIDS folders, other folders."""

import csv
import os
import re
from pathlib import Path
from typing import NamedTuple

from madad.datasets.cohorts import contrast_of, find_bids, mask_role, parse_bids_name
from madad.datasets.scan import Scan

_NIFTI = re.compile(r"(?i)\.nii(\.gz)?$")
_WORD = re.compile(r"[A-Za-z0-9]+")
_LABELS = re.compile(
    r"(?i)(?:^|_)(?:(?P<brain_mask>brain_?mask)|(?P<lesion_mask>lesion_?mask|lesions?|seg|tumor)"
    r"|(?P<other>mask|labels?|dseg|roi|parcellation))$"
)
_CONTRASTS = {"t1": "T1", "t1w": "T1", "pd": "PD", "pdw": "PD", "t2": "T2", "t2w": "T2", "flair": "FLAIR"}
_CONTRASTS |= dict.fromkeys(["t1ce", "t1c", "t1gd"], "T1CE") | {
    "t1n": "T1",
    "t2f": "FLAIR",
    "t2flair": "FLAIR",
}
_SEPARATORS = {".tsv": "\t", ".csv": ","}
_COLUMNS = ("image", "subject", "session", "contrast", "brain_mask", "lesion_mask")


class _File(NamedTuple):
    """One file of a scan: `kind` is "image", "brain_mask" or "lesion_mask", `where` is what errors show."""

    subject: str
    session: str | None
    kind: str
    contrast: str | None
    path: Path
    where: str


def find_scans(inputs, *, contrast=None):
    """Find the scans in files, tables and folders, as the commands take them.

    Parameters
    ----------
    inputs : str, os.PathLike or iterable of them
        Each one of

        - a NIfTI file (``.nii``, ``.nii.gz``);
        - a table with a header and a row per image, ``.tsv`` (tabs) or ``.csv`` (commas): columns ``image``
          and ``subject``, optionally ``session``, ``contrast``, ``brain_mask`` and ``lesion_mask``, empty or
          ``n/a`` for none. Paths are relative to the table's folder; those files need not exist yet;
        - a BIDS folder with raw images, read by `find_bids`;
        - any other folder: the NIfTI files in it at any depth, without hidden ones and ``derivatives``.
    contrast : str, default=None
        Contrast of the images whose name, or row of a table, tells none. It changes no other image.

    Returns
    -------
    list of Scan
        One per `subject` and `session`, in ascending order; files of different inputs are joined too.

    Raises
    ------
    FileNotFoundError
        If one of `inputs` does not exist.
    ValueError
        If one is none of these, a table cannot be understood, an image's contrast or subject is not known,
        two files claim one place in a scan, or there is no image.

    Notes
    -----
    Outside of BIDS folders and tables names are split into words of letters and digits. The last ones make a
    file a brain mask (``brain_mask``), a lesion mask (``lesion_mask``, ``lesion``, ``lesions``, ``seg``,
    ``tumor``) or other labels, which are left out (``mask``, ``label``, ``labels``, ``dseg``, ``roi``,
    ``parcellation``). Of the others, the last that is T1, T1w, T2, T2w, PD, PDw, FLAIR, T1CE, T1C or T1Gd, in
    capitals or not, is the contrast, and the rest, joined, the subject: "IXI002Guys0828" of
    ``IXI002-Guys-0828-T1_brain_mask.nii.gz``; if there is no rest, it is the folder's name, "p01" of
    ``p01/T1.nii.gz``. Where names begin with ``sub-<label>``, ``sub`` and ``ses`` are subject and session.
    Masks without an image are left out. Of brain or lesion masks for several contrasts, that for `contrast`
    is taken, otherwise the first of: one without a contrast, T1, PD, T2, FLAIR, T1CE.
    """
    if contrast is not None and not _label(contrast):
        raise ValueError(f"contrast must be a name like 'T1', got {contrast!r}. Use None if names tell it.")
    contrast, files, paths = contrast and _contrast_name(contrast), [], []
    for path in _existing(inputs):
        if path.is_file() and path.suffix.lower() in _SEPARATORS:
            files += _files_of_table(path, contrast)
        elif of_bids := _files_of_bids(path):
            files += of_bids
        else:
            paths += _nifti_files_at(path)
    return _join(files + _files_by_name(paths, contrast), contrast)


def _error(constraint, got, remedy):
    return ValueError(f"inputs must {constraint}, got {got}. {remedy}")


def _some(texts):
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


def _existing(inputs):
    paths = [Path(path) for path in ([inputs] if isinstance(inputs, str | os.PathLike) else inputs)]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"inputs must exist, got {str(path)!r}. Check its spelling.")
    return {os.path.abspath(path): path for path in paths}.values()


def _files_of_bids(folder):
    try:
        scans = find_bids(folder)
    except (FileNotFoundError, ValueError):  # a file, a folder of another layout, or images in other spaces
        return []
    parts = [(scan, "image", contrast, path) for scan in scans for contrast, path in scan.images.items()]
    parts += [(scan, "brain_mask", None, scan.brain_mask) for scan in scans if scan.brain_mask]
    parts += [(scan, "lesion_mask", None, scan.lesion_mask) for scan in scans if scan.lesion_mask]
    return [_File(scan.subject, scan.session, *part, repr(str(part[-1]))) for scan, *part in parts]


def _nifti_files_at(path):
    """Return the file itself, or those below a folder."""
    found = [path] if path.is_file() else []
    for parent, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "derivatives")
        found += [Path(parent, name) for name in sorted(names) if name[0] != "."]
    images = [file for file in found if _NIFTI.search(file.name)]
    if not images:
        what = "be NIfTI files (.nii, .nii.gz), folders that hold some, or tables (.tsv, .csv)"
        got = _some([repr(str(file)) for file in found]) or f"the empty folder {str(path)!r}"
        raise _error(what, got, "Convert other formats, DICOM (.dcm) with dcm2niix.")
    return images


def _files_by_name(paths, contrast):
    files = []
    for path in {os.path.abspath(path): path for path in paths}.values():
        subject, session, kind, its_contrast = _read_name(path)
        if kind != "other":
            its_contrast = its_contrast or (contrast if kind == "image" else None)
            files.append(_File(subject, session, kind, its_contrast, path, repr(str(path))))
    return files


def _read_name(path):
    """Return subject, session, kind and contrast, as far as the name tells."""
    stem = _NIFTI.sub("", path.name)
    entities, suffix = parse_bids_name(path)
    subject = _label(entities.get("sub", "")) if stem.startswith("sub-") else ""
    if subject:
        stem = "_".join(part for part in stem.split("_") if "-" not in part)
    stem = "_".join(_WORD.findall(stem))
    labels = _LABELS.search(stem)
    kind = labels.lastgroup if labels else "image"
    words = _WORD.findall(_LABELS.sub("", stem))
    at = max((i for i, word in enumerate(words) if word.lower() in _CONTRASTS), default=None)
    contrast = None if at is None else _contrast_name(words.pop(at))
    if contrast == "FLAIR" and at and words[at - 1].lower() in ("t1", "t2"):  # T2_FLAIR is one contrast
        words.pop(at - 1)
    if subject:
        session = _label(entities.get("ses", "")) or None
        role = mask_role(entities, suffix) or kind
        return subject, session, role, contrast_of(entities, suffix) or contrast
    folder = Path(os.path.abspath(path)).parent.name.removeprefix("sub-")
    return "".join(words) or _label(folder), None, kind, contrast


def _label(text):
    return "".join(_WORD.findall(text))  # BIDS allows letters and digits


def _contrast_name(text):
    return _CONTRASTS.get(text.lower(), text.upper())


def _files_of_table(table, contrast):
    try:
        lines = table.read_text(encoding="utf-8-sig").split("\n")
        reader = csv.DictReader(lines, delimiter=_SEPARATORS[table.suffix.lower()])
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        rows = [(reader.line_num, cells) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise _error("be tables of text in UTF-8", f"{str(table)!r} ({error})", "Save it as such.") from error
    if not {"image", "subject"} <= set(reader.fieldnames) or not rows:
        got = f"{str(table)!r} with columns {reader.fieldnames} and {len(rows)} rows"
        remedy = "Name columns in the first line; tabs separate them in .tsv, commas in .csv."
        raise _error("be tables with columns 'image' and 'subject' and a row per image", got, remedy)
    names = {}
    for line, cells in rows:
        row = {name: re.sub("(?i)^n/a$", "", (cells.get(name) or "").strip()) for name in _COLUMNS}
        if any(row.values()):
            yield from _files_of_row(row, table, line, contrast, names)


def _files_of_row(row, table, line, contrast, names):
    """Yield the files of a row; `names` keeps, for all rows, the name that each label stands for."""

    def where(column):
        return f"{row[column]!r} in {str(table)!r}, line {line}, column {column!r}"

    def label(column, *owner):
        name = row[column].removeprefix("sub-" if column == "subject" else "ses-")
        if (row[column] or column == "subject") and not _label(name):
            raise _error(f"have letters or digits in a {column}", where(column), "Name it 01, for example.")
        first = names.setdefault((column, *owner, _label(name)), name)
        if first != name:
            remedy = f"Only these tell it from {first!r}: rename one, or spell both alike."
            raise _error(f"have {column}s that differ in letters or digits", where(column), remedy)
        return _label(name) or None

    subject = label("subject")
    session = label("session", subject)
    for kind in ("image", *filter(row.get, ("brain_mask", "lesion_mask"))):
        if not _NIFTI.search(row[kind]):
            raise _error("name NIfTI files in a table", where(kind), "Convert it; DICOM with dcm2niix.")
        path, source, its_contrast = table.parent / row[kind], kind, None
        if kind == "image":
            source = "contrast" if row["contrast"] else "image"
            its_contrast = _contrast_name(row["contrast"]) or _read_name(path)[3] or contrast
        yield _File(subject, session, kind, its_contrast, path, where(source))


def _join(files, contrast):
    if unknown := [f.where for f in files if not f.subject or (f.kind == "image" and not f.contrast)]:
        remedy = "Name it ..._T1w.nii.gz, pass --contrast, or list the files in a table with these columns."
        raise _error("tell subject and contrast of every image", _some(unknown), remedy)
    groups = {}
    for file in files:
        groups.setdefault((file.subject, file.session or ""), []).append(file)
    keys = sorted(key for key, group in groups.items() if "image" in {file.kind for file in group})
    if not keys:
        got = _some([file.where for file in files]) or "none"
        raise _error("hold an image", got, "Add images to the masks, or list the files in a table.")
    return [_scan(groups[key], contrast) for key in keys]


def _scan(group, contrast):
    found = {"image": {}, "brain_mask": {}, "lesion_mask": {}}
    for file in group:
        first = found[file.kind].setdefault(file.contrast, file)
        # Rows of a table may repeat the mask that they share.
        if first is not file and (file.kind == "image" or first.path != file.path):
            what = f"{file.contrast or ''} {file.kind.replace('_', ' ')}".strip()
            got = f"{first.where} and {file.where}, both of subject {file.subject!r}"
            remedy = "Leave one out, or tell subjects and sessions apart in a table."
            raise _error(f"hold one {what} per subject and session", got, remedy)
    images = {name: file.path for name, file in found.pop("image").items()}
    order = (contrast, None, *_CONTRASTS.values())
    masks = {kind: [own[name].path for name in order if name in own] for kind, own in found.items()}
    best = {kind: paths[0] for kind, paths in masks.items() if paths}
    return Scan(group[0].subject, images, **best, session=group[0].session)
