"""Which files of a cohort belong together, in the folder layouts their owners distribute.

Names alone decide: nothing is opened here but descriptions of derivatives. `madad.datasets.load_scans` reads
the slices.
"""

import os
import re
from pathlib import Path

from madad._runtime.files import read_json
from madad.datasets.scan import Scan

_IXI = re.compile(
    r"(?P<scan>(?P<subject>IXI\d+)-[^-]+-[^-]+)-(?P<contrast>T1|T2|PD)(?P<mask>(_brain)?_mask)?\.nii(\.gz)?"
)
_BRATS = re.compile(r"(?P<subject>brats.+)_(?P<kind>flair|t1ce|t1|t2|seg)\.nii(\.gz)?", re.IGNORECASE)
_BIDS_CONTRASTS = {"T1w": "T1", "T2w": "T2", "PDw": "PD", "FLAIR": "FLAIR"}
_OWN_SPACES = {None, "orig", "native", "individual", "T1w", "T2w", "FLAIR"}  # the grid of the raw image


def find_ixi(root):
    """Find the scans of IXI, which are healthy and have no lesion masks.

    Parameters
    ----------
    root : str or os.PathLike
        Folder with ``IXI002-Guys-0828-T1.nii.gz`` and its like, also for T2 and PD, in folders of any depth;
        optionally with brain masks ``IXI002-Guys-0828-T1_brain_mask.nii.gz`` or ``..._mask.nii.gz``.

    Returns
    -------
    list of Scan
        One per person, by `subject` ("IXI002"). `brain_mask` is that of T1 where there is one, otherwise of
        PD or T2: as distributed, T1 is on a grid of its own, and only the contrast of the mask can be read.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If it holds no such file.
    """
    root = _existing(root)
    images, masks, subjects = {}, {}, {}
    for path in _nifti_files(root.rglob("IXI*.nii*")):
        if match := _IXI.fullmatch(path.name):
            into = masks if match["mask"] else images
            into.setdefault(match["scan"], {}).setdefault(match["contrast"], path)
            subjects[match["scan"]] = match["subject"]
    if not images:
        raise _nothing_found(root, "IXI002-Guys-0828-T1.nii.gz and its like")
    scans = []
    for scan, files in sorted(images.items()):
        brain_masks = masks.get(scan, {})
        mask = next((brain_masks[name] for name in ("T1", "PD", "T2") if name in brain_masks), None)
        scans.append(Scan(subjects[scan], files, brain_mask=mask))
    return scans


def find_brats(root):
    """Find the scans of BraTS 2017 to 2021, which are skull-stripped and have no brain masks.

    Parameters
    ----------
    root : str or os.PathLike
        Folder with ``BraTS2021_00000/BraTS2021_00000_flair.nii.gz``, ``_t1``, ``_t1ce``, ``_t2`` and
        ``_seg``, or the same of ``Brats18_...``, ``BraTS19_...`` or ``BraTS20_...``, in folders of any depth.

    Returns
    -------
    list of Scan
        By `subject` ("BraTS2021_00000"); `lesion_mask` is None where ``_seg`` is missing, as in the owners'
        validation sets. Its labels 1, 2 and 4 together are the whole tumour.

    Raises
    ------
    FileNotFoundError, ValueError
        As `find_ixi`.
    """
    root = _existing(root)
    images, lesion_masks = {}, {}
    for path in _nifti_files(root.rglob("*.nii*")):
        if match := _BRATS.fullmatch(path.name):
            kind = match["kind"].upper()
            if kind == "SEG":
                lesion_masks.setdefault(match["subject"], path)
            else:
                images.setdefault(match["subject"], {}).setdefault(kind, path)
    if not images:
        raise _nothing_found(root, "BraTS2021_00000/BraTS2021_00000_flair.nii.gz and its like")
    return [Scan(name, files, lesion_masks.get(name)) for name, files in sorted(images.items())]


def find_atlas(root):
    """Find the scans of ATLAS v2.0 (R2.0), T1 of stroke patients with the skull on.

    Parameters
    ----------
    root : str or os.PathLike
        Folder with ``Training/R001/sub-r001s001/ses-1/anat/`` and its like, the folder ``Training`` itself,
        or ``Testing``, which has no lesion masks. In ``anat`` lie
        ``sub-r001s001_ses-1_space-MNI152NLin2009aSym_T1w.nii.gz``,
        ``sub-r001s001_ses-1_space-MNI152NLin2009aSym_label-L_desc-T1lesion_mask.nii.gz`` and, if you made
        one, ``sub-r001s001_ses-1_space-MNI152NLin2009aSym_desc-brain_mask.nii.gz``.

    Returns
    -------
    list of Scan
        By `subject` ("r001s001") and `session` ("1").

    Raises
    ------
    FileNotFoundError, ValueError
        As `find_ixi`.
    """
    root = _existing(root)
    training = root / "Training"
    files = _nifti_files((training if training.is_dir() else root).glob("R*/sub-*/ses-*/anat/*.nii*"))
    scans = _scans_by_bids_names(files, files)
    if not scans:
        raise _nothing_found(root, "Training/R001/sub-r001s001/ses-1/anat/..._T1w.nii.gz and its like")
    return list(scans.values())


