"""What the baselines share: slices in, training on most of them, thresholds from the others, maps out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from madad._runtime.hashing import content_hash
from madad._runtime.random import generator_from, hold_out, isolated_seed
from madad._runtime.tensors import default_batch_size, resolve_device, to_images, to_network
from madad.base.map_detector import AnomalyMapDetector
from madad.base.network_batches import NetworkBatch, network_batches
from madad.base.slice_stack import SliceStack
from madad.maps.smoothing import finish_map, smoothing_width
from madad.nn import UNET_SIZES, MaskedUNet, UNetConfig
from madad.training import Trainer

TRAINING = {"max_epochs": math.inf, "max_steps": 3000, "batch_size": 16, "learning_rate": 1e-3}
"""What a baseline's `madad.training.Trainer` leaves at None."""

IMAGE_PATCH = 4  # pixels: images are folded so for a U-Net that the presets feed with latents


def make_trainer(trainer: Trainer | None) -> Trainer:
    """A baseline's trainer, checked, with `TRAINING` where it has None."""
    return (Trainer() if trainer is None else trainer).resolved(**TRAINING)


class Baseline(AnomalyMapDetector):
    """A detector that one compares MAD-AD with: the same slices, held-out share and thresholds.

    A subclass has the parameters of `AnomalyMapDetector` and ``smoothing_px``, ``batch_size``, ``device``,
    ``random_state`` and ``verbose``, names in ``_map_parameters`` what else its maps depend on after ``fit``,
    and implements ``_train`` and ``_raw_maps``.
    """

    _map_parameters: ClassVar[tuple[str, ...]] = ()
    _saved_attributes = (*AnomalyMapDetector._saved_attributes, "map_seed_")

    def fit(self, X, y=None, *, brain_mask=None, groups=None):
        """Train on healthy slices and calibrate the thresholds on held-out ones.

        With the same ``random_state`` all detectors hold the same slices out.

        Parameters
        ----------
        X, y, brain_mask, groups :
            As in `madad.MaskedDiffusionAnomalyDetector.fit`.

        Returns
        -------
        self
        """
        vars(self).pop("calibrated_with_", None)  # not fitted any more, until all is done
        stack = self._check_fit_slices(X, brain_mask)
        self._check_calibration(stack)
        self._check_parameters()
        team, (split_seed, seed, self.map_seed_) = self._begin(stack, 3)
        train, held_out, subjects = self._split(stack, groups, split_seed)
        self._train(stack.subset(train), subjects, seed)
        self._calibrate(stack, held_out, team)
        return self

    def _check_parameters(self) -> None:
        """Refuse parameters outside their ranges, before anything is trained."""
        smoothing_width(self.smoothing_px, 1, 1)

    def _train(self, stack: SliceStack, groups: np.ndarray | None, seed: int) -> None:
        """Learn from healthy slices."""

    def _raw_maps(self, x: Tensor, brain: np.ndarray) -> np.ndarray:
        """Maps (n, H, W) in 0..1 of network images (n, C, H, W) in -1..1 and brain masks (n, H, W).

        They may depend on nothing but the slice itself: noise has the shape (1, C, H, W) and is drawn from
        ``generator_from(self.map_seed_)``.
        """
        raise NotImplementedError

    def _map_settings(self) -> dict:
        return {name: getattr(self, name) for name in ("smoothing_px", *self._map_parameters)}

    def _map_batches(self, stack: SliceStack) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        start = 0
        for _, x, brain, n_valid in self._network_batches(stack):
            raw = self._raw_maps(x, brain[:, 0])[:n_valid].astype(np.float32)
            inside = brain[:n_valid, 0]
            yield start, finish_map(raw, inside, self.smoothing_px), inside
            start += n_valid

    def _network_batches(self, stack: SliceStack) -> Iterator[NetworkBatch]:
        self._check_parameters()
        batch_size = self.batch_size or default_batch_size(*self.image_shape_[1:])
        return network_batches(stack, batch_size, resolve_device(self.device))


