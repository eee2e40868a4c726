"""The state of a training: its optimisers, its memory, and that it goes on bitwise after an interruption."""

import contextlib
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tasks import (
    HERE,
    Clock,
    Interruption,
    N,
    everything,
    interrupt,
    line,
    own_line,
    same,
    squared_error,
    train,
    weights,
)

import madad.training.loop
import madad.training.trainer
from madad.training import Trainer


def test_a_rival_is_trained_by_adamw_with_its_own_betas_and_the_same_rates():
    rival, by_hand = line(), line()
    trainer = Trainer(8, learning_rate=0.05, gradient_clip=math.inf, weight_decay=0.1)
    _, history = train(trainer, rival=rival, rival_loss=own_line)
    optimiser = torch.optim.AdamW(by_hand.parameters(), lr=0.05, betas=(0.5, 0.9), weight_decay=0.1)
    for record in history:
        value, _ = squared_error(by_hand, torch.arange(N), None, 0)
        assert record["rival_loss"] == pytest.approx(value.item(), rel=1e-5)
        optimiser.param_groups[0]["lr"] = record["learning_rate"]
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    np.testing.assert_allclose(weights(rival), weights(by_hand), rtol=1e-4)
    assert not rival.training and rival.weight.any()


def test_peak_memory_is_that_of_the_process_or_unknown(monkeypatch):
    _, history = train(Trainer(1))
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
        assert 0.9 * peak < history[0]["peak_memory_mib"] < 100 * peak
    monkeypatch.setitem(sys.modules, "resource", None)
    assert train(Trainer(1))[1][0]["peak_memory_mib"] is None


# Interrupted runs


def test_everything_changes_and_the_best_is_not_the_last(uninterrupted):
    _, history = uninterrupted
    assert [record["step"] for record in history] == [3, 4, 6, 8, 9, 12, 15, 16]
    assert not history[-1].get("best") and sum(record.get("best", False) for record in history) == 1
    assert {"loss", "term", "half", "plain", "rival_loss", "real"} < set(history[0])


@pytest.mark.parametrize(
    "at, every",
    [((0,), 0), ((1,), 4), ((3,), 1e9), ((5,), 0), ((8,), 4), ((15,), 4), ((2, 3, 10), 0)],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, monkeypatch, uninterrupted, at, every):
    monkeypatch.setattr(madad.training.loop, "time", Clock(1.0))
    for step in at:
        with pytest.raises(Interruption):
            everything(tmp_path, at=[step], happens=interrupt, checkpoint_every_s=every)
    seen = []
    assert same(everything(tmp_path, seen, checkpoint_every_s=every), uninterrupted)
    first = {0: at[-1], 1e9: 0}.get(every, seen[0])
    assert seen == list(range(first, 16)) and first <= at[-1]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    "at, options",
    [
        (5, {"ema_decay": 0.0}),
        (10, {"precision": "bfloat16"}),
        (5, {"patience": 1}),
        (5, {"patience": 2}),
        (10, {"channels_last": True}),
    ],
)
def test_other_settings_resume_as_well(tmp_path, options, at):
    expected = everything(None, **options)
    with contextlib.suppress(Interruption):  # patience may come first
        everything(tmp_path, at=[at], happens=interrupt, **options)
    assert same(everything(tmp_path, **options), expected)


KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("tasks", sys.argv[1])
tasks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tasks)
tasks.everything(sys.argv[2], at=[int(sys.argv[3])], happens=lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_killed_by_force_is_resumed_bitwise(tmp_path, uninterrupted):
    package = Path(madad.training.trainer.__file__).parents[2]
    command = [sys.executable, "-c", KILLED, HERE, str(tmp_path), "10"]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    seen = []
    assert same(everything(tmp_path, seen), uninterrupted) and seen == list(range(10, 16))


def test_the_clock_goes_on_where_an_interrupted_run_was(tmp_path, monkeypatch):
    def run(directory, seen, **options):
        monkeypatch.setattr(madad.training.loop, "time", Clock(1.0))
        everything(directory, seen, max_time=40, max_epochs=math.inf, patience=math.inf, **options)

    whole, first, rest = [], [], []
    run(None, whole)
    with pytest.raises(Interruption):
        run(tmp_path, first, at=[10], happens=interrupt)
    run(tmp_path, rest)
    assert rest[0] == 10 and abs(rest[-1] - whole[-1]) <= 2


def test_resume_false_starts_anew_and_overwrites(tmp_path, uninterrupted):
    with pytest.raises(Interruption):
        everything(tmp_path, at=[9], happens=interrupt)
    seen = []
    assert same(everything(tmp_path, seen, resume=False), uninterrupted)
    assert seen == list(range(16)) and len(list(tmp_path.iterdir())) == 1


# Finished runs


def test_a_finished_run_is_read_back_at_once(tmp_path, uninterrupted):
    assert same(everything(tmp_path), uninterrupted)
    (path,) = tmp_path.iterdir()
    before, seen = path.read_bytes(), []
    assert same(everything(tmp_path, seen), uninterrupted)
    assert seen == [] and path.read_bytes() == before


def test_a_run_that_a_callback_or_patience_ended_is_finished(tmp_path):
    for options in ({"callbacks": [lambda state: "stop"]}, {"patience": 1}):
        directory, seen = tmp_path / next(iter(options)), []
        first = everything(directory, **options)
        assert first[1][-1]["step"] < 16
        assert same(everything(directory, seen, **options), first) and seen == []
