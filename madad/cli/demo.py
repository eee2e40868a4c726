"""``madad demo``: from data to a table, a picture and a saved model."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GroupShuffleSplit
from sklearn.utils import Bunch

from madad._runtime.files import write_json
from madad._runtime.version import __version__
from madad.baselines import TAILS, AutoencoderResidual, IntensityThreshold
from madad.cli._output import positive_seconds, table, timed, write_csv
from madad.datasets import load_slices, make_brain_slices
from madad.detector import MaskedDiffusionAnomalyDetector
from madad.maps.pooling import pool_map
from madad.metrics import evaluate_maps
from madad.plotting import require_matplotlib, summary_figure
from madad.saving.model_folder import refuse_foreign
from madad.stages.autoencoder import LatentAutoencoder
from madad.training import Trainer

N_TRAIN, N_TEST, N_SHOWN = 300, 60, 8
SLICES_PER_SUBJECT = 2
DEMO_STEPS = (200, 1200)  # of the autoencoder and of the denoiser
COLUMNS = ("auprc", "auroc", "max_dice_per_image", "max_dice_pooled", "calibrated_dice")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``demo`` and its arguments.

    Parameters
    ----------
    commands : argparse subparsers
        The commands of ``madad``, to which it is added.
    """
    demo = commands.add_parser(
        "demo",
        help="train on healthy slices, find lesions in others, compare with two baselines",
        description="Data, training, held-out evaluation and a picture in a few minutes. Writes summary.png, "
        "metrics.json, scores.csv and the saved model.",
    )
    demo.add_argument("--out", type=Path, default=Path("madad-demo"), help="directory to write to")
    demo.add_argument("--data", type=Path, help="an .npz file of slices instead of generated ones")
    demo.add_argument("--image", default="image", help="name of the image array in the .npz file")
    demo.add_argument("--size", type=int, default=64, help="height and width of the slices in pixels")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    demo.add_argument(
        "--max-time", type=positive_seconds, metavar="S", help="train for so many seconds, not so many steps"
    )
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, evaluate on held-out subjects, compare and write.

    Parameters
    ----------
    options : argparse.Namespace
        The arguments that `add_command` added.

    Returns
    -------
    int
        The exit status. 0: done.
    """
    refuse_foreign(options.out / "model")
    require_matplotlib()
    options.out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    with timed(seconds, "data"):
        train, test = _generated(options) if options.data is None else _from_file(options)
    n_lesions = int(test.lesion_masks.any(axis=(1, 2)).sum())
    print(
        f"{len(train.images)} healthy slices of {len(np.unique(train.subjects))} subjects to train on, "
        f"{len(test.images)} of {len(np.unique(test.subjects))} others to test on, {n_lesions} with a lesion."
    )

    if n_lesions == 0:
        raise ValueError(
            f"data must hold lesions in the held-out subjects, got none in {len(test.images)} slices. "
            f"Try another --seed."
        )
    detector = MaskedDiffusionAnomalyDetector(
        "small", device=options.device, random_state=options.seed, verbose=not options.quiet
    )
    detector.set_params(**_training(options.max_time))
    with timed(seconds, "fit"):
        detector.fit(train.images, brain_mask=train.brain_masks, groups=train.subjects)
    with timed(seconds, "predict"):
        maps = detector.predict_maps(test.images, brain_mask=test.brain_masks)
        restored = detector.restore(test.images, brain_mask=test.brain_masks)
        scores = -pool_map(maps, test.brain_masks)  # what score_samples would give, without another pass
    with timed(seconds, "evaluate"):
        methods = {"mad-ad": _evaluate(test, maps, detector.map_threshold_)}
        methods |= _baselines(detector, train, test)

    with timed(seconds, "write"):
        detector.save(options.out / "model")
        _write_scores(options.out / "scores.csv", test, scores, detector.offset_)
        _write_picture(options.out / "summary.png", test, maps, restored)
    report = {
        "methods": methods,
        "seconds": {stage: round(value, 2) for stage, value in seconds.items()},
        "data": "generated" if options.data is None else options.data.name,
        "n_train": len(train.images),
        "n_test": len(test.images),
        "n_test_with_lesion": n_lesions,
        "size": options.size,
        "seed": options.seed,
        "preset": detector.preset_,
        "brain_mask": "maps and truth are restricted to the brain mask",
        "version": __version__,
    }
    write_json(options.out / "metrics.json", report)
    print(table(methods, COLUMNS))
    print(f"\n{sum(seconds.values()):.0f} s; picture, metrics, scores and model are in {options.out}/")
    return 0


def _training(max_time: float | None) -> dict:
    """Both stages in minutes: by steps, so that a seed says it all, or by wall-clock time."""
    steps = DEMO_STEPS if max_time is None else (math.inf, math.inf)
    first, second = (Trainer(math.inf, max_steps=n, batch_size=16) for n in steps)
    return {"autoencoder": LatentAutoencoder(trainer=first), "trainer": second, "max_time": max_time}


def _generated(options: argparse.Namespace) -> tuple[Bunch, Bunch]:
    """Healthy slices to train on and others, half with lesions, of other subjects to test on."""
    shared = {"size": options.size, "slices_per_subject": SLICES_PER_SUBJECT}
    train = make_brain_slices(N_TRAIN, **shared, random_state=options.seed)
    test = make_brain_slices(N_TEST, **shared, lesions=0.5, random_state=options.seed + 1_000_000)
    test.subjects = np.char.add("test-", test.subjects)
    return train, test


def _from_file(options: argparse.Namespace) -> tuple[Bunch, Bunch]:
    """Split a file by subject: lesion-free slices of most to train on, of each other one the clearest two."""
    data = load_slices(options.data, image=options.image, size=options.size)
    if not data.has_lesion_masks:
        raise ValueError(
            f"data must hold lesion masks to evaluate on, got {options.data} without 'lesion_mask'. "
            f"Use the estimator in Python for data without masks."
        )
    splitter = GroupShuffleSplit(1, test_size=0.35, random_state=options.seed)
    kept, held_out = next(splitter.split(data.images, groups=data.subjects))
    area = data.lesion_masks.sum(axis=(1, 2))
    kept = kept[area[kept] == 0]
    chosen: list[int] = []
    for subject in np.unique(data.subjects[held_out]):
        rows = held_out[data.subjects[held_out] == subject]
        chosen.append(int(rows[area[rows].argmax()]))
        free = rows[area[rows] == 0]
        if len(free):
            chosen.append(int(free[data.brain_masks[free].sum(axis=(1, 2)).argmax()]))
    return _rows(data, kept), _rows(data, np.array(sorted(set(chosen))))


def _rows(data: Bunch, rows: np.ndarray) -> Bunch:
    names = ("images", "brain_masks", "lesion_masks", "subjects")
    return Bunch(**{name: data[name][rows] for name in names})


def _evaluate(test: Bunch, maps: np.ndarray, threshold: float) -> dict:
    return evaluate_maps(
        test.lesion_masks, maps, test.brain_masks, subjects=test.subjects, threshold=threshold
    )


def _baselines(detector: MaskedDiffusionAnomalyDetector, train: Bunch, test: Bunch) -> dict[str, dict]:
    """Both baselines on the same held-out slices; intensity has its better tail, in its favour."""
    shared = {"random_state": detector.random_state, "device": detector.device}
    residual = AutoencoderResidual(autoencoder=FrozenEstimator(detector.autoencoder_), **shared)
    of_tails = {tail: _baseline(IntensityThreshold(tail=tail, **shared), train, test) for tail in TAILS}
    best = max(of_tails, key=lambda tail: of_tails[tail]["auprc"])
    return {
        "intensity-threshold": of_tails[best] | {"tail": best},
        "autoencoder-residual": _baseline(residual, train, test),
    }


def _baseline(baseline: IntensityThreshold | AutoencoderResidual, train: Bunch, test: Bunch) -> dict:
    baseline.fit(train.images, brain_mask=train.brain_masks, groups=train.subjects)
    maps = baseline.predict_maps(test.images, brain_mask=test.brain_masks)
    return _evaluate(test, maps, baseline.map_threshold_)


def _write_picture(path: Path, test: Bunch, maps: np.ndarray, restored: np.ndarray) -> None:
    """Lesions over the range of sizes, and two slices without any."""
    area = test.lesion_masks.sum(axis=(1, 2))
    with_lesion = np.flatnonzero(area)[np.argsort(area[area > 0])]
    spread = np.linspace(0, len(with_lesion) - 1, min(N_SHOWN - 2, len(with_lesion))).round().astype(int)
    rows = np.concatenate([with_lesion[spread], np.flatnonzero(area == 0)[:2]])
    titles = [f"{test.subjects[row]}\n{area[row]} px" for row in rows]
    summary_figure(
        path,
        images=test.images[rows],
        restored=restored[rows],
        anomaly_maps=maps[rows],
        lesion_masks=test.lesion_masks[rows],
        titles=titles,
    )


def _write_scores(path: Path, test: Bunch, scores: np.ndarray, offset: float) -> None:
    rows = []
    for i, (subject, score) in enumerate(zip(test.subjects, scores, strict=True)):
        decision = score - offset
        row = [i, subject, f"{score:.6f}", f"{decision:.6f}", -1 if decision < 0 else 1]
        rows.append([*row, int(test.lesion_masks[i].sum())])
    write_csv(path, ["slice", "subject", "score", "decision", "prediction", "lesion_px"], rows)
