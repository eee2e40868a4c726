"""The example as users run it, in a process of its own, in which every warning is an error."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("distributed", reason='distributed is missing: pip install "madad[dask]"')
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "dask_cluster.py"
SECONDS = 300  # that it may not take


def test_two_workers_give_the_numbers_of_one_process_though_one_is_killed():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, "--kill"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "All numbers are the same." in ran.stdout and "40 different ones" in ran.stdout
    assert "search of 8 candidates on the cluster" in ran.stdout
    (killed,) = re.findall(r"worker (\d+) was killed", ran.stdout)
    loaded = re.findall(r"worker (\d+) loaded the model", ran.stdout)
    assert len(loaded) == len(set(loaded)) == 3  # two workers, and the one in place of the killed one
    assert killed in loaded[:2]
    assert "Traceback" not in ran.stderr


def test_no_process_here_is_killed_for_a_worker_elsewhere(capsys):
    spec = importlib.util.spec_from_file_location("examples_dask_cluster", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with pytest.raises(SystemExit):
        example.main(["--kill", "--scheduler", "tcp://far-away:8786"])
    assert "--kill must be given without --scheduler" in capsys.readouterr().err
