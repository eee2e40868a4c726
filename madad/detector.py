"""`MaskedDiffusionAnomalyDetector`: the estimator. Images, latents, restored latents, maps, scores."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, fields
from numbers import Real
from typing import ClassVar, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from torch import nn

from madad._runtime.hashing import content_hash
from madad._runtime.tensors import compile_in_place, one_ahead, resolve_device
from madad.base.map_detector import AnomalyMapDetector
from madad.base.sklearn_callbacks import NO_TASK, CallbackSupport, FitTask, with_callbacks
from madad.base.slice_stack import SliceStack
from madad.diffusion import (
    CORRUPTIONS,
    MaskedDDIM,
    MaskedDiffusionObjective,
    NoiseSchedule,
    Repair,
    make_repair,
    teaches_repainting,
)
from madad.maps.recipe import MapRecipe, RestoredBatch
from madad.nn import MaskedUNet
from madad.presets import INFERENCE_KNOBS, PRESETS, choose_preset
from madad.stages.augmentation import SliceAugmentation
from madad.stages.autoencoder import LatentAutoencoder, shared_autoencoder
from madad.stages.denoiser import (
    OBJECTIVE_KNOBS,
    check_denoiser,
    denoiser_identity,
    make_objective,
    train_denoiser,
)
from madad.stages.memory import StageMemory
from madad.stages.restoration import restore_batches
from madad.training import StopRequest, Trainer, TrainingStoppedWarning, graceful_stop


class _Fit(NamedTuple):
    """What the two stages of one fit share."""

    healthy: SliceStack
    subjects: np.ndarray | None
    memory: StageMemory
    task: FitTask
    stop: StopRequest

    def was_stopped(self) -> bool:
        """Whether a signal, or a callback of scikit-learn's, ended a training early."""
        return self.stop.signal is not None or self.task.was_stopped


