"""The equations against numbers that the original code gave, in any clone.

The original's mask is 1 where the latent is clean, and its t counts from 0. The answers of its network are
among the numbers; that our network gives them too is in tests/pretrained/test_loading.py.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from madad.diffusion import MaskedDDIM, NoiseSchedule, masked_diffusion_loss
from madad.diffusion.sampler import posterior_mean

SCHEDULE = NoiseSchedule.cosine(10)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def arrays():
    arrays = load_file(Path(__file__).parents[1] / "data" / "original_code.safetensors")
    return arrays | {"t": arrays["fwd_t_zero_based"] + 1, "noise_mask": (~arrays["fwd_keep_mask"]).float()}


def test_schedule_and_times(arrays):
    torch.testing.assert_close(SCHEDULE.alpha_bar[1:], arrays["alpha_bar"], rtol=1e-4, atol=1e-8)
    times = SCHEDULE.timesteps(5)
    assert times == sorted((arrays["timesteps_5_zero_based"] + 1).tolist(), reverse=True)
    torch.testing.assert_close(SCHEDULE.alpha_bar[times[::-1]], arrays["alpha_bar_5"], rtol=1e-4, atol=1e-8)


def test_forward_process(arrays):
    z_t = SCHEDULE.add_noise(arrays["fwd_z0"], arrays["fwd_eps"], arrays["noise_mask"], arrays["t"])
    torch.testing.assert_close(z_t, arrays["fwd_z_t"], **TOLERANCE)


def test_losses(arrays):
    answer = arrays["fwd_z0_hat"], arrays["noise_mask"], arrays["fwd_noise_logit"]
    z0_loss, mask_loss = masked_diffusion_loss(arrays["fwd_z0"], *answer, "mse")
    torch.testing.assert_close(z0_loss, arrays["loss_mse_per_sample"], **TOLERANCE)
    torch.testing.assert_close(mask_loss, arrays["loss_mask_mse_per_sample"], **TOLERANCE)
    total = z0_loss + 0.001 * mask_loss
    torch.testing.assert_close(total, arrays["loss_total_per_sample"], **TOLERANCE)


def test_posterior_mean(arrays):
    expected = arrays["ddpm_posterior_mean_all_noised"]
    for i, t in enumerate(arrays["t"]):
        ab, ab_before = float(SCHEDULE.alpha_bar[t]), float(SCHEDULE.alpha_bar[t - 1])
        mean = posterior_mean(arrays["fwd_z_t"][i], arrays["fwd_z0"][i], ab, ab_before)
        torch.testing.assert_close(mean, expected[i], rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_restoration(arrays):
    answers = zip(arrays["ddim5_z0_hat"], arrays["ddim5_noise_logit"], strict=True)
    restored = MaskedDDIM(5).restore(lambda z_t, t: next(answers), arrays["ddim5_eta0_start"], SCHEDULE)
    torch.testing.assert_close(restored.z_restored, arrays["ddim5_eta0_end"], **TOLERANCE)
