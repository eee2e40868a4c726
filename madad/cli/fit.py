"""``madad fit``: train a model on preprocessed volumes of healthy people."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from madad._runtime.distributed import FirstFailedError, join
from madad._runtime.tensors import resolve_device
from madad.cli._cohort import add_output_arguments, is_preprocessed, progress
from madad.cli._output import positive_seconds
from madad.detector import MaskedDiffusionAnomalyDetector
from madad.mri import VolumePreprocessor, VolumeSlicer, read_volume
from madad.presets import PRESETS
from madad.saving.model_folder import refuse_foreign
from madad.training import Trainer, TrainingStoppedWarning
from madad.volumes.bids_derivative import Derivative
from madad.volumes.fitting import HealthyVolume, fit_volumes
from madad.volumes.model import VolumeModel
from madad.volumes.prepared_folder import PreprocessedFiles, find_preprocessed, read_preprocessed


def add_command(commands: argparse._SubParsersAction) -> None:
    """Add ``fit`` and its arguments."""
    parser = commands.add_parser(
        "fit",
        help="train a model on preprocessed volumes of healthy people",
        description="DATA is what madad preprocess wrote. MODEL becomes a directory with the networks, the "
        "thresholds and a model card. Slices with expert lesion mask are left out. On several GPUs: torchrun "
        "--nproc-per-node N -m madad fit DATA MODEL. N processes, which must see the same files, then train "
        "together; a batch is shared between them.",
    )
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--preset", default="auto", choices=("auto", *PRESETS))
    parser.add_argument(
        "--contrasts", nargs="+", metavar="T1", help="the channels; needed if DATA has several"
    )
    slices = parser.add_argument_group("slices")
    slices.add_argument("--plane", default="axial", choices=("axial", "coronal", "sagittal"))
    slices.add_argument("--spacing-mm", type=float, default=1.0, help="edge of a pixel (default: 1)")
    slices.add_argument("--slice-mm", type=float, help="distance between slices (default: the volume's own)")
    slices.add_argument(
        "--range-mm", type=float, nargs=2, metavar=("LOW", "HIGH"), help="which slices, in mm of the template"
    )
    volumes = parser.add_argument_group("volumes")
    volumes.add_argument(
        "--median-slices", type=int, default=1, help="median over so many neighbouring slices"
    )
    volumes.add_argument("--smoothing-mm", type=float, default=0.0, help="Gaussian across slices")
    volumes.add_argument("--min-volume-ml", type=float, default=0.0, help="leave smaller components out")
    training = parser.add_argument_group("training")
    training.add_argument(
        "--max-time", type=positive_seconds, metavar="S", help="train for at most so many seconds"
    )
    training.add_argument("--precision", help="float32 or bfloat16")
    training.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--resume", action="store_true", help="go on where an interrupted run ended")
    training.add_argument("--overwrite", action="store_true", help="replace MODEL, forget an interrupted run")
    add_output_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train, calibrate, and write model and card; of torchrun's processes the first checks and writes."""
    team = join(resolve_device(options.device))
    try:
        folder, files, contrasts, work = team.first(lambda: _prepared(options))
        with warnings.catch_warnings():
            warnings.simplefilter("error", TrainingStoppedWarning)
            model = _fit(options, folder, files, contrasts, work)
    except TrainingStoppedWarning:
        if team.is_first:
            print("madad: interrupted; the same command with --resume goes on.", file=sys.stderr)
        return 130
    except FirstFailedError:  # it says why
        return 2
    if team.is_first:
        model.save(options.model)
        shutil.rmtree(work)
        _report(options, model)
    return 0


def _prepared(
    options: argparse.Namespace,
) -> tuple[Derivative, list[PreprocessedFiles], list[str], Path]:
    """What is trained on, and where; raises an error before anything is done where MODEL or DATA is wrong."""
    refuse_foreign(options.model)
    if options.model.exists() and any(options.model.iterdir()) and not options.overwrite:
        raise FileExistsError(
            f"MODEL must be new, got {options.model}, which holds a model. Choose another name, or give "
            "--overwrite."
        )
    if not is_preprocessed([options.data]):
        raise ValueError(
            f"DATA must be a folder that madad preprocess wrote, got {options.data}. "
            f"Run: madad preprocess {options.data} PREPARED"
        )
    folder = Derivative(options.data)
    files = find_preprocessed(folder)
    contrasts = _contrasts(options.contrasts, files)
    return folder, files, contrasts, _work_folder(options)


