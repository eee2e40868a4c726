"""Arrays and slow, obviously right NumPy loops to check the metrics against."""

import re

import numpy as np
import pytest


@pytest.fixture
def random_case():
    def draw(seed, n=7, shape=(6, 5), n_levels=9, dtype=np.float32):
        """Few grey levels, so that ties abound; one slice without a lesion; a brain mask with holes."""
        rng = np.random.default_rng(seed)
        lesion_masks = rng.random((n, *shape)) < 0.2
        lesion_masks[rng.integers(n)] = False
        anomaly_maps = (rng.integers(0, n_levels, (n, *shape)) + 3 * lesion_masks).astype(dtype) / n_levels
        brain_masks = rng.random((n, *shape)) < 0.8
        return lesion_masks, anomaly_maps, brain_masks

    return draw


@pytest.fixture
def slow_dice_per_image():
    def count(lesion_masks, anomaly_maps, brain_masks, threshold):
        dice = []
        for lesion, anomaly_map, brain in zip(lesion_masks, anomaly_maps, brain_masks, strict=True):
            truth, predicted = lesion[brain], anomaly_map[brain] >= threshold
            total = truth.sum() + predicted.sum()
            dice.append(2 * (truth & predicted).sum() / total if truth.any() else np.nan)
        return np.array(dice)

    return count


@pytest.fixture
def as_pattern():
    def escape(message):
        """Read "..." as anything in between and every other character as itself."""
        return ".*".join(re.escape(part) for part in message.split("..."))

    return escape
