import numpy as np
import pytest
import torch

from madad.diffusion import NoiseSchedule

SCHEDULES = {
    "cosine 10": NoiseSchedule.cosine(10),
    "cosine 50": NoiseSchedule.cosine(50),
    "linear 100": NoiseSchedule.linear(100),
    "one step": NoiseSchedule([0.3]),
}


def test_cosine_schedule_has_the_published_values():
    published = [0.972, 0.899, 0.787, 0.647, 0.494, 0.341, 0.203, 0.094, 0.024, 0.00002]
    np.testing.assert_allclose(NoiseSchedule.cosine(10).alpha_bar[1:], published, atol=6e-4)
    assert float(NoiseSchedule.cosine(10).alpha_bar[10]) == pytest.approx(2.4e-5, rel=0.1)


@pytest.mark.parametrize("T", [1, 10, 1000])
def test_cosine_schedule_equals_its_formula(T):
    u = (np.arange(T + 1) / T + 0.008) / 1.008
    remaining = np.cos(u * np.pi / 2) ** 2
    beta = np.minimum(1 - remaining[1:] / remaining[:-1], 0.999)
    np.testing.assert_allclose(NoiseSchedule.cosine(T).alpha_bar[1:], np.cumprod(1 - beta), rtol=1e-9)


def test_linear_schedule_is_ho_et_als_and_scales():
    np.testing.assert_allclose(NoiseSchedule.linear(1000).beta[1:], np.linspace(1e-4, 0.02, 1000))
    scaled = NoiseSchedule.linear(100)
    np.testing.assert_allclose(scaled.beta[1:], np.linspace(1e-3, 0.2, 100))
    assert float(scaled.alpha_bar[-1]) < 1e-4
    np.testing.assert_allclose(NoiseSchedule.linear(4, 0.1, 0.4).beta[1:], [0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_starts_clean_and_falls(schedule):
    T = schedule.n_timesteps
    assert len(schedule.beta) == len(schedule.alpha) == len(schedule.alpha_bar) == T + 1
    assert schedule.alpha_bar[0] == schedule.alpha[0] == 1 and schedule.beta[0] == 0
    assert schedule.alpha_bar.dtype == torch.float64
    assert (schedule.alpha_bar.diff() < 0).all() and schedule.alpha_bar[-1] > 0
    np.testing.assert_allclose(schedule.alpha_bar, np.cumprod(1 - schedule.beta.numpy()), rtol=1e-12)


# Times of a sampler


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_times_descend_without_repetition_for_every_number_of_steps(schedule, spacing):
    T = schedule.n_timesteps
    for n_steps in range(1, T + 1):
        times = schedule.timesteps(n_steps, spacing)
        assert len(times) == n_steps and all(isinstance(t, int) for t in times)
        assert all(later < earlier for earlier, later in zip(times, times[1:], strict=False))
        assert 1 <= times[-1] and times[0] <= T
        assert (times[-1] == 1) if spacing == "leading" else (times[0] == T)
        gaps = -np.diff(times)
        assert n_steps == 1 or gaps.max() - gaps.min() <= 1
    assert schedule.timesteps(T, spacing) == list(range(T, 0, -1))


def test_times_by_hand():
    schedule = NoiseSchedule.cosine(10)
    assert schedule.timesteps(5) == schedule.timesteps(5, "leading") == [9, 7, 5, 3, 1]
    assert schedule.timesteps(5, "trailing") == [10, 8, 6, 4, 2]
    assert schedule.timesteps(1, "leading") == [1] and schedule.timesteps(1, "trailing") == [10]


# Forward process


def draw(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    z0, fill = torch.randn(2, 10, 3, 6, 5, generator=generator, dtype=dtype)
    noise_mask = (torch.rand(10, 1, 6, 5, generator=generator) < 0.4).to(dtype)
    return z0, fill, noise_mask, torch.arange(1, 11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_add_noise_equals_its_formula_and_keeps_the_rest_bitwise(dtype):
    schedule = NoiseSchedule.cosine(10)
    z0, fill, noise_mask, t = draw(dtype)
    z_t = schedule.add_noise(z0, fill, noise_mask, t)
    remaining = np.cumprod(1 - schedule.beta.numpy())[t.numpy()][:, None, None, None]
    noised = np.sqrt(remaining) * z0.double().numpy() + np.sqrt(1 - remaining) * fill.double().numpy()
    M = noise_mask.double().numpy()
    np.testing.assert_allclose(z_t, M * noised + (1 - M) * z0.double().numpy(), rtol=1e-5, atol=1e-6)
    kept = ~noise_mask.bool().expand_as(z0)
    assert z_t.dtype == dtype and torch.equal(z_t[kept], z0[kept])


def test_unusable_values_in_a_kept_position_do_not_spread():
    z0, fill, noise_mask, t = draw()
    fill = torch.where(noise_mask.bool(), fill, torch.nan)
    assert NoiseSchedule.cosine(10).add_noise(z0, fill, noise_mask, t).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NoiseSchedule([0.1, 1.0]), r"beta must .*inside \(0, 1\), got \[0.1, 1.0\]"),
        (lambda: NoiseSchedule([0.0, 0.5]), r"beta must .*got \[0.0, 0.5\]"),
        (lambda: NoiseSchedule([-0.1]), r"beta must .*got \[-0.1\]"),
        (lambda: NoiseSchedule([float("nan")]), r"beta must .*got \[nan\]"),
        (lambda: NoiseSchedule([]), r"beta must hold at least one value .*got \[\]"),
        (lambda: NoiseSchedule([[0.1]]), r"beta must .*got \[\[0.1"),
        (lambda: NoiseSchedule.linear(10), r"beta must .*inside \(0, 1\), got \[0.01, .*2.0\]"),
        (lambda: NoiseSchedule.linear(20), r"beta must .*1.0\]"),
        (lambda: NoiseSchedule.cosine(0), "n_timesteps must be a positive integer, got 0"),
        (lambda: NoiseSchedule.cosine(2.5), "n_timesteps must be a positive integer, got 2.5"),
        (lambda: NoiseSchedule.cosine(10).timesteps(0), r"n_steps must lie in 1\.\.10, .*got 0"),
        (lambda: NoiseSchedule.cosine(10).timesteps(11), r"n_steps must lie in 1\.\.10, .*got 11"),
        (lambda: NoiseSchedule.cosine(10).timesteps(5, "even"), "step_spacing must be .*got 'even'"),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_linear_schedule_of_21_steps_is_the_shortest():
    assert float(NoiseSchedule.linear(21).beta.max()) < 1
