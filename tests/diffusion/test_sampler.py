import re

import numpy as np
import pytest
import torch

from madad.diffusion import MaskedDDIM, MaskedDDPM, NoiseSchedule, Repainting
from madad.diffusion.sampler import posterior_mean

SCHEDULE = NoiseSchedule.cosine(10)
SAMPLERS = {
    "ddim": MaskedDDIM(),
    "ddim eta": MaskedDDIM(eta=0.5),
    "ddim few": MaskedDDIM(3, step_spacing="trailing"),
    "ddpm": MaskedDDPM(),
    "ddpm few": MaskedDDPM(4),
    "ddim repaint": Repainting(MaskedDDIM(4)),
}
SHAPE = (5, 4, 6, 7)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def case(seed=0):
    """Clean latents, a mask, and the latents noised in it."""
    z0, noise = torch.randn(2, *SHAPE, generator=seeded(seed))
    noise_mask = torch.rand(SHAPE[0], 1, *SHAPE[2:], generator=seeded(seed + 1)) < 0.3
    return z0, noise_mask, torch.where(noise_mask, noise, z0)


def knowing(z0, noise_mask):
    """A network that knows the clean latent and the mask."""
    return lambda z_t, t: (z0, torch.where(noise_mask, 50.0, -50.0))


def stand_in(z_t, t):
    """An arbitrary position-wise network that depends on z_t and on t."""
    time = t.view(-1, 1, 1, 1).float()
    return 0.7 * z_t.roll(1, dims=1) + 0.1 * time, 2 * z_t[:, :1] - 0.3 * z_t[:, 1:2] + 0.05 * time


all_samplers = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


# Properties


@all_samplers
def test_perfect_denoiser_restores_the_clean_latent_and_keeps_the_rest_bitwise(sampler):
    z0, noise_mask, z = case()
    restored = sampler.restore(knowing(z0, noise_mask), z, SCHEDULE).z_restored
    kept = ~noise_mask.expand_as(z)
    assert torch.equal(restored[kept], z[kept])
    torch.testing.assert_close(restored, z0, rtol=1e-6, atol=1e-6)


@all_samplers
def test_kept_positions_return_bitwise_whatever_the_network_says(sampler):
    z0, noise_mask, z = case()

    def unet(z_t, t):
        return stand_in(z_t, t)[0], torch.where(noise_mask, 50.0, -50.0)

    restored = sampler.restore(unet, z, SCHEDULE).z_restored
    kept = ~noise_mask.expand_as(z)
    assert torch.equal(restored[kept], z[kept])
    assert not torch.isclose(restored[~kept], z[~kept]).any()


@all_samplers
def test_nothing_flagged_returns_the_input_bitwise(sampler):
    _, noise_mask, z = case()
    noise_mask = noise_mask.clone()
    noise_mask[2] = False
    unet = knowing(torch.full_like(z, torch.nan), noise_mask)  # nonsense that must not be used
    result = sampler.restore(unet, z, SCHEDULE)
    assert torch.equal(result.z_restored[2], z[2])
    assert result.flagged.tolist() == [True, True, False, True, True]
    nothing = sampler.restore(knowing(z, torch.zeros_like(noise_mask)), z, SCHEDULE)
    assert torch.equal(nothing.z_restored, z) and not nothing.flagged.any()


@all_samplers
def test_slice_does_not_depend_on_its_batch_or_its_place(sampler):
    _, _, z = case()
    together = sampler.restore(stand_in, z, SCHEDULE, seeded(4))
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = sampler.restore(stand_in, z[order], SCHEDULE, seeded(4))
    assert torch.equal(shuffled.z_restored, together.z_restored[order])
    # torch's sigmoid rounds the last few values of an array differently.
    torch.testing.assert_close(
        shuffled.noise_probability, together.noise_probability[:, order], rtol=1e-6, atol=0
    )
    for i in range(len(z)):
        alone = sampler.restore(stand_in, z[i : i + 1], SCHEDULE, seeded(4))
        assert torch.equal(alone.z_restored[0], together.z_restored[i])
        assert torch.equal(alone.flagged[0], together.flagged[i])


