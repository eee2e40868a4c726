"""Every accuracy number that madad states: all methods, one protocol, one table, with intervals.

    python -m benchmarks.evidence --data DIR --protocol s2 --methods all --seeds 3 --budget 4m --out runs/s2
    python -m benchmarks.evidence --data DIR --protocol s2 --ablate --seeds 3 --budget 4m --out runs/s2
    python -m benchmarks.evidence --quick --out runs/quick

With ``--budget`` each method gets the same time to train, without it the steps of its size, and networks of
one size (`benchmarks.methods`); who is trained on and tested is in `benchmarks.protocols`. ``--out`` gets
``results.json``, ``table.md``, a precision-recall figure, a figure of Dice against lesion size and a page of
examples; ``--ablate`` writes ``ablation.json`` and ``ablation.md`` there. The same call goes on where an
interrupted one was.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import platform
import sys
import time
import warnings
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.ndimage import median_filter
from sklearn.utils import Bunch

from benchmarks.figures import draw_examples, draw_precision_recall, draw_sizes
from benchmarks.methods import (
    INFERENCE_ABLATIONS,
    METHODS,
    NOT_FOR_PAPER,
    QUICK_METHODS,
    SIZES,
    TRAINING_ABLATIONS,
    Conditions,
    Method,
)
from benchmarks.protocols import Protocol, load_protocol, quick_protocol, take
from benchmarks.tables import (
    OURS,
    PAPERS,
    PUBLISHED,
    ablation_table,
    compare_pairs,
    measured,
    summarise,
    table,
    write_text,
)
from madad import MaskedDiffusionAnomalyDetector, __version__
from madad._runtime.hashing import content_hash
from madad.base.map_detector import AnomalyMapDetector
from madad.maps.pooling import healthy_threshold
from madad.presets import PRESETS
from madad.training import TrainingStoppedWarning

N_SHOWN = 4
QUICK_STEPS, QUICK_SEEDS = 400, 5


def main(arguments: list[str] | None = None) -> None:
    """Fit what is not there yet, evaluate, print and write."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    # A signal lets a training end in good order; what it ended with is no result.
    warnings.simplefilter("error", TrainingStoppedWarning)
    if options.quick:
        protocol = quick_protocol()
    else:
        sizes = {"tiny": 64, "small": 128, "paper": 256}
        protocol = load_protocol(
            options.protocol,
            options.data,
            contrast=options.contrast,
            size=sizes[options.size],
            validation=options.validation,
        )
    print(json.dumps(protocol.description))
    if options.ablate:
        ablate(options, protocol)
    else:
        compare(options, protocol)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with the cohorts; see benchmarks/protocols.py")
    parser.add_argument("--protocol", choices=("s1", "s2", "volume"), default="s2")
    parser.add_argument("--contrast", help="T1 for s1, FLAIR for the others, unless given")
    parser.add_argument(
        "--methods", nargs="+", default=["all"], help="all, or some by name; with --ablate rows"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted from 0")
    parser.add_argument(
        "--budget", type=seconds_of, help="time to train each: 90s, 30m, 2h; none: the size's steps"
    )
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="of --budget; cpu: where other jobs run too"
    )
    parser.add_argument("--size", choices=SIZES, default="small", help="of the networks")
    parser.add_argument("--precision", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ablate", action="store_true", help="rows of our method instead of the methods")
    parser.add_argument("--quick", action="store_true", help="generated slices, a few minutes in all")
    parser.add_argument("--validation", action="store_true", help="test on validation subjects")
    parser.add_argument(
        "--median", type=int, default=0, metavar="N", help="median filter of the maps, in pixels"
    )
    parser.add_argument(
        "--min-component",
        type=int,
        default=0,
        metavar="N",
        help="remove components of fewer pixels",
    )
    options = parser.parse_args(arguments)
    options.steps = None
    if options.quick:
        if options.ablate:
            parser.error("--quick must go without --ablate. Give --data to ablate.")
        options.size, options.budget, options.steps, options.seeds = "small", None, QUICK_STEPS, QUICK_SEEDS
    elif options.data is None:
        parser.error("--data must name the folder with the cohorts; only --quick goes without.")
    known = QUICK_METHODS if options.quick else TRAINING_ABLATIONS if options.ablate else METHODS
    if options.methods == ["all"]:
        options.methods = list(known)
    if unknown := set(options.methods) - set(known):
        parser.error(f"--methods must be all or among {sorted(known)}, got {sorted(unknown)}.")
    if options.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {options.seeds}.")
    options.known = known
    return options


def seconds_of(text: str) -> float:
    """Seconds of a time such as 90s, 30m or 2h."""
    try:
        seconds = float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]
    except (ValueError, KeyError, IndexError):
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a time such as 90s, 30m or 2h, got {text!r}")
    return seconds


