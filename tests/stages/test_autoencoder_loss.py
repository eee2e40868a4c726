import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from madad.nn import AUTOENCODER_SIZES, AutoencoderKL, PatchDiscriminator
from madad.nn.autoencoder import DiagonalGaussian
from madad.stages.autoencoder_loss import ReconstructionObjective, TrainedAutoencoder, structure_distance
from madad.training import Trainer

RNG = np.random.default_rng(0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed)).tanh()


def tiny(image_channels=1, *, learn_logvar=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = AutoencoderKL(replace(AUTOENCODER_SIZES["tiny"], image_channels=image_channels))
    return TrainedAutoencoder(network, learn_logvar=learn_logvar)


def patch_discriminator():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return PatchDiscriminator(1, 4, 2, norm_groups=4)


class Shifted(nn.Module):
    """Adds ``shift`` to images; its posterior is the standard normal."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x, generator=None):
        return x + self.shift, DiagonalGaussian(torch.zeros(len(x), 2, 1, 1), torch.zeros(len(x), 2, 1, 1))


def squares(x_hat, x):
    return (x_hat - x).square().mean(dim=(1, 2, 3))


def slow_structure_distance(x_hat, x):
    total = 0.0
    for scale in (1, 2, 4):
        rows, columns = (min(scale, side) for side in x.shape[2:])
        height, width = x.shape[2] // rows, x.shape[3] // columns
        coarse = [
            image[..., : height * rows, : width * columns]
            .reshape(*x.shape[:2], height, rows, width, columns)
            .mean(axis=(3, 5))
            for image in (x_hat, x)
        ]
        for axis in (-1, -2):
            if coarse[0].shape[axis] > 1:
                total += np.abs(np.diff(coarse[0], axis=axis) - np.diff(coarse[1], axis=axis)).mean()
    return total / 6


# The reconstruction


@pytest.mark.parametrize("pixel_loss", ["l1", "charbonnier"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_the_weighted_sum_of_its_terms(pixel_loss, channels):
    trained, x = tiny(channels), images(2, channels, 8, 12)
    objective = ReconstructionObjective(
        pixel_loss, kl_weight=0.3, structure_weight=0.7, perceptual=squares, perceptual_weight=0.2
    )
    loss, terms = objective(trained, x, generator(), 0)

    with torch.no_grad():
        x_hat, posterior = trained.network(x, generator())
        values = (x_hat, x, posterior.mean, posterior.logvar)
        x_hat, target, mean, logvar = (value.double().numpy() for value in values)
    error = x_hat - target
    expected = {
        "l1": np.abs(error).mean(),
        "structure": slow_structure_distance(x_hat, target),
        "perceptual": (error**2).mean(),
        "kl": (0.5 * (mean**2 + np.exp(logvar) - 1 - logvar)).mean(),
    }
    pixel = expected["l1"] if pixel_loss == "l1" else np.sqrt(error**2 + 1e-6).mean()
    total = pixel + 0.7 * expected["structure"] + 0.2 * expected["perceptual"] + 0.3 * expected["kl"]
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert loss.requires_grad and not any(term.requires_grad for term in terms.values())


@pytest.mark.parametrize(
    ("name", "term"),
    [("kl_weight", "kl"), ("structure_weight", "structure"), ("perceptual_weight", "perceptual")],
)
def test_each_weight_counts_its_term(name, term):
    trained, x = tiny(), images(2, 1, 8, 8)
    without, with_weight = (
        ReconstructionObjective(perceptual=squares, **{name: weight})(trained, x, generator(), 0)
        for weight in (0.0, 2.0)
    )
    difference = (with_weight[0] - without[0]).item()
    assert difference == pytest.approx(2 * without[1][term].item(), rel=1e-4) and difference > 0


@pytest.mark.parametrize("shift", [0.0, 0.002, -0.5])
def test_pixel_losses_of_a_constant_error_by_hand(shift):
    x = images(2, 1, 8, 8)
    for pixel_loss, expected in (("l1", abs(shift)), ("charbonnier", math.hypot(shift, 0.001))):
        trained = TrainedAutoencoder(Shifted(shift), learn_logvar=False)
        loss, _ = ReconstructionObjective(pixel_loss, structure_weight=0.0)(trained, x, generator(), 0)
        loss.backward()
        assert loss.item() == pytest.approx(expected, abs=1e-7)
        slope = math.copysign(1, shift) if pixel_loss == "l1" and shift else shift / math.hypot(shift, 0.001)
        assert trained.network.shift.grad.item() == pytest.approx(slope, abs=1e-4)


@pytest.mark.parametrize("value", [-1.0, 0.3])
@pytest.mark.parametrize("learn_logvar", [False, True])
def test_constant_images_have_a_finite_gradient(value, learn_logvar):
    trained, x = tiny(learn_logvar=learn_logvar), torch.full((2, 1, 8, 8), value)
    ReconstructionObjective("charbonnier")(trained, x, generator(), 0)[0].backward()
    gradients = [parameter.grad for parameter in trained.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_the_perceptual_distance_compares_the_reconstruction_with_the_image():
    def distance(x_hat, x):
        seen.append((x_hat.detach(), x))
        return squares(x_hat, x)

    trained, x, seen = TrainedAutoencoder(Shifted(0.5), learn_logvar=False), images(2, 1, 8, 8), []
    ReconstructionObjective(perceptual=distance)(trained, x, generator(), 0)
    assert torch.equal(seen[0][0], x + 0.5) and torch.equal(seen[0][1], x)


def test_the_objective_runs_the_module_that_the_trainer_compiles():
    trained, x, calls = tiny(), images(2, 1, 8, 8), []
    trained.register_forward_hook(lambda *_: calls.append(1))
    objective = ReconstructionObjective()
    objective(trained, x, generator(), 0)
    objective.of_validation(trained, x)
    assert len(calls) == 2


# The log-variance


def test_the_log_variance_is_best_at_the_logarithm_of_the_reconstruction_term():
    trained, x = TrainedAutoencoder(Shifted(0.25), learn_logvar=True), images(2, 1, 8, 8)
    s = trained.reconstruction_logvar
    losses = {}
    for offset in (-0.1, 0.0, 0.1):
        s.data.fill_(math.log(0.25) + offset)
        s.grad = None
        loss, terms = ReconstructionObjective()(trained, x, generator(), 0)
        loss.backward()
        losses[offset] = loss.item()
        assert losses[offset] == pytest.approx(math.exp(-offset) + math.log(0.25) + offset, rel=1e-5)
        assert s.grad.item() == pytest.approx(1 - math.exp(-offset), abs=1e-5)
        assert terms["logvar"] == s.detach()
    assert losses[0.0] < min(losses[-0.1], losses[0.1])


def test_the_log_variance_is_learned_only_where_asked_and_scales_neither_kl_nor_validation():
    assert len(list(tiny(learn_logvar=True).parameters())) == len(list(tiny().parameters())) + 1
    trained, x = tiny(learn_logvar=True), images(2, 1, 8, 8)
    objective = ReconstructionObjective(kl_weight=0.5)
    values = []
    for s in (0.0, 2.0):
        trained.reconstruction_logvar.data.fill_(s)
        loss, terms = objective(trained, x, generator(), 0)
        reconstruction = (terms["l1"] + terms["structure"]).item()
        assert loss.item() == pytest.approx(
            reconstruction * math.exp(-s) + s + 0.5 * terms["kl"].item(), rel=1e-5
        )
        values.append(objective.of_validation(trained, x)[0].item())
    assert values[0] == values[1]


def test_the_log_variance_lives_where_the_network_does():
    network = tiny().network.to("meta")
    assert TrainedAutoencoder(network, learn_logvar=True).reconstruction_logvar.device.type == "meta"


# Validation


@pytest.mark.parametrize("pixel_loss", ["l1", "charbonnier"])
def test_validation_is_the_reconstruction_term_of_the_mean(pixel_loss):
    trained, x = tiny(learn_logvar=True), images(2, 1, 24, 24)
    objective = ReconstructionObjective(
        pixel_loss, 5.0, 0.7, squares, 0.2, discriminator=patch_discriminator()
    )
    with torch.no_grad():
        value, _ = objective.of_validation(trained, x)
        error = (trained.network(x)[0] - x).double().numpy()
    pixel = np.abs(error).mean() if pixel_loss == "l1" else np.sqrt(error**2 + 1e-6).mean()
    expected = pixel + 0.7 * slow_structure_distance(error, 0 * error) + 0.2 * (error**2).mean()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert objective.of_discriminator(objective.discriminator, None, generator(), 0) is None


# The adversary


def test_neither_sees_the_other_before_the_start():
    trained, x, discriminator = tiny(), images(2, 1, 24, 24), patch_discriminator()
    objective = ReconstructionObjective(discriminator=discriminator, adversarial_start=3)
    alone, _ = ReconstructionObjective()(trained, x, generator(), 2)
    for step in (0, 2):
        loss, terms = objective(trained, x, generator(), step)
        assert loss == alone and set(terms) == {"l1", "structure", "kl"}
        assert objective.of_discriminator(discriminator, None, generator(), step) is None
    loss, terms = objective(trained, x, generator(), 3)
    assert loss != alone and {"adversarial", "adaptive_weight"} <= set(terms)
    assert objective.of_discriminator(discriminator, None, generator(), 3) is not None


@pytest.mark.parametrize("adversarial_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("learn_logvar", [False, True])
def test_the_adversarial_gradient_is_scaled_by_a_constant(adversarial_weight, learn_logvar):
    trained, x = tiny(learn_logvar=learn_logvar), images(2, 1, 24, 24)
    if learn_logvar:
        trained.reconstruction_logvar.data.fill_(-1.0)
    discriminator = patch_discriminator()
    objective = ReconstructionObjective(
        kl_weight=0.5, discriminator=discriminator, adversarial_weight=adversarial_weight
    )
    loss, terms = objective(trained, x, generator(), 0)
    loss.backward()

    weights = list(trained.network.parameters())
    gradients = [weight.grad for weight in weights]
    x_hat, posterior = trained.network(x, generator())
    reconstruction = (x_hat - x).abs().mean() + structure_distance(x_hat, x)
    reconstruction = reconstruction * math.e - 1 if learn_logvar else reconstruction
    adversarial = -discriminator(x_hat).mean()
    place = next(i for i, w in enumerate(weights) if w is trained.network.decoder.head.conv.weight)
    of_reconstruction = torch.autograd.grad(
        reconstruction, weights, retain_graph=True, materialize_grads=True
    )
    of_adversary = torch.autograd.grad(adversarial, weights, retain_graph=True, materialize_grads=True)
    of_kl = torch.autograd.grad(0.5 * posterior.kl().mean() / 72, weights, materialize_grads=True)
    factor = of_reconstruction[place].norm() / (of_adversary[place].norm() + 1e-4)
    factor = adversarial_weight * factor.item()

    assert terms["adaptive_weight"].item() == pytest.approx(factor, rel=1e-4)
    assert terms["adversarial"].item() == pytest.approx(adversarial.item(), rel=1e-5)
    expected = reconstruction + 0.5 * terms["kl"] + factor * adversarial
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, *parts in zip(gradients, of_reconstruction, of_adversary, of_kl, strict=True):
        total = parts[0] + factor * parts[1] + parts[2]
        torch.testing.assert_close(gradient, total, rtol=1e-3, atol=1e-5)


def test_each_loss_has_gradients_for_its_own_network_only():
    trained, x, discriminator = tiny(), images(2, 1, 24, 24), patch_discriminator()
    objective = ReconstructionObjective(discriminator=discriminator)
    objective(trained, x, generator(), 0)[0].backward()
    assert all(weight.grad is not None for weight in trained.parameters())
    assert all(weight.grad is None and weight.requires_grad for weight in discriminator.parameters())

    trained.zero_grad()
    objective.of_discriminator(discriminator, None, generator(), 0)[0].backward()
    assert all(weight.grad is not None for weight in discriminator.parameters())
    assert all(weight.grad is None for weight in trained.parameters())


def test_the_discriminator_judges_the_batch_just_reconstructed_once():
    class Recorder(nn.Module):
        def forward(self, x):
            seen.append(x.detach())
            return 2 * x.mean(dim=(2, 3))

    trained, x, recorder, seen = tiny(), images(3, 1, 8, 8), Recorder(), []
    objective = ReconstructionObjective(discriminator=recorder)
    objective(trained, images(3, 1, 8, 8, seed=1), generator(), 0)
    objective(trained, x, generator(), 1)
    loss, terms = objective.of_discriminator(recorder, None, generator(), 1)
    x_hat = trained.network(x, generator())[0].detach()
    assert torch.equal(seen[1], x_hat) and torch.equal(seen[2], x) and torch.equal(seen[3], x_hat)

    real, fake = (2 * batch.double().numpy().mean(axis=(1, 2, 3)) for batch in (x, x_hat))
    expected = (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean()) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5) and terms == {"discriminator": loss}
    assert objective.of_discriminator(recorder, None, generator(), 1) is None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_trainer_trains_both_in_turn(precision):
    X, discriminator, own = images(8, 1, 24, 24), patch_discriminator(), {}
    objective = ReconstructionObjective(discriminator=discriminator, adversarial_start=2)

    def rival_loss(rival, index, generator, step):
        answer = objective.of_discriminator(rival, index, generator, step)
        if answer is not None:
            weights = dict(rival.named_parameters())
            gradients = torch.autograd.grad(answer[0], list(weights.values()), retain_graph=True)
            own.update(zip(weights, gradients, strict=True))
        return answer

    before = discriminator.layers[0].weight.detach().clone()
    trainer = Trainer(2, batch_size=2, gradient_clip=math.inf, precision=precision)
    history = trainer.optimise(
        tiny(learn_logvar=True),
        lambda trained, index, generator, step: objective(trained, X[index], generator, step),
        len(X),
        generator=generator(),
        rival=discriminator,
        rival_loss=rival_loss,
        validation_loss=lambda trained, index, generator, step: objective.of_validation(trained, X[index]),
        n_validation=3,
    )
    assert {"adversarial", "adaptive_weight", "discriminator", "rival_loss", "logvar"} <= set(history[-1])
    assert all(math.isfinite(value) for record in history for value in record.values() if value is not None)
    assert not torch.equal(before, discriminator.layers[0].weight)
    for name, weight in discriminator.named_parameters():  # the generator's steps added nothing to it
        torch.testing.assert_close(weight.grad, own[name])


@pytest.mark.parametrize("shape", [(2, 1, 8, 24), (2, 1, 24, 8)])
def test_images_too_small_for_the_discriminator_are_refused_from_the_first_step_on(shape):
    objective = ReconstructionObjective(discriminator=patch_discriminator(), adversarial_start=100)
    with pytest.raises(ValueError, match=r"^x must have height and width of at least 12 .*got \(") as caught:
        objective(tiny(), torch.zeros(shape), generator(), 0)
    assert str(shape) in str(caught.value)


# Errors


@pytest.mark.parametrize("value", ["l2", None, "L1"])
def test_an_unknown_pixel_loss_is_refused(value):
    with pytest.raises(ValueError, match=r"^pixel_loss must be one of \('l1', 'charbonnier'\)") as caught:
        ReconstructionObjective(value)
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["kl_weight", "structure_weight", "perceptual_weight", "adversarial_weight", "adversarial_start"]
)
@pytest.mark.parametrize("value", [-1, math.nan])
def test_negative_weights_and_starts_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*0 or more.* got {value!r}"):
        ReconstructionObjective(**{name: value})


def test_an_infinite_weight_is_refused():
    with pytest.raises(ValueError, match="^kl_weight must be finite and 0 or more, got inf"):
        ReconstructionObjective(kl_weight=math.inf)


# The structure


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 8, 12), (3, 2, 7, 9), (1, 1, 4, 4), (1, 1, 3, 3), (2, 1, 2, 5), (1, 3, 9, 1), (1, 1, 2, 2)],
)
def test_structure_distance_is_the_mean_l1_of_gradients_at_three_scales(shape):
    x_hat, x = RNG.normal(size=(2, *shape))
    got = structure_distance(torch.from_numpy(x_hat), torch.from_numpy(x))
    assert float(got) == pytest.approx(slow_structure_distance(x_hat, x), rel=1e-12)


def test_structure_distance_by_hand():
    x = torch.zeros(1, 1, 4, 4)
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)  # slopes of 1, and of 2 between blocks of 2; 1 block of 4
    assert structure_distance(ramp, x) == pytest.approx((1 + 2) / 6)
    assert structure_distance(ramp.mT, x) == pytest.approx((1 + 2) / 6)
    assert structure_distance(ramp[..., :2, :2], x[..., :2, :2]) == pytest.approx(1 / 6)
    assert structure_distance(ramp[..., :1, 3:], x[..., :1, :1]) == 0


def test_structure_distance_ignores_a_constant_offset():
    x = torch.rand(2, 1, 8, 8, generator=generator(), dtype=torch.float64)
    assert float(structure_distance(x + 0.3, x)) == pytest.approx(0, abs=1e-12)
    assert float(structure_distance(x.flip(-1), x)) > 0.1
