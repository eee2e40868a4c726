import contextlib
import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from madad.cli import fit, main
from madad.datasets import Scan
from madad.training import Trainer
from madad.training.loop import TrainingLoop
from madad.volumes.model import VolumeModel

ROOT = Path(__file__).parents[2]
INTERRUPTED = Path(__file__).parents[1] / "distributed" / "interrupted_fit.py"
TINY = ("--preset", "tiny", "--spacing-mm", "4", "--device", "cpu", "--quiet")


def write_commands(folder, commands):
    path = folder / "commands.json"
    path.write_text(json.dumps([list(map(str, command)) for command in commands]))
    return path


def maps_of(model, image):
    loaded = VolumeModel.load(model, "cpu")
    return loaded.predict(loaded.prepare(Scan("x", {"T1": image}))).anomaly_map


def test_card_tells_data_steps_thresholds_and_use(model, run):
    text = (model / "README.md").read_text()
    assert "For research use only" in text and "- contrasts: T1" in text and "- template: False" in text
    card = json.loads((model / "card.json").read_text())
    assert card["contrasts"] == ["T1"] and card["data"]["volumes"] == 5
    assert card["preprocessing"]["center"] == "median"
    assert card["slices"]["spacing_mm"] == [4.0, 4.0]
    assert card["volume_threshold"] > 0 and card["volume_offset"] < 0
    assert f"- threshold: {card['volume_threshold']:.6g}" in text
    status, printed, _ = run("info", model, "--json")
    assert status == 0 and json.loads(printed)["card"]["contrasts"] == ["T1"]


def test_data_must_be_preprocessed(run, healthy, tmp_path):
    status, _, errors = run("fit", healthy.parent, tmp_path / "model", *TINY)
    assert status == 2
    assert "madad preprocess" in errors and str(healthy.parent) in errors


def test_a_model_is_not_replaced_unasked(run, model, prepared, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    before = (copy / "denoiser.safetensors").read_bytes()
    status, _, errors = run("fit", prepared, copy, *TINY)
    assert status == 2 and "--overwrite" in errors
    assert (copy / "denoiser.safetensors").read_bytes() == before
    assert run("fit", prepared, copy, *TINY, "--overwrite", "--seed", "5")[0] == 0
    assert (copy / "denoiser.safetensors").read_bytes() != before


def test_the_same_seed_gives_the_same_model(run, model, prepared, tmp_path):
    assert run("fit", prepared, tmp_path / "again", *TINY)[0] == 0
    for name in ("autoencoder.safetensors", "denoiser.safetensors", "calibration.json", "card.json"):
        assert (tmp_path / "again" / name).read_bytes() == (model / name).read_bytes(), name


def test_an_interrupted_run_goes_on_by_resume_alone(run, model, prepared, healthy, tmp_path, monkeypatch):
    path = tmp_path / "model"
    fit_once = Trainer.optimise

    def interrupted(trainer, *arguments, **options):
        if options["description"] == "denoiser":
            raise OSError(5, "the machine went away")
        return fit_once(trainer, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "optimise", interrupted)
        assert run("fit", prepared, path, *TINY)[0] == 2
    assert not path.exists()
    assert list((tmp_path / ".model-fit" / "checkpoints").iterdir())
    status, _, errors = run("fit", prepared, path, *TINY)
    assert status == 2 and "--resume" in errors
    assert run("fit", prepared, path, *TINY, "--resume")[0] == 0
    assert not (tmp_path / ".model-fit").exists()
    image = healthy.parent / "h0.nii.gz"
    np.testing.assert_array_equal(maps_of(path, image), maps_of(model, image))


def killed(commands, tmp_path):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, INTERRUPTED, "SIGKILL", write_commands(tmp_path, commands)]
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, timeout=120)
    assert ran.returncode == -signal.SIGKILL


