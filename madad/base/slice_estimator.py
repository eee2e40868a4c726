"""What every estimator shares: slices in any of their layouts, checked against those of ``fit``."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, validate_data

from madad._runtime.distributed import Team, join
from madad._runtime.gpu_jobs import warn_if_shared
from madad._runtime.random import spawn_seeds
from madad._runtime.tensors import resolve_device
from madad.base.check_slices import as_numpy, check_slices
from madad.base.slice_stack import SliceStack

OF_ONE_MACHINE = ("device", "memory", "verbose")


class SliceEstimator(BaseEstimator):
    """An estimator of slices.

    A subclass has the parameters ``image_shape``, ``intensity_range``, ``device`` and ``random_state``, and
    may have ``batch_size``.
    """

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.three_d_array = True
        tags.non_deterministic = False
        return tags

    def to_config(self) -> dict[str, Any]:
        """The parameters without those of one machine; see `madad._runtime.portable`.

        A `RandomState` has no seed to write down: it becomes None.
        """
        config = {
            name: value for name, value in self.get_params(deep=False).items() if name not in OF_ONE_MACHINE
        }
        if isinstance(config.get("random_state"), np.random.RandomState):
            config["random_state"] = None
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """An estimator, not fitted, with the parameters ``config`` that `to_config` gave."""
        return cls(**config)

    def _check_fit_slices(self, X, brain_mask=None) -> SliceStack:
        """Validate training slices and remember their shape and scale."""
        self._check_resources()
        X = self._check_rows(X, reset=True)
        stack = check_slices(
            X,
            image_shape=self.image_shape,
            intensity_range=self.intensity_range,
            brain_mask=brain_mask,
        )
        self.n_features_in_ = int(np.prod(stack.values.shape[1:]))
        self.image_shape_ = stack.image_shape
        self.intensity_range_ = stack.intensity_range
        return stack

    def _begin(self, stack: SliceStack, n_seeds: int) -> tuple[Team, list[int]]:
        """The processes that fit this estimator together, and seeds that are the same in all of them."""
        team = join(resolve_device(self.device))
        shapes = team.gather(stack.values.shape)
        if len(set(shapes)) > 1:
            raise ValueError(
                f"X must be the same in each process, got {shapes} by rank. Give all of it to each: fit "
                f"shares it out."
            )
        return team, team.broadcast(spawn_seeds(self.random_state, n_seeds))

    def _check_resources(self) -> None:
        """Of memory and of the device, which others may work on."""
        size = getattr(self, "batch_size", None)
        if size is not None and not (isinstance(size, Integral) and int(size) > 0):
            raise ValueError(f"batch_size must be a whole number above 0 or None, got {size!r}. Use None.")
        warn_if_shared(resolve_device(getattr(self, "device", "cpu")))

    def _check_rows(self, X, *, reset: bool) -> np.ndarray:
        """Give flat rows (and what is no array at all) to scikit-learn's own validation."""
        is_sparse = hasattr(X, "toarray")
        values = X if is_sparse else as_numpy(X)
        if is_sparse or values.ndim < 3:
            return validate_data(self, values, dtype="numeric", reset=reset)
        return values

    def _check_slices(self, X, brain_mask=None) -> SliceStack:
        """Validate slices for a fitted estimator."""
        check_is_fitted(self)
        self._check_resources()
        X = self._check_rows(X, reset=False)
        flat_shape = self.image_shape_ if X.ndim == 2 and self.image_shape is not None else None
        in_data_units = self.intensity_range == "data"
        stack = check_slices(
            X,
            image_shape=flat_shape,
            intensity_range="data" if in_data_units else self.intensity_range,
            brain_mask=brain_mask,
        )
        if stack.image_shape != self.image_shape_:
            raise ValueError(
                f"X must have slices of shape {self.image_shape_} (channels, height, width) as in fit, got "
                f"{stack.image_shape}. Resample them to the training grid."
            )
        return replace(stack, intensity_range=self.intensity_range_) if in_data_units else stack
