"""The second stage: cached latents of healthy slices in, a trained masked U-Net out."""

from __future__ import annotations

import math
import sys
import tempfile
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from madad._callbacks import NO_TASK, FitTask
from madad._distributed import ALONE, BUCKET, Team, join
from madad._hashing import content_hash
from madad._random import generator_from, hold_out, isolated_seed
from madad._tensors import (
    default_batch_size,
    fixed_batches,
    inference,
    resolve_device,
    state_to_numpy,
    to_network,
)
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

LARGE_CACHE = 2 * 2**30  # bytes
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


class RowsOnDisk:
    """float32 rows in a temporary file, of which only those that are asked for come into memory.

    Parameters
    ----------
    directory : path-like
        Made where it is missing. The file has no name in it, so that nothing is left of it when it is not
        needed any more or the process is killed.
    shape : tuple of int
    device : torch.device
        Where rows are read to.

    Raises
    ------
    OSError
        When rows are written and the disk is full.
    """

    def __init__(self, directory, shape: tuple[int, ...], device: torch.device):
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.directory, self.shape, self.device = directory, shape, device
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return self.shape[0]

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        # written, not mapped: a full disk is an error then, and not the process's end
        left = memoryview(values.cpu().numpy().tobytes())
        try:
            self._file.seek(4 * rows.start * math.prod(self.shape[1:]))
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(
                f"cache_directory must have room for {4 * math.prod(self.shape)} bytes, got {self.directory} "
                f"({error}). Free the disk, or let the detector's memory be elsewhere."
            ) from error

    def __getitem__(self, index: Tensor) -> Tensor:
        # as far as rows are written, until those asked for are copied
        mapped = np.memmap(self._file, np.float32, "r").reshape(-1, *self.shape[1:])
        return torch.from_numpy(np.asarray(mapped[index.cpu().numpy()])).to(self.device)


