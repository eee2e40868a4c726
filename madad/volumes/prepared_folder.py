"""Preprocessed volumes on disk: a BIDS derivative, read back with the way to the scan's own grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from madad._runtime.files import read_json, write_json, write_text
from madad._runtime.version import __version__
from madad.datasets import Scan
from madad.mri import (
    AffineRegistration,
    PreprocessedVolume,
    read_volume,
    write_like,
)
from madad.mri.registration import TEMPLATE_SPACE
from madad.volumes.bids_derivative import Derivative, participant
from madad.volumes.preparation import NAMES, bids_name, in_order, lesion_on_grid, registration_warnings

STEP = "preprocess"
TABLE = "preprocessing.tsv"
_EXPERT = "label-L_desc-expert_mask.nii.gz"
COLUMNS = (
    *("participant_id", "session_id", "contrast", "brain_made_by", "brain_ml"),
    *("registration_similarity", "registration_overlap", "warning"),
)


@dataclass(frozen=True)
class PreprocessedFiles:
    """One person's files in a folder of `write_preprocessed`.

    Attributes
    ----------
    scan : Scan
        The person; its ``images`` are the preprocessed ones, by contrast.
    sidecars : dict of str to dict
        What the sidecar of each contrast holds.
    expert_mask : Path or None
        The lesion mask as it came, on the scan's own grid; ``scan.lesion_mask`` is on that of the images.
    """

    scan: Scan
    sidecars: Mapping[str, dict]
    expert_mask: Path | None = None


def write_preprocessed(
    folder: Derivative, scan: Scan, volumes: Mapping[str, PreprocessedVolume], notes: Sequence[str] = ()
) -> list[str]:
    """Write preprocessed volumes, their brain mask, lesion mask and place in the template.

    Parameters
    ----------
    folder : Derivative
        Started with the step `STEP`.
    scan : Scan
        What the volumes were made from.
    volumes : dict of str to PreprocessedVolume
        The volume of each contrast, from `preprocess_scan`.
    notes : sequence of str, default=()
        Further warnings, for the sidecars.

    Returns
    -------
    list of str
        The notes and the warnings of the registrations.
    """
    first = next(iter(volumes.values()))
    space = None if first.registration is None else TEMPLATE_SPACE
    reference = {"SpatialReference": space or "orig"}
    folder.clear(scan)
    path = folder.path(scan, "desc-brain_mask.nii.gz", space)
    write_like(path, first.brain_mask, first.volume, dtype=np.uint8)
    brain_from = scan.brain_mask if scan.brain_mask is not None else first.source.path
    facts: dict[str, Any] = {
        "Type": "Brain",
        "Description": "The brain with the fluid in and around it.",
        "Sources": [folder.source_uri(brain_from)],
    }
    write_json(_sidecar_of(path), reference | facts)
    if scan.lesion_mask is not None:
        path = folder.path(scan, _EXPERT, space)
        write_like(path, lesion_on_grid(scan, volumes.values()), first.volume, dtype=np.uint8)
        facts = {
            "Type": "Lesion",
            "Description": "The lesion mask that came with the scan.",
            "Sources": [folder.source_uri(scan.lesion_mask)],
        }
        write_json(_sidecar_of(path), reference | facts)
    for name, volume in volumes.items():
        entity, suffix = bids_name(name)
        if volume.registration is not None:
            rows = (" ".join(f"{value:.9g}" for value in row) for row in volume.registration.matrix)
            ending = f"from-{suffix}_to-{space or 'orig'}_mode-image_xfm.txt"
            write_text(folder.path(scan, ending, entity=entity), "\n".join(rows) + "\n")
        path = folder.path(scan, f"desc-preproc_{suffix}.nii.gz", space, entity=entity)
        write_like(path, volume.volume.values, volume.volume)
        facts = {
            "SkullStripped": True,
            "Sources": [folder.source_uri(volume.source.path)],
            "Description": "Intensities of the brain, scaled; 0 outside.",
            "madad": _facts_of(name, volume, notes),
        }
        write_json(_sidecar_of(path), reference | facts)  # the last file: with it the contrast is done
    return [*notes, *(text for volume in volumes.values() for text in registration_warnings(volume))]


def is_preprocessed_whole(folder: Derivative, scan: Scan, *, template: bool) -> bool:
    """Tell whether all contrasts of a scan, and its lesion mask, are there.

    Parameters
    ----------
    folder : Derivative
        The folder that `write_preprocessed` wrote to.
    scan : Scan
        The scan as it came.
    template : bool
        Whether the volumes should be on the template's grid.

    Returns
    -------
    bool
        False also if the scan has a contrast that BIDS has no name for.

    Raises
    ------
    FileExistsError
        If they are, but of other files.
    """
    if not set(scan.images) <= set(NAMES):
        return False
    space = TEMPLATE_SPACE if template else None
    sidecars = {}
    for contrast, image in scan.images.items():
        entity, suffix = bids_name(contrast)
        sidecars[folder.path(scan, f"desc-preproc_{suffix}.json", space, entity=entity)] = image
    if scan.lesion_mask is not None:
        sidecars[folder.path(scan, _EXPERT.replace(".nii.gz", ".json"), space)] = scan.lesion_mask
    return all(folder.is_made_from(sidecar, [image]) for sidecar, image in sidecars.items())


def find_preprocessed(folder: Derivative) -> list[PreprocessedFiles]:
    """Find what `write_preprocessed` wrote.

    Parameters
    ----------
    folder : Derivative
        The folder that it wrote to.

    Returns
    -------
    list of PreprocessedFiles
        One for each subject and session, in ascending order.

    Raises
    ------
    ValueError
        If there is nothing, or a sidecar is damaged.
    """
    found = _sidecars_by_scan(folder)
    if not found:
        raise ValueError(
            f"DATA must hold preprocessed volumes, got none in {folder.root}. Run madad preprocess again."
        )
    return [_files_of(folder, *key, contrasts) for key, contrasts in sorted(found.items())]


def _sidecars_by_scan(folder: Derivative) -> dict[tuple[str, str], dict[str, tuple[Path, dict]]]:
    """(subject, session) -> contrast -> sidecar's path and content."""
    found: dict[tuple[str, str], dict[str, tuple[Path, dict]]] = {}
    for suffix in {suffix: None for _, suffix in NAMES.values()}:
        for path, sidecar in folder.sidecars(f"_desc-preproc_{suffix}.json"):
            subject, visit, *_ = path.relative_to(folder.root).parts
            session = visit.removeprefix("ses-") if visit.startswith("ses-") else ""
            of_scan = found.setdefault((subject.removeprefix("sub-"), session), {})
            try:
                of_scan[sidecar["madad"]["contrast"]] = (path, sidecar)
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} must be of madad preprocess, got no contrast in it. Delete it and "
                    "preprocess the scan again."
                ) from error
    return found