class RestoringBaseline(Baseline):
    """A baseline whose map is the difference to a pseudo-healthy slice.

    A subclass implements ``_restored``.
    """

    def restore(self, X, *, brain_mask=None) -> np.ndarray:
        """The pseudo-healthy slices: float32 in 0..1, shape of ``X``, 0 outside the brain.

        Parameters
        ----------
        X, brain_mask :
            As in `predict_maps`.
        """
        stack = self._check_slices(X, brain_mask)
        restored = (
            (self._restored(x, brain[:, 0])[:n_valid].cpu().numpy(), brain[:n_valid, 0])
            for _, x, brain, n_valid in self._network_batches(stack)
        )
        return self._joined(stack, np.arange(len(stack)), restored)

    def _restored(self, x: Tensor, brain: np.ndarray) -> Tensor:
        """The pseudo-healthy network images (n, C, H, W), float32, of what `_raw_maps` is given."""
        raise NotImplementedError

    def _raw_maps(self, x: Tensor, brain: np.ndarray) -> np.ndarray:
        return np.abs(to_images(x) - to_images(self._restored(x, brain))).mean(axis=1)


class UNetBaseline(RestoringBaseline):
    """A baseline that trains one U-Net on images.

    A subclass has the parameters ``denoiser`` (a name in `madad.nn.UNET_SIZES` or a `UNetConfig`),
    ``trainer`` and ``flip`` besides, names in ``_training_parameters`` what else decides what is learnt, and
    implements ``_loss`` and ``_restored``.

    Attributes
    ----------
    denoiser_ : MaskedUNet
        Only its ``z0_hat`` is used; the mask head is not trained.
    history_ : list of dict
        See `Trainer.optimise`.
    """

    _saved_parts: ClassVar[dict[str, type]] = {"denoiser_": MaskedUNet}
    _saved_attributes = (*Baseline._saved_attributes, "history_")
    _training_parameters: ClassVar[tuple[str, ...]] = ()

    def _loss(self, unet: nn.Module, x: Tensor, brain: Tensor, generator: torch.Generator) -> Tensor:
        """The mean loss of network images (n, C, H, W) with brain masks (n, 1, H, W) of 0 and 1."""
        raise NotImplementedError

    def _check_parameters(self) -> None:
        super()._check_parameters()
        self._unet_config(1)
        make_trainer(self.trainer)

    def _unet_config(self, channels: int) -> UNetConfig:
        config = self.denoiser
        if isinstance(config, str) and config in UNET_SIZES:
            config = replace(UNET_SIZES[config], patch_size=IMAGE_PATCH)
        if not isinstance(config, UNetConfig):
            raise ValueError(
                f"denoiser must be one of {sorted(UNET_SIZES)} or a UNetConfig, got {self.denoiser!r}. "
                f"Use 'small'."
            )
        return replace(config, latent_channels=channels)

    def _train(self, stack: SliceStack, groups: np.ndarray | None, seed: int) -> None:
        device, trainer = resolve_device(self.device), make_trainer(self.trainer)
        train, held_out = hold_out(len(stack), groups, trainer.validation_fraction, seed)
        mirrors = self.flip and self.image_shape_[-1] > 1  # one column is its own mirror image

        def loss_on(rows: np.ndarray, flip: bool):
            def batch_loss(unet, index, generator, step):
                chosen = rows[index.numpy()]
                x = to_network(stack.images(chosen), device)
                brain = torch.from_numpy(stack.brain(chosen).astype(np.float32)).to(device)
                if flip:
                    mirrored = (torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5).to(device)
                    x, brain = (torch.where(mirrored, part.flip(-1), part) for part in (x, brain))
                return self._loss(unet, x, brain, generator), {}

            return batch_loss

        identity = ""
        if trainer.checkpoint_dir is not None:
            decisive = {name: getattr(self, name) for name in ("flip", *self._training_parameters)}
            identity = content_hash((stack.digest, decisive, seed, groups))
        with isolated_seed(seed):
            unet = MaskedUNet(self._unet_config(self.image_shape_[0])).to(device)
            self.history_ = trainer.optimise(
                unet,
                loss_on(train, mirrors),
                len(train),
                generator=generator_from(seed),
                batch_size=default_batch_size(*self.image_shape_[1:]),
                validation_loss=loss_on(held_out, False) if len(held_out) else None,
                n_validation=len(held_out),
                description="denoiser",
                identity=identity,
                verbose=self.verbose,
            )
        self.denoiser_ = unet.cpu()