def stopped(commands, tmp_path):
    """By Ctrl-C, in this process."""
    step = TrainingLoop._step

    def interrupted(loop):
        if loop.plan.stage == "denoiser" and loop.run.step == 5:
            signal.raise_signal(signal.SIGINT)
        step(loop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_step", interrupted)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(word) for word in commands[0]])
    assert status == 130 and "--resume goes on" in err.getvalue()


@pytest.mark.parametrize("ended", [killed, stopped])
def test_killed_or_stopped_it_goes_on_by_resume(run, model, prepared, healthy, tmp_path, ended):
    path, work = tmp_path / "model", tmp_path / ".model-fit"
    ended([("fit", prepared, path, *TINY)], tmp_path)
    assert not path.exists() and list(work.glob("checkpoints/*"))
    status, _, errors = run("fit", prepared, path, *TINY)
    assert status == 2 and "--resume" in errors and not path.exists()
    assert run("fit", prepared, path, *TINY, "--resume")[0] == 0
    assert not work.exists()
    image = healthy.parent / "h0.nii.gz"
    np.testing.assert_array_equal(maps_of(path, image), maps_of(model, image))


def test_a_full_disk_leaves_no_half_model(run, model, prepared, tmp_path, monkeypatch, tree):
    path = tmp_path / "model"

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(VolumeModel, "save", full)
        status, _, errors = run("fit", prepared, path, *TINY)
    assert status == 2 and str(path) in errors and not path.exists()
    assert run("fit", prepared, path, *TINY, "--resume")[0] == 0
    again, before = tree(path), tree(model)
    for name in ("README.md", "config.json"):  # with names and with seconds
        assert again.pop(name) and before.pop(name)
    assert again == before


def test_after_an_error_before_the_training_the_same_command_begins(run, brain, save, tmp_path):
    raw, prepared, model = tmp_path / "raw", tmp_path / "prepared", tmp_path / "model"
    for i in range(3):
        save(raw / f"p{i}_T1.nii.gz", brain(i)[0])
        assert run("preprocess", raw, prepared, "--no-template", "--quiet")[0] == 0
        if i == 0:
            status, _, errors = run("fit", prepared, model, *TINY)
            assert status == 2 and "at least 2 healthy volumes" in errors
            assert not model.exists()
    assert run("fit", prepared, model, *TINY)[0] == 0


def test_a_refused_run_wants_no_resume(run, prepared, tmp_path):
    for _ in range(2):
        status, _, errors = run("fit", prepared, tmp_path / "model", *TINY, "--contrasts", "T2")
        assert status == 2 and "--contrasts must be there" in errors
    assert not list(tmp_path.iterdir())


def test_what_is_no_folder_of_volumes_is_refused(run, patients, model, tmp_path):
    maps = tmp_path / "maps"
    assert run("predict", model, patients, maps, "--quiet", "--shard", "1/3")[0] == 0
    for data in (maps, model, patients, tmp_path / "missing"):
        status, _, errors = run("fit", data, tmp_path / "model", *TINY)
        assert status == 2 and "DATA must be a folder that madad preprocess wrote" in errors
        assert str(data) in errors
    assert not (tmp_path / "model").exists()


def test_a_stopped_training_says_how_to_go_on(run, prepared, tmp_path, monkeypatch):
    def stopped(*arguments, **options):
        raise fit.TrainingStoppedWarning("stopped")

    monkeypatch.setattr(fit, "fit_volumes", stopped)
    status, _, errors = run("fit", prepared, tmp_path / "model", *TINY)
    assert status == 130 and "--resume" in errors


def test_time_and_precision_go_to_the_detector_and_the_rest_is_the_presets(
    run, prepared, tmp_path, monkeypatch
):
    seen = []

    def stopped(detector, *arguments, **options):
        seen.append(detector)
        raise fit.TrainingStoppedWarning("stopped")

    monkeypatch.setattr(fit, "fit_volumes", stopped)
    options = ("--resume", "--max-time", "60", "--precision", "bfloat16")
    run("fit", prepared, tmp_path / "model", *TINY, *options)
    run("fit", prepared, tmp_path / "model", *TINY, "--resume")
    checkpoints = tmp_path / ".model-fit" / "checkpoints"
    timed, plain = (
        Trainer(precision="bfloat16", checkpoint_dir=checkpoints),
        Trainer(checkpoint_dir=checkpoints),
    )
    for detector, max_time, trainer in zip(seen, (60.0, None), (timed, plain), strict=True):
        assert (detector.preset, detector.autoencoder, detector.max_time) == ("tiny", None, max_time)
        assert detector.trainer.get_params() == trainer.get_params()


@pytest.mark.parametrize("value", ["0", "-3", "inf", "nan", "long"])
def test_a_time_that_is_none_is_refused(value, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "prepared", "model", "--max-time", value])
    errors = capsys.readouterr().err
    assert "argument --max-time: " in errors and repr(value) in errors


