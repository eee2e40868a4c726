"""Distance to healthy patches, in the features of a network that was trained on photographs."""

from __future__ import annotations

import math
from functools import cache
from numbers import Integral
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import pairwise_distances_argmin_min
from torch import Tensor

from madad._runtime.tensors import (
    inference,
    pad_with_background,
)
from madad.base.slice_stack import SliceStack
from madad.baselines.base import Baseline
from madad.nn import EfficientNetLite0Features

STAGES = (2, 3)
STRIDE = 4  # of stage 2, whose grid is the finer one
MULTIPLE = 16  # pixels: slices are padded to it, which leaves two positions of stage 3 without enlargement
CANDIDATES_PER_PROTOTYPE = 10
PROJECTED_CHANNELS = 32


class PatchFeatureDistance(Baseline):
    """Patches whose features are far from those of all healthy patches are anomalous.

    Parameters
    ----------
    n_prototypes : int
        Healthy patches in the memory bank.
    upscale : {1, 2, 4}
        Slices are enlarged so many times, bilinearly, before the network sees them: a position of the map
        is ``4 / upscale`` pixels wide.
    smoothing_px : float or None
        Standard deviation of the Gaussian over the map; None = 5 px at 256, scaled to the slice's size.
    contamination, image_specificity, pixel_specificity, calibration_fraction :
        See `madad.MaskedDiffusionAnomalyDetector`.
    image_shape, intensity_range, batch_size, device, random_state, verbose :
        See `madad.MaskedDiffusionAnomalyDetector`.

    Attributes
    ----------
    prototypes_ : ndarray of shape (n_prototypes or fewer, n_channels), float32
        The memory bank; 64 channels for each channel of the slices.
    feature_scale_ : float
        Root mean square distance of healthy features from their mean: the distance that maps to 1/2.
    offset_, map_threshold_, calibration_rows_, image_shape_, intensity_range_, n_features_in_ :
        See `madad.MaskedDiffusionAnomalyDetector`.

    Raises
    ------
    ImportError
        If the package of the network's weights is missing (extra ``perceptual``).

    Notes
    -----
    The features ``f`` of a position are those of `madad.nn.EfficientNetLite0Features` after stages 2 and 3,
    at strides 4 and 8, each averaged over 3 x 3 positions, the coarser brought to the finer grid. With the
    memory bank ``M``, ::

        d = min over m in M of ||f - m||        a = d / (d + feature_scale_)

    brought to pixels bilinearly. ``M`` is a greedy coreset, at each step the candidate that is farthest from
    those chosen (in 32 dimensions, randomly projected), of 10 candidates per prototype that are drawn from
    the brains of the training slices and of their mirror images.

    Differs from the paper: a smaller network, which knows photographs at another scale; 10 candidates per
    prototype and not all patches; every channel is a grey image of its own; the slice's score is the mean of
    the largest 1 % of its map, without the paper's reweighting of the largest distance by the density of the
    bank there.

    References
    ----------
    Roth, Pemula, Zepeda, Schoelkopf, Brox, Gehler: Towards Total Recall in Industrial Anomaly Detection,
    CVPR 2022, arXiv 2106.08265.
    """

    _saved_arrays: ClassVar[tuple[str, ...]] = ("prototypes_",)
    _saved_attributes = (*Baseline._saved_attributes, "feature_scale_", "upscale_")

    def __init__(
        self,
        *,
        n_prototypes: int = 5000,
        upscale: int = 2,
        smoothing_px: float | None = None,
        contamination="auto",
        image_specificity: float = 0.95,
        pixel_specificity: float = 0.99,
        calibration_fraction: float = 0.15,
        image_shape=None,
        intensity_range=(0.0, 1.0),
        batch_size: int | None = None,
        device="auto",
        random_state=None,
        verbose: bool = False,
    ):
        self.n_prototypes = n_prototypes
        self.upscale = upscale
        self.smoothing_px = smoothing_px
        self.contamination = contamination
        self.image_specificity = image_specificity
        self.pixel_specificity = pixel_specificity
        self.calibration_fraction = calibration_fraction
        self.image_shape = image_shape
        self.intensity_range = intensity_range
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if not isinstance(self.n_prototypes, Integral) or self.n_prototypes < 1:
            raise ValueError(
                f"n_prototypes must be an integer of 1 or more, got {self.n_prototypes!r}. Use 5000."
            )
        if self.upscale not in (1, 2, 4):
            raise ValueError(f"upscale must be 1, 2 or 4, got {self.upscale!r}. Use 2.")

    def _train(self, stack: SliceStack, groups: np.ndarray | None, seed: int) -> None:
        self.upscale_ = self.upscale
        rng = np.random.default_rng(seed)
        quota = math.ceil(CANDIDATES_PER_PROTOTYPE * self.n_prototypes / (2 * len(stack)))
        candidates = []
        for _, x, brain, n_valid in self._network_batches(stack):
            for images, masks in ((x, brain), (x.flip(-1), brain[..., ::-1])):
                features, inside = self._features(images), self._positions(masks[:, 0])
                for i in range(n_valid):
                    healthy = features[i][inside[i]]
                    candidates.append(healthy[rng.permutation(len(healthy))[:quota]])
        healthy = np.concatenate(candidates)
        if len(healthy) == 0:  # no slice has brain, and no map will ask
            healthy = np.zeros((1, healthy.shape[1]), np.float32)
        spread = math.sqrt(healthy.var(axis=0, dtype=np.float64).sum())
        self.feature_scale_ = spread if spread > 0 else 1.0
        self.prototypes_ = healthy[greedy_coreset(healthy, self.n_prototypes, rng)]

    def _raw_maps(self, x: Tensor, brain: np.ndarray) -> np.ndarray:
        features, inside = self._features(x), self._positions(brain)
        squashed = np.zeros(inside.shape, np.float32)
        for i in range(len(x)):
            # slice by slice: how a matrix product rounds depends on how many rows it has
            if inside[i].any():
                _, distance = pairwise_distances_argmin_min(features[i][inside[i]], self.prototypes_)
                squashed[i][inside[i]] = distance / (distance + self.feature_scale_)
        return self._to_pixels(squashed, inside)

    def _features(self, x: Tensor) -> np.ndarray:
        """Features of network images (n, C, H, W): (n, h, w, n_channels), float32."""
        padded = pad_with_background(x, MULTIPLE, -1.0)
        if self.upscale_ > 1:
            padded = F.interpolate(padded, scale_factor=float(self.upscale_), mode="bilinear")
        grey = padded.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
        network = _network(str(x.device))
        with inference(network):
            averaged = [_averaged(stage) for stage in network(grey)]
        finer = averaged[0].shape[-2:]
        joined = torch.cat([F.interpolate(stage, finer, mode="bilinear") for stage in averaged], dim=1)
        return joined.view(len(x), -1, *finer).permute(0, 2, 3, 1).cpu().numpy()

    def _positions(self, brain: np.ndarray) -> np.ndarray:
        """Positions with some brain: (n, H, W) -> (n, h, w), bool."""
        width = STRIDE // self.upscale_
        padded = pad_with_background(torch.from_numpy(brain.astype(np.float32)), MULTIPLE, 0.0)
        return F.max_pool2d(padded, width).numpy() > 0

    def _to_pixels(self, maps: np.ndarray, inside: np.ndarray) -> np.ndarray:
        """Maps (n, h, w) as pixels (n, H, W); positions without brain have no weight."""
        _, height, width = self.image_shape_
        pixels = []
        for values in (maps, inside.astype(np.float32)):
            grid = torch.from_numpy(values)[:, None]
            stretched = F.interpolate(grid, scale_factor=STRIDE / self.upscale_, mode="bilinear")
            pixels.append(stretched[:, 0, :height, :width].numpy())
        return pixels[0] / np.maximum(pixels[1], np.finfo(np.float32).eps)


