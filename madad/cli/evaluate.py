"""``madad evaluate``: maps against experts' masks, beside plain intensity, in the scans' own space."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from madad._version import __version__
from madad.cli._cohort import OF_ONE_SCAN, add_output_arguments, is_fatal, noted_warnings, progress
from madad.cli._output import table
from madad.cli.predict import Load, add_scan_arguments, scans_to_judge
from madad.datasets import Scan, scan_name
from madad.derivatives import (
    ERROR_COLUMNS,
    ERRORS,
    failure_row,
    participant,
    table_text,
    write_json,
    write_text,
)
from madad.metrics import auprc, dice_at_threshold, evaluate_maps, lesion_detection, max_dice_per_image
from madad.mri import read_volume, same_grid
from madad.plotting import volume_figure
from madad.preprocessed import lesion_on_grid
from madad.volume_model import VolumeModel, model_hash

OURS = "mad-ad"
COLUMNS = ("auprc", "auroc", "max_dice_per_image", "max_dice_pooled", "calibrated_dice")
OF_SCANS = (
    *("participant_id", "session_id", "method", "lesion_ml", "auprc", "max_dice", "dice_at_threshold"),
    *("threshold", "lesion_recall", "lesion_precision", "n_lesions", "n_detections", "score", "warning"),
)


@dataclass
class Voxels:
    """Brain and lesion voxels of all scans, and each method's map there."""

    subjects: list[str] = field(default_factory=list)
    lesion: list[np.ndarray] = field(default_factory=list)
    maps: dict[str, list[np.ndarray]] = field(default_factory=dict)


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``evaluate`` and its arguments."""
    parser = commands.add_parser(
        "evaluate",
        help="maps against experts' lesion masks, beside plain intensity",
        description="DATA is what madad preprocess takes, or what it wrote, with lesion masks; scans without "
        "one are left out. Everything is measured on the scans' own grids, over brain and lesion; a volume "
        "is one image. About 40 MB of memory for each scan of 1 mm.",
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
    """Measure, and write evaluation.json, evaluation.tsv, errors.tsv and figures."""
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
    voxels, rows, errors = Voxels(maps={name: [] for name in thresholds}), [], []
    for scan, load in progress(scans, "scans", options):
        try:
            rows += _judge(model, scan, load, thresholds, voxels, options)
        except OF_ONE_SCAN as error:
            if is_fatal(error):
                raise
            errors.append(failure_row(scan, error))
            print(f"{scan_name(scan)}: failed: {errors[-1]['message']}", file=sys.stderr)
    results: dict[str, Any] = {
        "model": model_hash(options.model),
        "version": __version__,
        "volumes": len(voxels.subjects),
        "voxels": "brain and lesion, on the scans' own grids",
        "methods": _results(voxels, thresholds) if voxels.subjects else {},
    }
    write_json(options.out / "evaluation.json", results)
    write_text(options.out / "evaluation.tsv", table_text(OF_SCANS, rows))
    write_text(options.out / ERRORS, table_text(ERROR_COLUMNS, errors))
    if options.card:
        model.card.metrics[_named(options.inputs)] = _brief(results)
        model.save(options.model)
    if options.json:
        print(json.dumps(results | {"errors": errors}, indent=2))
    else:
        print(table(results["methods"], COLUMNS) if voxels.subjects else "")
        print(f"\n{len(voxels.subjects)} volumes, {len(errors)} failed: {options.out}/")
    return 1 if errors else 0


def _named(inputs: list[Path]) -> str:
    return ", ".join(map(str, inputs))


def _thresholds(model: VolumeModel, own: float | None) -> dict[str, float]:
    """What is compared, with thresholds from healthy data alone."""
    return {OURS: model.threshold if own is None else own, **model.card.intensity_thresholds}


def _judge(
    model: VolumeModel,
    scan: Scan,
    load: Load,
    thresholds: Mapping[str, float],
    voxels: Voxels,
    options: argparse.Namespace,
) -> list[dict]:
    """Rows of one scan; its voxels are added to those of the others."""
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
    for name, values in maps.items():
        voxels.maps[name].append(values[seen])
    voxels.subjects.append(scan.subject)
    voxels.lesion.append(lesion[seen])
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
    return rows


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


def _results(voxels: Voxels, thresholds: Mapping[str, float]) -> dict[str, dict]:
    """All metrics over all scans; a scan is one image."""
    longest = max(map(len, voxels.lesion))

    def stacked(parts: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(part, (0, longest - len(part))) for part in parts])[:, None]

    lesion = stacked(voxels.lesion)
    seen = stacked([np.ones(len(part), bool) for part in voxels.lesion])
    return {
        name: evaluate_maps(
            lesion, stacked(parts), seen, subjects=voxels.subjects, threshold=thresholds[name]
        )
        for name, parts in voxels.maps.items()
    }


def _brief(results: dict) -> dict:
    return {"volumes": results["volumes"]} | {
        name: {column: values[column] for column in COLUMNS} for name, values in results["methods"].items()
    }