def _files_of(folder: Derivative, subject: str, session: str, contrasts: dict) -> PreprocessedFiles:
    names = in_order(contrasts)
    images = {name: contrasts[name][0].with_suffix(".nii.gz") for name in names}
    mask = next(images[names[0]].parent.glob(f"sub-{subject}_*{_EXPERT}"), None)
    expert_mask = None if mask is None else folder.source_path(read_json(_sidecar_of(mask))["Sources"][0])
    scan = Scan(subject, images, lesion_mask=mask, session=session or None)
    return PreprocessedFiles(scan, {name: contrasts[name][1] for name in names}, expert_mask)


def read_preprocessed(
    folder: Derivative, files: PreprocessedFiles, contrasts: Sequence[str], *, needs_source: bool = True
) -> list[PreprocessedVolume]:
    """Read preprocessed volumes back.

    Parameters
    ----------
    folder : Derivative
        The folder that `write_preprocessed` wrote to.
    files : PreprocessedFiles
        One person's files, from `find_preprocessed`.
    contrasts : sequence of str
        The contrasts wanted, in the order wanted.
    needs_source : bool, default=True
        Whether results are to be brought to the scan's own grid. False reads no file but the preprocessed
        ones; ``source`` is then the preprocessed volume.

    Returns
    -------
    list of PreprocessedVolume
        The volume of each of `contrasts`.

    Raises
    ------
    FileNotFoundError
        If the scan that a volume was made from is needed and gone.
    ValueError
        If a contrast is missing, or a file is damaged or was changed since.
    """
    missing = [name for name in contrasts if name not in files.sidecars]
    if missing:
        raise ValueError(
            f"contrasts must be among those of sub-{files.scan.subject}, got {missing}, with "
            f"{sorted(files.sidecars)} there. Preprocess them, or leave the subject out."
        )
    return [
        _read_one(folder, files.scan.images[name], files.sidecars[name], needs_source) for name in contrasts
    ]


