"""The denoising autoencoder: a U-Net that takes coarse noise away, and lesions with it."""

from __future__ import annotations

import math
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madad._runtime.tensors import inference
from madad.baselines.base import UNetBaseline
from madad.training import Trainer


class DenoisingAutoencoder(UNetBaseline):
    """A U-Net that removes coarse noise in one pass; what it changes in a slice is anomalous.

    Parameters
    ----------
    denoiser : str or UNetConfig
        The U-Net: a name in `madad.nn.UNET_SIZES`, which reads blocks of 4 pixels, or a shape.
    trainer : Trainer or None
        Trains the U-Net. None, here or in its parameters, is 3000 steps of 16 slices at a rate
        of 0.001.
    noise_std : float
        Standard deviation of the noise before it is stretched, on images in 0..1.
    noise_resolution : int
        Independent values along the slice's longer side; in proportion along the other.
    flip : bool
        Train on left-right mirrored slices too.
    smoothing_px : float or None
        Standard deviation of the Gaussian over the map; None = 5 px at 256, scaled to the slice's size.
    contamination, image_specificity, pixel_specificity, calibration_fraction :
        See `madad.MaskedDiffusionAnomalyDetector`.
    image_shape, intensity_range, batch_size, device, random_state, verbose :
        See `madad.MaskedDiffusionAnomalyDetector`.

    Attributes
    ----------
    denoiser_, history_ :
        See `UNetBaseline`.
    offset_, map_threshold_, calibration_rows_, image_shape_, intensity_range_, n_features_in_ :
        See `madad.MaskedDiffusionAnomalyDetector`.

    Notes
    -----
    With brain mask ``b`` and noise ``eps``, drawn on a coarse grid, stretched bilinearly and moved around
    the slice by a random number of pixels, the loss and the map of a slice ``x`` are ::

        || b (f(x + b eps) - x) ||^2        a = mean over channels of |x - f(x)|

    Differs from the paper: the noise grid follows the slice's shape (16 x 16 where it is square, as the
    paper's at 128 x 128), and each slice, not each batch, is rolled by its own number of pixels; the loss is
    averaged over the brain and not over the image; the U-Net is ours, with attention in its middle, on blocks
    of 4 pixels; the map is smoothed with a Gaussian, where the authors' code leaves out a rim of two pixels
    of the brain and takes the median of 5 x 5 pixels.

    References
    ----------
    Kascenas, Pugeault, O'Neil: Denoising Autoencoders for Unsupervised Anomaly Detection in Brain MRI,
    MIDL 2022.

    Examples
    --------
    >>> from madad import Trainer
    >>> from madad.datasets import make_brain_slices
    >>> healthy = make_brain_slices(40, size=32, random_state=0)
    >>> baseline = DenoisingAutoencoder(denoiser="tiny", trainer=Trainer(2), random_state=0)
    >>> baseline.fit(healthy.images, groups=healthy.subjects).predict_maps(healthy.images[:2]).shape
    (2, 32, 32)
    """

    _training_parameters = ("noise_std", "noise_resolution")

    def __init__(
        self,
        *,
        denoiser="small",
        trainer: Trainer | None = None,
        noise_std: float = 0.2,
        noise_resolution: int = 16,
        flip: bool = True,
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
        self.denoiser = denoiser
        self.trainer = trainer
        self.noise_std = noise_std
        self.noise_resolution = noise_resolution
        self.flip = flip
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
        if not 0 < self.noise_std < math.inf:
            raise ValueError(
                f"noise_std must be positive and finite, got {self.noise_std!r}. The paper's is 0.2."
            )
        if not isinstance(self.noise_resolution, Integral) or self.noise_resolution < 1:
            raise ValueError(
                f"noise_resolution must be an integer of 1 or more, got {self.noise_resolution!r}. "
                f"The paper's is 16."
            )

    def _loss(self, unet: nn.Module, x: Tensor, brain: Tensor, generator: torch.Generator) -> Tensor:
        std = 2 * self.noise_std  # network images have twice the range
        noise = coarse_noise(x.shape, self.noise_resolution, generator).to(x.device)
        squares = brain * (_denoised(unet, x + std * noise * brain) - x).square()
        return squares.sum() / (brain.sum() * x.shape[1]).clamp_min(1)

    def _restored(self, x: Tensor, brain: np.ndarray) -> Tensor:
        unet = self.denoiser_.to(x.device)
        with inference(unet):
            return _denoised(unet, x)


def coarse_noise(shape, resolution: int, generator: torch.Generator) -> Tensor:
    """Gaussian noise on a coarse grid, of unit variance there, stretched and randomly rolled.

    Parameters
    ----------
    shape : (n, C, H, W)
        How many slices, channels and pixels.
    resolution : int
        Grid points along the longer side.
    generator : torch.Generator
        Source of the draws, on the CPU.

    Returns
    -------
    Tensor of shape (n, C, H, W), float32
        Every slice and channel has its own noise; each slice is rolled by its own number of pixels.
    """
    n, channels, height, width = shape
    grid = [max(1, round(resolution * side / max(height, width))) for side in (height, width)]
    coarse = torch.randn(n, channels, *grid, generator=generator)
    noise = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    rows = torch.randint(height, (n, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(width, (n, 1), generator=generator) + torch.arange(width)
    slices = torch.arange(n)[:, None, None]
    # advanced indices around a slice come first: (n, H, W, C)
    rolled = noise[slices, :, (rows % height)[:, :, None], (columns % width)[:, None, :]]
    return rolled.permute(0, 3, 1, 2)


def _denoised(unet: nn.Module, x: Tensor) -> Tensor:
    """The U-Net's clean image; it was made for latents at a time, and always hears of the first."""
    return unet(x, torch.ones(len(x), dtype=torch.long, device=x.device))[0].float()
