"""Processes that work on one GPU: whichever comes second or later says so, and it alone."""

import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from madad._runtime import gpu_jobs
from madad.base import slice_estimator
from madad.testing import tiny_detector

ROOT = Path(__file__).parents[2]
# Only this module, without the rest of madad: a process takes a second or two. It lives until its input ends.
SCRIPT = """
import importlib.util, sys, warnings
spec = importlib.util.spec_from_file_location("jobs", sys.argv[1])
jobs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(jobs)
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    for gpu in sys.argv[2:]:
        jobs.warn_of_others(gpu, "cuda:" + gpu)
print(" | ".join(str(one.message) for one in found), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """``start(*gpus)``: a process that works on them; its first line of output is its warnings."""
    running = []

    def start_one(*gpus, folder=tmp_path):
        command = [sys.executable, "-c", SCRIPT, gpu_jobs.__file__, *gpus]
        environment = os.environ | {"TMPDIR": str(folder)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=environment, **pipes))
        return running[-1]

    yield start_one
    for process in running:
        process.kill()
        process.communicate()


def said(process):
    return process.stdout.readline().strip()


def killed(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_one_of_three_at_once_warns(start):
    texts = sorted(said(process) for process in [start("0") for _ in range(3)])
    assert texts[:2] == ["", ""]
    assert texts[2].startswith("device 'cuda:0' is shared by several processes.")
    assert "n_jobs=1" in texts[2] and "CUDA_VISIBLE_DEVICES" in texts[2]


def test_the_first_says_nothing_and_a_killed_one_counts_no_more(start):
    first, other = start("0"), start("1")
    assert [said(first), said(other)] == ["", ""]  # a GPU of its own for each
    second = start("0", "1", "0")
    assert said(second).count("is shared") == 2  # each GPU once
    killed(first)
    killed(second)
    assert said(start("0")) == ""
    assert "is shared" in said(start("0"))


def test_locks_that_cannot_be_had_stop_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_jobs, "_known", set())
    (tmp_path / "link.lock").write_text("of somebody else")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        gpu_jobs.warn_of_others("a", "cuda")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        for name in ("b", "b-warned"):
            (tmp_path / f"madad-{os.getuid()}-{name}.lock").symlink_to(tmp_path / "link.lock")
        gpu_jobs.warn_of_others("b", "cuda")
        monkeypatch.setattr(gpu_jobs, "fcntl", None)
        gpu_jobs.warn_of_others("c", "cuda")
    assert (tmp_path / "link.lock").read_text() == "of somebody else"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_gpu_is_told_by_its_uuid_and_a_cpu_is_shared_without_a_word(monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_jobs, "warn_of_others", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: type("Properties", (), {"uuid": f"u{device.index}"}),
    )
    gpu_jobs.warn_if_shared(torch.device("cpu"))
    gpu_jobs.warn_if_shared(torch.device("cuda", 1))
    assert asked == [("u1", torch.device("cuda", 1))]


def test_fit_and_prediction_ask(monkeypatch):
    asked = []
    monkeypatch.setattr(slice_estimator, "warn_if_shared", asked.append)
    X = np.random.default_rng(0).uniform(0.1, 1, (8, 16, 16))
    detector = tiny_detector(device="cpu").fit(X)
    assert asked and set(asked) == {torch.device("cpu")}
    asked.clear()
    detector.predict(X)
    assert asked == [torch.device("cpu")]