def test_slices_with_lesion_are_left_out_and_counted(run, patients, healthy, tmp_path):
    out = tmp_path / "prepared"
    joined = tmp_path / "all.tsv"
    rows = patients.read_text().splitlines() + healthy.read_text().splitlines()[1:]
    joined.write_text("\n".join(rows) + "\n")
    assert run("preprocess", joined, out, "--no-template", "--quiet")[0] == 0
    status, printed, _ = run("fit", out, tmp_path / "model", *TINY[:-1], "--json")
    assert status == 0
    facts = json.loads(printed)
    assert facts["slices_with_lesion_left_out"] == 3 * 6  # planes 15 to 20 of three patients
    assert facts["subjects"] == 8


def test_which_contrasts_must_be_said(run, of_contrasts, tmp_path):
    table, model = of_contrasts
    prepared = table.parent / "prepared"
    status, _, errors = run("fit", prepared, tmp_path / "model", *TINY)
    assert status == 2 and "--contrasts" in errors and "['T1', 'T2', 'FLAIR']" in errors
    status, _, errors = run("fit", prepared, tmp_path / "model", *TINY, "--contrasts", "T1", "PD")
    assert status == 2 and "'PD'" in errors and "s0" in errors
    assert not (tmp_path / "model").exists()
    loaded = VolumeModel.load(model, "cpu")
    assert loaded.detector.image_shape_[0] == 3 and loaded.card.contrasts == ("T1", "T2", "FLAIR")


@pytest.mark.parametrize("plane", ["coronal", "sagittal"])
def test_other_planes(run, prepared, healthy, tmp_path, plane):
    model = tmp_path / "model"
    options = ("--plane", plane, "--median-slices", "3", "--min-volume-ml", "1")
    assert run("fit", prepared, model, *TINY, *options)[0] == 0
    card = json.loads((model / "card.json").read_text())
    assert card["slices"]["plane"] == plane
    assert card["aggregation"] == {"median_slices": 3, "smoothing_mm": 0.0, "min_volume_ml": 1.0}
    assert maps_of(model, healthy.parent / "h0.nii.gz").shape == (36, 44, 36)


@pytest.mark.slow
def test_processes_of_torchrun_train_together_and_go_on(torchrun, model, prepared, healthy, tmp_path, tree):
    refused = ("fit", healthy.parent, tmp_path / "refused", *TINY)
    whole = ("fit", prepared, tmp_path / "whole", *TINY[:-1], "--json")
    command = ("fit", prepared, tmp_path / "model", *TINY)
    commands = write_commands(tmp_path, [refused, whole, command])
    interrupted = torchrun(INTERRUPTED, "SIGTERM", commands)
    assert interrupted.returncode != 0, interrupted.stderr
    assert interrupted.stderr.count("--resume goes on") == 1, interrupted.stderr
    assert not (tmp_path / "model").exists()
    assert len(list((tmp_path / ".model-fit" / "checkpoints").iterdir())) == 2

    first, other = (json.loads((tmp_path / f"commands.{rank}.json").read_text()) for rank in range(2))
    assert [one["status"] for one in first + other] == [2, 0, 2, 0]
    assert first[0]["err"].count("madad preprocess wrote") == 1 and other[0]["err"] == ""  # one says it
    assert not list(tmp_path.glob("*refused*"))
    facts = json.loads(first[1]["out"])
    assert first[1]["err"] == other[1]["out"] == other[1]["err"] == ""
    assert facts["held_out_volumes"] == 1 and not (tmp_path / ".whole-fit").exists()
    both, alone = (VolumeModel.load(path, "cpu") for path in (tmp_path / "whole", model))
    scans = (Scan(f"h{i}", {"T1": healthy.parent / f"h{i}.nii.gz"}) for i in range(5))
    assert facts["offset"] in [both.predict(both.prepare(scan)).score for scan in scans]
    losses = ([record["loss"] for record in one.detector.history_] for one in (both, alone))
    np.testing.assert_allclose(*losses, rtol=0.15)

    resumed = torchrun("-m", "madad", *command[:-1], "--json", "--resume")
    assert resumed.returncode == 0 and resumed.stderr == "", resumed.stderr
    assert json.loads(resumed.stdout)["subjects"] == 5  # printed once
    again, before = tree(tmp_path / "model"), tree(tmp_path / "whole")
    for name in ("README.md", "config.json"):  # with names and with seconds
        assert again.pop(name) and before.pop(name)
    assert again == before
