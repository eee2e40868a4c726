"""What each term of the autoencoder's loss is worth: to its reconstructions and to what MAD-AD finds with it.

Same data, steps and seeds for every row; all on validation subjects, so that the default can be chosen by it.

``flair``: low-grade glioma FLAIR; healthy = lesion-free slices of the validation subjects; lesions = each
one's slice with the largest lesion. ``t1``: IXI T1 at 2 mm; eight held-out subjects, every fifth slice, as
they are and with a lesion painted in.

    python -m benchmarks.autoencoder --contrast flair --data DIR --out runs/ae-flair
    python -m benchmarks.autoencoder --contrast t1 --data DIR --out runs/ae-t1
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
from sklearn.frozen import FrozenEstimator
from sklearn.utils import Bunch

from benchmarks.protocols import NPZ, at_levels, cropped_to_brains, load_protocol, take
from benchmarks.tables import write_text
from madad import LatentAutoencoder, MaskedDiffusionAnomalyDetector, Trainer, __version__
from madad._runtime.hashing import content_hash
from madad.datasets import load_slices
from madad.datasets.painted_lesions import paint_lesion
from madad.metrics import auprc, max_dice_per_image, max_dice_pooled
from madad.presets import PRESETS

ROWS: dict[str, dict] = {
    "L1": {"structure_weight": 0.0},
    "L1 + structure": {},
    "L1 + structure + perceptual": {"perceptual": "efficientnet-lite0"},
    "L1 + structure + perceptual + adversarial": {
        "perceptual": "efficientnet-lite0",
        "adversarial_weight": 0.1,
    },
}
QUALITY = ("mae", "psnr", "ssim", "high_frequency_ratio")
FOUND = ("max_dice_per_image", "max_dice_pooled", "auprc")
SIZE = "fast-f4"  # small and quick to train, for both contrasts
N_T1_SUBJECTS, PAINTED_RADII_PX = 8, (3.0, 13.0)


def main() -> None:
    """Train what is not there yet, print the table, write ``results.json``."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    train, healthy, test = {"flair": flair, "t1": t1}[options.contrast](options)
    print(
        f"{options.contrast}: {len(train.images)} slices to train on, {len(healthy.images)} healthy and "
        f"{len(test.images)} lesioned ones of {len(np.unique(test.subjects))} other subjects, "
        f"{train.images.shape[1]} x {train.images.shape[2]} px"
    )
    settings = {
        "contrast": options.contrast,
        "steps": [options.autoencoder_steps, options.denoiser_steps],
        "precision": options.precision,
        "slices": content_hash((train, healthy, test)),
        "defaults": content_hash((__version__, PRESETS)),
    }
    rows: dict[str, list[dict]] = {name: [] for name in ROWS}
    for seed in options.seeds:
        for name, terms in ROWS.items():
            path = options.out / f"{name.replace(' ', '').replace('+', '-')}-{seed}.json"
            if not path.exists():
                result = measure(options, terms, seed, train, healthy, test)
                write_text(path, json.dumps({"settings": settings, "result": result}))
            cell = json.loads(path.read_text())
            if cell["settings"] != settings:
                raise SystemExit(
                    f"--out must be new or hold cells of the same run, got {path} of {cell['settings']}, now "
                    f"{settings}. Choose another directory."
                )
            rows[name].append(cell["result"])
    report = {
        "contrast": options.contrast,
        "data": options.data.name,
        "seeds": options.seeds,
        "steps": [options.autoencoder_steps, options.denoiser_steps],
        "precision": options.precision,
        "rows": rows,
        "version": __version__,
    }
    write_text(options.out / "results.json", json.dumps(report, indent=1) + "\n")
    print(table(rows))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--contrast", choices=("flair", "t1"), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--autoencoder-steps", type=int, default=300)
    parser.add_argument("--denoiser-steps", type=int, default=700)
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    return parser.parse_args()


