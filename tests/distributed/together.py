"""What `tests/test_distributed.py` has each process of a torchrun do, and does itself in one process.

    torchrun --nproc-per-node 2 tests/distributed/together.py FOLDER

Each function gets a folder of its own that the processes share, and returns what is compared.
"""

import contextlib
import gc
import hashlib
import io
import math
import pickle
import runpy
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import torch
from joblib import Parallel, delayed
from torch import nn

from madad import LatentAutoencoder, Trainer
from madad._runtime import distributed
from madad._runtime.distributed import ALONE, FirstFailedError, alone, is_first_process, join
from madad._runtime.random import isolated_seed
from madad.base.check_slices import check_slices
from madad.baselines import PartialDiffusion
from madad.datasets import make_brain_slices
from madad.stages import latent_cache
from madad.stages.augmentation import SliceAugmentation
from madad.testing import tiny_autoencoder, tiny_detector

N = 24
IMAGES = torch.randn(N, 3, 4, 4, generator=torch.Generator().manual_seed(4))
EXAMPLE = Path(__file__).parents[2] / "examples" / "torchrun.py"
SLICES = make_brain_slices(40, size=32, random_state=0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def state_of(*modules):
    """Weights and buffers as one array of bytes."""
    values = [value for module in modules for value in module.state_dict().values()]
    return b"".join(value.detach().cpu().contiguous().numpy().tobytes() for value in values)


def digest(*modules):
    return hashlib.sha256(state_of(*modules)).hexdigest()


def networks():
    """Two that start with other weights in each process: those of the first count."""
    with isolated_seed(join().rank):
        convolutions = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
        module = nn.Sequential(
            convolutions[0], nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.3), convolutions[1]
        )
        return module, nn.Conv2d(1, 1, 3)


def noisy(folder, *, happens=lambda step: None, **options):
    """A training with all that has a state: buffers, dropout, averages, draws, a rival, validation."""
    module, rival = networks()
    drawn = []

    def loss(module, index, generator, step):
        happens(step)
        noise = torch.randn(len(index), 3, 4, 4, generator=generator)
        drawn.append((index.tolist(), float(noise.flatten()[0]), float(torch.rand(()))))
        output = module(IMAGES[index] + 0.1 * noise)
        return (output - IMAGES[index, :1]).square().mean() - 0.01 * rival(output).mean(), {"half": 0.5}

    def rival_loss(network, index, generator, step):
        if step % 4 == 1:
            return None
        real = network(IMAGES[index, :1] + torch.randn(1, generator=generator))
        return (real - 1).square().mean(), {"real": real.detach().mean()}

    def validation_loss(module, index, generator, step):
        return (module(IMAGES[index]) - 0.8).square().mean(), {}

    settings = {"batch_size": 5, "learning_rate": 0.1, "ema_decay": 0.7, "validate_every": 3, "patience": 9}
    trainer = Trainer(4, checkpoint_dir=folder, **(settings | options))
    against = {"rival": rival, "rival_loss": rival_loss}
    validation = {"validation_loss": validation_loss, "n_validation": 7}
    with isolated_seed(7):
        before = torch.get_rng_state()
        history = trainer.optimise(
            module, loss, N, generator=seeded(6 + join().rank), **against, **validation
        )
        moved = not torch.equal(torch.get_rng_state(), before)
    return {"weights": digest(module, rival), "history": history, "own": drawn, "moved": moved}


def plain(folder):
    """A training whose loss draws nothing: what is left is the order of sums."""
    with isolated_seed(0):
        module, rival = nn.Conv2d(3, 1, 3), nn.Conv2d(1, 1, 1)

    def loss(module, index, generator, step):
        error = (module(IMAGES[index]) - IMAGES[index, :1, 1:3, 1:3]).square().mean()
        return error, {"twice": 2 * error.detach()}

    def rival_loss(rival, index, generator, step):
        return (rival(IMAGES[index, :1]) - IMAGES[index, 1:2]).square().mean(), {}

    history = Trainer(8, batch_size=7, learning_rate=0.05).optimise(
        module, loss, N, generator=seeded(0), rival=rival, rival_loss=rival_loss
    )
    return {"weights": digest(module, rival), "history": history}


def stopped(folder):
    """A signal to the last process alone stops all, and the same call goes on."""

    def happens(step):
        if step == 6 and not is_first_process():
            signal.raise_signal(signal.SIGTERM)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = noisy(folder / "checkpoints", happens=happens)
    files = len(list((folder / "checkpoints").iterdir())) if is_first_process() else 1
    again = noisy(folder / "checkpoints")
    return again | {"warned": [str(one.message) for one in caught], "files": files, "first": first["history"]}


def timed(folder):
    """The last process is the slowest, and its time counts."""

    def happens(step):
        time.sleep(0.002 if is_first_process() else 0.02)

    return noisy(None, happens=happens, max_time=0.4) | {"own": None}


def asked(folder):
    """Callbacks are called in the first process, and their answer is for all."""
    heard = []

    def callback(state):
        heard.append(state.step)
        return "stop" if state.step >= 6 else None

    result = noisy(None, callbacks=(callback,))
    return result | {"own": heard}


def refused(folder):
    """Errors that come to all, so that none waits for another."""
    messages = []
    for call in (
        lambda: noisy(None, batch_size=1),
        lambda: tiny_detector().fit(SLICES.images[: 30 + join().rank]),
        lambda: join().first(lambda: 1 / 0),
    ):
        try:
            call()
        except (ValueError, ZeroDivisionError, FirstFailedError) as error:
            messages.append(f"{type(error).__name__}: {error}")
    return {"own": messages}


