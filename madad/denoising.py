"""The second stage: cached latents of healthy slices in, a trained masked U-Net out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import joblib
import torch
from torch import Tensor, nn

from madad._random import generator_from, hold_out, isolated_seed
from madad._tensors import fixed_batches, inference, to_network
from madad._validation import SliceStack
from madad.augmentation import SliceAugmentation
from madad.diffusion import (
    CORRUPTIONS,
    EitherMask,
    MaskedDiffusionObjective,
    NoiseSchedule,
    RandomBlobs,
    RandomPatches,
)
from madad.nn import UNET_SIZES, MaskedUNet, UNetConfig
from madad.training import Trainer

MASK_SHAPES = ("patches", "blobs", "either")
OBJECTIVE_KNOBS = (
    "n_timesteps",
    "corruption",
    "mask_shape",
    "mask_ratio",
    "mask_patch_sizes",
    "mask_patch_probabilities",
    "brain_rule",
    "mask_loss",
    "mask_loss_weight",
)


@dataclass(frozen=True)
class LatentCache:
    """Everything the denoiser is trained on, computed once (DESIGN, decision 4).

    Attributes
    ----------
    mean, logvar : Tensor of shape (n, c, h, w)
        The posterior of each slice, scaled; a draw from it costs one multiplication.
    brain_fraction : Tensor of shape (n, 1, h, w)
    """

    mean: Tensor
    logvar: Tensor
    brain_fraction: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def sample(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """A latent of each indexed slice, drawn from its posterior."""
        mean, logvar = self.mean[index], self.logvar[index]
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        return mean + (0.5 * logvar).exp() * noise


def cache_latents(
    autoencoder,
    stack: SliceStack,
    *,
    flip: bool,
    augmentation: SliceAugmentation | None = None,
    generator: torch.Generator,
) -> LatentCache:
    """Encode slices, with ``flip`` their left-right mirror images too, and augmented copies of both.

    Parameters
    ----------
    autoencoder : LatentAutoencoder
    stack : SliceStack
    flip : bool
    augmentation : SliceAugmentation or None
    generator : torch.Generator
        Source of the augmentation's randomness.

    Returns
    -------
    LatentCache
        Batch by batch, a batch's versions one after the other; in memory, on the autoencoder's device: twice
        (mean and log-variance) ``latent_channels / factor^2`` of the float32 images, times the versions.
    """
    device, parts = autoencoder._to_device(), []
    n_copies = 0 if augmentation is None else augmentation.n_copies
    versions = [(mirrored, copy) for mirrored in range(1 + flip) for copy in range(1 + n_copies)]
    with inference(autoencoder.network_):
        for index, n_valid in fixed_batches(len(stack), autoencoder.batch_size_of()):
            images, brain = stack.images(index), stack.brain(index)
            for mirrored, copy in versions:
                side = slice(None, None, -1 if mirrored else 1)
                x, inside = to_network(images[..., side].copy(), device), brain[..., side]
                if copy and augmentation is not None:
                    x, moved = augmentation(x, torch.from_numpy(inside.copy()).to(device), generator)
                    inside = moved.cpu().numpy()
                mean, logvar = autoencoder.encode(autoencoder.pad(x))
                fraction = autoencoder.brain_fraction(inside, device)
                parts.append([part[:n_valid].float().clone() for part in (mean, logvar, fraction)])
    return LatentCache(*(torch.cat(column) for column in zip(*parts, strict=True)))


def train_denoiser(
    autoencoder,
    stack: SliceStack,
    *,
    denoiser: str | UNetConfig | nn.Module,
    objective: dict,
    trainer: Trainer,
    seed: int,
    flip: bool = True,
    augmentation: SliceAugmentation | None = None,
    groups=None,
    verbose: bool = False,
) -> tuple[nn.Module, list[dict]]:
    """Train a masked U-Net on the latents of healthy slices.

    Parameters
    ----------
    autoencoder : LatentAutoencoder
        Fitted; frozen here.
    stack : SliceStack
        Healthy slices.
    denoiser : str, UNetConfig or nn.Module
        A name in `madad.nn.UNET_SIZES`, a shape, or a network with the call of `MaskedUNet`.
    objective : dict
        The arguments of `make_objective`.
    trainer : Trainer
    seed : int
    flip : bool
        Train on mirrored slices too.
    augmentation : SliceAugmentation or None
        Train on augmented copies too.
    groups : array-like of shape (n,), optional
        Subjects: all slices of one are held out for the trainer's validation, or none.
    verbose : bool

    Returns
    -------
    denoiser : nn.Module
        On the CPU.
    history : list of dict
        See `Trainer.optimise`.
    """
    loss = make_objective(**objective)
    generator = generator_from(seed)
    train, held_out = hold_out(len(stack), groups, trainer.validation_fraction, seed)
    cache = cache_latents(
        autoencoder, stack.subset(train), flip=flip, augmentation=augmentation, generator=generator
    )
    validation = None
    if len(held_out):
        validation = cache_latents(autoencoder, stack.subset(held_out), flip=False, generator=generator)
    with isolated_seed(seed):
        unet = make_denoiser(denoiser, cache.mean.shape[1]).to(cache.mean.device)

        def loss_on(latents):
            def batch_loss(module, index, generator, step):
                index = index.to(latents.mean.device)
                return loss(
                    module, latents.sample(index, generator), latents.brain_fraction[index], generator
                )

            return batch_loss

        history = trainer.optimise(
            unet,
            loss_on(cache),
            len(cache),
            generator=generator,
            batch_size=autoencoder.batch_size_of(),
            validation_loss=None if validation is None else loss_on(validation),
            n_validation=0 if validation is None else len(validation),
            identity=joblib.hash((cache, objective)) if trainer.checkpoint_dir is not None else "",
            description="denoiser",
            verbose=verbose,
        )
    return unet.cpu(), history


def make_denoiser(denoiser: str | UNetConfig | nn.Module, latent_channels: int) -> nn.Module:
    """Build a U-Net for latents of so many channels; a module is taken as it is."""
    check_denoiser(denoiser)
    if isinstance(denoiser, nn.Module):
        return denoiser
    config = UNET_SIZES[denoiser] if isinstance(denoiser, str) else denoiser
    return MaskedUNet(replace(config, latent_channels=latent_channels))


def check_denoiser(denoiser) -> None:
    """Raise ValueError for what `make_denoiser` cannot make a network of."""
    if isinstance(denoiser, UNetConfig | nn.Module) or (isinstance(denoiser, str) and denoiser in UNET_SIZES):
        return
    raise ValueError(
        f"denoiser must be one of {sorted(UNET_SIZES)}, a UNetConfig or an nn.Module, "
        f"got {denoiser!r}. Use 'small'."
    )


def make_objective(
    *,
    n_timesteps: int,
    corruption,
    mask_shape: str,
    mask_ratio,
    mask_patch_sizes,
    mask_patch_probabilities,
    brain_rule: str,
    mask_loss: str,
    mask_loss_weight: float,
) -> MaskedDiffusionObjective:
    """The objective that the detector's flat parameters describe."""
    if isinstance(corruption, str):
        if corruption not in CORRUPTIONS:
            raise ValueError(
                f"corruption must be one of {sorted(CORRUPTIONS)} or an object with fill(z0, generator), "
                f"got {corruption!r}. The paper's is 'gaussian'."
            )
        corruption = CORRUPTIONS[corruption]
    patches = RandomPatches(
        _hashable(mask_ratio), tuple(mask_patch_sizes), _hashable(mask_patch_probabilities)
    )
    blobs = RandomBlobs.of_ratio(patches.ratio)
    masks = {"patches": patches, "blobs": blobs, "either": EitherMask(patches, blobs)}
    if mask_shape not in masks:
        raise ValueError(f"mask_shape must be one of {MASK_SHAPES}, got {mask_shape!r}. Use 'patches'.")
    if not mask_loss_weight >= 0:
        raise ValueError(f"mask_loss_weight must be 0 or more, got {mask_loss_weight!r}. Use 0.001.")
    schedule = NoiseSchedule.cosine(n_timesteps)
    return MaskedDiffusionObjective(
        schedule, masks[mask_shape], corruption, brain_rule, mask_loss, mask_loss_weight
    )


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value
