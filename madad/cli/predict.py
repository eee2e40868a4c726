"""``madad predict``: anomaly maps, masks and scores of scans, on their own grids."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from joblib import cpu_count

from madad._runtime.files import write_json
from madad._runtime.tensors import resolve_device
from madad._runtime.version import __version__
from madad.cli._cohort import (
    add_cohort_arguments,
    begin,
    for_each,
    is_preprocessed,
    noted_warnings,
    raw_scans,
    share_of,
)
from madad.datasets import Scan
from madad.mri import PreprocessedVolume, VolumePreprocessor, write_like
from madad.mri.registration import TEMPLATE_SPACE
from madad.volumes.bids_derivative import Derivative, changes
from madad.volumes.model import VolumeModel, model_hash
from madad.volumes.prediction import VolumePrediction
from madad.volumes.preparation import preprocess_scan
from madad.volumes.prepared_folder import PreprocessedFiles, find_preprocessed, read_preprocessed

STEP = "predict"
MAP, MASK = "stat-anomaly_statmap", "label-L_desc-madad_mask"
COLUMNS = (
    *("participant_id", "session_id", "score", "decision", "prediction", "n_components", "anomalous_ml"),
    *("largest_ml", "peak", "peak_x_mm", "peak_y_mm", "peak_z_mm", "brain_made_by"),
    *("registration_similarity", "registration_overlap", "warning"),
)
Load = Callable[[], list[PreprocessedVolume]]
MAX_READERS = 4
"""By default; each holds a prepared scan."""


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``predict`` and its arguments.

    Parameters
    ----------
    commands : argparse subparsers
        The commands of ``madad``, to which it is added.
    """
    parser = commands.add_parser(
        "predict",
        help="anomaly maps, masks and scores of scans",
        description="IN is what madad preprocess takes, or what it wrote. Scans as they came are prepared as "
        "the training data were. OUT becomes a BIDS derivative: a map and a mask of each scan on its own "
        "grid, scores.tsv and errors.tsv.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    add_scan_arguments(parser)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument(
        "--space", default="orig", choices=("orig", "template"), help="grid of maps and masks (default: orig)"
    )
    add_cohort_arguments(
        parser, default_readers=f"0; with a GPU one less than there are cores, at most {MAX_READERS}"
    )
    parser.set_defaults(run=run)


