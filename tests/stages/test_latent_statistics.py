"""Shift and scale of latents against plain NumPy, and what is said of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from madad._runtime.distributed import ALONE
from madad.stages.latent_statistics import LatentMoments, LatentStatistics, latent_report

RNG = np.random.default_rng(0)
MEANS = RNG.normal(3.0, [[[[2.0]], [[0.5]], [[7.0]]]], (10, 3, 4, 5)).astype(np.float32)
BRAIN = RNG.random((10, 4, 5)) < 0.6


def measured(parts, team=ALONE, brain=BRAIN, means=MEANS):
    moments = LatentMoments(means.shape[1])
    for rows in parts:
        moments.add(torch.from_numpy(means[rows]), torch.from_numpy(brain[rows]))
    return moments.statistics(team)


def inside(values, brain=BRAIN):
    """Positions with brain, (n, c), in double precision."""
    return np.moveaxis(values, 1, -1)[brain].astype(np.float64)


@pytest.mark.parametrize("parts", [[slice(None)], [slice(0, 3), slice(3, 10)], [slice(5, 10), slice(0, 5)]])
def test_they_are_mean_and_deviation_over_the_brain_however_it_is_batched(parts):
    statistics = measured(parts)
    np.testing.assert_allclose(statistics.shift, inside(MEANS).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(1 / statistics.scale, inside(MEANS).std(axis=0), rtol=1e-6)
    assert statistics.shift.dtype == statistics.scale.dtype == np.float32


def test_without_any_brain_all_positions_serve():
    nowhere, everywhere = np.zeros_like(BRAIN), np.ones_like(BRAIN)
    statistics = measured([slice(0, 4), slice(4, 10)], brain=nowhere)
    np.testing.assert_allclose(statistics.shift, inside(MEANS, everywhere).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(1 / statistics.scale, inside(MEANS, everywhere).std(axis=0), rtol=1e-6)


def test_processes_count_together():
    """Three of them, by hand: each hands in its own sums and gets all."""
    parts, sums = [slice(0, 2), slice(2, 9), slice(9, 10)], []
    for part in parts:
        measured([part], SimpleNamespace(gather=lambda own: sums.append(own) or [own]))
    together = [measured([part], SimpleNamespace(gather=lambda own: sums)) for part in parts]
    for statistics in together:
        np.testing.assert_array_equal(statistics.shift, together[0].shift)
        np.testing.assert_allclose(statistics.shift, measured(parts).shift, rtol=1e-6)
        np.testing.assert_allclose(statistics.scale, measured(parts).scale, rtol=1e-6)


def test_a_process_without_slices_counts_nothing():
    sums = []
    for parts in ([slice(None)], []):
        measured(parts, SimpleNamespace(gather=lambda own: sums.append(own) or [own]))
    together, alone = measured([], SimpleNamespace(gather=lambda own: sums)), measured([slice(None)])
    np.testing.assert_array_equal(together.shift, alone.shift)
    np.testing.assert_array_equal(together.scale, alone.scale)


def test_a_constant_channel_gets_a_finite_scale():
    statistics = measured([slice(None)], means=np.full_like(MEANS, 2.5))
    np.testing.assert_allclose(statistics.shift, 2.5)
    np.testing.assert_allclose(statistics.scale, 1e6, rtol=1e-6)


def test_scaled_latents_are_standard_and_their_variance_is_scaled_along():
    statistics = measured([slice(None)])
    mean, logvar = torch.from_numpy(MEANS), torch.from_numpy(RNG.normal(size=MEANS.shape))
    z, scaled_logvar = statistics.scaled(mean, logvar)
    np.testing.assert_allclose(inside(z.numpy()).mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(inside(z.numpy()).var(axis=0), 1, atol=1e-5)
    column = statistics.scale.astype(np.float64)[:, None, None]
    np.testing.assert_allclose(scaled_logvar.exp(), column**2 * logvar.exp().numpy(), rtol=1e-6)


def test_unscaled_undoes_scaled():
    statistics = LatentStatistics(np.float32([1, -2, 0.5]), np.float32([2, 0.25, 8]))
    z, _ = statistics.scaled(torch.from_numpy(MEANS), torch.zeros(MEANS.shape))
    np.testing.assert_allclose(statistics.unscaled(z), MEANS, atol=1e-5)
    np.testing.assert_allclose(z, (MEANS - [[[1]], [[-2]], [[0.5]]]) * [[[2]], [[0.25]], [[8]]], atol=1e-4)


def test_the_report_is_what_arrays_say():
    z, variance = RNG.normal(0.5, [1.0, 3.0, 0.1], (50, 3)), RNG.uniform(0.05, 0.2, (50, 3))
    report = latent_report(torch.from_numpy(z), torch.from_numpy(variance))
    assert report == pytest.approx(
        {"latent_mean": z.mean(), "latent_std": z.std(ddof=1), "dead_channels": 1 / 3}
    )
    assert all(type(value) is float for value in report.values())
