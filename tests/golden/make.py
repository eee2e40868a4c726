"""Make the golden maps: a tiny fitted detector, five generated slices, and the maps that belong to them.

    python tests/golden/make.py                            # refuses where there are some
    python tests/golden/make.py --declare "what changed"   # new maps; model and slices stay as they are
    python tests/golden/make.py --declare "what changed" --retrain   # a new model and new slices too

The slices are stored with their maps: a change of the generator does not reach them.
"""

import argparse
import copy
from pathlib import Path

import numpy as np

from madad import LatentAutoencoder, MaskedDiffusionAnomalyDetector, Trainer
from madad.datasets import make_brain_slices
from madad.presets import PRESETS

GOLDEN = Path(__file__).parent
TOLERANCE = 1e-5  # absolute; maps and scores are in 0..1
SIZE, N_SLICES, SEED = 50, 5, 0  # 50 is no multiple of the networks' factors: padding takes part
KINDS = ("image", "latent", "mask")
WAYS = {
    "preset": {},  # repaints
    "published": {
        "repaint": 0.0,
        "n_steps": 10,
        "step_spacing": "leading",
        "mask_threshold": 0.5,
        "reference": "input",
        "map_difference": "squared",
        "gamma": 0.2,
        "eta": 0.5,
        "smoothing": "gaussian",
    },
}


def load_detector(folder):
    """The checked-in model, on the CPU wherever it runs."""
    return MaskedDiffusionAnomalyDetector.load(folder / "model").set_params(device="cpu")


def load_stored(folder):
    """The arrays of ``maps.npz``: slices, brain masks, and what `measure` gave."""
    with np.load(folder / "maps.npz", allow_pickle=False) as file:
        return dict(file)


def variant(detector, way, kind, **overrides):
    return copy.deepcopy(detector).set_params(anomaly_map=kind, **(WAYS[way] | overrides))


def measure(detector, images, brain_masks, ways=tuple(WAYS), **overrides):
    """Maps, scores and both thresholds, for each way of repairing and each kind of map."""
    measured = {"fitted_thresholds": np.array([detector.map_threshold_, detector.offset_])}
    for way in ways:
        for kind in KINDS:
            one, name = variant(detector, way, kind, **overrides), f"{way}_{kind}"
            measured[f"{name}_maps"] = one.predict_maps(images, brain_mask=brain_masks)
            measured[f"{name}_scores"] = one.score_samples(images, brain_mask=brain_masks)
            one.calibrate(images, brain_mask=brain_masks)  # as if healthy: the arithmetic is what counts
            measured[f"{name}_thresholds"] = np.array([one.map_threshold_, one.offset_])
    return measured


def movements(measured, stored):
    """By how much each array moved, at most; infinity where its shape did, or it is new."""
    return {
        name: float(np.abs(values.astype(np.float64) - stored[name]).max())
        if name in stored and stored[name].shape == values.shape
        else np.inf
        for name, values in measured.items()
    }


def check_same(measured, stored):
    """Raise AssertionError where something moved by more than the tolerance."""
    moved = {name: by for name, by in movements(measured, stored).items() if not by <= TOLERANCE}
    if moved:
        lines = "\n".join(f"  {name}: {by:.3g}" for name, by in moved.items())
        raise AssertionError(
            f"golden maps must stay within {TOLERANCE:g}, got these largest movements:\n{lines}\n"
            f"If that is meant, say so under Numerics in CHANGELOG.md and run "
            f'python tests/golden/make.py --declare "what changed".'
        )


def check_worth(detector, stored):
    """Raise AssertionError where a change could pass unnoticed, or the rounding of a machine could not."""
    images, brain = stored["images"], stored["brain_masks"]
    for way in WAYS:
        share = repaired_share(detector, way, images, brain)
        assert (share > 0.01).all() and (share < 0.9).all(), f"{way}: {share} of the brain is repaired"
        for kind in KINDS:
            inside = [one[where] for one, where in zip(stored[f"{way}_{kind}_maps"], brain, strict=True)]
            spread = min(values.std() for values in inside)
            assert spread > 0.005, f"{way} {kind}: a map has a standard deviation of {spread:.2g}"
            assert stored[f"{way}_{kind}_thresholds"][0] > 0.01, f"{way} {kind}: trivial threshold"
        # no flag may hang on less than this
        threshold = (PRESETS[detector.preset_] | WAYS[way])["mask_threshold"]
        for moved in (threshold - 1e-4, threshold + 1e-4):
            check_same(measure(detector, images, brain, (way,), mask_threshold=moved), stored)
    for noise in np.random.default_rng(0).uniform(-1e-6, 1e-6, (2, *images.shape)):
        noisy = np.where(brain, (images + noise).clip(1e-6, 1), 0).astype(np.float32)
        check_same(measure(detector, noisy, brain), stored)


def repaired_share(detector, way, images, brain_masks):
    """Share of each slice's brain whose latent was moved: elsewhere an unsmoothed latent map is 0."""
    maps = variant(detector, way, "latent", smoothing_px=0).predict_maps(images, brain_mask=brain_masks)
    return np.array([(one[brain] > 0).mean() for one, brain in zip(maps, brain_masks, strict=True)])


def train():
    """A detector of the preset "tiny", trained long enough to flag some positions and not others."""
    healthy = make_brain_slices(200, size=SIZE, slices_per_subject=2, random_state=SEED)
    detector = MaskedDiffusionAnomalyDetector(
        "tiny",
        autoencoder=LatentAutoencoder("tiny", trainer=Trainer(10**6, max_steps=300, learning_rate=2e-3)),
        trainer=Trainer(10**6, max_steps=1500, batch_size=16, learning_rate=2e-3),
        device="cpu",
        random_state=SEED,
    )
    return detector.fit(healthy.images, brain_mask=healthy.brain_masks, groups=healthy.subjects)


def make_slices(detector):
    """The first slices of other subjects in which either way of repairing finds something."""
    many = make_brain_slices(40, size=SIZE, lesions=0.7, random_state=SEED + 1)
    shares = [repaired_share(detector, way, many.images, many.brain_masks) for way in WAYS]
    chosen = np.flatnonzero(np.min(shares, axis=0) > 0.01)[:N_SLICES]
    return {"images": many.images[chosen], "brain_masks": many.brain_masks[chosen]}


def main(arguments=None, folder=GOLDEN):
    """Write ``model`` and ``maps.npz`` into a folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--declare", metavar="TEXT", help="what changed; replaces the maps that are there")
    parser.add_argument("--retrain", action="store_true", help="make a new model and new slices too")
    options = parser.parse_args(arguments)
    exists = (folder / "maps.npz").exists() or (folder / "model").exists()
    if exists and not (options.declare or "").strip():
        parser.error(f'{folder} must hold no golden maps yet. Give --declare "what changed" to replace them.')

    before = {} if options.retrain or not exists else load_stored(folder)
    if before:
        detector, slices = load_detector(folder), {name: before[name] for name in ("images", "brain_masks")}
    else:
        detector = train()
        slices = make_slices(detector)
    measured = measure(detector, **slices)
    stored = slices | measured
    check_worth(detector, stored)
    if not before:
        detector.save(folder / "model")
    scratch = folder / ".maps.partial.npz"
    np.savez_compressed(scratch, **stored)
    scratch.replace(folder / "maps.npz")

    for name, by in movements(measured, before).items() if before else ():
        print(f"{name}: moved by up to {by:.3g}")
    if exists:
        print(f"Now put this under *Numerics* in CHANGELOG.md, with by how much:\n- {options.declare}")


if __name__ == "__main__":
    main()
