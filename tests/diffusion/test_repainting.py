import numpy as np
import pytest
import torch

from madad.diffusion import MaskedDDIM, MaskedDDPM, NoiseSchedule, Repainting, make_repair

SCHEDULE = NoiseSchedule.cosine(10)
SHAPE = (5, 4, 6, 7)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def case(seed=0):
    """Clean latents, a mask, and the latents noised in it."""
    z0, noise = torch.randn(2, *SHAPE, generator=seeded(seed))
    noise_mask = torch.rand(SHAPE[0], 1, *SHAPE[2:], generator=seeded(seed + 1)) < 0.3
    return z0, noise_mask, torch.where(noise_mask, noise, z0)


def stand_in(z_t, t):
    """An arbitrary position-wise network that depends on z_t and on t."""
    time = t.view(-1, 1, 1, 1).float()
    return 0.7 * z_t.roll(1, dims=1) + 0.1 * time, 2 * z_t[:, :1] - 0.3 * z_t[:, 1:2] + 0.05 * time


def flagging(noise_logit, z0_hat=None):
    """A network with fixed flags that answers ``z0_hat``, and notes what it was given."""
    given = []

    def unet(z_t, t):
        given.append((z_t.clone(), t.tolist()))
        return stand_in(z_t, t)[0] if z0_hat is None else z0_hat(z_t, t), noise_logit.to(z_t)

    return unet, given


@pytest.mark.parametrize("repair", [Repainting(MaskedDDIM(3)), Repainting(MaskedDDPM(4))])
def test_repaint_erases_what_is_flagged_and_takes_the_prediction_at_the_last_time(repair):
    _, noise_mask, z = case()
    unet, given = flagging(torch.where(noise_mask, 3.0, -3.0))
    result = repair.restore(unet, z, SCHEDULE, return_trajectory=True)
    assert len(given) == repair.sampler.n_steps + 1
    asked, t = given[-1]
    assert t == [10] * SHAPE[0]
    assert torch.equal(asked, torch.where(noise_mask, 0.0, z))
    expected = torch.where(noise_mask, stand_in(asked, torch.full((SHAPE[0],), 10))[0], z)
    assert torch.equal(result.z_restored, expected)
    assert len(result.trajectory) == repair.sampler.n_steps + 2
    assert torch.equal(result.trajectory[-1], expected)
    assert torch.equal(result.flagged, noise_mask.flatten(1).any(dim=1))