def compare(options: argparse.Namespace, protocol: Protocol) -> None:
    """The table of methods, with its figures."""
    cells = {
        name: [fitted(options, protocol, name, options.known[name], seed) for seed in range(options.seeds)]
        for name in options.methods
    }
    methods = {
        name: summarise(protocol, [cell.result for cell in of_name]) for name, of_name in cells.items()
    }
    if OURS in methods:
        compare_pairs(protocol, methods)
    report = {"methods": methods} | circumstances(options, protocol)
    write_text(options.out / "results.json", json.dumps(report, indent=1) + "\n")
    write_text(options.out / "table.md", table(methods) + "\n")
    print(table(methods))
    maps = {name: [cell.maps for cell in of_name] for name, of_name in cells.items()}
    draw_precision_recall(options.out / "precision-recall.png", protocol.test, maps)
    if not protocol.by_volume:
        draw_sizes(options.out / "dice-by-size.png", protocol.test, methods)
    restored = {name: of_name[0].restored for name, of_name in cells.items()}
    shown = shown_rows(protocol.test)
    first = {name: of_name[0][shown] for name, of_name in maps.items()}
    draw_examples(options.out / "examples.png", protocol.test, shown, restored, first)


def ablate(options: argparse.Namespace, protocol: Protocol) -> None:
    """The table of what each part of our method is worth, beside the paper's own rows."""
    rows: dict[str, dict[str, dict]] = {"defaults": {}}
    for base in (OURS, PAPERS):
        results: dict[str, list[dict]] = {}
        for seed in range(options.seeds):
            for name, result in inference_rows(options, protocol, base, seed).items():
                results.setdefault(name, []).append(result)
        for name, of_seeds in results.items():
            rows.setdefault(name, {})[base] = summarise(protocol, of_seeds)
    for name in options.methods:
        method = TRAINING_ABLATIONS[name]
        cells = [fitted(options, protocol, name, method, seed).result for seed in range(options.seeds)]
        rows[name] = {OURS: summarise(protocol, cells)}
    report = {"rows": rows, "published_s2_average": PUBLISHED} | circumstances(options, protocol)
    write_text(options.out / "ablation.json", json.dumps(report, indent=1) + "\n")
    write_text(options.out / "ablation.md", ablation_table(rows) + "\n")
    print(ablation_table(rows))


def fitted(options: argparse.Namespace, protocol: Protocol, name: str, method: Method, seed: int) -> Bunch:
    """Result, maps and shown restored slices of a method and a seed, from disk if they are there."""
    folder = options.out / "cells" / slug(name) / str(seed)
    conditions = Conditions(
        seed=seed,
        budget_s=options.budget,
        steps=options.steps,
        size=options.size,
        precision=options.precision,
        device=options.device,
        clock=options.clock,
    )
    wanted = identity(options, protocol, method(conditions))
    if (folder / "cell.json").is_file():
        cell = json.loads((folder / "cell.json").read_text())
        if cell["identity"] != wanted:
            raise SystemExit(
                f"--out must be new or hold cells of the same run, got {folder} of {cell['identity']}, "
                f"now {wanted}. Choose another directory."
            )
        with np.load(folder / "maps.npz", allow_pickle=False) as file:
            return Bunch(result=cell["result"], maps=file["maps"], restored=file["restored"], cell=cell)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = protocol.train, protocol.test
    detector = method(replace(conditions, checkpoints=options.out / "checkpoints"))
    start = time.monotonic()
    detector.fit(train.images, brain_mask=train.brain_masks, groups=train.subjects)
    fit_seconds = time.monotonic() - start
    start = time.monotonic()
    maps = detector.predict_maps(test.images, brain_mask=test.brain_masks)
    predict_seconds = time.monotonic() - start
    maps, threshold = finished(options, protocol, detector, maps, detector.calibration_rows_)
    shown, restored = shown_rows(test), np.empty(0)
    if hasattr(detector, "restore"):
        restored = detector.restore(test.images[shown], brain_mask=test.brain_masks[shown])
    detector.save(folder / "model")
    result = measured(protocol, maps, threshold) | {
        "seed": seed,
        "fit_seconds": fit_seconds,
        "predict_seconds": predict_seconds,
        "training": training_of(detector),
    }
    cell = {
        "identity": wanted,
        "calibration_rows": detector.calibration_rows_.tolist(),
        "result": result,
    }
    np.savez_compressed(folder / "maps.npz.partial.npz", maps=maps, restored=restored)
    os.replace(folder / "maps.npz.partial.npz", folder / "maps.npz")
    write_text(folder / "cell.json", json.dumps(cell, indent=1) + "\n")
    dice = result["max_dice_per_image"]
    print(f"{name}, seed {seed}: {dice:.3f} per image, {fit_seconds:.0f} s", flush=True)
    return Bunch(result=result, maps=maps, restored=restored, cell=cell)