@dataclass(frozen=True)
class LatentCache:
    """Everything the denoiser is trained on, computed once (DESIGN, decision 4).

    Attributes
    ----------
    mean, logvar : Tensor or RowsOnDisk of shape (n, c, h, w)
        The posterior of each slice, scaled; a draw from it costs one multiplication.
    brain_fraction : Tensor or RowsOnDisk of shape (n, 1, h, w)
    """

    mean: Tensor | RowsOnDisk
    logvar: Tensor | RowsOnDisk
    brain_fraction: Tensor | RowsOnDisk

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
    directory=None,
    team: Team = ALONE,
    verbose: bool = False,
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
    directory : path-like or None
        Where a cache of more than `LARGE_CACHE` bytes is kept; None = in memory, on the autoencoder's device.
    team : Team
        Each process encodes its share and has all. Augmented copies, whose draws follow one another, each
        makes itself.
    verbose : bool
        Say beforehand how large the cache becomes, and where it is.

    Returns
    -------
    LatentCache
        All slices in one version after the other. It takes twice (mean and log-variance)
        ``latent_channels / factor^2`` of the float32 images, times the versions.
    """
    device = autoencoder._to_device()
    n_copies = 0 if augmentation is None else augmentation.n_copies
    versions = [(mirrored, copy) for mirrored in range(1 + flip) for copy in range(1 + n_copies)]
    channels, height, width = autoencoder.latent_shape_
    shapes = [(len(versions) * len(stack), depth, height, width) for depth in (channels, channels, 1)]
    n_bytes = 4 * sum(map(math.prod, shapes))
    on_disk = directory is not None and n_bytes > LARGE_CACHE
    if verbose and team.rank == 0:
        place = f"on disk, below {directory}" if on_disk else f"in memory ({device})"
        print(
            f"latents of {len(stack)} slices, {len(versions)} of each: {n_bytes / 2**20:.1f} MiB {place}",
            file=sys.stderr,
        )
    if on_disk:
        cache = LatentCache(*(RowsOnDisk(directory, shape, device) for shape in shapes))
    else:
        cache = LatentCache(*(torch.empty(shape, device=device) for shape in shapes))
    shares = team.shares(len(stack))
    own = shares[team.rank] if augmentation is None else range(len(stack))
    batch_size = autoencoder.batch_size_of(device)
    if augmentation is not None:  # its draws go by batches, which must not depend on a GPU's free memory
        batch_size = autoencoder.batch_size or default_batch_size(*stack.image_shape[1:])
    with inference(autoencoder.network_):
        for places, n_valid in fixed_batches(len(own), batch_size):
            index = own.start + places
            images, brain = stack.images(index), stack.brain(index)
            for version, (mirrored, copy) in enumerate(versions):
                side = slice(None, None, -1 if mirrored else 1)
                x, inside = to_network(images[..., side].copy(), device), brain[..., side]
                if copy and augmentation is not None:
                    x, moved = augmentation(x, torch.from_numpy(inside.copy()).to(device), generator)
                    inside = moved.cpu().numpy()
                mean, logvar = autoencoder.encode(autoencoder.pad(x))
                start = version * len(stack) + int(index[0])
                rows = slice(start, start + n_valid)
                cache.mean[rows], cache.logvar[rows] = mean[:n_valid].float(), logvar[:n_valid].float()
                cache.brain_fraction[rows] = autoencoder.brain_fraction(inside, device)[:n_valid]
    if augmentation is None and team.size > 1:
        for part in (cache.mean, cache.logvar, cache.brain_fraction):
            for start in range(0, len(part), len(stack)):
                for source, share in enumerate(shares):
                    _copy_rows(part, range(start + share.start, start + share.stop), source, team)
    return cache


def _copy_rows(part: Tensor | RowsOnDisk, rows: range, source: int, team: Team) -> None:
    """Give all processes the rows of a cache that one of them has."""
    step = max(1, BUCKET // math.prod(part.shape[1:]))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        if team.rank == source:
            team.copy_([part[torch.arange(start, stop)]], source)
        else:
            values = torch.empty(stop - start, *part.shape[1:], device=part.device)
            team.copy_([values], source)
            part[slice(start, stop)] = values


def what_is_learnt(autoencoder, stack: SliceStack, **settings) -> str:
    """A hash of the encoder, the slices and what `train_denoiser` is told besides, for files and caches."""
    settings["objective"] = make_objective(**settings["objective"])  # what the names stand for
    if isinstance(settings.get("denoiser"), str):
        settings["denoiser"] = UNET_SIZES[settings["denoiser"]]
    statistics = (autoencoder.latent_shift_, autoencoder.latent_scale_)
    network = (autoencoder.config_, state_to_numpy(autoencoder.network_))
    return content_hash((network, statistics, autoencoder.batch_size, stack.digest, settings))


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
    cache_directory=None,
    task: FitTask = NO_TASK,
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
    cache_directory : path-like or None
        Where large latents are while training lasts: ``directory`` of `cache_latents`.
    task : FitTask
        The fit that this is a stage of.
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
    team = join(resolve_device(autoencoder.device))
    caching = {"verbose": verbose, "generator": generator, "directory": cache_directory, "team": team}
    cache = cache_latents(autoencoder, stack.subset(train), flip=flip, augmentation=augmentation, **caching)
    validation = None
    if len(held_out):
        validation = cache_latents(autoencoder, stack.subset(held_out), flip=False, **caching)
    identity = ""
    if trainer.checkpoint_dir is not None and team.leads:
        identity = what_is_learnt(
            autoencoder,
            stack,
            objective=objective,
            seed=seed,
            flip=flip,
            augmentation=augmentation,
            groups=None if groups is None else np.asarray(groups),
        )
    batch_size = autoencoder.batch_size or default_batch_size(*stack.image_shape[1:])
    n_epochs = trainer.max_records(len(cache), batch_size)
    with (
        isolated_seed(seed),
        task.stage("denoiser", n_epochs) as stage,
        stage.epochs(trainer) as watched,
    ):
        unet = make_denoiser(denoiser, cache.mean.shape[1]).to(cache.mean.device)

        def loss_on(latents):
            def batch_loss(module, index, generator, step):
                z0 = latents.sample(index, generator)
                return loss(module, z0, latents.brain_fraction[index], generator)

            return batch_loss

        history = watched.optimise(
            unet,
            loss_on(cache),
            len(cache),
            generator=generator,
            batch_size=batch_size,
            validation_loss=None if validation is None else loss_on(validation),
            n_validation=0 if validation is None else len(validation),
            identity=identity,
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