def _fit(
    options: argparse.Namespace,
    folder: Derivative,
    files: Sequence[PreprocessedFiles],
    contrasts: Sequence[str],
    work: Path,
) -> VolumeModel:
    return fit_volumes(
        _detector(options, work / "checkpoints"),
        [one.scan.subject for one in files],
        lambda i: _read(folder, files[i], contrasts),
        contrasts=contrasts,
        preprocessor=VolumePreprocessor(**folder.description()["madad"]["parameters"]),
        slicer=VolumeSlicer(
            options.plane,
            spacing_mm=options.spacing_mm,
            slice_mm=options.slice_mm,
            range_mm=options.range_mm and tuple(options.range_mm),
        ),
        aggregation={
            "median_slices": options.median_slices,
            "smoothing_mm": options.smoothing_mm,
            "min_volume_ml": options.min_volume_ml,
        },
        data={"folder": os.fspath(options.data), "seed": options.seed},
        scratch=work,
        progress=lambda indices, what: progress(indices, what, options),
    )


def _contrasts(wanted: Sequence[str] | None, files: Sequence[PreprocessedFiles]) -> list[str]:
    """The channels: what was asked for, or the one contrast that there is."""
    found = list(dict.fromkeys(name for one in files for name in one.sidecars))
    if wanted is None and len(found) > 1:
        raise ValueError(f"--contrasts must be given where DATA has several, got {found}. Choose of these.")
    wanted = found if wanted is None else [name.upper().removesuffix("W") for name in wanted]
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"--contrasts must differ, got {wanted}. Name each once.")
    lacking = [one.scan.subject for one in files if not set(wanted) <= set(one.sidecars)]
    if lacking:
        raise ValueError(
            f"--contrasts must be there for each subject, got {wanted}, which {len(lacking)} lack: "
            f"{lacking[:5]}. Leave them out of DATA, or choose other contrasts."
        )
    return wanted


def _work_folder(options: argparse.Namespace) -> Path:
    """Where checkpoints and slices are until the model is written: beside it, hidden."""
    work = options.model.parent / f".{options.model.name}-fit"
    if work.exists() and options.overwrite and not options.resume:
        shutil.rmtree(work)
    if any(work.glob("checkpoints/*")) and not options.resume:
        raise FileExistsError(
            f"MODEL must not have an interrupted run, got {work}. Give --resume to go on with it, or "
            "--overwrite to start anew."
        )
    work.mkdir(parents=True, exist_ok=True)
    for stale in work.glob("slices-*"):
        shutil.rmtree(stale)
    return work


def _detector(options: argparse.Namespace, checkpoints: Path) -> MaskedDiffusionAnomalyDetector:
    return MaskedDiffusionAnomalyDetector(
        options.preset,
        trainer=Trainer(checkpoint_dir=checkpoints, precision=options.precision),
        max_time=options.max_time,
        device=options.device,
        random_state=options.seed,
        verbose=not (options.quiet or options.json),
    )


def _read(folder: Derivative, files: PreprocessedFiles, contrasts: Sequence[str]) -> HealthyVolume:
    volumes = read_preprocessed(folder, files, contrasts, needs_source=False)
    mask = files.scan.lesion_mask
    return HealthyVolume(volumes, None if mask is None else read_volume(mask).values > 0)


def _report(options: argparse.Namespace, model: VolumeModel) -> None:
    facts = {
        "model": os.fspath(options.model),
        "shape": list(model.detector.image_shape_),
        "threshold": model.threshold,
        "offset": model.offset,
        **model.card.data,
    }
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    print(
        f"{facts['slices']} slices of {facts['subjects']} subjects, {' x '.join(map(str, facts['shape']))}; "
        f"{facts['slices_with_lesion_left_out']} with lesion left out. Model and card: {options.model}/"
    )
    if facts["held_out_volumes"] * (1 - model.detector.image_specificity) < 1:
        print(
            f"Volumes held out for the thresholds: {facts['held_out_volumes']}. The offset of volumes is "
            "their lowest score.",
            file=sys.stderr,
        )