def flair(options: argparse.Namespace) -> tuple[Bunch, Bunch, Bunch]:
    """Training slices, held-out healthy slices, and lesions, all of the validation split of s2."""
    lesions = load_protocol("s2", options.data, validation=True)
    volumes = load_protocol("volume", options.data, validation=True).test
    return lesions.train, take(volumes, volumes.lesion_masks.sum(axis=(1, 2)) == 0), lesions.test


def t1(options: argparse.Namespace) -> tuple[Bunch, Bunch, Bunch]:
    """IXI slices of most subjects; of eight others as they are, and with lesions painted in."""
    data = at_levels(load_slices(options.data / NPZ["s1"][0], spacing_mm=2.0, center="mode"))
    (data,) = cropped_to_brains(data)
    held_out = np.random.default_rng(0).permutation(np.unique(data.subjects))[:N_T1_SUBJECTS]
    is_held_out = np.isin(data.subjects, held_out)
    healthy = take(data, np.flatnonzero(is_held_out)[::5])
    return take(data, np.flatnonzero(~is_held_out)), healthy, painted(healthy)


def painted(healthy: Bunch) -> Bunch:
    """Each slice with one lesion of random size; slices too small for any are left out."""
    rng = np.random.default_rng(1)
    rows, images, masks = [], [], []
    for row, (image, brain) in enumerate(zip(healthy.images, healthy.brain_masks, strict=True)):
        radius = float(np.exp(rng.uniform(*np.log(PAINTED_RADII_PX))))
        try:
            lesioned, mask = paint_lesion(image, brain, rng, radius_px=radius, mass_effect=rng.random() < 0.5)
        except ValueError:  # the lesion does not fit into the brain
            continue
        rows.append(row)
        images.append(lesioned)
        masks.append(mask)
    kept = take(healthy, np.array(rows))
    kept.update(images=np.array(images), lesion_masks=np.array(masks))
    return kept


def measure(
    options: argparse.Namespace, terms: dict, seed: int, train: Bunch, healthy: Bunch, test: Bunch
) -> dict:
    """One cell: train both stages, report on the reconstructions and on the maps."""

    def trainer(steps: int, learning_rate: float, batch_size: int) -> Trainer:
        rest = {"batch_size": batch_size, "precision": options.precision}
        return Trainer(math.inf, max_steps=steps, learning_rate=learning_rate, **rest)

    start = time.monotonic()
    if "adversarial_weight" in terms:
        terms = terms | {"adversarial_start": options.autoencoder_steps // 4}
    autoencoder = LatentAutoencoder(
        SIZE, trainer=trainer(options.autoencoder_steps, 2e-3, 16), random_state=seed, **terms
    )
    autoencoder.fit(train.images, brain_mask=train.brain_masks)
    seconds = time.monotonic() - start
    detector = MaskedDiffusionAnomalyDetector(
        "small",
        autoencoder=FrozenEstimator(autoencoder),
        trainer=trainer(options.denoiser_steps, 1e-3, 16),
        random_state=seed,
    )
    detector.fit(train.images, brain_mask=train.brain_masks, groups=train.subjects)
    maps = detector.predict_maps(test.images, brain_mask=test.brain_masks)
    arrays = (test.lesion_masks, maps, test.brain_masks)
    quality = autoencoder.score_report(healthy.images, brain_mask=healthy.brain_masks)
    return quality | {
        "max_dice_per_image": max_dice_per_image(*arrays).dice,
        "max_dice_pooled": max_dice_pooled(*arrays).dice,
        "auprc": auprc(*arrays),
        "autoencoder_seconds": seconds,
        "seconds": time.monotonic() - start,
    }


def table(rows: dict[str, list[dict]]) -> str:
    """Markdown: mean over seeds, and each seed's Dice."""
    names = (*QUALITY, *FOUND)
    lines = ["| loss | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for name, cells in rows.items():
        values = [f"{np.mean([cell[key] for cell in cells]):.{1 if key == 'psnr' else 3}f}" for key in names]
        index = names.index("max_dice_per_image")
        values[index] += " (" + ", ".join(f"{cell['max_dice_per_image']:.3f}" for cell in cells) + ")"
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
