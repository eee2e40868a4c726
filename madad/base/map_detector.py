"""From anomaly maps to scores, thresholds and decisions: what every detector shares."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from numbers import Real
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import OutlierMixin
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted
from torch import nn

from madad._runtime.distributed import ALONE, Team
from madad._runtime.portable import PortableNetwork
from madad._runtime.random import hold_out
from madad.base.slice_estimator import SliceEstimator
from madad.base.slice_stack import SliceStack, release_pages
from madad.maps.pooling import healthy_threshold, pool_map
from madad.saving.model_card import ModelCard
from madad.saving.saved_detector import load_detector, save_detector

CALIBRATED = ("offset_", "map_threshold_", "calibrated_with_")


class AnomalyMapDetector(OutlierMixin, SliceEstimator):
    """A detector that makes a map of each slice; scores, thresholds and decisions follow from the maps.

    A subclass has the parameters ``contamination``, ``image_specificity``, ``pixel_specificity`` and
    ``calibration_fraction`` beside those of `SliceEstimator`, ends its ``fit`` with ``_calibrate``, and
    implements ``_map_batches`` and ``_map_settings``.

    Attributes
    ----------
    offset_ : float
        ``decision_function = score_samples - offset_``.
    map_threshold_ : float
        Pixels of a map that reach it are anomalous; the smallest value above the stated share of healthy
        pixels.
    """

    # What `save` writes: attributes that hold a network or an estimator, arrays, and plain values.
    _saved_parts: ClassVar[dict[str, type]] = {}
    _saved_arrays: ClassVar[tuple[str, ...]] = ()
    _saved_attributes: ClassVar[tuple[str, ...]] = ("n_features_in_", "image_shape_", "intensity_range_")

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "calibrated_with_")  # set last: a failed fit leaves an unfitted estimator

    def _map_batches(self, stack: SliceStack) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """First row, maps (n, H, W) and brain masks of each batch."""
        raise NotImplementedError

    def _map_settings(self) -> dict:
        """The parameters that a map depends on after ``fit``, by name."""
        raise NotImplementedError

    def _without_effect(self, settings: dict) -> tuple[str, ...]:
        """Those of the settings that change no map as the others are."""
        return ()

    def calibrate(self, X, *, brain_mask=None):
        """Set both thresholds anew from healthy slices that were not trained on.

        Needed after ``set_params`` changed a parameter of the maps: thresholds of ``fit`` then no longer fit.
        With a numeric ``contamination``, ``offset_`` is the quantile of these slices' scores.

        Parameters
        ----------
        X, brain_mask :
            As in `predict_maps`.

        Returns
        -------
        self
        """
        stack = self._check_slices(X, brain_mask)
        self._calibrate(stack, np.arange(len(stack)))
        return self

    def predict_maps(self, X, *, brain_mask=None) -> np.ndarray:
        """Anomaly maps, float32 in 0..1, higher = more anomalous, 0 outside the brain.

        Parameters
        ----------
        X : array-like, as in ``fit``
            Slices or volumes in any of the layouts of ``fit``, of the height, width and channels that it saw.
        brain_mask : array-like of bool, shape of ``X`` without channels, optional
            True = brain. None = where ``X`` is above the background.

        Returns
        -------
        ndarray of shape (n, H, W); (n, D, H, W) for volumes, (n, n_pixels) for flat rows
            Of a memory map, maps of more than 64 MiB are a memory map too: of a file without a name, in the
            system's folder for temporary files (TMPDIR), which is gone when the array is.
        """
        return self._gathered(self._check_slices(X, brain_mask), np.float32, np.asarray)

    def predict_masks(self, X, *, brain_mask=None) -> np.ndarray:
        """Pixels whose map reaches ``map_threshold_``: bool, shape as `predict_maps`.

        Parameters
        ----------
        X, brain_mask :
            As in `predict_maps`.
        """
        check_is_fitted(self)
        self._warn_if_stale()
        threshold = np.float32(self.map_threshold_)
        return self._gathered(self._check_slices(X, brain_mask), bool, lambda maps: maps >= threshold)

    def score_samples(self, X, *, brain_mask=None) -> np.ndarray:
        """Score of each sample, (n,): higher = more normal; minus the pooled map of the slice or volume.

        Parameters
        ----------
        X, brain_mask :
            As in `predict_maps`.
        """
        stack = self._check_slices(X, brain_mask)
        return self._score_stack(stack)

    def decision_function(self, X, *, brain_mask=None) -> np.ndarray:
        """``score_samples - offset_``: negative = anomalous.

        Parameters
        ----------
        X, brain_mask :
            As in `predict_maps`.
        """
        check_is_fitted(self)
        self._warn_if_stale()
        return self.score_samples(X, brain_mask=brain_mask) - self.offset_

    def predict(self, X, *, brain_mask=None) -> np.ndarray:
        """+1 for normal samples, -1 for anomalous ones.

        Parameters
        ----------
        X, brain_mask :
            As in `predict_maps`.
        """
        return np.where(self.decision_function(X, brain_mask=brain_mask) < 0, -1, 1)

    def fit_predict(self, X, y=None, *, brain_mask=None, groups=None) -> np.ndarray:
        """`fit`, then `predict` of the same slices.

        Parameters
        ----------
        X, y, brain_mask, groups :
            As in ``fit``.
        """
        return self.fit(X, y, brain_mask=brain_mask, groups=groups).predict(X, brain_mask=brain_mask)

    def save(self, path, *, card: ModelCard | None = None) -> None:
        """Write the fitted detector to a directory: JSON and safetensors, no pickle, no device.

        What belongs to one machine or one run stays behind: ``device``, ``memory``, ``verbose``, a
        `RandomState`, and the trainers' callbacks and checkpoints. Of a network that was given to start from,
        the shape is saved. Under ``torchrun`` only the process of rank 0 writes; the others return at once.

        Parameters
        ----------
        path : path-like
            A new directory, an empty one, or one with a model already, which is replaced.
        card : ModelCard or None
            How its images were made, where that is known; ``README.md`` beside the model shows it.

        Raises
        ------
        FileExistsError
            If ``path`` holds something other than a model.
        TypeError
            If `load` could not rebuild a parameter or a fitted part: a corruption, a perceptual distance or
            a network of your own. Nothing is written then; keep such an estimator with joblib.
        """
        check_is_fitted(self)
        save_detector(self, path, card)

    @classmethod
    def load(cls, path) -> Self:
        """Read the detector that `save` wrote to ``path``; works on any device (``device="auto"``).

        Raises
        ------
        FileNotFoundError, ValueError
            If something is missing, damaged, of a newer format, or no detector. Nothing in the files is
            executed.
        """
        return load_detector(cls, path)

    def to_config(self) -> dict[str, Any]:
        """The parameters without those of one machine; in place of a network that was given, its shape."""
        config = super().to_config()
        for name, _, kind in self._named_parts():
            if type(config.get(name)) is kind and issubclass(kind, PortableNetwork):
                config[name] = config[name].config
        return config

    def to_saved(self) -> tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]:
        """What a saved detector is, and the tensors of each file; see `madad._runtime.portable`.

        Raises
        ------
        TypeError
            If a fitted part is not of madad's own class.
        """
        description: dict[str, Any] = {"parameters": self.to_config(), "shared": []}
        tensors = {}
        for name, attribute, kind in self._named_parts():
            part, given = getattr(self, attribute), description["parameters"].get(name)
            if type(part) is not kind:  # a subclass may do something else
                raise TypeError(
                    f"{name} must be a {kind.__name__} to be saved, got {type(part).__name__}. "
                    f"Keep the estimator with joblib instead."
                )
            if isinstance(given, FrozenEstimator):
                if given.estimator is not part:
                    raise TypeError(
                        f"{name} must be FrozenEstimator({attribute}) to be saved, got another than it was "
                        f"fitted with, {' '.join(repr(given).split())}. Fit the detector again."
                    )
                description["parameters"][name] = None
                description["shared"].append(name)
            description[name], tensors[name] = part.to_saved()
        for attribute in self._saved_arrays:
            tensors[attribute.rstrip("_")] = {"values": getattr(self, attribute)}
        description["fitted"] = {name: getattr(self, name) for name in self._saved_attributes}
        description["calibration"] = {name: getattr(self, name) for name in CALIBRATED}
        return description, tensors

    @classmethod
    def from_saved(cls, description: dict[str, Any], tensors: dict[str, dict[str, np.ndarray]]) -> Self:
        """The detector whose `to_saved` gave ``description`` and ``tensors``."""
        detector = cls.from_config(description["parameters"])
        for name, attribute, kind in cls._named_parts():
            part = kind.from_saved(description[name], tensors[name])
            setattr(detector, attribute, part)
            if name in description["shared"]:
                setattr(detector, name, FrozenEstimator(part))
        for attribute in cls._saved_arrays:
            setattr(detector, attribute, tensors[attribute.rstrip("_")]["values"])
        for group, attributes in (("fitted", cls._saved_attributes), ("calibration", CALIBRATED)):
            for attribute in attributes:
                setattr(detector, attribute, description[group][attribute])
        return detector

    @classmethod
    def _named_parts(cls) -> list[tuple[str, str, Any]]:
        """Name, attribute and class of each saved part; the name is its parameter's and its file's."""
        return [(attribute.rstrip("_"), attribute, kind) for attribute, kind in cls._saved_parts.items()]

    @classmethod
    def tensor_files(cls) -> tuple[str, ...]:
        """Names of the files of tensors beside a saved detector, without their ending."""
        return tuple(attribute.rstrip("_") for attribute in (*cls._saved_parts, *cls._saved_arrays))

    def _gathered(self, stack: SliceStack, dtype, of_maps: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """What is made of the maps of each batch, in the layout of the stack."""
        gathered = stack.new_maps(dtype)
        for start, maps, _ in self._map_batches(stack):
            gathered[start : start + len(maps)] = of_maps(maps)
            release_pages(gathered)
        return stack.unfold(gathered)

    def _joined(
        self, stack: SliceStack, shown: np.ndarray, batches: Iterable[tuple[np.ndarray, np.ndarray]]
    ) -> np.ndarray:
        """Network images (n, C, H, W) of some rows, with their brains, as 0..1 in the stack's layout."""
        joined, start = np.zeros((len(stack), *self.image_shape_), np.float32), 0
        for images, brain in batches:
            rows = shown[start : (start := start + len(brain))]
            joined[rows] = np.where(brain[:, None], np.clip((images + 1) / 2, 0, 1), 0)
        if stack.is_flat:
            return joined.reshape(len(joined), -1)[:, : self.n_features_in_]
        if stack.values.ndim == 5:
            joined = joined.reshape(-1, stack.depth, *joined.shape[1:]).swapaxes(1, 2)
        return joined if stack.values.ndim > 3 else joined[:, 0]

    def _split(
        self, stack: SliceStack, groups, seed: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Slices to train on, slices held out for the thresholds, and the groups of the former."""
        groups = stack.spread(groups)
        train, held_out = hold_out(len(stack), groups, self.calibration_fraction, seed)
        self.calibration_rows_ = np.unique(stack.samples[held_out])
        train = stack.rows_to_train_on(train)
        return train, held_out, None if groups is None else np.asarray(groups)[train]

    def _check_calibration(self, stack: SliceStack) -> None:
        """Refuse what no threshold can be set with, before anything is trained."""
        if len(stack.values) < 2:
            raise ValueError(
                f"X must have at least 2 samples to train on some and calibrate on others, got "
                f"n_samples = {len(stack.values)}. Add healthy ones."
            )
        self._check_specificities()

    def _check_specificities(self) -> None:
        """Refuse what no threshold can be set with, whatever the slices are."""
        is_share = isinstance(self.contamination, Real) and 0 < float(self.contamination) <= 0.5
        if self.contamination != "auto" and not is_share:
            raise ValueError(
                f"contamination must be 'auto' or in (0, 0.5], got {self.contamination!r}. Use 'auto'."
            )
        usual = {"image_specificity": 0.95, "pixel_specificity": 0.99, "calibration_fraction": 0.15}
        for name, value in usual.items():
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must lie between 0 and 1, got {getattr(self, name)!r}. Use {value}."
                )

    def _calibrate(self, stack: SliceStack, healthy: np.ndarray, team: Team = ALONE) -> None:
        """Both thresholds, from the maps of held-out healthy slices: of lesions a user has no examples.

        Each process of a team maps its share of the samples, and has what is measured of all.
        """
        self._check_specificities()

        def both(maps: np.ndarray, brain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return pool_map(maps, brain), maps[brain]

        pooled, pixels = zip(*self._measured(stack.subset(healthy), both, team), strict=True)
        if self.contamination == "auto":
            offset = -np.quantile(np.concatenate(pooled), self.image_specificity)
        else:
            others = np.setdiff1d(np.arange(len(stack)), healthy)
            pooled_too = self._measured(stack.subset(others), pool_map, team) if len(others) else []
            offset = np.quantile(-np.concatenate([*pooled, *pooled_too]), self.contamination)
        self.map_threshold_ = healthy_threshold(np.concatenate(pixels), self.pixel_specificity)
        self.offset_ = float(offset)
        self.calibrated_with_ = self._map_settings()

    def _measured(self, stack: SliceStack, measure: Callable[..., Any], team: Team) -> list:
        """What ``measure`` makes of the maps and brain masks of all samples, in their order."""
        own = _share_of(stack, team)
        found = [measure(maps, brain) for maps, brain in self._map_samples(own)] if len(own) else []
        return list(chain.from_iterable(team.gather(found)))

    def _warn_if_stale(self) -> None:
        settings = self._map_settings()
        unused = self._without_effect(settings)
        changed = {
            name: value
            for name, value in settings.items()
            if value != self.calibrated_with_.get(name) and name not in unused
        }
        if changed:
            before = {name: self.calibrated_with_.get(name) for name in changed}
            warnings.warn(
                f"offset_ and map_threshold_ were calibrated with {before}, now {changed}. "
                f"Call calibrate(healthy_slices).",
                UserWarning,
                stacklevel=3,
            )

    def _score_stack(self, stack: SliceStack) -> np.ndarray:
        return -np.concatenate([pool_map(maps, brain) for maps, brain in self._map_samples(stack)])

    def _map_samples(self, stack: SliceStack) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Maps and brain masks of whole samples: (n, H, W) of some slices, (1, D, H, W) of each volume."""
        if stack.depth == 1:
            yield from ((maps, brain) for _, maps, brain in self._map_batches(stack))
            return
        batches = self._map_batches(stack)
        slices = (pair for _, maps, brain in batches for pair in zip(maps, brain, strict=True))
        for _, n_slices in zip(*np.unique(stack.samples, return_counts=True), strict=True):
            own = [next(slices) for _ in range(n_slices)]
            yield np.stack([maps for maps, _ in own])[None], np.stack([brain for _, brain in own])[None]

    def __getstate__(self):
        """State that holds no device: the weights of networks as arrays."""
        state = super().__getstate__().copy()
        packed = {}
        for name, kind in self._saved_parts.items():
            network = state.get(name)
            try:  # a subclass may do something else
                if type(network) is kind and isinstance(network, PortableNetwork):
                    packed[name] = network.to_saved()
                    del state[name]
                    continue
            except TypeError:  # its layers are no longer those of its config
                pass
            if isinstance(network, nn.Module):
                state[name] = copy.deepcopy(network).cpu()
        return state | {"_packed": packed}

    def __setstate__(self, state):
        state = dict(state)
        packed = state.pop("_packed")
        super().__setstate__(state)
        kinds: Any = self._saved_parts
        for name, saved in packed.items():
            setattr(self, name, kinds[name].from_saved(*saved))


def _share_of(stack: SliceStack, team: Team) -> SliceStack:
    """The slices of the samples that this process maps, volumes whole; shares follow the ranks' order."""
    samples = np.unique(stack.samples)
    own = samples[team.shares(len(samples))[team.rank]]
    return stack.subset(np.flatnonzero(np.isin(stack.samples, own)))
