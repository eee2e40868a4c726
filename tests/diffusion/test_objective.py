import numpy as np
import pytest
import torch

from madad.diffusion import (
    EitherMask,
    GaussianNoise,
    MaskedDiffusionObjective,
    NoiseSchedule,
    RandomBlobs,
    RandomPatches,
    masked_diffusion_loss,
)

SCHEDULE = NoiseSchedule.cosine(10)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(n=3):
    generator = seeded()
    z0, z0_hat = torch.randn(2, n, 4, 5, 6, generator=generator)
    noise_logit = 3 * torch.randn(n, 1, 5, 6, generator=generator)
    noise_mask = (torch.rand(n, 1, 5, 6, generator=generator) < 0.3).float()
    return z0, z0_hat, noise_mask, noise_logit


@pytest.mark.parametrize("mask_loss", ["bce", "mse"])
def test_loss_equals_its_formula(mask_loss):
    z0, z0_hat, noise_mask, noise_logit = (tensor.double().numpy() for tensor in draw())
    f_M = 1 / (1 + np.exp(-noise_logit))
    if mask_loss == "bce":
        of_mask = -(noise_mask * np.log(f_M) + (1 - noise_mask) * np.log(1 - f_M))
    else:
        of_mask = (f_M - noise_mask) ** 2
    z0_loss, mask_term = masked_diffusion_loss(*draw(), mask_loss)
    np.testing.assert_allclose(z0_loss, ((z0 - z0_hat) ** 2).reshape(3, -1).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(mask_term, of_mask.reshape(3, -1).mean(axis=1), rtol=1e-5)


def test_bce_stays_finite_where_the_head_is_certain_and_wrong():
    z0, z0_hat, noise_mask, _ = draw()
    wrong = 1e4 * (1 - 2 * noise_mask)
    assert torch.allclose(masked_diffusion_loss(z0, z0_hat, noise_mask, wrong)[1], torch.tensor(1e4))


@pytest.mark.parametrize("mask_loss", ["bce", "mse"])
def test_perfect_answer_costs_nothing(mask_loss):
    z0, _, noise_mask, _ = draw()
    for term in masked_diffusion_loss(z0, z0, noise_mask, 100 * (2 * noise_mask - 1), mask_loss):
        assert term.max() < 1e-6


# What is noised


def brain(n=40, size=16):
    brain_fraction = torch.zeros(n, 1, size, size)
    brain_fraction[..., 2:13, 3:15] = 1
    brain_fraction[..., 13, 3:15] = 0.3
    return brain_fraction


@pytest.mark.parametrize("rule", ["paper", "original"])
@pytest.mark.parametrize("masking", [RandomPatches((0.5, 0.5)), RandomBlobs(), EitherMask()])
def test_noise_stays_in_the_brain_and_follows_the_forward_process(masking, rule):
    z0 = torch.randn(40, 4, 16, 16, generator=seeded(5))
    fill = torch.full_like(z0, 7.0)

    class Sevens:
        def fill(self, z0, generator):
            return fill

    objective = MaskedDiffusionObjective(SCHEDULE, masking, Sevens(), brain_rule=rule)
    z_t, noise_mask, t = objective.noise(z0, brain(), seeded())
    allowed = brain() > 0 if rule == "paper" else (brain() == 1)
    assert noise_mask.any() and not (noise_mask.bool() & ~allowed).any()
    assert t.min() >= 1 and t.max() <= 10
    ab = SCHEDULE.alpha_bar[t].float()[:, None, None, None]
    noised = noise_mask.bool().expand_as(z0)
    expected = ab.sqrt() * z0 + (1 - ab).sqrt() * 7
    torch.testing.assert_close(z_t[noised], expected[noised])
    assert torch.equal(z_t[~noised], z0[~noised])


def test_every_time_is_drawn_equally_often():
    objective = MaskedDiffusionObjective(SCHEDULE)
    _, _, t = objective.noise(torch.zeros(4000, 1, 2, 2), torch.ones(4000, 1, 2, 2), seeded())
    np.testing.assert_allclose(np.bincount(t, minlength=11)[1:] / 4000, 0.1, atol=0.02)


def test_blobs_are_centred_in_the_brain():
    objective = MaskedDiffusionObjective(SCHEDULE, RandomBlobs(radius=(0.02, 0.02), roughness=0.0))
    _, noise_mask, _ = objective.noise(torch.zeros(40, 1, 16, 16), brain(), seeded())
    assert (noise_mask.sum(dim=(1, 2, 3)) >= 1).all()  # a blob outside would have been taken away


def test_draws_are_seeded_and_leave_the_global_generator_alone():
    objective, z0 = MaskedDiffusionObjective(SCHEDULE, EitherMask()), torch.randn(40, 4, 16, 16)
    state = torch.random.get_rng_state()
    first, again, other = (objective.noise(z0, brain(), seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# The whole loss


@pytest.mark.parametrize("mask_loss", ["bce", "mse"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_objective_is_the_weighted_sum_of_its_terms(mask_loss, weight):
    objective = MaskedDiffusionObjective(SCHEDULE, mask_loss=mask_loss, mask_loss_weight=weight)
    z0 = torch.randn(40, 4, 16, 16, generator=seeded(5))
    seen = {}

    def unet(z_t, t):
        seen.update(z_t=z_t, t=t)
        return 0.5 * z_t, z_t[:, :1]

    loss, terms = objective(unet, z0, brain(), seeded(3))
    z_t, noise_mask, t = objective.noise(z0, brain(), seeded(3))
    assert torch.equal(seen["z_t"], z_t) and torch.equal(seen["t"], t)
    of_z0, of_mask = masked_diffusion_loss(z0, 0.5 * z_t, noise_mask, z_t[:, :1], mask_loss)
    torch.testing.assert_close(terms, {"z0": of_z0.mean(), "mask": of_mask.mean()})
    torch.testing.assert_close(loss, of_z0.mean() + weight * of_mask.mean())


@pytest.mark.parametrize("mask_loss", ["bce", "mse"])
def test_network_that_knows_the_answer_has_no_loss(mask_loss):
    objective = MaskedDiffusionObjective(
        SCHEDULE, RandomPatches((0.4, 0.4)), GaussianNoise(), mask_loss=mask_loss, mask_loss_weight=1.0
    )
    z0 = torch.randn(40, 4, 16, 16, generator=seeded(5))

    def unet(z_t, t):
        return z0, torch.where((z_t != z0).any(dim=1, keepdim=True), 50.0, -50.0)

    loss, terms = objective(unet, z0, brain(), seeded())
    assert loss < 1e-6 and terms["z0"] == 0

    def blind(z_t, t):
        return z_t, torch.zeros_like(z_t[:, :1])

    _, terms = objective(blind, z0, brain(), seeded())
    assert terms["z0"] > 0.05
    assert terms["mask"] == pytest.approx(np.log(2) if mask_loss == "bce" else 0.25, rel=1e-5)


def test_gradient_reaches_the_network_through_both_terms():
    scale = torch.ones(2, requires_grad=True)
    objective = MaskedDiffusionObjective(SCHEDULE)
    z0 = torch.randn(4, 2, 16, 16, generator=seeded(5))
    loss, terms = objective(lambda z_t, t: (scale[0] * z_t, scale[1] * z_t[:, :1]), z0, brain(4), seeded())
    loss.backward()
    assert scale.grad.all() and not any(term.requires_grad for term in terms.values())


def test_half_precision_answers_are_scored_in_float32():
    z0 = torch.randn(4, 2, 16, 16, generator=seeded(5))
    objective = MaskedDiffusionObjective(SCHEDULE)
    loss, _ = objective(lambda z_t, t: (z_t.bfloat16(), z_t[:, :1].bfloat16()), z0, brain(4), seeded())
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"mask_loss": "l1"}, r"mask_loss must be one of \('bce', 'mse'\), got 'l1'"),
        ({"brain_rule": "all"}, "brain_rule must be .*got 'all'"),
    ],
)
def test_unknown_names_raise(knobs, message):
    with pytest.raises(ValueError, match=message):  # before anything is trained
        MaskedDiffusionObjective(SCHEDULE, **knobs)
