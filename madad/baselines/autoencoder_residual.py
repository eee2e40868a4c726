"""The autoencoder's residual: what a narrow bottleneck, trained on healthy slices, cannot reconstruct."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from torch import Tensor

from madad._runtime.tensors import inference
from madad.base.slice_stack import SliceStack
from madad.baselines.base import RestoringBaseline, make_trainer
from madad.nn import AutoencoderConfig
from madad.stages.autoencoder import LatentAutoencoder, shared_autoencoder
from madad.training import Trainer

# 4 numbers for 16 x 16 pixels: 256 for a slice of 128 x 128, where the literature's dense ones have 128.
BOTTLENECK = AutoencoderConfig(
    latent_channels=4,
    base_channels=32,
    channel_multipliers=(1, 2, 4),
    n_res_blocks=1,
    patch_size=4,
    mid_attention=False,
    norm_groups=8,
)
VARIATIONAL_KL_WEIGHT = 1e-2


class AutoencoderResidual(RestoringBaseline):
    """An autoencoder with a narrow bottleneck; what it does not reconstruct is anomalous.

    Parameters
    ----------
    autoencoder : LatentAutoencoder, FrozenEstimator or None
        An estimator to be cloned and fitted, or ``FrozenEstimator(fitted)`` to share one. None = 4 numbers
        for each block of 16 x 16 pixels, trained with the L1 loss.
    variational : bool
        Give the default autoencoder a KL divergence that matters; see Notes. An autoencoder that is given
        has a ``kl_weight`` of its own.
    trainer : Trainer or None
        Trains the default autoencoder. None, here or in its
        parameters, is 3000 steps of 16 slices at a rate of 0.001.
    smoothing_px : float or None
        Standard deviation of the Gaussian over the map; None = 5 px at 256, scaled to the slice's size.
    contamination, image_specificity, pixel_specificity, calibration_fraction :
        See `madad.MaskedDiffusionAnomalyDetector`.
    image_shape, intensity_range, batch_size, device, random_state, verbose :
        See `madad.MaskedDiffusionAnomalyDetector`.

    Attributes
    ----------
    autoencoder_ : LatentAutoencoder
        The fitted one, or the one that is shared.
    offset_, map_threshold_, calibration_rows_, image_shape_, intensity_range_, n_features_in_ :
        See `madad.MaskedDiffusionAnomalyDetector`.

    Notes
    -----
    Of a slice ``x`` in 0..1, with the mean of the posterior as ``E(x)``, ::

        a = mean over channels of |x - D(E(x))|

    and the default's loss is, on -1..1, ``mean |x - D(z)| + w KL(q(z | x) || N(0, I)) / n``, ``z`` drawn from
    ``q``, ``n`` latent values, ``w`` 0 or 0.01. The residual of a `LatentAutoencoder` for diffusion, which
    reconstructs everything, lesions included, shows little.

    Differs from the paper: the bottleneck keeps its places (h, w) and is not a dense vector, and the network
    is a small residual one; the plain autoencoder also draws ``z``, with a variance that nothing keeps from
    vanishing. The map has residuals of both signs and is smoothed with a Gaussian, where the paper keeps
    the bright ones (its lesions are), erodes the brain mask, takes medians and drops small components.

    References
    ----------
    Baur, Denner, Wiestler, Navab, Albarqouni: Autoencoders for Unsupervised Anomaly Segmentation in Brain MR
    Images: A Comparative Study, Medical Image Analysis 69, 2021.

    Examples
    --------
    >>> from madad import Trainer
    >>> from madad.datasets import make_brain_slices
    >>> healthy = make_brain_slices(40, size=32, random_state=0)
    >>> baseline = AutoencoderResidual(variational=True, trainer=Trainer(2), random_state=0)
    >>> baseline.fit(healthy.images, groups=healthy.subjects).predict_maps(healthy.images[:2]).shape
    (2, 32, 32)
    """

    _saved_parts: ClassVar[dict[str, type]] = {"autoencoder_": LatentAutoencoder}

    def __init__(
        self,
        *,
        autoencoder=None,
        variational: bool = False,
        trainer: Trainer | None = None,
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
        self.autoencoder = autoencoder
        self.variational = variational
        self.trainer = trainer
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
        if self.autoencoder is not None:
            is_frozen = isinstance(self.autoencoder, FrozenEstimator)
            given = self.autoencoder.estimator if is_frozen else self.autoencoder
            if not isinstance(given, LatentAutoencoder):
                raise TypeError(
                    f"autoencoder must be a LatentAutoencoder, FrozenEstimator(fitted) or None, "
                    f"got {self.autoencoder!r}. Use LatentAutoencoder()."
                )
            if self.variational:
                raise ValueError(
                    f"variational must be False where an autoencoder is given, got {self.variational!r}. "
                    f"Set that autoencoder's kl_weight."
                )
        make_trainer(self.trainer)

    def _train(self, stack: SliceStack, groups: np.ndarray | None, seed: int) -> None:
        if isinstance(self.autoencoder, FrozenEstimator):
            self.autoencoder_ = shared_autoencoder(self.autoencoder.estimator, stack, self.intensity_range)
            return
        shared = {"device": self.device, "image_shape": None, "intensity_range": (0.0, 1.0)}
        unfitted = self._make_autoencoder().set_params(**shared, random_state=seed, verbose=self.verbose)
        self.autoencoder_ = unfitted.fit_stack(stack, groups)

    def _make_autoencoder(self) -> LatentAutoencoder:
        if self.autoencoder is not None:
            # of the given trainer and not of its clone, which has copies of the callbacks
            return clone(self.autoencoder).set_params(trainer=make_trainer(self.autoencoder.trainer))
        return LatentAutoencoder(
            BOTTLENECK,
            kl_weight=VARIATIONAL_KL_WEIGHT if self.variational else 0.0,
            structure_weight=0.0,
            trainer=make_trainer(self.trainer),
        )

    def _restored(self, x: Tensor, brain: np.ndarray) -> Tensor:
        autoencoder = self.autoencoder_
        with inference(autoencoder.network_.to(x.device)):
            z, _ = autoencoder.encode(autoencoder.pad(x))
            return autoencoder.decode(z).float()
