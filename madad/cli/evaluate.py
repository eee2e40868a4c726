"""``madad evaluate``: maps against experts' masks, beside plain intensity, in the scans' own space."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from madad._runtime.files import write_json, write_text
from madad._runtime.version import __version__
from madad.cli._cohort import OF_ONE_SCAN, add_output_arguments, is_fatal, noted_warnings, progress
from madad.cli._output import table
from madad.cli.predict import Load, add_scan_arguments, scans_to_judge
from madad.datasets import Scan, scan_name
from madad.metrics import MapEvaluation, auprc, dice_at_threshold, lesion_detection, max_dice_per_image
from madad.mri import read_volume, same_grid
from madad.plotting import volume_figure
from madad.volumes.bids_derivative import ERROR_COLUMNS, ERRORS, failure_row, participant, table_text
from madad.volumes.model import VolumeModel, model_hash
from madad.volumes.preparation import lesion_on_grid

OURS = "mad-ad"
COLUMNS = ("auprc", "auroc", "max_dice_per_image", "max_dice_pooled", "calibrated_dice")
OF_SCANS = (
    *("participant_id", "session_id", "method", "lesion_ml", "auprc", "max_dice", "dice_at_threshold"),
    *("threshold", "lesion_recall", "lesion_precision", "n_lesions", "n_detections", "score", "warning"),
)


class Judged(NamedTuple):
    """What was measured of one scan.

    Attributes
    ----------
    rows : list of dict
        Cells of `OF_SCANS`, one row for each method.
    lesion : ndarray of shape (n_voxels,), bool
        True = lesion, at each voxel of brain or lesion.
    maps : dict of str to ndarray of shape (n_voxels,)
        Each method's map at these voxels, in 0..1.
    """

    rows: list[dict]
    lesion: np.ndarray
    maps: dict[str, np.ndarray]


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``evaluate`` and its arguments.

    Parameters
    ----------
    commands : argparse subparsers
        The commands of ``madad``, to which it is added.
    """
    parser = commands.add_parser(
        "evaluate",
        help="maps against experts' lesion masks, beside plain intensity",
        description="DATA is what madad preprocess takes, or what it wrote, with lesion masks; scans without "
        "one are left out. Everything is measured on the scans' own grids, over brain and lesion; a volume "
        "is one image. While it runs, --out holds 4 bytes for each of these voxels and each method that is "
        "compared, about 40 MB for a scan of 1 mm and five of them; memory does not grow with the scans.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL")
    add_scan_arguments(parser, "DATA")
    parser.add_argument(
        "--out", type=Path, default=Path("madad-evaluation"), help="folder for tables and figures"
    )
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--card", action="store_true", help="note the result in the model's card")
    add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, and write evaluation.json, evaluation.tsv, errors.tsv and figures.

    Parameters
    ----------
    options : argparse.Namespace
        The arguments that `add_command` added.

    Returns
    -------
    int
        The exit status. 0: done; 1: done, but some scans failed.
    """
    if options.card and options.threshold is not None:
        raise ValueError(
            f"--threshold must be the model's where --card notes the result, got {options.threshold}. "
            "Leave one of the two out."
        )
    model = VolumeModel.load(options.model, options.device)
    scans, _ = scans_to_judge(model, options)
    scans = [(scan, load) for scan, load in scans if scan.lesion_mask is not None]
    if not scans:
        raise ValueError(
            f"DATA must hold lesion masks, got none in {_named(options.inputs)}. "
            "Name them in a table (lesion_mask)."
        )
    thresholds = _thresholds(model, options.threshold)
    options.out.mkdir(parents=True, exist_ok=True)
    methods, rows, errors = _evaluate(model, scans, thresholds, options)
    n_volumes = len(scans) - len(errors)
    results: dict[str, Any] = {
        "model": model_hash(options.model),
        "version": __version__,
        "volumes": n_volumes,
        "voxels": "brain and lesion, on the scans' own grids",
        "methods": methods,
    }
    write_json(options.out / "evaluation.json", results)
    write_text(options.out / "evaluation.tsv", table_text(OF_SCANS, rows))
    write_text(options.out / ERRORS, table_text(ERROR_COLUMNS, errors))
    if options.card:
        model.card.metrics[_named(options.inputs)] = _brief(results)
        model.save_card(options.model)
    if options.json:
        print(json.dumps(results | {"errors": errors}, indent=2))
    else:
        print(table(methods, COLUMNS) if methods else "")
        print(f"\n{n_volumes} volumes, {len(errors)} failed: {options.out}/")
    return 1 if errors else 0


def _named(inputs: list[Path]) -> str:
    return ", ".join(map(str, inputs))


def _thresholds(model: VolumeModel, own: float | None) -> dict[str, float]:
    """What is compared, with thresholds from healthy data alone."""
    return {OURS: model.threshold if own is None else own, **model.card.intensity_thresholds}


def _evaluate(
    model: VolumeModel,
    scans: list[tuple[Scan, Load]],
    thresholds: Mapping[str, float],
    options: argparse.Namespace,
) -> tuple[dict[str, dict], list[dict], list[dict]]:
    """Metrics of each method over all scans, a row for each scan and method, and for each failed scan."""
    rows, errors = [], []
    with ExitStack() as stack:
        evaluations = {name: stack.enter_context(MapEvaluation(options.out)) for name in thresholds}
        for scan, load in progress(scans, "scans", options):
            try:
                judged = _judge(model, scan, load, thresholds, options)
            except OF_ONE_SCAN as error:
                if is_fatal(error):
                    raise
                errors.append(failure_row(scan, error))
                print(f"{scan_name(scan)}: failed: {errors[-1]['message']}", file=sys.stderr)
                continue
            for name, values in judged.maps.items():  # the volume is one image
                evaluations[name].update(judged.lesion[None], values[None], subjects=[scan.subject])
            rows += judged.rows
        methods = {name: each.result(thresholds[name]) for name, each in evaluations.items() if rows}
    return methods, rows, errors


def _judge(
    model: VolumeModel,
    scan: Scan,
    load: Load,
    thresholds: Mapping[str, float],
    options: argparse.Namespace,
) -> Judged:
    """Measure one scan and draw its figure."""
    with noted_warnings() as noted:
        volumes = load()
        doubts = model.doubts(volumes)
        prediction = model.predict(volumes, thresholds[OURS])
        expert = read_volume(scan.lesion_mask)
    first = prediction.preprocessed
    if same_grid(first.source, expert):
        lesion = expert.values > 0
    else:  # drawn on another of the model's contrasts
        lesion = first.to_source(lesion_on_grid(scan, volumes))
    if not lesion.any():
        raise ValueError(f"lesion_mask must show a lesion, got none in {expert.name}. Leave the scan out.")
    maps = {OURS: prediction.on_source()[0]}
    for name in model.card.intensity_thresholds:
        maps[name] = model.predict_from_intensity(volumes, name).on_source()[0]
    seen = first.to_source(first.brain_mask) | lesion
    rows = []
    voxel_ml = abs(float(np.linalg.det(first.source.affine[:3, :3]))) / 1000
    for name, values in maps.items():
        rows.append(
            {
                **participant(scan),
                "method": name,
                "lesion_ml": float(np.count_nonzero(lesion) * voxel_ml),
                **_row(lesion, values, seen, thresholds[name]),
                "score": prediction.score if name == OURS else None,
                "warning": " ".join([*noted, *doubts]),
            }
        )
    if not options.no_figures:
        volume_figure(
            options.out / f"{scan_name(scan)}.png",
            image=first.source.values,
            anomaly_map=maps[OURS],
            affine=first.source.affine,
            threshold=thresholds[OURS],
            lesion_mask=lesion,
            title=f"{scan_name(scan)} {model.card.contrasts[0]}",
        )
    return Judged(rows, lesion[seen], {name: values[seen] for name, values in maps.items()})


def _row(lesion: np.ndarray, values: np.ndarray, seen: np.ndarray, threshold: float) -> dict:
    flat = (lesion[seen][None, None], values[seen][None, None])
    found = lesion_detection(lesion[None], values[None], threshold, seen[None])
    return {
        "auprc": auprc(*flat),
        "max_dice": max_dice_per_image(*flat).dice,
        "dice_at_threshold": dice_at_threshold(*flat, threshold),
        "threshold": threshold,
        "lesion_recall": found.recall,
        "lesion_precision": None if math.isnan(found.precision) else found.precision,
        "n_lesions": found.n_lesions,
        "n_detections": found.n_detections,
    }


def _brief(results: dict) -> dict:
    return {"volumes": results["volumes"]} | {
        name: {column: values[column] for column in COLUMNS} for name, values in results["methods"].items()
    }