def children(folder):
    """What a process starts itself fits alone, and writes for itself."""

    def size():
        return join().size, is_first_process()

    found = []
    thread = threading.Thread(target=lambda: found.append(join().size))
    thread.start()
    thread.join()
    with alone():
        found.append(size())
    own = [] if is_first_process() else Parallel(2)(delayed(size)() for _ in range(2))
    return {"own": own, "here": found}


def autoencoder(folder):
    """Alone, with seeds that nobody chose."""
    trainer = Trainer(4, batch_size=8, validation_fraction=0.2)
    fitted = tiny_autoencoder(random_state=None, trainer=trainer).fit(SLICES.images, groups=SLICES.subjects)
    statistics = (fitted.latent_shift_.tolist(), fitted.latent_scale_.tolist())
    return {"weights": digest(fitted.network_), "statistics": statistics, "history": fitted.history_}


def latents(folder):
    """The cache that the processes fill together, and that of one."""
    fitted = tiny_autoencoder().fit(SLICES.images)
    stack, same = check_slices(SLICES.images[:37]), []
    latent_cache.LARGE_CACHE, before = 0, latent_cache.LARGE_CACHE
    latent_cache.BUCKET = 10_000  # several pieces
    for directory in (None, folder / join_text()):
        for augmentation in (None, SliceAugmentation(n_copies=1)):
            options = {"flip": True, "augmentation": augmentation, "directory": directory}
            both = [
                latent_cache.cache_latents(fitted, stack, generator=seeded(1), team=team, **options)
                for team in (join(), ALONE)
            ]
            for name in ("mean", "logvar", "brain_fraction"):
                rows = torch.arange(len(both[0]))
                same.append(torch.equal(*(getattr(cache, name)[rows] for cache in both)))
    latent_cache.LARGE_CACHE = before
    return {"same": same}


def join_text():
    return f"rank {join().rank}"


def facts_of(detector):
    thresholds = [detector.offset_, detector.map_threshold_]
    histories = {"autoencoder": detector.autoencoder_.history_, "denoiser": detector.history_}
    weights = digest(detector.autoencoder_.network_, detector.denoiser_)
    return {"weights": weights, "thresholds": thresholds, "histories": histories}


def detector(folder):
    """From training to a model on disk, with predictions of one process alone."""
    first, second = (Trainer(6, max_steps=math.inf, batch_size=8, learning_rate=3e-3) for _ in range(2))
    stages = {"autoencoder": LatentAutoencoder("tiny", trainer=first), "trainer": second}
    fitted = tiny_detector(memory=str(folder / "memory"), **stages)
    fitted.fit(SLICES.images, groups=SLICES.subjects)
    missed = facts_of(fitted)
    fitted.save(folder / "model")
    maps = fitted.predict_maps(SLICES.images[:3]) if is_first_process() else None  # the others do not wait
    hit = facts_of(fitted.fit(SLICES.images, groups=SLICES.subjects))
    return missed | {"hit": hit, "own": maps, "held_out": fitted.calibration_rows_.tolist()}


def volumes(folder):
    """Volumes as samples, fewer held out than there are processes, a share that is called anomalous."""
    X = SLICES.images[:24].reshape(4, 1, 6, 32, 32)
    trainer = Trainer(2, batch_size=8)
    parts = {"trainer": trainer, "autoencoder": tiny_autoencoder(trainer=trainer)}
    fitted = tiny_detector(contamination=0.3, **parts).fit(X)
    fitted.save(folder / "model")
    return facts_of(fitted) | {"held_out": fitted.calibration_rows_.tolist()}


def baseline(folder):
    options = {"trainer": Trainer(2, batch_size=8), "n_steps": 2, "denoiser": "tiny", "random_state": None}
    fitted = PartialDiffusion(**options).fit(SLICES.images)
    fitted.save(folder / "model")
    found = {"thresholds": [fitted.offset_, fitted.map_threshold_], "seed": fitted.map_seed_}
    return found | {"weights": digest(fitted.denoiser_), "held_out": fitted.calibration_rows_.tolist()}


def example(folder):
    """The example as users run it, and what it shows."""
    out, err = io.StringIO(), io.StringIO()
    small = ("--steps", "4", "--n-slices", "24", "--size", "32", "--out", str(folder / "model"))
    before, sys.argv = sys.argv, [str(EXAMPLE), *small]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    sys.argv = before
    return {"own": (out.getvalue(), err.getvalue())}


TASKS = (plain, noisy, stopped, timed, asked, refused, children, autoencoder, latents) + (
    *(detector, volumes, baseline, example),
)


def threads_of_groups():
    """Threads of this process that talk to other processes, by name; none where the system does not tell."""
    names = (task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm"))
    return [name for name in names if "gloo" in name]


def main(folder):
    results = {}
    for task in TASKS:
        (folder / task.__name__).mkdir(parents=True, exist_ok=True)
        results[task.__name__] = task(folder / task.__name__)
    rank, results["left"] = join().rank, [len(threads_of_groups())]
    distributed._leave()  # as at the end of the process
    gc.collect()
    results["left"].append(len(threads_of_groups()))
    (folder / f"rank{rank}.pkl").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