def inference_rows(options: argparse.Namespace, protocol: Protocol, base: str, seed: int) -> dict[str, dict]:
    """What each inference parameter changes, with one training; thresholds are calibrated for each."""
    cell = fitted(options, protocol, base, METHODS[base], seed).cell
    folder = options.out / "cells" / slug(base) / str(seed)
    path, wanted = folder / "rows.json", content_hash((cell, INFERENCE_ABLATIONS))
    if path.is_file() and (kept := json.loads(path.read_text()))["identity"] == wanted:
        return kept["rows"]
    train, test, held_out = protocol.train, protocol.test, np.array(cell["calibration_rows"])
    rows = {"defaults": cell["result"]}
    for name, parameters in INFERENCE_ABLATIONS.items():
        if base == PAPERS and name in NOT_FOR_PAPER:
            continue
        detector = MaskedDiffusionAnomalyDetector.load(folder / "model")
        detector.set_params(device=options.device, **parameters)
        detector.calibrate(train.images[held_out], brain_mask=train.brain_masks[held_out])
        maps = detector.predict_maps(test.images, brain_mask=test.brain_masks)
        maps, threshold = finished(options, protocol, detector, maps, held_out)
        rows[name] = measured(protocol, maps, threshold) | {"seed": seed}
    write_text(path, json.dumps({"identity": wanted, "rows": rows}) + "\n")
    return rows


def finished(
    options: argparse.Namespace,
    protocol: Protocol,
    detector: AnomalyMapDetector,
    maps: np.ndarray,
    held_out: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Test maps with the filters that were asked for, and the threshold that belongs to them."""
    if not options.median and not options.min_component:
        return maps, detector.map_threshold_
    filters = {"median": options.median, "min_component": options.min_component}
    maps = filtered(maps, protocol.test.subjects if protocol.by_volume else None, **filters)
    healthy = take(protocol.train, held_out)
    calm = detector.predict_maps(healthy.images, brain_mask=healthy.brain_masks)
    calm = filtered(calm, healthy.subjects if protocol.by_volume else None, **filters)
    return maps, healthy_threshold(calm[healthy.brain_masks], detector.pixel_specificity)


def filtered(maps: np.ndarray, subjects: np.ndarray | None, *, median: int, min_component: int) -> np.ndarray:
    """Maps after a median filter and without small components, across the slices of each subject if given.

    Components are removed at every threshold at once (an opening by area).
    """
    groups = [np.array([row]) for row in range(len(maps))]
    if subjects is not None:
        groups = [np.flatnonzero(subjects == subject) for subject in np.unique(subjects)]
    maps = maps.copy()
    for rows in groups:
        if median:
            maps[rows] = median_filter(maps[rows], (1 if subjects is None else median, median, median))
        if min_component:
            # scikit-image fails on arrays of one or two slices: empty ones around them change nothing
            padded = np.pad(maps[rows], ((1, 1), (0, 0), (0, 0)))
            maps[rows] = _area_opening()(padded, min_component)[1:-1]
    return maps


def _area_opening():
    try:
        from skimage.morphology import area_opening
    except ImportError as error:
        raise ImportError(
            "scikit-image must be installed for --min-component, got no such package. "
            'Run: pip install "madad[report]"'
        ) from error
    return area_opening


def training_of(detector: AnomalyMapDetector) -> dict:
    """How long the networks were trained: steps and final loss of each stage, as far as there are any."""
    stages = {"autoencoder": getattr(detector, "autoencoder_", None), "denoiser": detector}
    histories = {name: getattr(stage, "history_", None) for name, stage in stages.items()}
    return {
        name: {"steps": history[-1]["step"], "loss": history[-1]["loss"]}
        for name, history in histories.items()
        if history
    }


def shown_rows(test: Bunch) -> np.ndarray:
    """Slices for the page of examples, over the range of lesion sizes."""
    area = test.lesion_masks.sum(axis=(1, 2))
    order = np.argsort(area, kind="stable")[np.sort(area) > 0]
    return order[(np.linspace(0.15, 0.95, N_SHOWN) * (len(order) - 1)).round().astype(int)]


def identity(options: argparse.Namespace, protocol: Protocol, detector: AnomalyMapDetector) -> dict:
    """What a cell depends on; parameters that are None stand for the presets' values."""
    names = ("budget", "clock", "steps", "size", "precision", "median", "min_component")
    return protocol.description | {
        **{name: getattr(options, name) for name in names},
        "slices": content_hash((protocol.train, protocol.test)),
        "detector": content_hash((type(detector).__name__, detector.get_params())),
        "defaults": content_hash((PRESETS, inspect.getsource(sys.modules[type(detector).__module__]))),
        "version": __version__,
    }


def circumstances(options: argparse.Namespace, protocol: Protocol) -> dict:
    """Data, conditions and versions, for the reports."""
    packages = ("torch", "scikit-learn", "numpy", "scipy")
    return {
        "data": protocol.description,
        "conditions": {
            "seconds_to_train_each": options.budget,
            "clock": options.clock,
            "size": options.size,
            "precision": options.precision,
            "seeds": list(range(options.seeds)),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": date.today().isoformat(),
        },
        "versions": {"madad": __version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
    }


def slug(name: str) -> str:
    """A folder's name."""
    return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in name.lower())


if __name__ == "__main__":
    main()
