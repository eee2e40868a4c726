"""Search parameters and score volumes on a dask cluster, with the numbers of one process.

Shown here: `GridSearchCV` whose fits run on the cluster through joblib, where ``memory`` trains each network
once; then 40 volumes scored by workers that load the model once each. Both are done a second time in this
process and compared. A worker that dies costs a retry, which ``--kill`` shows: dask starts another in its
place and gives what was lost to those that live. Run (needs the extra ``dask``)

    python examples/dask_cluster.py              # two workers on this machine, about a minute
    python examples/dask_cluster.py --kill       # one of them is killed while it scores

On a cluster of machines start ``dask scheduler`` on one and ``dask worker ADDRESS --nthreads 1 --nworkers N``
on the others, or let dask-jobqueue do it (SLURM, PBS, ...), and give ``--scheduler ADDRESS --shared FOLDER``,
a folder that all of them see. madad must be installed on all of them. A worker has one thread, because a
model judges one scan at a time, and one GPU: start one for each with its own ``CUDA_VISIBLE_DEVICES``. A task
is given up (``KilledWorker``) when more workers died at it than dask's setting
``distributed.scheduler.allowed-failures`` allows, 3 by default. Workers that come to a fold at the same time
may train the same network; all of them get the same one.

For data of your own replace `make_slices`, and `save_volumes` by the paths of your files, as `score` reads
them. Scans as they came are easier shared out by ``madad predict --shard i/N``, which needs no dask.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import joblib
import numpy as np
import torch
from distributed import Client, LocalCluster, WorkerPlugin, as_completed, get_worker
from sklearn.model_selection import GridSearchCV

from madad import MaskedDiffusionAnomalyDetector
from madad.datasets import make_brain_slices
from madad.metrics import max_dice_scorer
from madad.testing import tiny_detector

GRID = {"gamma": [0.1, 0.2, 0.4, 0.8], "mask_ratio": [0.2, 0.4]}  # inference and training: 8 candidates
SIZE, DEPTH, N_VOLUMES = 24, 4, 40


class ResidentModel(WorkerPlugin):
    """Loads the model when a worker starts, also one that takes the place of a dead one."""

    def __init__(self, path):
        self.path = path

    def setup(self, worker):
        """Called by dask, once for each worker."""
        worker.madad_model = MaskedDiffusionAnomalyDetector.load(self.path)
        print(f"worker {os.getpid()} loaded the model", flush=True)


def score(path):
    """Score of the volume in a file, by the worker's model; higher = more normal."""
    return score_with(get_worker().madad_model, path)


def score_with(model, path):
    """Score of the volume in a file: (C, D, H, W) becomes one sample."""
    return float(model.score_samples(np.load(path)[None])[0])


def make_slices():
    """Slices and lesion masks; 16 healthy ones, then 8 with lesions."""
    healthy = make_brain_slices(16, size=SIZE, random_state=0)
    patients = make_brain_slices(8, size=SIZE, lesions=1.0, random_state=1)
    return (np.concatenate([healthy[name], patients[name]]) for name in ("images", "lesion_masks"))


def save_volumes(folder, n):
    """One file for each volume of ``DEPTH`` slices, as a cohort has them."""
    made = make_brain_slices(n * DEPTH, size=SIZE, slices_per_subject=DEPTH, lesions=0.5, random_state=2)
    paths = [str(folder / f"volume-{i:02d}.npy") for i in range(n)]
    for path, volume in zip(paths, made.images.reshape(n, 1, DEPTH, SIZE, SIZE), strict=True):
        np.save(path, volume)
    return paths


def make_search(memory):
    """8 candidates in two folds: train on healthy slices, score on lesions."""
    detector = tiny_detector(anomaly_map="image", memory=str(memory))
    folds = [(np.arange(0, 12), np.arange(16, 24)), (np.arange(4, 16), np.arange(16, 24))]
    return GridSearchCV(detector, GRID, scoring=max_dice_scorer, cv=folds, refit=False)


def search_twice(folder):
    """Search on the active cluster and in this process; whether both find the same."""
    images, lesion_masks = make_slices()
    with timed("search of 8 candidates on the cluster"), joblib.parallel_config(backend="dask"):
        there = make_search(folder / "cache").fit(images, lesion_masks)
    with timed("search of 8 candidates in this process"):  # with a cache of its own: it trains too
        here = make_search(folder / "own-cache").fit(images, lesion_masks)
    print(f"best candidate: {there.best_params_}, max Dice per image {there.best_score_:.3f}")
    return np.array_equal(there.cv_results_["mean_test_score"], here.cv_results_["mean_test_score"])


def score_twice(client, folder, kill):
    """Save a model and volumes, and score them on the cluster and in this process."""
    images, _ = make_slices()
    tiny_detector(anomaly_map="image").fit(images[:16]).save(folder / "model")
    paths = save_volumes(folder, N_VOLUMES)
    with timed(f"scores of {N_VOLUMES} volumes on the cluster"):
        there = score_on(client, folder / "model", paths, kill)
    model = MaskedDiffusionAnomalyDetector.load(folder / "model")
    with timed(f"scores of {N_VOLUMES} volumes in this process"):
        here = [score_with(model, path) for path in paths]
    print(f"scores from {min(there):.4f} to {max(there):.4f}; {len(set(there))} different ones")
    return there == here


def score_on(client, model, paths, kill=False):
    """Scores of all files, in their order."""
    client.register_plugin(ResidentModel(model), name="madad-model")
    pids = client.run(os.getpid)
    futures = client.map(score, paths, pure=False)  # pure=False: whatever dask remembers of these paths
    if kill:
        next(iter(as_completed(futures)))
        busy = next(address for address, tasks in client.processing().items() if tasks)
        os.kill(pids[busy], signal.SIGKILL)  # what the system does to a process that takes too much memory
        print(f"worker {pids[busy]} was killed", flush=True)
    scores = client.gather(futures)
    if kill:
        client.wait_for_workers(len(pids))
    client.unregister_worker_plugin("madad-model")
    return scores


@contextmanager
def cluster(options):
    """The address of the cluster given, or of one on this machine, which ends with the block."""
    if options.scheduler:
        yield options.scheduler
        return
    with LocalCluster(n_workers=options.workers, threads_per_worker=1, dashboard_address=":0") as local:
        yield local.scheduler_address


@contextmanager
def timed(what):
    """Print how long the block took."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)


def main(arguments=None):
    """Search and score twice; the exit status is 0 if all numbers are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, help="processes on this machine (2)")
    parser.add_argument("--scheduler", help="address of a running cluster, tcp://HOST:PORT")
    parser.add_argument("--shared", type=Path, help="folder that all workers see (default: a temporary one)")
    parser.add_argument("--kill", action="store_true", help="kill a worker of this machine while it scores")
    options = parser.parse_args(arguments)
    if options.kill and options.scheduler:
        parser.error("--kill must be given without --scheduler: a process here may have a worker's number")
    torch.set_num_threads(1)  # as workers have: sums in more threads are rounded otherwise

    with tempfile.TemporaryDirectory(dir=options.shared) as name, cluster(options) as address:
        folder = Path(name)
        with Client(address) as client:
            same = [search_twice(folder), score_twice(client, folder, options.kill)]
    print("All numbers are the same." if all(same) else "The numbers DIFFER.")
    return 0 if all(same) else 1


if __name__ == "__main__":
    sys.exit(main())
