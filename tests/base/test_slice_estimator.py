"""What every estimator shares, on the smallest one: it keeps the checked slices and does nothing."""

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError

from madad.base.slice_estimator import SliceEstimator


class Keeper(SliceEstimator):
    def __init__(self, image_shape=None, intensity_range=(0.0, 1.0), batch_size=None, device="cpu"):
        self.image_shape = image_shape
        self.intensity_range = intensity_range
        self.batch_size = batch_size
        self.device = device

    def fit(self, X, y=None, brain_mask=None):
        self.stack_ = self._check_fit_slices(X, brain_mask)
        return self

    def see(self, X, brain_mask=None):
        return self._check_slices(X, brain_mask)


SLICES = np.random.default_rng(0).uniform(0, 1, (5, 6, 8)).astype(np.float32)


@pytest.mark.parametrize(
    ("X", "shape", "n_features"),
    [
        (SLICES, (1, 6, 8), 48),
        (SLICES[:, None].repeat(2, axis=1), (2, 6, 8), 96),
        (SLICES[None, None], (1, 6, 8), 240),  # a volume of five slices
        (SLICES.reshape(5, 48), (1, 7, 7), 48),  # padded to the next square
    ],
)
def test_fit_remembers_shape_and_scale(X, shape, n_features):
    keeper = Keeper().fit(X)
    assert (keeper.image_shape_, keeper.n_features_in_) == (shape, n_features)
    assert keeper.intensity_range_ == (0.0, 1.0)
    index = np.arange(len(keeper.stack_))
    np.testing.assert_array_equal(keeper.see(X).images(index), keeper.stack_.images(index))


def test_later_slices_have_the_shape_of_the_first():
    keeper = Keeper().fit(SLICES)
    with pytest.raises(ValueError, match=r"X must have slices of shape \(1, 6, 8\).*got \(1, 6, 7\)"):
        keeper.see(SLICES[..., :7])
    assert len(keeper.see(SLICES[:2])) == 2


def test_the_datas_own_scale_is_that_of_fit():
    keeper = Keeper(intensity_range="data").fit(4 * SLICES)
    low, high = keeper.intensity_range_
    assert (low, high) == (4 * SLICES.min(), 4 * SLICES.max())
    seen = keeper.see(2 * SLICES)
    assert seen.intensity_range == (low, high)
    np.testing.assert_allclose(seen.images([0])[0, 0], (2 * SLICES[0] - low) / (high - low), atol=1e-6)


def test_flat_rows_are_folded_by_the_shape_given():
    keeper = Keeper(image_shape=(6, 8)).fit(SLICES.reshape(5, 48))
    np.testing.assert_array_equal(keeper.see(SLICES.reshape(5, 48)).images([3])[0, 0], SLICES[3])


def test_nothing_is_seen_before_fit():
    with pytest.raises(NotFittedError):
        Keeper().see(SLICES)


@pytest.mark.parametrize("size", [0, -4, 2.5, "8"])
def test_a_batch_has_slices(size):
    with pytest.raises(ValueError, match="batch_size must be a whole number above 0 or None, got"):
        Keeper(batch_size=size).fit(SLICES)
    with pytest.raises(ValueError, match="batch_size must be"):
        Keeper().fit(SLICES).set_params(batch_size=size).see(SLICES)