@pytest.mark.parametrize("sampler", [MaskedDDIM(), MaskedDDPM(eta=0.0)])
def test_without_eta_the_generator_does_not_matter(sampler):
    z = case()[2]
    restored = [sampler.restore(stand_in, z, SCHEDULE, seeded(seed)).z_restored for seed in (1, 2)]
    assert torch.equal(*restored)


@pytest.mark.parametrize("sampler", [MaskedDDIM(eta=0.5), MaskedDDIM(eta=1.0), MaskedDDPM()])
def test_with_eta_the_noise_is_seeded(sampler):
    z = case()[2]
    state = torch.random.get_rng_state()
    none, zero, one = (
        sampler.restore(stand_in, z, SCHEDULE, generator).z_restored
        for generator in (None, seeded(0), seeded(1))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(none, zero) and not torch.equal(zero, one)


@all_samplers
def test_trajectory_runs_from_the_input_to_the_result(sampler):
    z = case()[2]
    result = sampler.restore(stand_in, z, SCHEDULE, return_trajectory=True)
    repaints = isinstance(sampler, Repainting)
    steps = sampler.sampler if repaints else sampler
    assert result.trajectory.shape == (steps.n_steps + 1 + repaints, *SHAPE)
    assert torch.equal(result.trajectory[0], z) and torch.equal(result.trajectory[-1], result.z_restored)
    assert result.noise_probability.shape == (steps.n_steps, SHAPE[0], 1, *SHAPE[2:])
    times = SCHEDULE.timesteps(steps.n_steps, steps.step_spacing)
    for z_t, t, probability in zip(result.trajectory, times, result.noise_probability, strict=False):
        logit = stand_in(z_t, torch.full((SHAPE[0],), t))[1]
        assert torch.equal(probability, torch.sigmoid(logit.double()).float())
    assert sampler.restore(stand_in, z, SCHEDULE).trajectory is None


def test_positions_without_brain_are_never_flagged():
    z0, _, z = case()
    brain_fraction = torch.zeros(SHAPE[0], 1, *SHAPE[2:])
    brain_fraction[:4, :, 2:4] = 0.01
    everywhere = knowing(z0, torch.ones_like(brain_fraction, dtype=torch.bool))
    result = MaskedDDIM().restore(everywhere, z, SCHEDULE, brain_fraction=brain_fraction)
    outside = (brain_fraction == 0).expand_as(z)
    assert torch.equal(result.z_restored[outside], z[outside])
    torch.testing.assert_close(result.z_restored[~outside], z0[~outside])
    assert result.flagged.tolist() == [True] * 4 + [False]
    assert not result.noise_probability[:, brain_fraction == 0].any()


@pytest.mark.parametrize(("threshold", "flagged"), [(0.5, False), (0.49, True), (1.0, False)])
def test_positions_above_the_threshold_are_flagged(threshold, flagged):
    z = case()[2]
    result = MaskedDDIM(mask_threshold=threshold).restore(
        lambda z_t, t: (0 * z_t, torch.zeros_like(z_t[:, :1])), z, SCHEDULE
    )
    assert (result.flagged == flagged).all()


def test_position_flagged_at_any_step_counts():
    z = case()[2]

    def unet(z_t, t):
        return 0 * z_t, torch.full_like(z_t[:, :1], 5.0 if t[0] == 4 else -5.0)

    result = MaskedDDIM().restore(unet, z, SCHEDULE)
    assert result.flagged.all() and not torch.equal(result.z_restored, z)


def test_double_latents_stay_double():
    result = MaskedDDIM(eta=0.5).restore(stand_in, case()[2].double(), SCHEDULE)
    assert result.z_restored.dtype == result.noise_probability.dtype == torch.float64


# Independent formulas


def slow_restore(z, n_steps, eta, alpha_bar, step, spacing):
    """The loop in NumPy float64; `step` is the formula at one time."""
    times = SCHEDULE.timesteps(n_steps, spacing)
    generator = seeded(8)
    z_t = z.double().numpy()
    for t, before in zip(times, [*times[1:], 0], strict=True):
        answers = stand_in(torch.from_numpy(z_t), torch.full((len(z_t),), t))
        z0_hat, logit = (answer.numpy() for answer in answers)
        noise = torch.randn((1, *z.shape[1:]), generator=generator).double().numpy()
        B = 1 / (1 + np.exp(-logit)) > 0.5
        z_t = B * step(z_t, z0_hat, alpha_bar[t], alpha_bar[before], eta, noise) + (1 - B) * z_t
    return z_t


def ddim_step(z_t, z0_hat, ab, ab_before, eta, eps):
    sigma = eta * np.sqrt((1 - ab_before) / (1 - ab)) * np.sqrt(1 - ab / ab_before)
    eps_hat = (z_t - np.sqrt(ab) * z0_hat) / np.sqrt(1 - ab)
    return np.sqrt(ab_before) * z0_hat + np.sqrt(1 - ab_before - sigma**2) * eps_hat + sigma * eps


def ddpm_step(z_t, z0_hat, ab, ab_before, eta, eps):
    alpha = ab / ab_before
    beta = 1 - alpha
    mean = np.sqrt(ab_before) * beta / (1 - ab) * z0_hat + np.sqrt(alpha) * (1 - ab_before) / (1 - ab) * z_t
    return mean + (ab_before < 1) * eta * np.sqrt(beta) * eps


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("n_steps", "spacing"), [(1, "trailing"), (2, "leading"), (5, "trailing"), (10, "leading")]
)
@pytest.mark.parametrize(("kind", "step"), [(MaskedDDIM, ddim_step), (MaskedDDPM, ddpm_step)])
def test_samplers_equal_their_formulas(kind, step, eta, n_steps, spacing):
    u = (np.arange(11) / 10 + 0.008) / 1.008
    remaining = np.cos(u * np.pi / 2) ** 2
    beta = np.minimum(1 - remaining[1:] / remaining[:-1], 0.999)
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    z = case()[2].double()
    expected = slow_restore(z, n_steps, eta, alpha_bar, step, spacing)
    result = kind(n_steps, eta, step_spacing=spacing).restore(stand_in, z, SCHEDULE, seeded(8))
    np.testing.assert_allclose(result.z_restored, expected, rtol=1e-8, atol=1e-8)