class MaskedDiffusionAnomalyDetector(CallbackSupport, AnomalyMapDetector):
    """Unsupervised anomaly detection in brain slices by masked latent diffusion (MAD-AD).

    ``fit`` sees healthy slices only. An autoencoder maps them to latents; random regions of the latents are
    noised, and a U-Net learns the clean latent and where the noise is. At test time the latent of a slice is
    taken as the noisy one, what the U-Net flags is repaired by a masked DDIM, and the difference to the
    repaired image, latent, or the flags themselves are the anomaly map.

    Parameters
    ----------
    preset : {"auto", "tiny", "small", "original", "paper"}
        Where the parameters below that are None take their values from (`madad.presets.PRESETS`).
        ``"paper"`` is the published method, ``"original"`` what the published code does instead. ``"auto"``
        is ``"small"``: the paper's method with corruptions that look more like disease, more weight on the
        mask head, repainting of what it flags, and networks that a CPU can train.
    autoencoder : LatentAutoencoder, FrozenEstimator, str or None
        The first stage: an estimator to be cloned and fitted, ``FrozenEstimator(fitted)`` to share one, or
        the name of a size.
    denoiser : str, UNetConfig, nn.Module or None
        The second stage's network: a name in `madad.nn.UNET_SIZES`, a shape, or a module that is called
        as `madad.nn.MaskedUNet` is.
    trainer : Trainer or None
        Trains the denoiser. What it leaves at None is the preset's ``"denoiser_training"``: ``Trainer(2)``
        means two epochs at most, and no more steps than the preset has. The autoencoder's trainer, where it
        has None, shares this one's checkpoints, callbacks, clock, precision and the like
        (`Trainer.SHARED`); for the rest it has the preset's ``"autoencoder_training"``.
    max_time : float or None
        Seconds of training for both stages together, above 0; None = no bound. The autoencoder has the
        preset's ``"autoencoder_time_share"`` of them and the denoiser the rest, or all where the autoencoder
        is frozen. It bounds a stage besides its trainer's own ``max_time``: the smaller holds. The trainers'
        ``clock`` counts. Latents and thresholds take their time on top.
    augmentation : SliceAugmentation or None
        Further copies of the healthy slices for the denoiser, moved, deformed, with another contrast and bias
        field. Not shown to help yet (benchmarks/README.md). None = no copies.
    corruption : {"gaussian", "mixture"}, Corruption or None
        What fills masked latents in training: Gaussian noise (the paper) or a mixture of nothing, foreign
        latents and smooth offsets.
    mask_shape : {"patches", "blobs", "either"} or None
        Shape of the masked regions: the paper's patches, blobs as lesions are, or for each slice one of them.
    mask_ratio : float, (float, float) or None
        Share of masked positions, drawn uniformly per slice; one number means (0, number). The area of
        blobs goes with its upper end.
    mask_patch_sizes, mask_patch_probabilities : tuple or None
        Sides of the patches in latent positions, and how likely each is.
    brain_rule : {"paper", "original"} or None
        Which positions may be masked: all with some brain, or those of blocks that are nearly all brain; see
        `madad.diffusion.masking.restrict_to_brain`.
    mask_loss : {"bce", "mse"} or None
        Loss of the mask head: binary cross-entropy (the paper) or the squared error of the probability (the
        original code).
    mask_loss_weight : float or None
        Weight of the mask head's loss, lambda in the paper; 0 or more. Trainings of less than a thousand
        steps do better with 1 than with the 0.1 of ``"small"``.
    n_timesteps : int or None
        Number of times T of the forward process; the paper's is 10.
    n_steps : int or None
        Steps of the sampler, 1..T; more of them take longer in proportion.
    eta : float or None
        Noise of each step, 0..1: 0 = deterministic DDIM, 1 = as noisy as DDPM; it is seeded.
    step_spacing : {"leading", "trailing"} or None
        Which times fewer than T steps visit: `madad.diffusion.NoiseSchedule.timesteps`.
    mask_threshold : float or None
        Positions with f_M above it are repaired, 0..1.
    repaint : float or None
        Above 0: erase what is flagged, at most this share of the brain, and predict it anew; 0 = move it step
        by step, as the paper does. Only a network whose corruption erases (``"mixture"`` does, ``"gaussian"``
        does not) can repaint: None = 0 with others. See `madad.diffusion.Repainting`.
    anomaly_map : {"image", "latent", "mask"} or None
        Difference of images, of latents, or the mean of f_M over the steps.
    reference : {"reconstruction", "input"} or None
        What the restored image is compared with: D(E(x)) (the original code) or x (the paper).
    map_difference : {"absolute", "squared", "relative"} or None
        How the image map measures a difference; see `madad.maps.image_map`.
    gamma : float or None
        Clip of the image map (not of the others) on the network's scale of -1..1; ``math.inf`` = no clipping.
    smoothing : {"gaussian", "guided"} or None
        A Gaussian over the map (the original code), or the smaller of it and a guided filter, which ends at
        the edges of the slice; see `madad.maps.finish_map`.
    smoothing_px : float or None
        Standard deviation of the Gaussian over the map; None = 5 px at 256, scaled to the slice's size.
    contamination : "auto" or float in (0, 0.5]
        ``"auto"``: ``offset_`` is such that ``1 - image_specificity`` of the held-out healthy slices are
        called anomalous. A number: the share of the training slices that are, as in scikit-learn.
    image_specificity, pixel_specificity : float
        Shares of held-out healthy slices and of their brain pixels that stay below the thresholds.
    calibration_fraction : float
        Share of the slices (or of the groups) that ``fit`` holds out to calibrate the thresholds.
    image_shape : (H, W) or (C, H, W) or None
        What flat rows are folded to; None = the exact square, or the next one.
    intensity_range : (float, float) or "data"
        What background and the brightest value are; see `LatentAutoencoder`.
    memory : None, str or joblib.Memory
        Caches the two training stages, so that a search over inference parameters trains once per fold.
        Latents of more than 2 GiB (`madad.stages.latent_cache.LARGE_CACHE`) are in a file there while
        they are used.
    batch_size : int or None
        Slices per forward pass; None = by the slice's size, on a GPU by its free memory. Powers of two keep a
        slice's result bitwise independent of its place in the batch.
    precision : {"float32", "bfloat16"}
        What the networks compute in at prediction. bfloat16 is faster on GPUs and on CPUs with matrix units
        for it, and moves maps: `benchmarks/README.md` says by how much.
    compile : bool
        Run the networks through ``torch.compile`` at prediction. It takes a minute at the first call, and on
        a CPU a C++ compiler.
    device : str or torch.device
        ``"auto"`` = the first GPU, else the CPU.
    random_state : int, RandomState or None
        Seed of all draws: held-out slices, weights, masks and noise. None = another one at each ``fit``.
    verbose : bool
        Show a progress bar with loss and time left for each stage.

    Attributes
    ----------
    autoencoder_ : LatentAutoencoder
        The fitted first stage.
    denoiser_ : MaskedUNet
        The fitted second stage, or a trained copy of the module that ``denoiser`` is.
    calibration_rows_ : ndarray of int
        The samples given to ``fit`` that were held out; not saved.
    offset_ : float
        ``decision_function = score_samples - offset_``.
    map_threshold_ : float
        Pixels of a map that reach it are anomalous; the smallest value above the stated share of healthy
        pixels.
    preset_, preset_values_ : str, dict
        The preset that applied, and what it had for the parameters of the maps: a saved model keeps both, so
        that a later version of the table cannot move its maps.
    image_shape_, intensity_range_, n_features_in_, history_ :
        See `LatentAutoencoder`; ``history_`` is the denoiser's.

    Notes
    -----
    The map and the scores of a slice are bitwise independent of its batch on a CPU. A slice's score is
    minus the mean of the largest 1 % of its map inside the brain (`madad.maps.pool_map`): the mean
    of the whole map would drown small lesions. Repair is restricted to latent positions with some brain.

    With scikit-learn 1.9 or later ``set_callbacks`` works as in `LatentAutoencoder`; the tasks are ``"fit"``,
    in it ``"autoencoder"`` and ``"denoiser"``, and in these the epochs. The first is the fit of another
    estimator: only callbacks that scikit-learn propagates, such as ``ProgressBar``, see its epochs. A stage
    that comes from ``memory`` is no task, and one that a callback stopped is not kept there.

    References
    ----------
    Beizaee, Lodygensky, Desrosiers, Dolz: MAD-AD: Masked Diffusion for Unsupervised Brain Anomaly
    Detection, IPMI 2025, arXiv 2502.16943.

    Examples
    --------
    >>> from madad.datasets import make_brain_slices
    >>> from madad.testing import tiny_detector
    >>> healthy = make_brain_slices(40, size=32, random_state=0)
    >>> det = tiny_detector(random_state=0).fit(healthy.images, groups=healthy.subjects)
    >>> det.predict_maps(healthy.images[:2]).shape
    (2, 32, 32)
    """

    _saved_parts: ClassVar[dict[str, type]] = {"autoencoder_": LatentAutoencoder, "denoiser_": MaskedUNet}
    _saved_attributes = (
        *AnomalyMapDetector._saved_attributes,
        *("history_", "preset_", "preset_values_", "sampler_seed_", "n_timesteps_", "can_repaint_"),
    )

    def __init__(
        self,
        preset: str = "auto",
        *,
        autoencoder=None,
        denoiser=None,
        trainer: Trainer | None = None,
        max_time: float | None = None,
        augmentation: SliceAugmentation | None = None,
        corruption=None,
        mask_shape: str | None = None,
        mask_ratio=None,
        mask_patch_sizes=None,
        mask_patch_probabilities=None,
        brain_rule: str | None = None,
        mask_loss: str | None = None,
        mask_loss_weight: float | None = None,
        n_timesteps: int | None = None,
        n_steps: int | None = None,
        eta: float | None = None,
        step_spacing: str | None = None,
        mask_threshold: float | None = None,
        repaint: float | None = None,
        anomaly_map: str | None = None,
        reference: str | None = None,
        map_difference: str | None = None,
        gamma: float | None = None,
        smoothing: str | None = None,
        smoothing_px: float | None = None,
        contamination="auto",
        image_specificity: float = 0.95,
        pixel_specificity: float = 0.99,
        calibration_fraction: float = 0.15,
        image_shape=None,
        intensity_range=(0.0, 1.0),
        memory=None,
        batch_size: int | None = None,
        precision: str = "float32",
        compile: bool = False,
        device="auto",
        random_state=None,
        verbose: bool = False,
    ):
        self.preset, self.autoencoder, self.denoiser = preset, autoencoder, denoiser
        self.trainer, self.max_time, self.augmentation = trainer, max_time, augmentation
        self.corruption, self.mask_shape, self.mask_ratio = corruption, mask_shape, mask_ratio
        self.mask_patch_sizes, self.mask_patch_probabilities = mask_patch_sizes, mask_patch_probabilities
        self.brain_rule, self.mask_loss, self.mask_loss_weight = brain_rule, mask_loss, mask_loss_weight
        self.n_timesteps, self.n_steps, self.eta, self.step_spacing = n_timesteps, n_steps, eta, step_spacing
        self.mask_threshold, self.repaint = mask_threshold, repaint
        self.anomaly_map, self.reference = anomaly_map, reference
        self.map_difference, self.gamma = map_difference, gamma
        self.smoothing, self.smoothing_px = smoothing, smoothing_px
        self.contamination, self.calibration_fraction = contamination, calibration_fraction
        self.image_specificity, self.pixel_specificity = image_specificity, pixel_specificity
        self.image_shape, self.intensity_range = image_shape, intensity_range
        self.memory, self.batch_size, self.precision = memory, batch_size, precision
        self.compile, self.device = compile, device
        self.random_state, self.verbose = random_state, verbose

    @with_callbacks
    def fit(self, X, y=None, *, brain_mask=None, groups=None):
        """Train both stages on healthy slices and calibrate the thresholds on held-out ones.

        Under ``torchrun`` each process calls it with all slices, and all end with the same detector; see
        `madad.training.Trainer`.

        Parameters
        ----------
        X : array-like of shape (n, H, W), (n, C, H, W), (n, C, D, H, W) or (n, n_features)
            Healthy slices, values in ``intensity_range``, background 0; arrays, tensors or memory maps.
            Of five axes, a sample is a volume of D axial slices: those with brain are trained on, all of a
            volume are held out or none, and it has one score.
        y : ignored
        brain_mask : array-like of bool, shape of ``X`` without channels, optional
            True = brain. None = where ``X`` is above the background.
        groups : array-like of shape (n,), optional
            Subjects: all samples of one are held out for calibration, or none.

        Returns
        -------
        self
        """
        for name in ("calibrated_with_", "can_repaint_", "preset_values_"):
            vars(self).pop(name, None)  # not fitted any more, until all is done
        self.preset_ = choose_preset(self.preset)
        stack = self._check_fit_slices(X, brain_mask)
        self._check_fit_parameters(stack)
        team, seeds = self._begin(stack, 4)
        split_seed, autoencoder_seed, denoiser_seed, self.sampler_seed_ = seeds
        train, held_out, subjects = self._split(stack, groups, split_seed)
        shares = isinstance(self.autoencoder, FrozenEstimator)
        task = FitTask.of_fit(self, 1 if shares else 2, X=X, y=y) if team.is_first else NO_TASK
        with graceful_stop() as stop:
            running = _Fit(stack.subset(train), subjects, StageMemory(self.memory, team), task, stop)
            if shares:
                self.autoencoder_ = shared_autoencoder(
                    self.autoencoder.estimator, stack, self.intensity_range
                )
            else:
                self.autoencoder_ = self._train_autoencoder(running, autoencoder_seed)
            self.denoiser_, self.history_ = self._train_denoiser(running, denoiser_seed)
        self.n_timesteps_, self.can_repaint_ = self._value_of("n_timesteps"), self._teaches_to_repaint()
        self.preset_values_ = {name: PRESETS[self.preset_][name] for name in INFERENCE_KNOBS}
        self._calibrate(stack, held_out, team)
        task.end_fit()
        return self

    def restore(self, X, *, brain_mask=None) -> np.ndarray:
        """The pseudo-healthy slices: float32 in 0..1, shape of ``X``, 0 outside the brain.

        ``intensity_range_`` is what 0..1 stands for.

        Parameters
        ----------
        X, brain_mask :
            As in `predict_maps`.
        """
        stack = self._check_slices(X, brain_mask)
        shown = stack.rows_with_brain()
        batches = self._restore_batches(stack.subset(shown), decode="restored")
        return self._joined(stack, shown, ((batch.restored, batch.brain) for batch in batches))

    def _value_of(self, name: str):
        """A parameter, or what the preset has where it is None."""
        value, fitted = getattr(self, name), getattr(self, "preset_values_", {})
        if value is not None:
            return value
        return fitted[name] if name in fitted else PRESETS[self.preset_][name]

    def _objective(self) -> MaskedDiffusionObjective:
        return make_objective(**{name: self._value_of(name) for name in OBJECTIVE_KNOBS})

    def _recipe(self) -> MapRecipe:
        return MapRecipe(**{field.name: self._value_of(field.name) for field in fields(MapRecipe)})

    def _sampler(self) -> MaskedDDIM:
        return MaskedDDIM(**{field.name: self._value_of(field.name) for field in fields(MaskedDDIM)})

    def _repair(self) -> Repair:
        return make_repair(self._sampler(), self._repaint_share())

    def _repaint_share(self) -> float:
        """``repaint``, or 0 where it is left open and the network never learnt to."""
        can_repaint = getattr(self, "can_repaint_", None)
        if can_repaint is None:
            can_repaint = self._teaches_to_repaint()
        return self._value_of("repaint") if can_repaint or self.repaint is not None else 0.0

    def _map_settings(self) -> dict:
        self._repair()  # refuses a share outside its range
        return asdict(self._sampler()) | {"repaint": self._repaint_share()} | asdict(self._recipe())

    def _teaches_to_repaint(self) -> bool:
        corruption = self._value_of("corruption")
        return teaches_repainting(CORRUPTIONS[corruption] if isinstance(corruption, str) else corruption)

    def _without_effect(self, settings: dict) -> tuple[str, ...]:
        return self._recipe().without_effect

    def _check_fit_parameters(self, stack: SliceStack) -> None:
        self._check_calibration(stack)
        objective, trainer = self._objective(), self._make_trainer()
        check_denoiser(self._value_of("denoiser"))
        if self.memory is not None or trainer.checkpoint_dir is not None:  # what has no hash fails here
            content_hash((objective, self.augmentation, self.memory is not None and trainer.decisive()))
        knobs = self._map_settings()
        NoiseSchedule.cosine(self._value_of("n_timesteps")).timesteps(knobs["n_steps"], knobs["step_spacing"])

    def _train_autoencoder(self, running: _Fit, seed: int) -> LatentAutoencoder:
        autoencoder = self._make_autoencoder(seed)

        def decisive():
            identity = autoencoder.identity(running.healthy, running.subjects)
            return identity, str(self.device), autoencoder.trainer.decisive()

        def train():
            with running.task.stage("autoencoder", fits=autoencoder):
                autoencoder.set_params(verbose=self.verbose).fit_stack(running.healthy, running.subjects)
            return autoencoder.set_params(trainer=autoencoder.trainer.portable())

        return running.memory.result("autoencoder", train, decisive, running.was_stopped)

    def _train_denoiser(self, running: _Fit, seed: int) -> tuple[nn.Module, list[dict]]:
        autoencoder, trainer, stop = self.autoencoder_, self._make_trainer(), running.stop
        stopped, _ = stop.agree(running.memory.team)
        if stopped and stop.signal is not None:
            warnings.warn(
                f"denoiser gets a single step, because {stop.signal.name} came before it. Make the same call "
                f"again to train it.",
                TrainingStoppedWarning,
                stacklevel=4,
            )
            # no checkpoint: the next fit ends with another autoencoder
            trainer = copy.copy(trainer).set_params(checkpoint_dir=None, max_steps=1)
        settings = {
            "denoiser": copy.deepcopy(self._value_of("denoiser")),
            "objective": self._objective(),
            "seed": seed,
            "augmentation": self.augmentation,
            "groups": running.subjects,
            # one column is its own mirror image
            "flip": getattr(autoencoder, "flip", False) and self.image_shape_[-1] > 1,
        }

        def decisive():
            known = settings | {"trainer": trainer.decisive()}
            return denoiser_identity(autoencoder, running.healthy, **known), str(self.device)

        def train():
            return train_denoiser(
                autoencoder,
                running.healthy,
                trainer=trainer,
                cache_directory=running.memory.directory,
                task=running.task,
                verbose=self.verbose,
                **settings,
            )

        return running.memory.result("denoiser", train, decisive, running.was_stopped)

    def _make_autoencoder(self, seed: int) -> LatentAutoencoder:
        autoencoder = self._value_of("autoencoder")
        if isinstance(autoencoder, str):
            unfitted = LatentAutoencoder(autoencoder)
        elif isinstance(autoencoder, LatentAutoencoder):
            unfitted = clone(autoencoder)
        else:
            raise TypeError(
                f"autoencoder must be a LatentAutoencoder, FrozenEstimator(fitted), the name of a size or "
                f"None, got {autoencoder!r}. Use LatentAutoencoder()."
            )
        # of a given trainer and not of its clone, which has copies of the callbacks
        own = Trainer() if isinstance(autoencoder, str) else autoencoder.trainer or Trainer()
        trainer = self._of_stage(own.sharing(self.trainer), "autoencoder")
        shared = {"device": self.device, "image_shape": None, "intensity_range": (0.0, 1.0), "verbose": False}
        return unfitted.set_params(**shared, trainer=trainer, random_state=seed)

    def _make_trainer(self) -> Trainer:
        return self._of_stage(Trainer() if self.trainer is None else self.trainer, "denoiser")

    def _of_stage(self, trainer: Trainer, stage: str) -> Trainer:
        """A stage's trainer with the preset's recipe where it has None, and the stage's share of the time."""
        if self.max_time is not None and not (isinstance(self.max_time, Real) and float(self.max_time) > 0):
            raise ValueError(f"max_time must be positive or None, got {self.max_time!r}. None is no bound.")
        preset = PRESETS[self.preset_]
        share = 0.0 if isinstance(self.autoencoder, FrozenEstimator) else preset["autoencoder_time_share"]
        seconds = math.inf if self.max_time is None else self.max_time
        seconds *= share if stage == "autoencoder" else 1 - share
        return trainer.resolved(at_most_s=seconds, **preset[f"{stage}_training"])

    def _restore_batches(
        self, stack: SliceStack, *, decode: str, needs_probability: bool = True
    ) -> Iterator[RestoredBatch]:
        device, network = resolve_device(self.device), self.autoencoder_.network_
        compile_in_place(self.compile, network.encoder, network.decoder, self.denoiser_)
        return restore_batches(
            self.autoencoder_,
            self.denoiser_,
            stack,
            self._repair(),
            NoiseSchedule.cosine(self.n_timesteps_),
            batch_size=self.batch_size or self.autoencoder_.batch_size_of(device),
            seed=self.sampler_seed_,
            device=device,
            decode=decode,
            needs_probability=needs_probability,
            precision=self.precision,
        )

    def _map_batches(self, stack: SliceStack) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """First row, maps (n, H, W) and brain masks of each batch."""
        recipe, shown, start = self._recipe(), stack.rows_with_brain(), 0
        batches = self._restore_batches(
            stack.subset(shown), decode=recipe.decode, needs_probability=recipe.needs_probability
        )

        def finished(batch: RestoredBatch) -> tuple[np.ndarray, np.ndarray]:
            return recipe.maps_of(batch, self.autoencoder_.config_.factor), batch.brain

        # beside a GPU the maps are finished while it is busy with the next batch
        on_gpu = resolve_device(self.device).type == "cuda"
        for maps, brain in (one_ahead if on_gpu else map)(finished, batches):
            rows, shown = shown[: len(maps)], shown[len(maps) :]
            stop = len(stack) if len(shown) == 0 else int(shown[0])
            places, n = rows - start, stop - start
            yield start, _among_empty(maps, places, n), _among_empty(brain, places, n)
            start = stop
        if start < len(stack):
            nothing = np.zeros((len(stack) - start, *self.image_shape_[1:]), np.float32)
            yield start, nothing, nothing > 0


def _among_empty(values: np.ndarray, rows: np.ndarray, n: int) -> np.ndarray:
    """Maps or masks of some rows among ``n``; those without brain are 0."""
    if len(rows) == n:
        return values
    spread = np.zeros((n, *values.shape[1:]), values.dtype)
    spread[rows] = values
    return spread