def find_bids(root, *, space=None):
    """Find the anatomical scans of a BIDS dataset, raw or derivative.

    Parameters
    ----------
    root : str or os.PathLike
        Folder with ``sub-*/anat/`` or ``sub-*/ses-*/anat/`` and in it ``*_T1w``, ``*_T2w``, ``*_PDw`` or
        ``*_FLAIR`` (``.nii`` or ``.nii.gz``). Lesion masks (``_mask`` or ``_roi`` with ``label-L`` or a label
        or desc that contains "lesion") and brain masks (``desc-brain`` or ``label-brain``) lie beside the
        images or under ``derivatives/*/sub-*/``, but not in what madad itself has written there.
    space : str, default=None
        Read images and masks of this ``space-<label>``; None: those on the grid of the raw images.

    Returns
    -------
    list of Scan
        By `subject` and `session`, the labels without ``sub-`` and ``ses-``. Images with contrast agent
        (``ce-<label>``) are a contrast of their own, "T1CE". Of several files that fit (runs, acquisitions,
        raters), the one with the fewest entities in its name is taken, of these the first by name.

    Raises
    ------
    FileNotFoundError, ValueError
        As `find_ixi`; the message names the spaces that there are.
    """
    root = _existing(root)
    images = _nifti_files(root.glob("sub-*/anat/*.nii*"), root.glob("sub-*/ses-*/anat/*.nii*"))
    folders = ("", "anat/", "ses-*/", "ses-*/anat/")
    others = [one for one in root.glob("derivatives/*") if not _is_ours(one)]
    derived = _nifti_files(*(one.glob(f"sub-*/{folder}*.nii*") for one in others for folder in folders))
    scans = _scans_by_bids_names(images, images + derived)
    wanted = None if space in _OWN_SPACES else space
    found = [scan for (_, _, scan_space), scan in scans.items() if scan_space == wanted]
    if not found:
        spaces = sorted({f"space={scan_space!r}" for _, _, scan_space in scans})
        what = f"images like sub-01/anat/sub-01_T1w.nii.gz for space={space!r}"
        raise _nothing_found(root, what, f"images for {' and '.join(spaces)} only" if spaces else None)
    return found


def _is_ours(derivative):
    """Whether madad wrote a derivative: its masks are made from the images, and no further knowledge."""
    try:
        return "madad" in read_json(derivative / "dataset_description.json")
    except (OSError, ValueError):
        return False


def _scans_by_bids_names(image_files, mask_files):
    """Return (subject, session, space) -> Scan in ascending order, for every such triple with an image."""
    images, masks = {}, {}
    for files, role_of, into in ((image_files, contrast_of, images), (mask_files, mask_role, masks)):
        for path in files:
            entities, suffix = parse_bids_name(path)
            role = role_of(entities, suffix)
            if role and "sub" in entities:
                space = entities.get("space")
                key = (entities["sub"], entities.get("ses"), None if space in _OWN_SPACES else space)
                into.setdefault(key, {}).setdefault(role, []).append((len(entities), path.name, path))

    def best(candidates):
        return {role: min(files)[-1] for role, files in candidates.items()}

    scans = {}
    for key in sorted(images, key=lambda key: tuple(part or "" for part in key)):
        subject, session, _ = key
        scans[key] = Scan(subject, best(images[key]), **best(masks.get(key, {})), session=session)
    return scans


def parse_bids_name(path):
    """Split a BIDS name into its entities and its suffix.

    Parameters
    ----------
    path : Path
        A file, whose name alone is looked at.

    Returns
    -------
    entities : dict of str to str
        Key and label of each part of the name that has a hyphen, such as "sub" and "01".
    suffix : str
        The last part, such as "T1w".
    """
    *parts, suffix = path.name.partition(".nii")[0].split("_")
    return dict(part.split("-", 1) for part in parts if "-" in part), suffix


def contrast_of(entities, suffix):
    """Tell the contrast that a BIDS name stands for.

    Parameters
    ----------
    entities : dict of str to str
        Entities of the name, from `parse_bids_name`.
    suffix : str
        Suffix of the name, from `parse_bids_name`.

    Returns
    -------
    str or None
        "T1", "T2", "PD" or "FLAIR", with "CE" behind it after a contrast agent; None for other suffixes.
    """
    contrast = _BIDS_CONTRASTS.get(suffix)
    return f"{contrast}CE" if contrast and "ce" in entities else contrast


def mask_role(entities, suffix):
    """Tell the attribute of `Scan` that a mask is for.

    Parameters
    ----------
    entities : dict of str to str
        Entities of the name, from `parse_bids_name`.
    suffix : str
        Suffix of the name, from `parse_bids_name`.

    Returns
    -------
    {"lesion_mask", "brain_mask"} or None
        None if it is no mask, or a mask of something else.
    """
    if suffix not in ("mask", "roi"):
        return None
    label, desc = entities.get("label", ""), entities.get("desc", "")
    if desc == "madad":  # a prediction is no truth
        return None
    if label == "L" or "lesion" in f"{label} {desc}".lower():
        return "lesion_mask"
    return "brain_mask" if "brain" in (label, desc) else None


def _existing(root):
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"root must name an existing folder, got {os.fspath(root)!r}. Check its spelling."
        )
    return root


def _nifti_files(*found):
    """Return the NIfTI files among paths, in ascending order; folders and ``.nii.gz.part`` are none."""
    paths = (path for paths in found for path in paths)
    return sorted(path for path in paths if path.name.endswith((".nii", ".nii.gz")) and path.is_file())


def _nothing_found(root, what, found=None):
    here = sorted(path.name for path in root.iterdir())
    return ValueError(
        f"root must hold {what}, got {os.fspath(root)!r} with "
        f"{found or f'{here[:5]} and {max(len(here) - 5, 0)} more'}. "
        "Give the folder of that layout" + (", or another space." if found else ".")
    )
