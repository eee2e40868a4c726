"""The second stage: cached latents of healthy slices in, a trained masked U-Net out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from torch import nn

from madad._runtime.distributed import join
from madad._runtime.hashing import content_hash
from madad._runtime.random import generator_from, hold_out, isolated_seed
from madad._runtime.tensors import (
    default_batch_size,
    resolve_device,
    state_to_numpy,
)
from madad.base.sklearn_callbacks import NO_TASK, FitTask
from madad.base.slice_stack import SliceStack
from madad.diffusion import (
    CORRUPTIONS,
    EitherMask,
    MaskedDiffusionObjective,
    NoiseSchedule,
    RandomBlobs,
    RandomPatches,
)
from madad.nn import UNET_SIZES, MaskedUNet, UNetConfig
from madad.stages.augmentation import SliceAugmentation
from madad.stages.latent_cache import LatentCache, cache_latents
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


def denoiser_identity(autoencoder, stack: SliceStack, **settings) -> str:
    """A hash of all that decides what `train_denoiser` learns, for caches and checkpoints.

    Parameters
    ----------
    autoencoder : LatentAutoencoder
        The encoder, fitted.
    stack : SliceStack
        The healthy slices.
    **settings
        What `train_denoiser` is told besides, as far as it decides anything.
    """
    if isinstance(settings.get("denoiser"), str):
        settings["denoiser"] = UNET_SIZES[settings["denoiser"]]  # what the name stands for
    statistics = (autoencoder.latent_shift_, autoencoder.latent_scale_)
    network = (autoencoder.config_, state_to_numpy(autoencoder.network_))
    return content_hash((network, statistics, autoencoder.batch_size, stack.digest, settings))


def train_denoiser(
    autoencoder,
    stack: SliceStack,
    *,
    denoiser: str | UNetConfig | nn.Module,
    objective: MaskedDiffusionObjective,
    trainer: Trainer,
    seed: int,
    flip: bool = True,
    augmentation: SliceAugmentation | None = None,
    groups=None,
    cache_directory=None,
    task: FitTask = NO_TASK,
    verbose: bool = False,
) -> tuple[nn.Module, list[dict]]:
    """Train a masked U-Net on the latents of healthy slices.

    Parameters
    ----------
    autoencoder : LatentAutoencoder
        Encodes the slices; fitted, and frozen here.
    stack : SliceStack
        Healthy slices to train on.
    denoiser : str, UNetConfig or nn.Module
        A name in `madad.nn.UNET_SIZES`, a shape, or a network with the call of `MaskedUNet`.
    objective : MaskedDiffusionObjective
        Draws masks and fills, and scores the network's answer; see `make_objective`.
    trainer : Trainer
        How the network is optimised.
    seed : int
        Seed of the initial weights and of all draws.
    flip : bool
        Train on mirrored slices too.
    augmentation : SliceAugmentation or None
        Train on augmented copies too.
    groups : array-like of shape (n,), optional
        Subjects: all slices of one are held out for the trainer's validation, or none.
    cache_directory : path-like or None
        Where large latents are while training lasts: ``directory`` of `cache_latents`.
    task : FitTask
        The fit that this is a stage of.
    verbose : bool
        Show a progress bar, and say how large the cache of latents is.

    Returns
    -------
    denoiser : nn.Module
        The trained network, on the CPU.
    history : list of dict
        See `Trainer.optimise`.
    """
    trainer = trainer.resolved()
    generator = generator_from(seed)
    train, held_out = hold_out(len(stack), groups, trainer.validation_fraction, seed)
    team = join(resolve_device(autoencoder.device))
    caching = {"verbose": verbose, "generator": generator, "directory": cache_directory, "team": team}
    cache = cache_latents(autoencoder, stack.subset(train), flip=flip, augmentation=augmentation, **caching)
    validation = None
    if len(held_out):
        validation = cache_latents(autoencoder, stack.subset(held_out), flip=False, **caching)
    identity = ""
    if trainer.checkpoint_dir is not None and team.is_first:
        decisive = {"objective": objective, "seed": seed, "flip": flip, "augmentation": augmentation}
        subjects = None if groups is None else np.asarray(groups)
        identity = denoiser_identity(autoencoder, stack, groups=subjects, **decisive)
    batch_size = autoencoder.batch_size or default_batch_size(*stack.image_shape[1:])
    n_epochs = trainer.max_records(len(cache), batch_size)
    with (
        isolated_seed(seed),
        task.stage("denoiser", n_epochs) as stage,
        stage.epochs(trainer) as watched,
    ):
        unet = make_denoiser(denoiser, cache.mean.shape[1]).to(cache.mean.device)
        history = watched.optimise(
            unet,
            _loss_on(cache, objective),
            len(cache),
            generator=generator,
            batch_size=batch_size,
            validation_loss=None if validation is None else _loss_on(validation, objective),
            n_validation=0 if validation is None else len(validation),
            identity=identity,
            description="denoiser",
            verbose=verbose,
        )
    return unet.cpu(), history


def _loss_on(cache: LatentCache, objective: MaskedDiffusionObjective) -> Callable:
    """The loss of some cached latents, as `Trainer.optimise` calls it."""

    def loss(unet, index, generator, step):
        return objective(unet, cache.sample(index, generator), cache.brain_fraction[index], generator)

    return loss


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
    """The objective of the detector's flat parameters; see `madad.MaskedDiffusionAnomalyDetector`."""
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
    schedule = NoiseSchedule.cosine(n_timesteps)
    return MaskedDiffusionObjective(
        schedule, masks[mask_shape], corruption, brain_rule, mask_loss, mask_loss_weight
    )


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value
