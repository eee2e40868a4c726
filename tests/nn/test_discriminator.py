import numpy as np
import pytest
import torch
from torch import nn

from madad.nn import (
    AUTOENCODER_SIZES,
    AutoencoderKL,
    PatchDiscriminator,
    adaptive_weight,
    hinge_discriminator_loss,
    hinge_generator_loss,
)


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(image_channels=1, base_channels=8, n_layers=3, norm_groups=4, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PatchDiscriminator(image_channels, base_channels, n_layers, norm_groups=norm_groups)


def convolutions_only(discriminator):
    for i, layer in enumerate(discriminator.layers):
        if isinstance(layer, nn.GroupNorm):
            discriminator.layers[i] = nn.Identity()
    return discriminator


# The network


@pytest.mark.parametrize(
    ("n_layers", "shape", "logits"),
    [
        (3, (24, 24), (1, 1)),
        (3, (32, 32), (2, 2)),
        (3, (37, 65), (2, 6)),
        (3, (256, 256), (30, 30)),
        (1, (6, 9), (1, 2)),
        (4, (50, 64), (1, 2)),
    ],
)
def test_one_logit_per_patch(n_layers, shape, logits):
    assert network(2, n_layers=n_layers)(random_tensor(2, 2, *shape)).shape == (2, 1, *logits)


def test_default_has_cyclegans_number_of_parameters_and_those_of_the_norms():
    with torch.device("meta"):
        of_colour = PatchDiscriminator(3)
    assert sum(parameter.numel() for parameter in of_colour.parameters()) == 2_764_737 + 2 * (128 + 256 + 512)


@pytest.mark.parametrize(("n_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_one_patch(n_layers, patch):
    discriminator = convolutions_only(network(n_layers=n_layers, base_channels=2, norm_groups=2)).double()
    side = 2**n_layers * 14
    x = random_tensor(1, 1, side, side).double().requires_grad_()
    logits = discriminator(x)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    seen = gradient[0, 0] != 0
    (rows,), (columns,) = (np.nonzero(seen.any(dim=axis).numpy()) for axis in (1, 0))
    assert np.ptp(rows) + 1 == np.ptp(columns) + 1 == patch == seen.sum() ** 0.5

    outside = x.detach() + 100 * ~seen
    assert discriminator(outside)[0, 0, middle, middle] == logits[0, 0, middle, middle]
    inside = x.detach() + seen * 0.1
    assert discriminator(inside)[0, 0, middle, middle] != logits[0, 0, middle, middle]


def test_logits_do_not_depend_on_the_batch_or_the_mode():
    discriminator, x = network(), random_tensor(3, 1, 32, 40)
    together = discriminator.train()(x)
    torch.testing.assert_close(discriminator.eval()(x[1:2]), together[1:2])


def test_weights_are_drawn_with_a_deviation_of_a_fiftieth():
    convolutions = [layer for layer in network(base_channels=16).layers if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 5 and not any(layer.bias.any() for layer in convolutions)
    for weight in (layer.weight.detach() for layer in convolutions):
        assert weight.std() == pytest.approx(0.02, rel=0.15) and abs(weight.mean()) < 0.005


def test_it_learns_to_tell_noise_from_flat_images():
    discriminator = network()
    optimiser = torch.optim.Adam(discriminator.parameters(), 1e-3)
    real, fake = random_tensor(4, 1, 32, 32).tanh(), torch.full((4, 1, 32, 32), 0.3)
    losses = []
    for _ in range(15):
        loss = hinge_discriminator_loss(discriminator(real), discriminator(fake))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(1, abs=0.3) and losses[-1] < 0.2
    assert discriminator(real).mean() > 0.5 > -0.5 > discriminator(fake).mean()


@pytest.mark.parametrize("shape", [(1, 1, 23, 32), (1, 1, 32, 16), (1, 2, 32, 32), (1, 32, 32)])
def test_forward_names_the_shape_it_cannot_take(shape):
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 1, .*at least 24, got") as error:
        network()(torch.zeros(shape))
    assert str(shape) in str(error.value)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="n_layers must be at least 1, got 0"):
        PatchDiscriminator(1, n_layers=0)
    with pytest.raises(ValueError, match=r"norm_groups must divide 2 \* base_channels = 20, got 32"):
        PatchDiscriminator(1, 10)


# The losses


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([3.0, 0.5, -1.0, 1.0]), torch.tensor([-2.0, 0.0, 1.0])
    assert hinge_discriminator_loss(real, fake) == pytest.approx(0.5 * ((0.5 + 2) / 4 + (1 + 2) / 3))
    assert hinge_discriminator_loss(torch.ones(2), -torch.ones(3)) == 0  # at the margins
    assert hinge_generator_loss(fake).item() == pytest.approx(1 / 3)


def test_a_generator_step_raises_the_logits():
    discriminator, x = network(), random_tensor(2, 1, 32, 32).requires_grad_()
    loss = hinge_generator_loss(discriminator(x))
    (gradient,) = torch.autograd.grad(loss, x)
    moved = discriminator(x - 1e-2 * gradient / gradient.norm())
    assert hinge_generator_loss(moved) < loss and moved.mean() > -loss


def test_adaptive_weight_is_the_ratio_of_gradients():
    last_layer = torch.tensor([2.0, -1.0], requires_grad=True)
    reconstruction, adversarial = (last_layer * torch.tensor([3.0, 4.0])).sum(), 0.1 * last_layer[0] ** 2
    weight = adaptive_weight(reconstruction, adversarial, last_layer)
    assert weight.item() == pytest.approx(5 / (0.4 + 1e-4))  # |(3, 4)| and |(0.2 * 2, 0)|
    assert weight.shape == () and not weight.requires_grad and last_layer.grad is None
    assert adaptive_weight(reconstruction, adversarial, last_layer, largest=3.0) == 3
    assert adaptive_weight(reconstruction, 0 * adversarial, last_layer) == 1e4
    (reconstruction + weight * adversarial).backward()  # the graphs are still there


def test_weighted_losses_pull_equally_at_the_decoders_last_layer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = AutoencoderKL(AUTOENCODER_SIZES["tiny"])
    discriminator, x = network().requires_grad_(False), random_tensor(2, 1, 32, 32)
    last_layer = autoencoder.decoder.head.conv.weight
    x_hat, _ = autoencoder(x)
    losses = (x_hat - x).abs().mean(), hinge_generator_loss(discriminator(x_hat))
    weight = adaptive_weight(*losses, last_layer)
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm() for loss in losses]
    assert weight * norms[1] == pytest.approx(norms[0].item(), rel=1e-4 / norms[1].item() + 1e-5)
