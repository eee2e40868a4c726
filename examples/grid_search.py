"""Search gamma, lambda and the mask ratio with scikit-learn's `GridSearchCV`, and train no network twice.

Shown here: folds of healthy subjects to train on and lesions of *other* subjects to score on; a scorer that
takes lesion masks as ``y``; and ``memory``, which trains one autoencoder per fold and one denoiser per fold,
lambda and mask ratio. gamma only clips the maps: its values cost a prediction each. Run

    python examples/grid_search.py            # about five minutes on one CPU core; --quick for a first look

For slices of your own, replace `make_data` by a function that returns three arrays: images (n, H, W) in 0..1
with background 0, lesion masks (n, H, W), empty for healthy slices, and the subject of each slice (n,);
`madad.datasets.load_slices` reads all three from an ``.npz`` file. Then leave ``denoiser`` at its default and
take thousands of steps. The subjects that chose the parameters must not judge the result: keep others for
that, and fit the winner with ``detector.set_params(**search.best_params_).fit(all_healthy_slices)``.
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold

from madad import LatentAutoencoder, MaskedDiffusionAnomalyDetector, Trainer
from madad.datasets import make_brain_slices
from madad.metrics import max_dice_scorer

GAMMA, LAMBDA, RATIO = "gamma", "mask_loss_weight", "mask_ratio"
GRID = {GAMMA: [0.1, 0.2, 0.4, 0.8], LAMBDA: [0.01, 0.1, 1.0], RATIO: [0.1, 0.2, 0.4]}
QUICK_GRID = {GAMMA: [0.2, 0.4], LAMBDA: [0.001, 1.0], RATIO: [0.2, 0.6]}


def make_data(n_train, n_lesions, size):
    """Slices, lesion masks and subjects: healthy volunteers first, then patients."""
    healthy = make_brain_slices(n_train, size=size, slices_per_subject=2, random_state=0)
    patients = make_brain_slices(n_lesions, size=size, slices_per_subject=2, lesions=1.0, random_state=1)
    subjects = [f"healthy {name}" for name in healthy.subjects] + [f"patient {n}" for n in patients.subjects]
    pairs = ((healthy[name], patients[name]) for name in ("images", "lesion_masks"))
    return *map(np.concatenate, pairs), np.array(subjects)


def healthy_to_lesion_folds(lesion_masks, subjects, n_folds=2):
    """(train, test) rows: healthy subjects to train on, slices with lesions of other subjects to test on."""
    has_lesion = lesion_masks.any(axis=(1, 2))
    is_patient = np.isin(subjects, subjects[has_lesion])
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=0)
    for rest, held_out in splitter.split(subjects, is_patient, groups=subjects):
        yield rest[~is_patient[rest]], held_out[has_lesion[held_out]]


def count_trainings(memory):
    """How many results of each training stage the cache holds."""
    entries = Path(memory).rglob("output.pkl")
    return Counter(entry.parent.parent.name.removeprefix("_") for entry in entries)


def print_table(results):
    """Print all candidates, the best first."""
    folds = [scores for name, scores in results.items() if name.startswith("split")]
    print(f"\n{'gamma':>6} {'lambda':>7} {'mask_ratio':>10}   max Dice per image: mean (each fold)")
    for i in np.argsort(results["rank_test_score"], kind="stable"):
        gamma, weight, ratio = (results[f"param_{name}"][i] for name in (GAMMA, LAMBDA, RATIO))
        each = ", ".join(f"{scores[i]:.3f}" for scores in folds)
        print(f"{gamma:6g} {weight:7g} {ratio:10g}   {results['mean_test_score'][i]:.3f} ({each})")


def draw_heat_map(results, grid, path):
    """Draw the score over lambda and mask ratio, in each cell that of its best gamma."""
    # GridSearchCV goes through the names in alphabetical order, the values of the last one fastest
    scores = results["mean_test_score"].reshape([len(grid[name]) for name in (GAMMA, LAMBDA, RATIO)])
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axis = figure.subplots()
    coloured = axis.imshow(scores.max(axis=0), cmap="viridis", aspect="auto")
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "boxstyle": "round"}
    for row, column in np.ndindex(scores.shape[1:]):
        cell = scores[:, row, column]
        label = f"{cell.max():.3f}\n$\\gamma$ = {grid[GAMMA][cell.argmax()]:g}"
        axis.text(column, row, label, ha="center", va="center", fontsize=12, bbox=box)
    axis.set_xticks(range(len(grid[RATIO])), [f"{ratio:g}" for ratio in grid[RATIO]])
    axis.set_yticks(range(len(grid[LAMBDA])), [f"{weight:g}" for weight in grid[LAMBDA]])
    axis.set_xlabel("mask ratio: largest share of masked latent positions (0..1)")
    axis.set_ylabel(r"$\lambda$: weight of the mask loss (no unit)")
    figure.suptitle(
        "Search on generated slices, each cell with its best $\\gamma$ (images in -1..1)", fontsize=11
    )
    figure.colorbar(coloured, label="max Dice per image, mean over the folds (0..1)")
    figure.savefig(path, dpi=120)


def main(arguments=None):
    """Search, print the table, draw the heat map; returns the `GridSearchCV` and the counted trainings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"), help="the picture")
    parser.add_argument("--memory", help="folder of the cache, kept for a next search (default: temporary)")
    parser.add_argument("--steps", type=int, help="training steps of each denoiser (300; quick: 20)")
    parser.add_argument("--n-train", type=int, help="healthy slices of all folds (160; quick: 32)")
    parser.add_argument("--quick", action="store_true", help="only to see it run: small and hardly trained")
    options = parser.parse_args(arguments)
    usual = (QUICK_GRID, 32, 8, 20, 32) if options.quick else (GRID, 48, 40, 300, 160)
    grid, size, n_lesions, steps, n_train = usual
    steps, n_train = options.steps or steps, options.n_train or n_train

    images, lesion_masks, subjects = make_data(n_train, n_lesions, size)
    folds = list(healthy_to_lesion_folds(lesion_masks, subjects))
    with tempfile.TemporaryDirectory() as temporary:
        memory = options.memory or temporary
        detector = MaskedDiffusionAnomalyDetector(
            autoencoder=LatentAutoencoder(trainer=Trainer(max_steps=80, learning_rate=2e-3)),
            denoiser="tiny",
            trainer=Trainer(max_steps=steps, batch_size=16, learning_rate=1e-3),
            memory=memory,
            random_state=0,
        )
        # no refit: that would train on all rows, those with lesions too
        search = GridSearchCV(detector, grid, scoring=max_dice_scorer, cv=folds, refit=False)
        known = count_trainings(memory)
        search.fit(images, lesion_masks)
        trained = count_trainings(memory) - known

    print_table(search.cv_results_)
    print(
        f"\n{len(folds) * len(search.cv_results_['params'])} fits (candidates x folds): "
        f"{trained['autoencoder']} autoencoders and {trained['denoiser']} denoisers trained, "
        f"the others came from the cache.\nBest: {search.best_params_}. Picture: {options.out}"
    )
    at_edge = [name for name, best in search.best_params_.items() if best in (grid[name][0], grid[name][-1])]
    print(f"At the edge of the grid, where it may get better beyond: {', '.join(at_edge) or 'none'}.")
    draw_heat_map(search.cv_results_, grid, options.out)
    return search, trained


if __name__ == "__main__":
    main()
