"""Workers of joblib and dask share the cores: together they have no more threads than there are cores."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import joblib

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
import joblib

def threads(seed):
    import numpy, torch  # by the workers alone
    from madad.testing import tiny_detector

    tiny_detector().fit(numpy.random.default_rng(seed).uniform(0.1, 1, (8, 16, 16)))
    return torch.get_num_threads()

def in_workers():
    return joblib.Parallel(n_jobs=2)(joblib.delayed(threads)(i) for i in range(4))

if __name__ == "__main__":
    print(*in_workers())
    if "dask" in sys.argv:
        from distributed import Client, LocalCluster
        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
            with Client(cluster), joblib.parallel_config(backend="dask"):
                print(*in_workers())
"""


def test_two_workers_have_no_more_threads_than_there_are_cores(tmp_path):
    backends = ["loky"] + ["dask"] * (importlib.util.find_spec("distributed") is not None)
    (tmp_path / "script.py").write_text(SCRIPT)
    chosen = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # left to the backend here
    environment = {name: value for name, value in os.environ.items() if name not in chosen}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error", tmp_path / "script.py", *backends]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    by_backend = [list(map(int, line.split())) for line in ran.stdout.splitlines()]
    assert len(by_backend) == len(backends)
    for found in by_backend:
        assert len(found) == 4 and 1 <= min(found) and max(found) <= max(1, joblib.cpu_count() // 2)