def add_scan_arguments(parser: argparse.ArgumentParser, name: str = "IN") -> None:
    """Add the arguments of the commands that judge scans.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Parser of the command.
    name : str, default="IN"
        What the help calls the scans.
    """
    parser.add_argument("inputs", type=Path, nargs="+", metavar=name)
    parser.add_argument("--contrast", help="of files whose names do not tell: T1, T2, PD, FLAIR, T1CE")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--threshold", type=share, help="of the map, 0..1 (default: the model's)")


def share(text: str) -> float:
    """Read a number in 0..1.

    Parameters
    ----------
    text : str
        What the user wrote.

    Returns
    -------
    float
        The number that was meant.
    """
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0..1, got {text!r}")
    return value


def run(options: argparse.Namespace) -> int:
    """Judge what is not judged yet.

    Parameters
    ----------
    options : argparse.Namespace
        The arguments that `add_command` added.

    Returns
    -------
    int
        The exit status. 0: done; 1: done, but some scans failed.
    """
    model = VolumeModel.load(options.model, options.device)
    space = _space(model, options.space)
    threshold = model.threshold if options.threshold is None else options.threshold
    settings = {"model": model_hash(options.model), "space": space or "orig", "threshold": threshold}
    scans, source = scans_to_judge(model, options, out=options.out, needs_source=space is None)
    folder = Derivative(options.out)
    begin(folder, options, "Anomaly maps", step=STEP, parameters=settings, source=source)

    def images_of(scan: Scan) -> list[Path]:
        return [scan.images[name] for name in model.card.contrasts if name in scan.images]

    def work(scan: Scan, volumes: list[PreprocessedVolume], noted: list[str]) -> list[str]:
        with noted_warnings(noted):
            doubts = model.doubts(volumes)
            prediction = model.predict(volumes, threshold)
        facts = {**_facts(model, prediction), "settings": settings, "warnings": [*noted, *doubts]}
        sources = [folder.source_uri(image) for image in images_of(scan)]
        _write(folder, scan, prediction, facts, sources, space)
        return facts["warnings"]

    tally = for_each(
        share_of(scans, options),
        work,
        is_done=lambda scan: folder.is_made_from(folder.path(scan, f"{MAP}.json", space), images_of(scan)),
        folder=folder,
        options=options,
        readers=_default_readers(options.device) if options.readers is None else options.readers,
    )
    if not options.dry_run:
        folder.write_errors()
        folder.write_table("scores.tsv", COLUMNS, lambda: _rows(folder))
    tally.report(options, options.out)
    return tally.status


def scans_to_judge(
    model: VolumeModel, options: argparse.Namespace, *, out: Path | None = None, needs_source: bool = True
) -> tuple[list[tuple[Scan, Load]], Path]:
    """Find the scans of IN, and what prepares each.

    Parameters
    ----------
    model : VolumeModel
        The model that is to judge them.
    options : argparse.Namespace
        With ``inputs`` and ``contrast``.
    out : Path or None, default=None
        Folder of results, if there is one.
    needs_source : bool, default=True
        Whether results are to be brought to the scan's own grid.

    Returns
    -------
    scans : list of (Scan, callable)
        Each scan with a function that returns its preprocessed volumes.
    source : Path
        The folder that results name their files relative to.

    Raises
    ------
    ValueError
        If IN was preprocessed otherwise than the training data, or results in ``out`` would be taken for
        scans.
    """
    if not is_preprocessed(options.inputs):
        scans, source = raw_scans(options.inputs, options.contrast, out)
        assert model.card.preprocessor is not None
        prepare = partial(_prepare, model.card.preprocessor, model.card.contrasts)
        return [(scan, partial(prepare, scan)) for scan in scans], source
    folder = Derivative(options.inputs[0])
    # How a brain is found decides nothing where it is found.
    before, now = (
        {name: value for name, value in parameters.items() if name != "brain"}
        for parameters in (model.card.preprocessing, folder.description()["madad"]["parameters"])
    )
    if before != now:
        raise ValueError(
            f"IN must be preprocessed as the training data were, got {folder.root} with "
            f"{changes(now, before)}. Give the scans as they came, or preprocess them so."
        )

    load = partial(read_preprocessed, folder, contrasts=model.card.contrasts, needs_source=needs_source)
    found = find_preprocessed(folder)
    return [(_judged(one), partial(load, one)) for one in found], folder.root


def _prepare(
    preprocessor: VolumePreprocessor, contrasts: Sequence[str], scan: Scan
) -> list[PreprocessedVolume]:
    """`VolumeModel.prepare` without the networks, which no other process needs."""
    return list(preprocess_scan(preprocessor, scan, contrasts).values())


def _default_readers(device: str) -> int:
    """Some beside a GPU, which would wait for scans; none where the networks want the cores themselves."""
    return min(MAX_READERS, cpu_count() - 1) if resolve_device(device).type == "cuda" else 0


def _judged(files: PreprocessedFiles) -> Scan:
    """A preprocessed scan with its lesion mask as it came."""
    return replace(files.scan, lesion_mask=files.expert_mask)


def _space(model: VolumeModel, wanted: str) -> str | None:
    """The space entity of the results; None = the scan's own grid."""
    if wanted == "orig":
        return None
    if not model.card.preprocessing["template"]:
        raise ValueError(
            "--space must be orig for a model of volumes on their own grids, got template. Leave it out."
        )
    return TEMPLATE_SPACE


def _facts(model: VolumeModel, prediction: VolumePrediction) -> dict:
    first = prediction.preprocessed
    registration = first.registration
    components = prediction.components
    decision = prediction.score - model.offset
    return {
        "versions": {"madad": __version__, "torch": torch.__version__, "numpy": np.__version__},
        "score": prediction.score,
        "decision": decision,
        "prediction": -1 if decision < 0 else 1,
        "components": [one._asdict() for one in components],
        "brain_made_by": first.brain_made_by,
        "similarity": None if registration is None else registration.similarity,
        "overlap": None if registration is None else registration.overlap,
    }


def _write(
    folder: Derivative,
    scan: Scan,
    prediction: VolumePrediction,
    facts: dict,
    sources: list[str],
    space: str | None,
) -> None:
    """Mask, map, and last the map's sidecar, with which the scan is done."""
    folder.clear(scan)
    first = prediction.preprocessed
    anomaly_map, labels = prediction.anomaly_map, prediction.labels
    grid = first.volume
    if space is None:
        anomaly_map, labels = prediction.on_source()
        grid = first.source
    shared = {"SpatialReference": space or "orig", "Sources": sources}
    done = folder.path(scan, f"{MAP}.json", space)
    write_like(folder.path(scan, f"{MASK}.nii.gz", space), labels > 0, grid, dtype=np.uint8)
    meaning = "Where the anomaly map reaches the threshold. For research use only."
    facts_of_mask = {"Type": "Lesion", "Description": meaning, **shared}
    write_json(folder.path(scan, f"{MASK}.json", space), facts_of_mask)
    write_like(folder.path(scan, f"{MAP}.nii.gz", space), anomaly_map, grid)
    meaning = "Anomaly map in 0..1; higher = less like healthy brains. For research use only."
    write_json(done, {"Description": meaning, **shared, "madad": facts})


def _rows(folder: Derivative) -> Iterator[dict]:
    """One row of scores.tsv for each sidecar."""
    for path, sidecar in folder.sidecars(f"{MAP}.json"):
        facts = sidecar["madad"]
        parts = path.relative_to(folder.root).parts
        components = facts["components"]
        highest = components[0] if components else {}
        x, y, z = highest.get("peak_mm", (None, None, None))
        volumes = [one["volume_ml"] for one in components]
        yield {
            "participant_id": parts[0],
            "session_id": parts[1] if parts[1].startswith("ses-") else None,
            "score": facts["score"],
            "decision": facts["decision"],
            "prediction": facts["prediction"],
            "n_components": len(components),
            "anomalous_ml": float(sum(volumes)),
            "largest_ml": max(volumes, default=None),
            "peak": highest.get("peak"),
            "peak_x_mm": x,
            "peak_y_mm": y,
            "peak_z_mm": z,
            "brain_made_by": facts["brain_made_by"],
            "registration_similarity": facts["similarity"],
            "registration_overlap": facts["overlap"],
            "warning": " ".join(facts["warnings"]),
        }
