"""The first stage's loss: reconstructions that are faithful, sharp, and, where asked for, pass as real."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from madad.nn.autoencoder import AutoencoderKL, DiagonalGaussian
from madad.nn.discriminator import adaptive_weight, hinge_discriminator_loss, hinge_generator_loss

PIXEL_LOSSES = ("l1", "charbonnier")
WEIGHTS = ("kl_weight", "structure_weight", "perceptual_weight", "adversarial_weight")
CHARBONNIER_WIDTH = 1e-3  # of network images, -1..1
STRUCTURE_SCALES = (1, 2, 4)


class TrainedAutoencoder(nn.Module):
    """What the optimiser sees: the network and, if it is learned, the log-variance of its reconstruction.

    Parameters
    ----------
    network : AutoencoderKL
        The autoencoder that is trained, in place.
    learn_logvar : bool
        Whether one log-variance for all pixels is learned beside it, from 0 on.
    """

    def __init__(self, network: AutoencoderKL, *, learn_logvar: bool):
        super().__init__()
        self.network = network
        logvar = next(network.parameters()).new_zeros(())
        self.reconstruction_logvar = nn.Parameter(logvar) if learn_logvar else None

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, DiagonalGaussian]:
        """The reconstruction of ``x`` and its posterior; what is compiled, where the trainer compiles.

        A latent is drawn by ``generator``; without one it is the posterior's mean.
        """
        return self.network(x, generator)


@dataclass
class ReconstructionObjective:
    """``pixel + structure + perceptual``, a KL term, and from some step on an adversarial one.

    Parameters
    ----------
    pixel_loss : {"l1", "charbonnier"}
        Mean absolute error, or ``sqrt(error^2 + 0.001^2)``, which is smooth at 0.
    kl_weight : float
        Weight, 0 or more, of the KL divergence per latent value to the standard normal.
    structure_weight : float
        Weight, 0 or more, of `structure_distance`.
    perceptual : callable (x_hat, x) -> Tensor, or None
        Distance of features, whose mean is taken; see `madad.nn.make_perceptual`. None = no such term.
    perceptual_weight : float
        Weight, 0 or more, of ``perceptual``.
    discriminator : nn.Module or None
        Gives logits of images; trained in turn with the autoencoder. None = no adversarial term.
    adversarial_weight : float
        Weight, 0 or more, of the generator's hinge loss, beside the adaptive weight.
    adversarial_start : int
        Steps, 0 or more, before either of the two sees the other.

    Raises
    ------
    ValueError
        If ``pixel_loss`` is neither of the two, a weight is negative or not finite, or the start is negative.

    Notes
    -----
    The recipe of VQGAN and of latent diffusion (Esser et al., CVPR 2021; Rombach et al., CVPR 2022). With a
    learned log-variance ``s`` the reconstruction term is ``term / exp(s) + s``.
    """

    pixel_loss: str = "l1"
    kl_weight: float = 1e-6
    structure_weight: float = 1.0
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    perceptual_weight: float = 0.1
    discriminator: nn.Module | None = None
    adversarial_weight: float = 0.1
    adversarial_start: int = 0
    _last: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self):
        if self.pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"pixel_loss must be one of {PIXEL_LOSSES}, got {self.pixel_loss!r}. Use 'l1'.")
        for name in WEIGHTS:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name} must be finite and 0 or more, got {getattr(self, name)!r}. 0 switches it off."
                )
        if not self.adversarial_start >= 0:
            raise ValueError(
                f"adversarial_start must be 0 or more steps, got {self.adversarial_start!r}. Use 500."
            )

    def __call__(
        self, trained: TrainedAutoencoder, x: Tensor, generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch.

        Parameters
        ----------
        trained : TrainedAutoencoder
            The network, and the log-variance where it is learned.
        x : Tensor of shape (batch, C, H, W), in -1..1
            Network images, padded to the network's factor.
        generator : torch.Generator
            Draws the latents from their posteriors.
        step : int
            Steps that were done before, 0 or more.

        Returns
        -------
        loss : Tensor
            A number to descend on.
        terms : dict of Tensor
            What it is the sum of, by name, before any weight.

        Raises
        ------
        ValueError
            If the images are smaller than the discriminator takes, at whatever step.
        """
        smallest = getattr(self.discriminator, "smallest_side", 0)
        if min(x.shape[2:]) < smallest:
            raise ValueError(
                f"x must have height and width of at least {smallest} for the discriminator, got "
                f"{tuple(x.shape)}. Pad the images, or do without: adversarial_weight=0."
            )
        x_hat, posterior = trained(x, generator)
        x_hat, values_per_image = x_hat.float(), posterior.mean[0].numel()
        reconstruction, terms = self._of_reconstruction(x_hat, x)
        if trained.reconstruction_logvar is not None:
            s = trained.reconstruction_logvar
            reconstruction = reconstruction / s.exp() + s
            terms["logvar"] = s.clone()  # the optimiser changes s in place before it is recorded
        terms["kl"] = posterior.kl().mean() / values_per_image
        total = reconstruction + self.kl_weight * terms["kl"]
        if self.discriminator is not None and step >= self.adversarial_start:
            adversarial = hinge_generator_loss(_logits_of_frozen(self.discriminator, x_hat).float())
            last_layer = trained.network.decoder.head.conv.weight
            weight = self.adversarial_weight * adaptive_weight(reconstruction, adversarial, last_layer)
            total = total + weight * adversarial
            terms |= {"adversarial": adversarial, "adaptive_weight": weight}
            self._last = x, x_hat.detach()
        return total, {name: term.detach() for name, term in terms.items()}

    def of_validation(self, trained: TrainedAutoencoder, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The reconstruction term of the posterior's mean, without the terms that only help to train.

        Parameters
        ----------
        trained : TrainedAutoencoder
            The network; its log-variance is left out.
        x : Tensor of shape (batch, C, H, W), in -1..1
            Network images that are not trained on.

        Returns
        -------
        loss, terms
            As of a call.
        """
        return self._of_reconstruction(trained(x)[0].float(), x)

    def of_discriminator(
        self, discriminator: nn.Module, index: Tensor, generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The discriminator's hinge loss on the batch just reconstructed.

        Parameters
        ----------
        discriminator : nn.Module
            The one that is trained now.
        index, generator, step :
            What the trainer gives each loss; none of them is used.

        Returns
        -------
        (Tensor, dict of Tensor) or None
            The loss, also by name; None where the discriminator was not asked.
        """
        if self._last is None:
            return None
        (x, x_hat), self._last = self._last, None
        loss = hinge_discriminator_loss(discriminator(x).float(), discriminator(x_hat).float())
        return loss, {"discriminator": loss.detach()}

    def _of_reconstruction(self, x_hat: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pixel, structure and perceptual terms: their weighted sum, and by name."""
        weighs = self.structure_weight > 0  # else it is only noted
        structure = structure_distance(x_hat if weighs else x_hat.detach(), x)
        terms = {"l1": (x_hat - x).abs().mean(), "structure": structure}
        pixel = terms["l1"]
        if self.pixel_loss == "charbonnier":
            pixel = ((x_hat - x).square() + CHARBONNIER_WIDTH**2).sqrt().mean()
        total = pixel + self.structure_weight * structure if weighs else pixel
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(x_hat, x).mean()
            total = total + self.perceptual_weight * terms["perceptual"]
        return total, terms


def structure_distance(x_hat: Tensor, x: Tensor) -> Tensor:
    """Mean L1 distance of the gradients of ``x_hat`` and ``x``, across and down, at scales 1, 2 and 4.

    Both are network images (batch, C, H, W), and the distance is in their units, 0 or more. An axis that a
    scale leaves one pixel of has no gradient there, which counts as no distance.
    """
    error = x_hat - x  # differences and means are linear, so they can be taken of the error
    total = x.new_zeros(())
    for scale in STRUCTURE_SCALES:
        coarse = F.avg_pool2d(error, [min(scale, side) for side in error.shape[2:]])
        for axis in (-1, -2):
            if coarse.shape[axis] > 1:
                total = total + coarse.diff(dim=axis).abs().mean()
    return total / (2 * len(STRUCTURE_SCALES))


def _logits_of_frozen(discriminator: nn.Module, x_hat: Tensor) -> Tensor:
    """Logits whose gradient reaches the images and not the discriminator's weights."""
    weights = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    return functional_call(discriminator, weights, (x_hat,))
