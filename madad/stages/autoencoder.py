"""`LatentAutoencoder`: images to scaled latents and back, as a scikit-learn transformer."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from sklearn.base import TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from madad._runtime.distributed import Team
from madad._runtime.hashing import content_hash
from madad._runtime.random import generator_from, hold_out, isolated_seed
from madad._runtime.tensors import (
    default_batch_size,
    fixed_batches,
    forward_batch_size,
    inference,
    pad_with_background,
    resolve_device,
    state_to_numpy,
    to_images,
    to_network,
)
from madad.base.check_slices import as_numpy
from madad.base.network_batches import network_batches
from madad.base.sklearn_callbacks import NO_TASK, CallbackSupport, FitTask, with_callbacks
from madad.base.slice_estimator import SliceEstimator
from madad.base.slice_stack import SliceStack
from madad.metrics import reconstruction_errors
from madad.nn import AUTOENCODER_SIZES, AutoencoderConfig, AutoencoderKL, PatchDiscriminator, make_perceptual
from madad.pretrained.loading import load_autoencoder
from madad.stages.augmentation import SliceAugmentation
from madad.stages.autoencoder_loss import ReconstructionObjective, TrainedAutoencoder
from madad.stages.latent_statistics import LatentMoments, LatentStatistics, latent_report
from madad.training import Trainer

BACKGROUND = -1.0  # of a network image
COMPONENT_SLICES = 256
AUTO_SIZES = (("fast-f2", 96), ("fast-f4", 160), ("fast-f8", math.inf))
SAVED_ATTRIBUTES = ("n_features_in_", "image_shape_", "intensity_range_", "history_")


class LatentAutoencoder(CallbackSupport, TransformerMixin, SliceEstimator):
    """KL autoencoder between slices and latents of unit variance.

    Parameters
    ----------
    size : str or AutoencoderConfig
        A name in `madad.nn.AUTOENCODER_SIZES`, or a shape. ``"auto"`` is the one of the fast ones that
        suits the slices: a factor of 2 for sides of up to 96 pixels, 4 up to 160, else 8.
    latent_channels : int or None
        Overrides the size's number of latent channels.
    init : path-like, str or None
        Weights to start from, instead of a new network of ``size``: whatever
        `madad.pretrained.load_autoencoder` reads, a file, a directory or a hub id. Three-channel weights
        serve slices of one channel.
    pixel_loss : {"l1", "charbonnier"}
        What is taken of each pixel's error: its absolute value, or ``sqrt(error^2 + 0.001^2)``.
    kl_weight : float
        Weight of the KL divergence (per latent value) to the standard normal, 0 or more.
    structure_weight : float
        Weight of the L1 distance of image gradients at scales 1, 2 and 4, 0 or more.
    perceptual : None, "efficientnet-lite0" or callable (x_hat, x) -> Tensor
        A distance of features that is added to the loss; see `madad.nn.make_perceptual`. None = no such term.
        A model with a callable of your own works, and cannot be saved.
    perceptual_weight : float
        Weight of the perceptual distance, 0 or more; 0 = it is not even loaded.
    adversarial_weight : float
        Weight of the patch-adversarial term beside the adaptive one, 0 or more; 0 = no discriminator.
    adversarial_start : int
        Steps, 0 or more, before the discriminator is trained and heeded.
    learn_logvar : bool
        Learn the log-variance of the reconstruction term, as latent diffusion's code can.
    flip : bool
        Train on left-right mirrored slices too.
    augmentation : SliceAugmentation or None
        Train on a new augmented copy of each slice at each step, for ``n_copies`` out of ``n_copies + 1``.
    trainer : Trainer or None
        None = ``Trainer()``: what a trainer leaves at None is its default, or in a detector the preset's; a
        detector's checkpoint directory, callbacks and clock are shared where this one has None.
        With a ``validation_fraction``, slices (or whole groups) are held out, and the weights with the best
        reconstruction of them are kept.
    image_shape : (H, W) or (C, H, W) or None
        What flat rows are folded to; see `fit`.
    intensity_range : (float, float) or "data"
        What is mapped to the network's -1..1. With numbers, values outside raise an error; ``"data"``
        takes the smallest and largest value of the training data.
    batch_size : int or None
        Slices per forward pass of `transform`; results do not depend on it by more than rounding. None =
        by the size of a slice.
    device : str or torch.device
        ``"auto"`` = the first GPU, else the CPU.
    random_state : int, RandomState or None
        Seed of all draws: first weights, order of the slices, flips. None = another fit each time.
    verbose : bool
        Show a progress bar with the loss and the time left.

    Attributes
    ----------
    network_ : AutoencoderKL
        The trained network, in evaluation mode.
    latent_shift_, latent_scale_ : ndarray of shape (latent_channels,)
        A latent is ``(posterior mean - shift) * scale``: zero mean and unit variance per channel over the
        brain of the training slices.
    image_shape_ : tuple (C, H, W)
        Channels, height and width of the training slices, before padding.
    intensity_range_ : tuple (low, high)
        Intensities that stand for 0 and 1.
    history_ : list of dict
        The training's losses and speeds, a record for each epoch; see `Trainer.optimise`.
    config_ : AutoencoderConfig
        Shape of the fitted network.
    latent_shape_ : tuple (latent_channels, h, w)
        Shape of the latent of a slice.

    Notes
    -----
    Where it stands in the method is in ``docs/method.md``. The loss is
    `madad.stages.ReconstructionObjective`. The paper's autoencoder is a kl-f8 (Rombach et
    al., CVPR 2022), pretrained with perceptual and patch-adversarial terms and fine-tuned on healthy slices:
    ``init=path, perceptual="efficientnet-lite0", adversarial_weight=0.5``. Published pipelines multiply
    latents by one literal scale; here it is estimated.

    With scikit-learn 1.9 or later ``set_callbacks`` takes its callbacks, ``ProgressBar()`` for one. The task
    ``"fit"`` has a sub-task ``"epoch"`` for each record of ``history_``, which its end has as ``metadata``;
    a callback that returns True there ends training in good order. ``fitted_estimator`` is given at the end
    of ``"fit"`` only. Callbacks are no parameters, and are not pickled.
    """

    def __init__(
        self,
        size: str | AutoencoderConfig = "auto",
        *,
        latent_channels: int | None = None,
        init=None,
        pixel_loss: str = "l1",
        kl_weight: float = 1e-6,
        structure_weight: float = 1.0,
        perceptual=None,
        perceptual_weight: float = 0.1,
        adversarial_weight: float = 0.0,
        adversarial_start: int = 500,
        learn_logvar: bool = False,
        flip: bool = True,
        augmentation: SliceAugmentation | None = None,
        trainer: Trainer | None = None,
        image_shape=None,
        intensity_range=(0.0, 1.0),
        batch_size: int | None = None,
        device="auto",
        random_state=None,
        verbose: bool = False,
    ):
        self.size = size
        self.latent_channels = latent_channels
        self.init = init
        self.pixel_loss = pixel_loss
        self.kl_weight = kl_weight
        self.structure_weight = structure_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.learn_logvar = learn_logvar
        self.flip = flip
        self.augmentation = augmentation
        self.trainer = trainer
        self.image_shape = image_shape
        self.intensity_range = intensity_range
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []  # latents are float32 whatever the slices are
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "history_")

    def fit(self, X, y=None, *, brain_mask=None, groups=None):
        """Train on healthy slices.

        Parameters
        ----------
        X : array-like of shape (n, H, W), (n, C, H, W) or (n, n_features)
            Values in ``intensity_range``, background 0. Any height and width: slices are padded with
            background to a multiple of the network's factor. Flat rows are folded by ``image_shape``, by
            the exact square root, or padded to the next square.
        y : ignored
        brain_mask : array-like of bool, shape of ``X`` without channels, optional
            Where latent statistics are taken. None = where ``X`` > 0.
        groups : array-like of shape (n,), optional
            Subjects: all slices of one are held out for validation, or none.

        Returns
        -------
        self
        """
        stack = self._check_fit_slices(X, brain_mask)
        groups = stack.spread(groups)
        shown = stack.rows_to_train_on(np.arange(len(stack)))
        if len(shown) < len(stack):
            stack, groups = stack.subset(shown), None if groups is None else groups[shown]
        return self.fit_stack(stack, groups)

    @with_callbacks
    def fit_stack(self, stack: SliceStack, groups=None):
        """`fit` on slices that are already checked.

        Parameters
        ----------
        stack : SliceStack
            Healthy slices, each of them to be trained on or validated with.
        groups : array-like of shape (n,), optional
            The subject of each slice, as in `fit`.

        Returns
        -------
        self
        """
        self.__dict__.pop("history_", None)  # not fitted any more, until all is done
        trainer = (Trainer() if self.trainer is None else self.trainer).resolved()
        self.image_shape_, self.intensity_range_ = stack.image_shape, stack.intensity_range
        self.n_features_in_ = int(np.prod(stack.values.shape[1:]))
        device, batch_size = resolve_device(self.device), default_batch_size(*stack.image_shape[1:])
        team, (weights_seed, training_seed) = self._begin(stack, 2)
        train, held_out = hold_out(len(stack), groups, trainer.validation_fraction, training_seed)
        training, validation = stack.subset(train), stack.subset(held_out)
        n_epochs = trainer.max_records(len(training), batch_size)
        task = FitTask.of_fit(self, n_epochs, X=stack.selected) if team.is_first else NO_TASK
        self.network_, objective = self._start(training, weights_seed)
        self.latent_shift_ = np.zeros(self.config_.latent_channels, np.float32)
        self.latent_scale_ = np.ones(self.config_.latent_channels, np.float32)

        def loss(trained, index, generator, step):
            x = self.pad(self._varied(training, index.numpy(), device, generator))
            return objective(trained, x, generator, step)

        def validation_loss(trained, index, generator, step):
            x = self.pad(to_network(validation.images(index.numpy()), device))
            return objective.of_validation(trained, x)

        trained = TrainedAutoencoder(self.network_, learn_logvar=self.learn_logvar).to(device)
        identity = ""
        if trainer.checkpoint_dir is not None and team.is_first:
            identity = self.identity(stack, groups)
        with isolated_seed(training_seed), task.epochs(trainer) as watched:
            history = watched.optimise(
                trained,
                loss,
                len(training),
                generator=generator_from(training_seed),
                batch_size=batch_size,
                rival=objective.discriminator,
                rival_loss=objective.of_discriminator if objective.discriminator is not None else None,
                validation_loss=validation_loss if len(validation) else None,
                n_validation=len(validation),
                identity=identity,
                description="autoencoder",
                verbose=self.verbose,
            )
        statistics = self._measure_latents(stack, team)
        self.latent_shift_, self.latent_scale_ = statistics.shift, statistics.scale
        self.history_ = history
        task.end_fit()
        return self

    def transform(self, X) -> np.ndarray:
        """Latents of slices.

        Parameters
        ----------
        X : array-like
            Slices in any of the layouts of `fit`, of the height, width and channels that it saw.

        Returns
        -------
        ndarray of shape (n, latent_channels, h, w), float32
            The posterior's means, near zero mean and unit variance.
        """
        stack = self._check_slices(X)
        device, latents = self.to_device(), []
        with inference(self.network_):
            for _, x, _, n_valid in network_batches(stack, self.batch_size_of(device), device):
                mean, _ = self.encode(self.pad(x))
                latents.append(mean[:n_valid].float().cpu().numpy())
        return np.concatenate(latents)

    def inverse_transform(self, Z) -> np.ndarray:
        """Images of latents.

        Parameters
        ----------
        Z : array-like of shape (n, latent_channels, h, w)
            Scaled latents, as `transform` returns them.

        Returns
        -------
        ndarray of shape (n, H, W) or (n, C, H, W), float32 in 0..1
            Values are on the network's scale: ``intensity_range_`` is mapped to 0..1.
        """
        check_is_fitted(self)
        Z = as_numpy(Z).astype(np.float32)
        expected = self.latent_shape_
        if Z.ndim != 4 or Z.shape[1:] != expected or len(Z) == 0:
            raise ValueError(
                f"Z must have shape (n_samples, {', '.join(map(str, expected))}), got {Z.shape}. "
                f"Use what transform returned."
            )
        device, images = self.to_device(), []
        with inference(self.network_):
            for index, n_valid in fixed_batches(len(Z), self.batch_size_of(device)):
                images.append(to_images(self.decode(torch.from_numpy(Z[index]).to(device))[:n_valid]))
        joined = np.concatenate(images)
        return joined[:, 0] if self.image_shape_[0] == 1 else joined

    def score_report(self, X, *, brain_mask=None) -> dict[str, float]:
        """How good the reconstructions and the latents of slices are.

        Parameters
        ----------
        X, brain_mask :
            As in `fit`; healthy slices that were not trained on.

        Returns
        -------
        dict
            ``mae``, ``psnr``, ``ssim`` and ``high_frequency_ratio`` inside the brain, see
            `madad.metrics.reconstruction_errors`; ``latent_mean``, ``latent_std`` and ``dead_channels`` of
            the latent positions that hold brain, see `madad.stages.latent_statistics.latent_report`.

        Raises
        ------
        ImportError
            Without scikit-image (extra ``report``).
        """
        stack, device = self._check_slices(X, brain_mask), self.to_device()
        originals, copies = [], []
        latents: list[Tensor] = []
        variances: list[Tensor] = []
        with inference(self.network_):
            for _, x, brain, n_valid in network_batches(stack, self.batch_size_of(device), device):
                mean, logvar = self.encode(self.pad(x))
                inside = self.brain_fraction(brain[:n_valid], device)[:, 0] > 0
                originals.append(to_images(x[:n_valid]))
                copies.append(to_images(self.decode(mean)[:n_valid]))
                for parts, values in ((latents, mean), (variances, logvar.exp())):
                    parts.append(values[:n_valid].permute(0, 2, 3, 1)[inside].double().cpu())
        brain = stack.brain(np.arange(len(stack)))[:, 0]
        errors = reconstruction_errors(np.concatenate(originals), np.concatenate(copies), brain)
        return errors | latent_report(torch.cat(latents), torch.cat(variances))

    @property
    def config_(self) -> AutoencoderConfig:
        """The fitted network's shape."""
        return self.network_.config

    @property
    def latent_statistics(self) -> LatentStatistics:
        """What ``latent_shift_`` and ``latent_scale_`` do to latents."""
        return LatentStatistics(self.latent_shift_, self.latent_scale_)

    @property
    def latent_shape_(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent."""
        _, height, width = self.image_shape_
        factor = self.config_.factor
        return self.config_.latent_channels, -(-height // factor), -(-width // factor)

    def batch_size_of(self, device: torch.device) -> int:
        """The fixed number of slices per forward pass on ``device``."""
        _, height, width = self.image_shape_
        needed = self.config_.bytes_per_slice(height, width)
        return self.batch_size or forward_batch_size(height, width, device, needed)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the scaled latents of padded network images ``x``, (batch, C, H, W)."""
        posterior = self.network_.encode(x)
        return self.latent_statistics.scaled(posterior.mean, posterior.logvar)

    def decode(self, z: Tensor) -> Tensor:
        """Network images (batch, C, H, W), cropped to the slices' size, of scaled latents ``z``."""
        _, height, width = self.image_shape_
        return self.network_.decode(self.latent_statistics.unscaled(z))[..., :height, :width]

    def pad(self, x: Tensor) -> Tensor:
        """Pad network images ``x`` with background to a multiple of the network's factor."""
        return pad_with_background(x, self.config_.factor, BACKGROUND)

    def brain_fraction(self, brain: np.ndarray, device: torch.device) -> Tensor:
        """Share of brain in each latent position: ``brain`` (n, 1, H, W) to (n, 1, h, w) on ``device``."""
        mask = torch.from_numpy(np.ascontiguousarray(brain, dtype=np.float32)).to(device)
        factor = self.config_.factor
        return F.avg_pool2d(pad_with_background(mask, factor, 0.0), factor)

    def identity(self, stack: SliceStack, groups) -> str:
        """A hash of the slices in ``stack``, their ``groups`` and the settings: it names what is kept."""
        settings = self.get_params(deep=False) | {"trainer": None, "verbose": None, "device": None}
        if self.init is None:
            settings["size"] = self._config(stack.image_shape)  # what the name stands for
        else:
            settings["init"] = state_to_numpy(
                load_autoencoder(self.init, image_channels=stack.image_shape[0])
            )
        return content_hash((settings, stack.digest, None if groups is None else np.asarray(groups)))

    def to_config(self) -> dict[str, Any]:
        """The parameters without those of one machine; see `madad._runtime.portable`."""
        config = super().to_config()
        if isinstance(self.init, os.PathLike):
            config["init"] = os.fspath(self.init)
        return config

    def to_saved(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What was fitted, and the weights and latent statistics by name; see `madad._runtime.portable`."""
        description, weights = self.network_.to_saved()
        statistics = {"latent_shift_": self.latent_shift_, "latent_scale_": self.latent_scale_}
        return {
            "parameters": self.to_config(),
            "fitted": {name: getattr(self, name) for name in SAVED_ATTRIBUTES},
            "network": description,
        }, weights | statistics

    @classmethod
    def from_saved(cls, description: dict[str, Any], tensors: dict[str, np.ndarray]) -> Self:
        """The autoencoder whose `to_saved` gave ``description`` and ``tensors``."""
        autoencoder, weights = cls.from_config(description["parameters"]), dict(tensors)
        autoencoder.latent_shift_ = weights.pop("latent_shift_")
        autoencoder.latent_scale_ = weights.pop("latent_scale_")
        autoencoder.network_ = AutoencoderKL.from_saved(description["network"], weights)
        for name in SAVED_ATTRIBUTES:
            setattr(autoencoder, name, description["fitted"][name])
        return autoencoder

    def __getstate__(self):
        """State with arrays in place of the network: no device, and the same bytes for the same weights."""
        state = super().__getstate__().copy()
        if "network_" in state:
            state["_packed_network"] = state.pop("network_").to_saved()
        return state

    def __setstate__(self, state):
        state = dict(state)
        packed = state.pop("_packed_network", None)
        super().__setstate__(state)
        if packed is not None:
            self.network_ = AutoencoderKL.from_saved(*packed)

    def _start(self, stack: SliceStack, seed: int) -> tuple[AutoencoderKL, ReconstructionObjective]:
        """The network before training, on the device, and what it is trained for."""
        device, channels = resolve_device(self.device), stack.image_shape[0]
        with isolated_seed(seed):
            if self.init is not None:
                self.network_ = load_autoencoder(self.init, image_channels=channels)
                self._check_latent_channels()
            else:
                self.network_ = AutoencoderKL(self._config(stack.image_shape))
        if self.init is None and self.config_.linear_shortcut:
            self._start_from_components(stack, seed)
        perceptual = make_perceptual(self.perceptual) if self.perceptual_weight > 0 else None
        discriminator = None
        if self.adversarial_weight > 0:
            with isolated_seed(seed + 1):
                width = min(64, self.config_.base_channels)  # no wider than what it judges
                discriminator = PatchDiscriminator(channels, width, norm_groups=math.gcd(32, 2 * width))
                discriminator.to(device)
        return self.network_.to(device), ReconstructionObjective(
            self.pixel_loss,
            self.kl_weight,
            self.structure_weight,
            perceptual.to(device) if isinstance(perceptual, nn.Module) else perceptual,
            self.perceptual_weight,
            discriminator,
            self.adversarial_weight,
            self.adversarial_start,
        )

    def _config(self, image_shape: tuple[int, int, int]) -> AutoencoderConfig:
        size = self.size
        if isinstance(size, str) and size == "auto":
            longest = max(image_shape[1:])
            size = next(name for name, limit in AUTO_SIZES if longest <= limit)
        if isinstance(size, str) and size in AUTOENCODER_SIZES:
            size = AUTOENCODER_SIZES[size]
        if not isinstance(size, AutoencoderConfig):
            raise ValueError(
                f"size must be 'auto', one of {sorted(AUTOENCODER_SIZES)} or an AutoencoderConfig, "
                f"got {size!r}. Use 'auto'."
            )
        channels = self.latent_channels or size.latent_channels
        return replace(size, image_channels=image_shape[0], latent_channels=channels)

    def _check_latent_channels(self) -> None:
        if self.latent_channels not in (None, self.config_.latent_channels):
            raise ValueError(
                f"latent_channels must be None or those of init, {self.config_.latent_channels}, got "
                f"{self.latent_channels!r}. Leave it at None."
            )

    def _start_from_components(self, stack: SliceStack, seed: int) -> None:
        """Give the network blocks of brain from up to `COMPONENT_SLICES` slices."""
        rows = np.random.default_rng(seed).permutation(len(stack))[:COMPONENT_SLICES]
        x = self.pad(to_network(stack.images(rows), torch.device("cpu")))
        brain = self.brain_fraction(stack.brain(rows), torch.device("cpu"))
        p = self.config_.factor
        blocks = rearrange(x, "n c (h p) (w q) -> (n h w) c p q", p=p, q=p)
        inside = blocks[brain.flatten() > 0]
        self.network_.start_from_components(inside if len(inside) > 1 else blocks)

    def _varied(
        self, stack: SliceStack, rows: np.ndarray, device: torch.device, generator: torch.Generator
    ) -> Tensor:
        """Network images of some slices, half of them mirrored and most augmented, if that is asked for."""
        x = to_network(stack.images(rows), device)
        mirrored = torch.zeros(len(x), 1, 1, 1, dtype=torch.bool)
        if self.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
            x = torch.where(mirrored.to(device), x.flip(-1), x)
        if self.augmentation is not None:
            inside = stack.brain(rows)
            brain = torch.from_numpy(np.where(mirrored.numpy(), inside[..., ::-1], inside)).to(device)
            share = self.augmentation.n_copies / (self.augmentation.n_copies + 1)
            copied = torch.rand(len(x), 1, 1, 1, generator=generator) < share
            copies, _ = self.augmentation(x, brain, generator)
            x = torch.where(copied.to(x.device), copies, x)
        return x

    def _measure_latents(self, stack: SliceStack, team: Team) -> LatentStatistics:
        """Where the latents of healthy brain lie; each process of a team encodes its share of the slices."""
        device, moments = self.to_device(), LatentMoments(self.config_.latent_channels)
        share = team.shares(len(stack))[team.rank]
        own = stack.subset(np.arange(share.start, share.stop))
        with inference(self.network_):
            for _, x, brain, n_valid in network_batches(own, self.batch_size_of(device), device):
                inside = self.brain_fraction(brain[:n_valid], device)[:, 0] > 0
                moments.add(self.network_.encode(self.pad(x)).mean[:n_valid], inside)
        return moments.statistics(team)

    def to_device(self) -> torch.device:
        """Move the network to where it is used; returns that device."""
        device = resolve_device(self.device)
        self.network_.to(device)
        return device


def shared_autoencoder(autoencoder, stack: SliceStack, intensity_range) -> LatentAutoencoder:
    """An autoencoder that others use too, if it is fitted on slices of this shape and scale.

    Parameters
    ----------
    autoencoder : LatentAutoencoder
        The fitted one; whatever a user gave in its place is refused.
    stack : SliceStack
        The slices that it is to be used on.
    intensity_range : (float, float) or "data"
        Parameter of the estimator that uses it.

    Returns
    -------
    LatentAutoencoder
        The very same.

    Raises
    ------
    TypeError, ValueError
        If it is something else, or fitted on other slices.
    """
    if not isinstance(autoencoder, LatentAutoencoder):
        raise TypeError(
            f"autoencoder must be FrozenEstimator(LatentAutoencoder) when it is shared, "
            f"got {autoencoder!r}. Fit a LatentAutoencoder first."
        )
    check_is_fitted(autoencoder)
    if autoencoder.image_shape_ != stack.image_shape:
        raise ValueError(
            f"autoencoder must be fitted on slices of shape {stack.image_shape}, "
            f"got {autoencoder.image_shape_}. Fit it on slices of this size."
        )
    if "data" in (autoencoder.intensity_range, intensity_range):
        if autoencoder.intensity_range_ != stack.intensity_range:
            raise ValueError(
                f"autoencoder must be fitted with intensity_range {stack.intensity_range}, "
                f"got {autoencoder.intensity_range_}. Give both estimators the same numbers."
            )
    return autoencoder