def greedy_coreset(features: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of ``n`` rows so that none of the others is far from all of them, or of all if there are fewer.

    Parameters
    ----------
    features : ndarray of shape (n_rows, n_channels), float32
        One feature vector in each row.
    n : int
        Rows to choose; more of them cover the others more closely.
    rng : numpy.random.Generator
        Draws the projection and the first row.

    Returns
    -------
    ndarray of int, increasing

    Notes
    -----
    The greedy algorithm for the k-centre problem, at most twice as far as the best choice: each row chosen is
    the farthest from those before it.
    """
    if len(features) <= n:
        return np.arange(len(features))
    n_channels = features.shape[1]
    if n_channels > PROJECTED_CHANNELS:
        features = features @ rng.standard_normal((n_channels, PROJECTED_CHANNELS), np.float32)
    norms = np.einsum("ij,ij->i", features, features)
    chosen = [int(rng.integers(len(features)))]
    nearest = np.full(len(features), np.inf, np.float32)
    while len(chosen) < n:
        last = chosen[-1]
        np.minimum(nearest, norms - 2 * (features @ features[last]) + norms[last], out=nearest)
        nearest[last] = -np.inf  # rounding must not bring it back
        chosen.append(int(nearest.argmax()))
    return np.sort(chosen)


@cache
def _network(device: str) -> EfficientNetLite0Features:
    """The features' network, read once per process and device."""
    return EfficientNetLite0Features(STAGES).to(device)


def _averaged(features: Tensor) -> Tensor:
    """The mean of each 3 x 3 neighbourhood, of as much of it as there is."""
    return F.avg_pool2d(features, 3, stride=1, padding=1, count_include_pad=False)
