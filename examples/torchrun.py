"""Train one detector with several processes: the same script, started by torchrun.

    torchrun --nproc-per-node 2 examples/torchrun.py                # two processes: a minute on CPUs
    torchrun --nproc-per-node 8 examples/torchrun.py --steps 5000   # eight GPUs of a machine
    python examples/torchrun.py                                     # one process, the same code

Every process loads the same slices and calls ``fit``, which notices the others. Each takes its share of every
batch: ``batch_size`` is that of all together, so that a run needs no other learning rate than one process at
the same batch. All end with the same weights, history and thresholds; only the first shows a bar and writes
the model and the checkpoints, from which the same command goes on. Predictions are each process's own.

On CPUs torchrun gives each process one thread; set OMP_NUM_THREADS to cores / processes for more.
"""

import argparse
import os
from pathlib import Path

from madad import LatentAutoencoder, MaskedDiffusionAnomalyDetector, Trainer
from madad.datasets import make_brain_slices


def main(arguments=None):
    """Fit, print the losses and save; returns the detector."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("distributed-model"), help="folder of the model")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each stage")
    parser.add_argument(
        "--batch-size", type=int, default=16, help="slices of a step, of all processes together"
    )
    parser.add_argument("--n-slices", type=int, default=120, help="generated slices to train on")
    parser.add_argument("--size", type=int, default=64, help="height and width of a slice in pixels")
    options = parser.parse_args(arguments)

    healthy = make_brain_slices(options.n_slices, size=options.size, slices_per_subject=2, random_state=0)
    first, second = (
        Trainer(max_steps=options.steps, batch_size=options.batch_size, learning_rate=2e-3) for _ in range(2)
    )
    detector = MaskedDiffusionAnomalyDetector(
        autoencoder=LatentAutoencoder(trainer=first), denoiser="tiny", trainer=second, random_state=0
    )
    detector.fit(healthy.images, brain_mask=healthy.brain_masks, groups=healthy.subjects)
    detector.save(options.out)  # writes in the first process alone

    if os.environ.get("RANK", "0") == "0":
        histories = {"autoencoder": detector.autoencoder_.history_, "denoiser": detector.history_}
        for stage, history in histories.items():
            losses = " ".join(f"{record['loss']:.4f}" for record in history)
            speed = history[-1]["samples_per_second"]
            print(f"{stage}: loss {losses}; {speed:.0f} slices per second")
        print(f"{os.environ.get('WORLD_SIZE', '1')} processes; model: {options.out}/")
    return detector


if __name__ == "__main__":
    main()
