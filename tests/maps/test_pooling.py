import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from sklearn.metrics import roc_auc_score

from madad.maps.pooling import pool_map

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("top_share, k", [(0.01, 1), (0.1, 8), (0.5, 38), (1.0, 77)])
def test_pooling_is_the_mean_of_the_largest_values_in_the_brain(top_share, k):
    maps = RNG.random((3, 10, 10))
    brain_mask = np.zeros(100, bool)
    brain_mask[RNG.permutation(100)[:77]] = True
    brain_mask = np.broadcast_to(brain_mask.reshape(10, 10), maps.shape)
    expected = [np.sort(one[brain])[::-1][:k].mean() for one, brain in zip(maps, brain_mask, strict=True)]
    np.testing.assert_allclose(pool_map(maps, brain_mask, top_share), expected, rtol=1e-12)


def test_a_slice_without_brain_scores_zero():
    brain_mask = np.stack([np.zeros((4, 4), bool), np.ones((4, 4), bool)])
    np.testing.assert_array_equal(pool_map(np.ones((2, 4, 4), np.float32), brain_mask), [0, 1])


def test_pooling_separates_small_lesions_from_noise_better_than_the_mean_does():
    """Smooth noise whose level differs between slices, and a lesion of 4 x 4 pixels in every other one."""
    has_lesion = np.arange(80) % 2 == 1
    gains = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        maps = gaussian_filter(rng.random((80, 48, 48)), (0, 1, 1)) * rng.uniform(0.85, 1.15, (80, 1, 1))
        for one in maps[1::2]:
            row, column = rng.integers(8, 36, 2)
            one[row : row + 4, column : column + 4] += 0.4
        brain_mask = np.zeros(maps.shape, bool)
        brain_mask[:, 4:44, 6:42] = True
        by_pooling = roc_auc_score(has_lesion, pool_map(maps, brain_mask))
        by_mean = roc_auc_score(has_lesion, pool_map(maps, brain_mask, top_share=1.0))
        gains.append(by_pooling - by_mean)
        assert by_pooling > 0.9
    assert min(gains) > 0.2 and np.mean(gains) > 0.3


@pytest.mark.parametrize("value", [0, -0.1, 1.5, np.nan])
def test_the_share_of_pooled_values_must_be_one(value):
    with pytest.raises(ValueError, match=f"top_share must be above 0 and at most 1, got {value!r}"):
        pool_map(np.zeros((1, 4, 4)), np.ones((1, 4, 4), bool), value)
