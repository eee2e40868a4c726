"""How long evaluating anomaly maps takes, and how much memory: the usual way, and `MapEvaluation`.

    python -m benchmarks.metrics [--pixels 1e7] [--usual 1.0] [--json FILE]

The maps are made, 256 x 256 float32 as a detector's: smooth noise in an ellipse, 0 around it, and in every
other one a disc that is brighter on average. The usual way holds all maps, tries 201 thresholds on each slice
with a lesion, one after the other, and calls scikit-learn's average_precision_score and roc_auc_score. It can
be run on a share of the images (``--usual``); its time and memory are then scaled, as the output says.
`MapEvaluation`, in memory and with a folder, gets the maps in batches, and also estimates intervals. Seconds
leave out the making of the maps. Memory is the peak of tracemalloc, which sees Python's and NumPy's
allocations of this process, maps included, and not the system's cache of files; it is measured in a second
run of the same, because it costs time.
"""

import argparse
import json
import math
import os
import platform
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from madad.metrics import MapEvaluation

SIDE, BATCH, THRESHOLDS = 256, 16, 201
AREAS = ("auprc", "auroc")
WAYS = ("usual", "in memory", "with a folder")


def main():
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pixels", type=float, default=1e7)
    parser.add_argument("--usual", type=float, default=1.0, help="share of the images for the usual way")
    parser.add_argument("--folder", type=Path, help="where the temporary file goes")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args()
    facts = measure(options.pixels, usual_share=options.usual, folder=options.folder)
    print(table(facts))
    if options.json is not None:
        options.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def measure(n_pixels, *, usual_share=1.0, folder=None, side=SIDE):
    """Seconds, peak memory and results of the three ways, the largest difference, and the machine."""
    n_images = max(2, math.ceil(n_pixels / side**2))
    n_usual = max(2, math.ceil(n_images * usual_share))
    with tempfile.TemporaryDirectory(dir=folder) as directory:
        ways = {
            "usual": (usual, n_usual),
            "in memory": (streamed, n_images),
            "with a folder": (lambda batches, clock: streamed(batches, clock, directory), n_images),
        }
        measured = {name: _measured(way, n, side) for name, (way, n) in ways.items()}
    scale = n_images / n_usual
    for unit in ("seconds", "peak_mb"):
        measured["usual"][unit] *= scale
    expected = measured["usual"]["results"]
    ours = measured["in memory"]["results"]
    assert ours == measured["with a folder"]["results"]
    same = ours if n_usual == n_images else streamed(batches_of(n_usual, side), Clock())
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "pixels": n_images * side**2,
        "images": n_images,
        "images_of_usual": n_usual,
        "ways": measured,
        "times_faster": {name: measured["usual"]["seconds"] / measured[name]["seconds"] for name in WAYS[1:]},
        "largest_difference": max(abs(same[name] - expected[name]) for name in AREAS),
        "dice_above_grid": same["max_dice_per_image"] - expected["max_dice_per_image"],
    }


def _measured(way, n_images, side):
    clock = Clock()
    results = way(batches_of(n_images, side), clock)
    tracemalloc.start()
    try:
        way(batches_of(n_images, side), Clock())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return {"seconds": clock.seconds, "peak_mb": peak / 1e6, "results": results}


class Clock:
    """Adds up the seconds of ``with`` blocks."""

    def __init__(self):
        self.seconds = 0.0

    def __enter__(self):
        self._start = time.perf_counter()

    def __exit__(self, *error):
        self.seconds += time.perf_counter() - self._start


def usual(batches, clock):
    """What evaluation scripts do with all lesion masks and maps."""
    truth, maps = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    with clock:
        rows = np.flatnonzero(truth.any(axis=(1, 2)))
        mean_dice = []
        for threshold in np.linspace(maps.min(), maps.max(), THRESHOLDS):
            mean_dice.append(np.mean([_dice(truth[row], maps[row] >= threshold) for row in rows]))
        flat = truth.ravel(), maps.ravel()
        areas = average_precision_score(*flat), roc_auc_score(*flat)
    return {"max_dice_per_image": float(max(mean_dice)), **dict(zip(AREAS, map(float, areas), strict=True))}


def streamed(batches, clock, directory=None):
    """Ours."""
    with MapEvaluation(directory) as evaluation:
        for truth, maps in batches:
            with clock:
                evaluation.update(truth, maps)
        with clock:
            return evaluation.result()


def batches_of(n_images, side):
    """Lesion masks and maps, (n, side, side), the same each time."""
    rng = np.random.default_rng(0)
    y, x = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    brain = (y / 0.4) ** 2 + (x / 0.32) ** 2 < 1  # 40 % of the pixels
    for start in range(0, n_images, BATCH):
        n = min(BATCH, n_images - start)
        centre = rng.uniform(-0.2, 0.2, (2, n, 1, 1))
        radius = rng.uniform(0.02, 0.1, (n, 1, 1)) * (np.arange(n) % 2 == 0)[:, None, None]
        truth = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        noise = rng.standard_normal((n, side, side), dtype=np.float32)
        smooth = (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2) + np.roll(noise, (1, 1), (1, 2))) / 2
        maps = 1 / (1 + np.exp(2.5 - smooth - 1.5 * truth)) * brain
        yield truth, maps.astype(np.float32)


def _dice(truth, predicted):
    return 2 * np.count_nonzero(truth & predicted) / (np.count_nonzero(truth) + np.count_nonzero(predicted))


def table(facts):
    """Markdown: a row for each way, and what the ways agree on."""
    lines = [
        f"{facts['pixels']:.3g} pixels, {facts['images']} images; {facts['cores']} cores",
        "",
        "| way | s | peak of memory, MB | times faster |",
        "|---|---|---|---|",
    ]
    for name, way in facts["ways"].items():
        factor = facts["times_faster"].get(name, 1.0)
        lines.append(f"| {name} | {way['seconds']:.2f} | {way['peak_mb']:.0f} | {factor:.1f} |")
    if facts["images_of_usual"] < facts["images"]:
        share = f"{facts['images_of_usual']} of {facts['images']} images"
        lines.append(f"\nThe usual way ran on {share}; its seconds and megabytes are scaled up from there.")
    areas = f"AUPRC and AUROC differ by {facts['largest_difference']:.1e} at most"
    dice = f"the Dice is {facts['dice_above_grid']:.1e} above the best of {THRESHOLDS} thresholds"
    return "\n".join([*lines, "", f"{areas}; {dice}."])


if __name__ == "__main__":
    main()