@pytest.mark.parametrize(("threshold", "erased"), [(0.19, True), (0.21, False)])
def test_repaint_goes_by_the_mean_of_the_flags(threshold, erased):
    """f_M is 0.4 in one of two steps: never the threshold of the mean, but flagged on the way."""
    z = case()[2]
    logits = {10: np.log(0.4 / 0.6), 5: -np.inf}

    def unet(z_t, t):
        return 0 * z_t + 7, torch.full_like(z_t[:, :1], logits[int(t[0])])

    repair = Repainting(MaskedDDIM(2, mask_threshold=threshold, step_spacing="trailing"))
    result = repair.restore(unet, z, SCHEDULE)
    assert torch.equal(result.z_restored, 0 * z + 7 if erased else z)
    assert result.flagged.tolist() == [erased] * SHAPE[0]
    torch.testing.assert_close(result.noise_probability.mean(), torch.tensor(0.2))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_only_what_has_something_erased_is_repainted_in_parts_of_one_size(size):
    z = case()[2]
    logit = torch.full((SHAPE[0], 1, *SHAPE[2:]), -3.0)
    logit[[0, 3, 4], 0, 2:4, 1:3] = 3.0
    unet, given = flagging(logit)
    together = Repainting(MaskedDDIM(2)).restore(unet, z, SCHEDULE)
    given.clear()
    result = Repainting(MaskedDDIM(2)).restore(unet, z, SCHEDULE, repaint_size=size)
    sizes = [len(asked) for asked, _ in given]
    assert sizes == [5, 5] + [size] * -(-3 // size)
    torch.testing.assert_close(result.z_restored, together.z_restored)
    assert torch.equal(result.z_restored[[1, 2]], z[[1, 2]])
    assert result.flagged.tolist() == [True, False, False, True, True]


def flagging_in_turn(logits):
    """A network whose mask logits are given for each step in turn; counts its calls in the second value."""
    calls = []

    def unet(z_t, t):
        calls.append(int(t[0]))
        return 0 * z_t + 7, logits[len(calls) - 1]

    return unet, calls


@pytest.mark.parametrize(("threshold", "seed"), [(0.2, 0), (0.2, 3), (0.5, 1), (0.5, 4), (0.8, 2), (0.8, 5)])
def test_early_exit_gives_the_same_latents_bit_by_bit(threshold, seed):
    z = case(seed)[2]
    logits = 2 * torch.randn(11, SHAPE[0], 1, *SHAPE[2:], generator=seeded(seed)) - seed
    repair = Repainting(MaskedDDIM(10, mask_threshold=threshold), 0.5)
    whole, quick = (
        repair.restore(flagging_in_turn(logits)[0], z, SCHEDULE, early_exit=early) for early in (False, True)
    )
    assert torch.equal(whole.z_restored, quick.z_restored)
    assert torch.equal(whole.flagged, quick.flagged)


@pytest.mark.parametrize(
    ("first", "exits_after"),
    [(-30.0, 5), (0.0, 7), (1.0, None)],  # f_M is 0, 1/2 or 0.73 in four steps, then 0
)
def test_early_exit_comes_when_no_position_can_reach_the_threshold_and_not_before(first, exits_after):
    """Mean 0.5 of ten: after k steps that sum to s it is out of reach once s + 10 - k <= 5."""
    z = case()[2]
    logits = torch.full((11, SHAPE[0], 1, *SHAPE[2:]), -40.0)
    logits[:4, 2, 0, 3, 3] = first
    if exits_after is None:
        logits[4:, 2, 0, 3, 3] = first
    unet, calls = flagging_in_turn(logits)
    repair = Repainting(MaskedDDIM(10, mask_threshold=0.5), 0.5)
    result = repair.restore(unet, z, SCHEDULE, early_exit=True)
    assert len(calls) == (11 if exits_after is None else exits_after)
    assert bool(result.flagged.any()) == (exits_after is None)
    assert len(result.noise_probability) == min(len(calls), 10)


@pytest.mark.parametrize("sampler", [MaskedDDIM(), MaskedDDPM()], ids=["ddim", "ddpm"])
def test_without_repainting_no_step_is_left_out(sampler):
    unet, calls = flagging_in_turn(torch.full((10, SHAPE[0], 1, *SHAPE[2:]), -40.0))
    sampler.restore(unet, case()[2], SCHEDULE, early_exit=True)
    assert len(calls) == 10


@pytest.mark.parametrize(("share", "with_brain"), [(0.1, True), (0.5, False), (0.99, True)])
def test_repaint_erases_at_most_a_share_of_the_brain_and_what_is_flagged_most(share, with_brain):
    z = case()[2]
    logit = torch.randn(SHAPE[0], 1, *SHAPE[2:], generator=seeded(5)) + 2
    brain = (torch.rand(logit.shape, generator=seeded(6)) < 0.7).float() if with_brain else None
    unet, given = flagging(logit)
    result = Repainting(MaskedDDIM(2, mask_threshold=0.5), share).restore(
        unet, z, SCHEDULE, brain_fraction=brain
    )
    inside = torch.ones_like(logit, dtype=torch.bool) if brain is None else brain > 0
    erased = (given[-1][0] == 0).all(dim=1, keepdim=True)
    for i in range(SHAPE[0]):
        candidates = logit[i][inside[i]].sort(descending=True).values
        allowed = int(share * len(candidates))
        expected = min(allowed, int((candidates > 0).sum()))
        assert int(erased[i].sum()) == expected
        assert (logit[i][erased[i]] >= candidates[expected - 1]).all()
        assert not erased[i][~inside[i]].any()
    assert torch.equal(result.z_restored[~erased.expand_as(z)], z[~erased.expand_as(z)])


def test_repaint_erases_its_share_where_all_positions_are_flagged_alike():
    z = case()[2]
    unet, given = flagging(torch.full((SHAPE[0], 1, *SHAPE[2:]), 30.0))  # f_M is exactly 1
    result = Repainting(MaskedDDIM(3, mask_threshold=0.1), 0.3).restore(unet, z, SCHEDULE)
    erased = (given[-1][0] == 0).all(dim=1).flatten(1).sum(dim=1)
    assert erased.tolist() == [int(0.3 * 6 * 7)] * SHAPE[0] and result.flagged.all()


def test_repaint_takes_away_all_of_what_was_there():
    """Whatever stands in the flagged positions, the repainted latent is the same."""
    z0, noise_mask, z = case()
    restored = []
    for content in (z, z + 5, -3 * z):
        unet, _ = flagging(torch.where(noise_mask, 3.0, -3.0))
        changed = torch.where(noise_mask, content, z0)
        restored.append(Repainting(MaskedDDIM()).restore(unet, changed, SCHEDULE).z_restored)
    assert torch.equal(restored[0], restored[1]) and torch.equal(restored[0], restored[2])
    unet, _ = flagging(torch.where(noise_mask, 3.0, -3.0))
    stepwise = [MaskedDDIM().restore(unet, torch.where(noise_mask, c, z0), SCHEDULE) for c in (z, z + 5)]
    assert not torch.equal(stepwise[0].z_restored, stepwise[1].z_restored)


def test_a_share_of_nothing_is_the_sampler_itself():
    sampler = MaskedDDIM(3)
    assert make_repair(sampler, 0.0) is sampler
    assert make_repair(sampler, 0.3) == Repainting(sampler, 0.3)


@pytest.mark.parametrize("share", [-0.1, 1.01, np.nan, "x"])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ValueError, match=f"^repaint must be above 0 and at most 1, got {share!r}"):
        make_repair(MaskedDDIM(), share)
    with pytest.raises(ValueError, match=r"got 0\.0\. make_repair\(sampler, 0\)"):
        Repainting(MaskedDDIM(), 0.0)
