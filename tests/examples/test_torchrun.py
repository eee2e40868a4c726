from pathlib import Path

import pytest

from madad import MaskedDiffusionAnomalyDetector

SCRIPT = Path(__file__).parents[2] / "examples" / "torchrun.py"


@pytest.mark.slow
def test_two_processes_print_once_and_leave_one_model(torchrun, tmp_path):
    small = ("--steps", 4, "--n-slices", 24, "--size", 32, "--out", tmp_path / "model")
    done = torchrun(SCRIPT, *small)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        *("autoencoder", "denoiser", "2 processes; model")
    ]
    model = MaskedDiffusionAnomalyDetector.load(tmp_path / "model")
    assert model.history_[-1]["step"] == 4 and model.trainer.max_steps == 4
