"""The patch discriminator, which tells painted patches from real ones, and the losses that use its answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al., CVPR 2017): one logit per overlapping patch; higher = more like a real image.

    Parameters
    ----------
    image_channels : int
        Channels of the image.
    base_channels : int
        Width of the first convolution; it doubles with each one after it, up to 8 times as wide.
    n_layers : int, at least 1
        Strided convolutions; 1, 2 and 3 see patches of 16, 34 and 70 pixels.
    norm_groups : int
        Groups of every group norm; must divide ``2 * base_channels``.

    Notes
    -----
    The layers and their N(0, 0.02) weights are those of Isola et al. and of VQGAN (Esser et al., CVPR 2021),
    except that group norm replaces batch norm: an image's logits do not depend on the rest of its batch, and
    real and reconstructed batches share no running statistics. Like batch norm in training, it takes mean and
    variance from the whole image; the patch is what the convolutions see.
    """

    def __init__(
        self, image_channels: int, base_channels: int = 64, n_layers: int = 3, *, norm_groups: int = 32
    ):
        super().__init__()
        if n_layers < 1:
            raise ValueError(
                f"n_layers must be at least 1, got {n_layers}. Choose 3 for patches of 70 pixels."
            )
        if 2 * base_channels % norm_groups:
            raise ValueError(
                f"norm_groups must divide 2 * base_channels = {2 * base_channels}, got {norm_groups}. "
                f"Choose a divisor of {2 * base_channels}."
            )
        self.image_channels = image_channels
        self.smallest_side = 3 * 2**n_layers  # pixels: 3 positions after the strides, 1 logit at the end

        channels = base_channels
        layers = [nn.Conv2d(image_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, n_layers + 1):
            width = base_channels * min(2**i, 8)
            layers += [
                nn.Conv2d(channels, width, 4, stride=2 if i < n_layers else 1, padding=1),
                nn.GroupNorm(norm_groups, width),
                nn.LeakyReLU(0.2),
            ]
            channels = width
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``x`` in -1..1, (batch, image_channels, H, W) -> (batch, 1, h, w).

        ``h = H // 2**n_layers - 2``, and so for ``w``.

        Raises
        ------
        ValueError
            If the channels disagree, or a side is shorter than ``3 * 2**n_layers``.
        """
        if x.ndim != 4 or x.shape[1] != self.image_channels or min(x.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"x must have shape (batch, {self.image_channels}, height, width) with height and width at "
                f"least {self.smallest_side}, got {tuple(x.shape)}. Pad the images or use fewer layers."
            )
        return self.layers(x)


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half of ``mean(max(0, 1 - real)) + mean(max(0, 1 + fake))``, a scalar, as in VQGAN's code.

    Parameters
    ----------
    real_logits, fake_logits : Tensor
        The discriminator's logits of real images and of reconstructed ones.
    """
    return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """``-mean(fake_logits)`` of reconstructed images, a scalar: unbounded on both sides."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, largest: float = 1e4
) -> Tensor:
    """What to multiply the adversarial loss with, so that both losses pull equally at the last layer.

    Parameters
    ----------
    reconstruction_loss, adversarial_loss : Tensor, scalars
        Both must depend on ``last_layer``; their graphs are kept for the backward pass that follows.
    last_layer : Tensor
        Weight of the generator's last convolution.
    largest : float
        Upper bound of the weight.

    Returns
    -------
    Tensor
        Scalar in 0..``largest``, without a graph of its own.

    Notes
    -----
    Esser et al., CVPR 2021, eq. 7: ``|grad reconstruction| / (|grad adversarial| + delta)``, gradients with
    respect to ``last_layer``; delta is 1e-4 as in their code, 1e-6 in the paper.
    """
    of_reconstruction, of_adversary = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (reconstruction_loss, adversarial_loss)
    )
    return (of_reconstruction / (of_adversary + 1e-4)).clamp(0.0, largest)
