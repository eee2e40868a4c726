"""The numbers of a run: metrics of one method and seed, means and intervals over them, tables."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from benchmarks.protocols import Protocol
from madad.metrics import bootstrap_ci, dice_per_image, evaluate_maps

OURS, PAPERS = "mad-ad", "MAD-AD, the paper's"
SUMMARISED = ("max_dice_per_image", "max_dice_pooled", "calibrated_dice", "auprc", "auroc")
COLUMNS = ("max_dice_per_image", "max_dice_pooled", "calibrated_dice", "auprc")
HEADER = ("max Dice per image", "max Dice pooled", "calibrated Dice per image", "AUPRC")
STRATA = ("small", "medium", "large")
# docs/method.md, "Published numbers": per cent Dice, setting 2, average
PUBLISHED = {
    "map: image": 70.3,
    "map: latent": 68.6,
    "map: mean mask": 63.6,
    "steps: 2": 69.0,
    "steps: 5": 69.4,
    "steps: 10": 70.3,
    "gamma: 0.2": 70.3,
    "gamma: 0.4": 70.3,
    "gamma: none": 69.3,
}


def measured(protocol: Protocol, maps: np.ndarray, threshold: float) -> dict:
    """All metrics of one method and seed, and the Dice of each image at the oracle threshold."""
    truth, maps, brain, subjects = images_of(protocol, maps)
    result = evaluate_maps(truth, maps, brain, subjects=subjects, threshold=threshold)
    dice = dice_per_image(truth, maps, result["oracle_threshold_per_image"], brain)
    return result | {"dice_per_image": dice.tolist()}


def images_of(protocol: Protocol, maps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Truth, maps, brain masks and subjects of what counts as an image: a slice, or all of a subject's."""
    test = protocol.test
    arrays = (test.lesion_masks, maps, test.brain_masks)
    if not protocol.by_volume:
        return *arrays, test.subjects
    subjects = np.unique(test.subjects)
    groups = [np.flatnonzero(test.subjects == subject) for subject in subjects]
    depth = max(map(len, groups))
    stacked = []
    for values in arrays:
        padded = np.zeros((len(groups), depth, *values.shape[1:]), values.dtype)
        for padding, rows in zip(padded, groups, strict=True):
            padding[: len(rows)] = values[rows]
        stacked.append(padded.reshape(len(groups), -1, values.shape[-1]))
    return *stacked, subjects


def summarise(protocol: Protocol, results: list[dict]) -> dict:
    """Means over seeds, each seed's values, and 95 % intervals over subjects.

    The interval of the Dice per image is that of the mean over seeds; the others are means of the seeds'.
    """
    _, _, _, subjects = images_of(protocol, protocol.test.lesion_masks)
    summary: dict = {
        name: {
            "mean": float(np.mean([result[name] for result in results])),
            "seeds": [result[name] for result in results],
        }
        for name in SUMMARISED
    }
    per_image = np.mean([result["dice_per_image"] for result in results], axis=0)
    several = len(np.unique(subjects)) > 1  # of one subject nobody can know the spread
    summary["max_dice_per_image"]["ci95"] = list(bootstrap_ci(per_image, subjects)) if several else None
    for name in ("max_dice_pooled", "auprc", "calibrated_dice"):
        bounds = [result[f"{name}_ci95"] for result in results]
        summary[name]["ci95"] = None if None in bounds else np.mean(bounds, axis=0).tolist()
    if not protocol.by_volume:
        strata = protocol.lesion_sizes
        summary["dice_by_lesion_size"] = {
            stratum: {"mean": float(per_image[strata == stratum].mean()), "n": int((strata == stratum).sum())}
            for stratum in STRATA
            if (strata == stratum).any()
        }
    summary["dice_of_each"] = per_image.tolist()
    summary["seeds"] = [result["seed"] for result in results]
    summary["seconds"] = [result.get("fit_seconds") for result in results]
    summary["training"] = [result.get("training") for result in results]
    return summary


def compare_pairs(protocol: Protocol, methods: dict[str, dict]) -> None:
    """Add to each other method how much more Dice per image ours has on the same images, on average."""
    _, _, _, subjects = images_of(protocol, protocol.test.lesion_masks)
    ours = np.array(methods[OURS]["dice_of_each"])
    for name, summary in methods.items():
        if name != OURS:
            gained = ours - np.array(summary["dice_of_each"])
            several = len(np.unique(subjects)) > 1
            summary["ours_gains"] = {
                "mean": float(gained.mean()),
                "ci95": list(bootstrap_ci(gained, subjects)) if several else None,
            }


def table(methods: dict[str, dict]) -> str:
    """Markdown: a row for each method, 95 % intervals over subjects in brackets."""
    columns, header = COLUMNS, HEADER
    if any("ours_gains" in summary for summary in methods.values()):
        columns, header = (*COLUMNS, "ours_gains"), (*HEADER, "MAD-AD's gain per image")
    lines = ["| method | " + " | ".join(header) + " |", "| --- |" + " --- |" * len(header)]
    for name, summary in methods.items():
        cells = []
        for column in columns:
            if column not in summary:
                cells.append("")
                continue
            interval = summary[column].get("ci95")
            bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
            cells.append(f"{summary[column]['mean']:.3f}{bounds}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablation_table(rows: dict[str, dict[str, dict]]) -> str:
    """Markdown: each row with our defaults and with the paper's as the base, and the published Dice."""
    lines = [
        "| row | ours: per image | ours: pooled | ours: AUPRC | paper's: per image | paper's: pooled "
        "| paper's: AUPRC | published |",
        "| --- |" + " --- |" * 7,
    ]
    for name, bases in rows.items():
        cells = [
            f"{bases[base][column]['mean']:.3f}" if base in bases else ""
            for base in (OURS, PAPERS)
            for column in ("max_dice_per_image", "max_dice_pooled", "auprc")
        ]
        cells.append(f"{PUBLISHED[name]:.1f}" if name in PUBLISHED else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