def write_preprocessing_table(folder: Derivative) -> None:
    """Write ``preprocessing.tsv``, one row for each contrast of each scan, from the sidecars.

    Parameters
    ----------
    folder : Derivative
        The folder that `write_preprocessed` wrote to.
    """

    def rows():
        for (subject, session), contrasts in sorted(_sidecars_by_scan(folder).items()):
            for name in in_order(contrasts):
                facts = contrasts[name][1]["madad"]
                yield {
                    **participant(Scan(subject, {}, session=session or None)),
                    "contrast": name,
                    "brain_made_by": facts["brain_made_by"],
                    "brain_ml": facts["brain_ml"],
                    "registration_similarity": facts["similarity"],
                    "registration_overlap": facts["overlap"],
                    "warning": " ".join(facts["warnings"]),
                }

    folder.write_table(TABLE, COLUMNS, rows)


def _read_one(folder: Derivative, path: Path, sidecar: dict, needs_source: bool) -> PreprocessedVolume:
    volume = read_volume(path)
    facts = sidecar["madad"]
    registration = None
    if facts["matrix"] is not None:
        matrix = np.array(facts["matrix"])
        registration = AffineRegistration(matrix, facts["similarity"], facts["overlap"])
    if not needs_source:
        return PreprocessedVolume(volume, volume, facts["brain_made_by"], registration)
    original = folder.source_path(sidecar["Sources"][0])
    if not original.exists():
        raise FileNotFoundError(
            f"the scan that was preprocessed must still exist, got no {original}. Put it back, or use "
            "--space template."
        )
    source = read_volume(original)
    if list(source.shape) != facts["shape"] or not np.allclose(source.affine, facts["affine"], atol=1e-3):
        raise ValueError(
            f"the scan that was preprocessed must not have changed, got another grid in {original}. "
            "Preprocess it again."
        )
    return PreprocessedVolume(volume, source, facts["brain_made_by"], registration)


def _facts_of(contrast: str, volume: PreprocessedVolume, notes: Sequence[str]) -> dict:
    registration, source = volume.registration, volume.source
    voxel_ml = abs(float(np.linalg.det(volume.volume.affine[:3, :3]))) / 1000
    if registration is not None:
        voxel_ml /= abs(float(np.linalg.det(registration.matrix[:3, :3])))
    return {
        "version": __version__,
        "contrast": contrast,
        "brain_made_by": volume.brain_made_by,
        "brain_ml": round(np.count_nonzero(volume.brain_mask) * voxel_ml, 1),
        "similarity": None if registration is None else registration.similarity,
        "overlap": None if registration is None else registration.overlap,
        "matrix": None if registration is None else registration.matrix.tolist(),
        "shape": list(source.shape),
        "affine": source.affine.tolist(),
        "n_not_finite": source.n_not_finite,
        "warnings": [*notes, *registration_warnings(volume)],
    }


def _sidecar_of(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(".nii.gz") + ".json")