def test_posterior_mean_is_that_of_the_gaussian_by_bayes():
    """q(z_before | z_t, z0) from the two Gaussians q(z_before | z0) and q(z_t | z_before)."""
    ab, ab_before = float(SCHEDULE.alpha_bar[6]), float(SCHEDULE.alpha_bar[5])
    z_t, z0 = torch.randn(2, 100, dtype=torch.float64, generator=seeded())
    alpha = ab / ab_before
    precision = 1 / (1 - ab_before) + alpha / (1 - alpha)
    mean = (ab_before**0.5 * z0 / (1 - ab_before) + alpha**0.5 * z_t / (1 - alpha)) / precision
    torch.testing.assert_close(posterior_mean(z_t, z0, ab, ab_before), mean)


@pytest.mark.parametrize(
    ("name", "value"), [("eta", -0.1), ("eta", 1.1), ("mask_threshold", -0.1), ("mask_threshold", 2)]
)
@pytest.mark.parametrize("kind", [MaskedDDIM, MaskedDDPM])
def test_parameters_outside_their_range_are_refused(kind, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must lie in 0\.\.1, got {value}\."):
        kind(**{name: value})


def test_more_steps_than_times_are_refused():
    with pytest.raises(ValueError, match=r"n_steps must lie in 1\.\.10, .*got 11"):
        MaskedDDIM(11).restore(stand_in, case()[2], SCHEDULE)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_steps", 0, "n_steps must be an integer of 1 or more, got 0"),
        ("n_steps", 2.5, "n_steps must be an integer of 1 or more, got 2.5"),
        ("eta", "a", "eta must lie in 0..1, got 'a'"),
        ("mask_threshold", None, "mask_threshold must lie in 0..1, got None"),
        ("step_spacing", "odd", "step_spacing must be 'leading' or 'trailing', got 'odd'"),
    ],
)
def test_wrong_parameters_are_refused_where_the_sampler_is_made(name, value, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        MaskedDDIM(**{name: value})
