"""The methods of the evidence table and the ablations of ours, with the same time and networks of one size.

A method is a function of `Conditions` that gives an unfitted detector. All of them come from the package and
share its data path, trainer, held-out slices and thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from madad import LatentAutoencoder, MaskedDiffusionAnomalyDetector, Trainer
from madad.base.map_detector import AnomalyMapDetector
from madad.baselines import (
    AutoencoderResidual,
    DenoisingAutoencoder,
    ImplicitGuidanceDiffusion,
    IntensityThreshold,
    PartialDiffusion,
    PatchFeatureDistance,
)
from madad.maps.differences import image_map
from madad.maps.smoothing import finish_map
from madad.presets import PRESETS
from madad.training.settings import DEFAULTS

SMALL_STEPS = 3000  # of each network of this size, where nothing else is said
BOTTLENECK_STEPS = 1000  # of AE and VAE, at most: on validation subjects more of them found less
OUR_GAMMA = PRESETS["small"]["gamma"]
SIZES = ("tiny", "small", "paper")


@dataclass(frozen=True)
class Conditions:
    """What all methods of a run have in common.

    Parameters
    ----------
    seed : int
    budget_s : float or None
        Seconds to train, by ``clock``; None = by steps.
    steps : int or None
        Of all networks of a method together; None = the number of steps or epochs that the size has for
        each.
    size : {"tiny", "small", "paper"}
        Of the networks: for tests, for two CPU cores, for a GPU.
    precision : str
        Of `Trainer`.
    device : str
    clock : {"wall", "cpu"}
        Of `Trainer`.
    checkpoints : Path or None
        Where trainings are written down, to be found again after an interruption, or by another method that
        has the same one.
    """

    seed: int
    budget_s: float | None = None
    steps: int | None = None
    size: str = "small"
    precision: str = "auto"
    device: str = "auto"
    clock: str = "wall"
    checkpoints: Path | None = None

    def trainer(self, share: float = 1.0, *, batch_size: int = 16, learning_rate: float = 1e-3) -> Trainer:
        """For all of a budget of time, which a detector splits; without one, for ``share`` of the steps."""
        extent = {
            "tiny": {"max_steps": 20},
            "small": {"max_steps": SMALL_STEPS},
            "paper": {"max_epochs": 300},
        }
        bounds: dict = {"max_epochs": math.inf, "max_steps": math.inf}
        if self.budget_s is not None:
            bounds |= {"max_time": self.budget_s, "clock": self.clock}
        elif self.steps is not None:
            bounds |= {"max_steps": max(round(share * self.steps), 1)}
        else:
            bounds |= extent[self.size]
        if self.size == "paper":
            batch_size, learning_rate = 96, min(learning_rate, 5e-4)
        return Trainer(
            **bounds,
            batch_size=batch_size,
            learning_rate=learning_rate,
            ema_decay=DEFAULTS["ema_decay"],
            precision=self.precision,
            checkpoint_dir=self.checkpoints,
            checkpoint_every_s=60.0,
        )

    @property
    def common(self) -> dict:
        """Parameters that every detector has."""
        return {"device": self.device, "random_state": self.seed, "verbose": False}

    @property
    def unet(self) -> dict:
        """Parameters that every baseline with a U-Net has."""
        name = {"tiny": "tiny", "small": "small", "paper": "L"}[self.size]
        return {"denoiser": name, "trainer": self.trainer()} | self.common


Method = Callable[[Conditions], AnomalyMapDetector]


def mad_ad(preset: str | None = None, *, autoencoder: str | None = None, **parameters) -> Method:
    """MAD-AD with a preset's method in the run's size, and some parameters changed."""

    def build(conditions: Conditions) -> MaskedDiffusionAnomalyDetector:
        sizes = {
            "tiny": ("tiny", "tiny"),
            "small": ("auto", "small"),
            "paper": ("kl-f8", "L"),
        }
        latents, unet = sizes[conditions.size]
        own = preset or {"tiny": "tiny", "small": "small", "paper": "small"}[conditions.size]
        share = PRESETS[own]["autoencoder_time_share"]  # of steps too
        return MaskedDiffusionAnomalyDetector(
            own,
            **{
                "autoencoder": LatentAutoencoder(
                    autoencoder or latents,
                    trainer=conditions.trainer(share, batch_size=32, learning_rate=2e-3),
                ),
                "denoiser": unet,
                "trainer": conditions.trainer(1 - share),
                "max_time": conditions.budget_s,
            },
            **conditions.common,
            **parameters,
        )

    return build


def intensity(tail: str, *, equalize: bool = False) -> Method:
    """A threshold on the intensity itself."""
    return lambda conditions: IntensityThreshold(tail=tail, equalize=equalize, **conditions.common)


def autoencoder(*, variational: bool) -> Method:
    """The residual of an autoencoder with a narrow bottleneck."""

    def build(conditions: Conditions) -> AutoencoderResidual:
        trainer = conditions.trainer()
        if conditions.size == "small":
            steps = SMALL_STEPS if conditions.steps is None else conditions.steps
            trainer.set_params(max_steps=min(steps, BOTTLENECK_STEPS))
        return AutoencoderResidual(variational=variational, trainer=trainer, **conditions.common)

    return build


class DenoisingAutoencoderWithOurMap(DenoisingAutoencoder):
    """The DAE's restored slice compared with the slice as MAD-AD's is: what of ours is the map alone."""

    def _map_batches(self, stack):
        start = 0
        for _, x, brain, n_valid in self._network_batches(stack):
            restored = self._restored(x, brain[:, 0])[:n_valid].clamp(-1, 1).cpu().numpy()
            images, inside = x[:n_valid].cpu().numpy(), brain[:n_valid, 0]
            raw = image_map(restored, images, gamma=OUR_GAMMA, difference="relative", brain_mask=inside)
            yield start, finish_map(raw, inside, self.smoothing_px, (images + 1) / 2), inside
            start += n_valid


METHODS: dict[str, Method] = {
    "intensity, bright": intensity("bright"),
    "intensity, dark": intensity("dark"),
    "intensity, both tails": intensity("both"),
    "intensity, bright, equalised": intensity("bright", equalize=True),
    "intensity, dark, equalised": intensity("dark", equalize=True),
    "AE": autoencoder(variational=False),
    "VAE": autoencoder(variational=True),
    "DAE": lambda conditions: DenoisingAutoencoder(**conditions.unet),
    "DAE, our map": lambda conditions: DenoisingAutoencoderWithOurMap(**conditions.unet),
    "DDPM": lambda conditions: PartialDiffusion(noise="gaussian", **conditions.unet),
    "AnoDDPM": lambda conditions: PartialDiffusion(noise="simplex", **conditions.unet),
    "THOR": lambda conditions: ImplicitGuidanceDiffusion(noise="simplex", **conditions.unet),
    "patch features": lambda conditions: PatchFeatureDistance(**conditions.common),
    "MAD-AD, the paper's": mad_ad("paper"),
    "mad-ad": mad_ad(),
}

# For generated slices and few steps: coarse latents, which are quick to learn, and lambda 1: with the
# default's 0.1 the mask head needs longer (AUPRC 0.38 after 400 steps and 0.60 after 1000; with 1, 0.68).
QUICK_METHODS: dict[str, Method] = {
    "intensity, both tails": intensity("both"),
    "AE": autoencoder(variational=False),
    "mad-ad": mad_ad(autoencoder="fast-f4", mask_loss_weight=1.0),
}

# What each row changes against "mad-ad" (ours) or "MAD-AD, the paper's" (paper). Rows of inference parameters
# use that method's training; a row that names a training parameter has its own.
INFERENCE_ABLATIONS: dict[str, dict] = {
    "map: image": {"anomaly_map": "image"},
    "map: latent": {"anomaly_map": "latent"},
    "map: mean mask": {"anomaly_map": "mask"},
    "steps: 1": {"n_steps": 1},
    "steps: 2": {"n_steps": 2},
    "steps: 5": {"n_steps": 5},
    "steps: 10": {"n_steps": 10},
    "gamma: 0.1": {"gamma": 0.1},
    "gamma: 0.2": {"gamma": 0.2},
    "gamma: 0.4": {"gamma": 0.4},
    "gamma: none": {"gamma": math.inf},
    "reference: input": {"reference": "input"},
    "reference: reconstruction": {"reference": "reconstruction"},
    "difference: absolute": {"map_difference": "absolute"},
    "difference: squared": {"map_difference": "squared"},
    "difference: relative": {"map_difference": "relative"},
    "eta: 0": {"eta": 0.0},
    "eta: 0.5": {"eta": 0.5},
    "smoothing: none": {"smoothing": "gaussian", "smoothing_px": 0.0},
    "smoothing: Gaussian": {"smoothing": "gaussian"},
    "smoothing: guided": {"smoothing": "guided"},
    "repaint: 0": {"repaint": 0.0},
    "repaint: 0.3": {"repaint": 0.3},
    "repaint: 1": {"repaint": 1.0},
    "mask threshold: 0.1": {"mask_threshold": 0.1},
    "mask threshold: 0.5": {"mask_threshold": 0.5},
}
NOT_FOR_PAPER = ("repaint: 0.3", "repaint: 1")  # a network that was never shown erased latents cannot
TRAINING_ABLATIONS: dict[str, Method] = {
    "lambda: 0.001": mad_ad(mask_loss_weight=0.001),
    "lambda: 1": mad_ad(mask_loss_weight=1.0),
    "mask ratio: 0.2": mad_ad(mask_ratio=0.2),
    "masks: patches": mad_ad(mask_shape="patches"),
    "masks: patches of 1 and 2": mad_ad(mask_shape="patches", mask_patch_sizes=(1, 2)),
    "mask loss: MSE": mad_ad(mask_loss="mse"),
    "brain rule: original": mad_ad(brain_rule="original"),
    "corruption: Gaussian": mad_ad(corruption="gaussian"),
    "autoencoder: factor 2": mad_ad(autoencoder="fast-f2"),
    "autoencoder: factor 8": mad_ad(autoencoder="fast-f8"),
}
