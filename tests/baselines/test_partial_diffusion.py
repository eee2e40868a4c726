import pickle

import numpy as np
import pytest
import torch
from scipy.stats import hmean
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from madad import Trainer
from madad._runtime.random import generator_from
from madad._runtime.tensors import to_network
from madad.baselines.partial_diffusion import ImplicitGuidanceDiffusion, PartialDiffusion, guidance
from madad.baselines.simplex import simplex_noise
from madad.diffusion import MaskedDDIM, NoiseSchedule
from madad.nn import UNetConfig
from madad.training.loop import TrainingLoop

CLASSES = (PartialDiffusion, ImplicitGuidanceDiffusion)
NOISES = ("gaussian", "simplex")
both_classes = pytest.mark.parametrize("cls", CLASSES)
both_noises = pytest.mark.parametrize("noise", NOISES)


def tiny(cls=PartialDiffusion, **overrides):
    defaults = {
        "denoiser": "tiny",
        "trainer": Trainer(2, max_steps=5),
        "noise": "gaussian",
        "n_timesteps": 50,
        "t_start": 20,
        "n_steps": 4,
        "eta": 0.0,
        "random_state": 0,
    }
    if cls is ImplicitGuidanceDiffusion:
        defaults["n_guidance"] = 2
    return cls(**(defaults | overrides))


def make_slices(n, height=16, width=16, seed=0):
    """Ellipses with smooth and random texture, background 0."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = ((2 * y + 1) / height - 1) ** 2 + ((2 * x + 1) / width - 1) ** 2 < 0.75
    waves = 0.1 * np.sin(x / 3 + rng.uniform(0, 6, (n, 1, 1)))
    values = 0.4 + waves + 0.03 * rng.standard_normal((n, height, width))
    return np.where(inside, values.clip(0.02, 1), 0).astype(np.float32)


HEALTHY = make_slices(40)


class Network(nn.Module):
    """A function in the place of the U-Net; it answers with noise, and with nonsense for the mask."""

    def __init__(self, eps_hat):
        super().__init__()
        self.eps_hat = eps_hat
        self.times = []

    def forward(self, x_t, t):
        self.times.append(int(t[0]))
        assert (t == t[0]).all()
        return self.eps_hat(x_t, int(t[0])), torch.full_like(x_t, torch.nan)


def predicting(x0_hat, n_timesteps=50):
    """A network whose noise is such that the clean image is x0_hat(x_t, t)."""
    alpha_bar = NoiseSchedule.linear(n_timesteps).alpha_bar

    def eps_hat(x_t, t):
        ab = float(alpha_bar[t])
        return (x_t - ab**0.5 * x0_hat(x_t, t)) / (1 - ab) ** 0.5

    return Network(eps_hat)


def as_if_fitted(estimator, network):
    estimator.denoiser_, estimator.map_seed_ = network, 5
    estimator.n_timesteps_, estimator.noise_ = estimator.n_timesteps, estimator.noise
    return estimator


def raw_maps(estimator, network, X, brain=None):
    as_if_fitted(estimator, network)
    brain = X > 0 if brain is None else brain
    return estimator._raw_maps(to_network(X[:, None], torch.device("cpu")), brain)


# scikit-learn


@parametrize_with_checks(
    [
        tiny(
            cls,
            trainer=Trainer(1, max_steps=1),
            n_timesteps=30,
            t_start=8,
            n_steps=2,
            intensity_range="data",
            smoothing_px=0.5,
        )
        for cls in CLASSES
    ]
)
def test_scikit_learn_check(estimator, check):
    check(estimator)


@both_classes
def test_the_default_settings_pass_their_own_checks(cls):
    cls()._check_parameters()


# What a perfect and a constant network lead to


@both_classes
@both_noises
def test_a_perfect_network_restores_the_slice(cls, noise):
    x = to_network(HEALTHY[:6, None], torch.device("cpu"))
    estimator = tiny(cls, noise=noise)
    maps = raw_maps(estimator, predicting(lambda x_t, t: x), HEALTHY[:6])
    np.testing.assert_allclose(maps, 0, atol=1e-5)


@both_classes
def test_the_map_is_the_difference_to_what_the_network_takes_for_clean(cls):
    X = HEALTHY[:6]
    maps = raw_maps(tiny(cls), predicting(lambda x_t, t: torch.full_like(x_t, 0.5)), X)
    expected = np.where(X > 0, np.abs(X.astype(np.float64) - 0.75), 0)
    np.testing.assert_allclose(maps, expected, atol=1e-5)
    assert (maps[X == 0] == 0).all()


@both_classes
def test_the_estimate_is_clipped_and_the_map_stays_in_0_to_1(cls):
    X = HEALTHY[:6]
    maps = raw_maps(tiny(cls), predicting(lambda x_t, t: torch.full_like(x_t, 40.0)), X)
    np.testing.assert_allclose(maps, np.where(X > 0, 1 - X, 0), atol=1e-6)
    beyond = raw_maps(tiny(cls), predicting(lambda x_t, t: torch.full_like(x_t, -1.0)), 3 * X)
    assert beyond.max() == 1


@both_classes
def test_channels_are_averaged(cls):
    X = np.stack([HEALTHY[:4], 0.5 * HEALTHY[:4]], axis=1)
    estimator = as_if_fitted(tiny(cls), predicting(lambda x_t, t: torch.full_like(x_t, 0.5)))
    maps = estimator._raw_maps(to_network(X, torch.device("cpu")), HEALTHY[:4] > 0)
    expected = np.where(HEALTHY[:4] > 0, np.abs(X.astype(np.float64) - 0.75).mean(axis=1), 0)
    np.testing.assert_allclose(maps, expected, atol=1e-5)


@pytest.mark.parametrize(
    "t_start, n_steps, times",
    [(20, 4, [20, 15, 10, 5]), (20, 1, [20]), (3, 3, [3, 2, 1]), (50, 3, [50, 34, 17])],
)
def test_times_are_evenly_spaced_and_begin_at_t_start(t_start, n_steps, times):
    network = predicting(lambda x_t, t: x_t)
    raw_maps(tiny(t_start=t_start, n_steps=n_steps), network, HEALTHY[:2])
    assert network.times == times


# Independent formulas


def stand_in(x_t, t):
    """An arbitrary clean image, inside -1..1, that depends on the noised one and on t."""
    return (0.3 * x_t.roll(1, dims=-1) + 0.01 * t).clamp(-0.9, 0.9)


@pytest.mark.parametrize("noise, eta", [("gaussian", 0.0), ("gaussian", 0.6), ("simplex", 0.0)])
def test_the_steps_are_those_of_ddim(noise, eta):
    """As the library's other sampler takes them; its noise is Gaussian."""
    X = HEALTHY[:5]
    maps = raw_maps(tiny(noise=noise, eta=eta), predicting(stand_in), X, np.ones(X.shape, bool))
    x, generator = to_network(X[:, None], torch.device("cpu")), generator_from(5)
    schedule = NoiseSchedule(NoiseSchedule.linear(50).beta[1:21])
    eps = torch.randn((1, 1, 16, 16), generator=generator)
    if noise == "simplex":
        eps = simplex_noise(1, 16, 16, generator_from(5))[None]
    ab = float(schedule.alpha_bar[20])
    flagged = torch.full((5, 1, 16, 16), 50.0)
    restored = MaskedDDIM(4, eta, step_spacing="trailing").restore(
        lambda x_t, t: (stand_in(x_t, int(t[0])), flagged),
        ab**0.5 * x + (1 - ab) ** 0.5 * eps,
        schedule,
        generator,
    )
    expected = (restored.z_restored - x).abs()[:, 0] / 2
    np.testing.assert_allclose(maps, expected.numpy(), atol=1e-5)


def test_guidance_by_hand():
    X, n_guidance = HEALTHY[:5], 2
    maps = raw_maps(
        tiny(ImplicitGuidanceDiffusion, n_guidance=n_guidance),
        predicting(stand_in),
        X,
        np.ones(X.shape, bool),
    )
    x = to_network(X[:, None], torch.device("cpu"))
    eps, alpha_bar = (
        torch.randn((1, 1, 16, 16), generator=generator_from(5)),
        NoiseSchedule.linear(50).alpha_bar,
    )
    x_t = alpha_bar[20].sqrt() * x + (1 - alpha_bar[20]).sqrt() * eps
    seen = []
    for t, t_before in ((20, 15), (15, 10), (10, 5), (5, 0)):
        ab, ab_before = alpha_bar[t], alpha_bar[t_before]
        x0_hat = stand_in(x_t.float(), t).double()
        eps_hat = (x_t - ab.sqrt() * x0_hat) / (1 - ab).sqrt()
        x_0 = x0_hat
        if t in (15, 5):  # the second and the fourth of four steps
            seen.append((x - x0_hat).abs()[:, 0].numpy() / 2)
            m = torch.from_numpy(guidance(seen[-1]))[:, None]
            x_0, eps_hat = m * x0_hat + (1 - m) * x, eps
        x_t = ab_before.sqrt() * x_0 + (1 - ab_before).sqrt() * eps_hat
    np.testing.assert_allclose(maps, hmean(np.stack(seen), axis=0), atol=1e-5)


def test_one_comparison_is_partial_diffusion():
    alone = raw_maps(tiny(eta=0.5), predicting(stand_in), HEALTHY[:4])
    guided = raw_maps(
        tiny(ImplicitGuidanceDiffusion, n_guidance=1, eta=0.5), predicting(stand_in), HEALTHY[:4]
    )
    np.testing.assert_array_equal(alone, guided)


def test_the_slice_is_put_back_where_it_agrees():
    """What differs only on the left is noised again with the slice on the right."""
    X, inputs = make_slices(2, 64, 64), []
    x = to_network(X[:, None], torch.device("cpu"))

    def left_removed(x_t, t):
        inputs.append(x_t)
        wrong = x.clone()
        wrong[..., 12:20, 12:20] = 0.9
        wrong[..., 40:] += 0.02 * (t == 20)  # a little off on the right, at first
        return wrong

    estimator = tiny(ImplicitGuidanceDiffusion, n_steps=2, n_guidance=2)
    raw_maps(estimator, predicting(left_removed), X)
    ab, eps = (
        NoiseSchedule.linear(50).alpha_bar[10].float(),
        torch.randn((1, 1, 64, 64), generator=generator_from(5)),
    )
    back = (inputs[1] - (1 - ab).sqrt() * eps) / ab.sqrt()
    assert (back - x)[..., 45:].abs().max() < 0.002
    removed = (back - 0.9).abs() / (x - 0.9).abs()
    assert removed[..., 14:18, 14:18].max() < 0.15


def test_guidance_is_the_smoothed_share_and_its_neighbourhood():
    difference = np.zeros((3, 128, 128), np.float32)
    difference[0, 60:64, 60:64] = 0.2
    difference[1] = 0.01 * difference[0]
    m = guidance(difference)
    assert m.dtype == np.float32 and m.max() == 1 and m.min() == 0
    np.testing.assert_allclose(m[1], m[0], atol=1e-5)  # relative to the slice's largest
    assert not m[2].any()
    assert m[0, 62, 62] > 0.95
    assert 0.3 < m[0, 62, 62 + 7] < 0.55  # half where only the neighbourhood differs
    assert not m[0, :, 90:].any()


@both_noises
def test_the_loss_is_the_squared_error_of_the_noise(noise):
    x, brain = to_network(make_slices(400, 8, 8)[:, None], torch.device("cpu")), torch.ones(400, 1, 8, 8)
    alpha_bar = NoiseSchedule.linear(50).alpha_bar
    seen = []

    def perfect(x_t, t):
        seen.append(t)
        ab = alpha_bar[t].float()[:, None, None, None]
        return (x_t - ab.sqrt() * x) / (1 - ab).sqrt(), None

    estimator = tiny(noise=noise)
    assert estimator._loss(perfect, x, brain, generator_from(0)) < 1e-8
    nothing = estimator._loss(lambda x_t, t: (torch.zeros_like(x_t), None), x, brain, generator_from(0))
    torch.testing.assert_close(nothing, torch.tensor(1.0), atol=0.05, rtol=0)  # the noise's variance
    assert set(seen[0].tolist()) == set(range(1, 51))


# The same slice, the same result


@both_classes
@pytest.mark.parametrize("noise, shape", [("gaussian", (17, 23)), ("simplex", (16, 16))])
def test_results_do_not_depend_on_company_or_order(cls, noise, shape, two_threads):
    X = make_slices(40, *shape)
    estimator = tiny(cls, noise=noise, eta=0.7).fit(X)
    maps, scores = estimator.predict_maps(X), estimator.score_samples(X)
    assert maps.max() > 0
    rng = np.random.default_rng(0)
    for rows in (np.array([7]), np.array([39, 3]), np.arange(40)[::-1], rng.integers(0, 40, 50)):
        np.testing.assert_array_equal(estimator.predict_maps(X[rows]), maps[rows])
        np.testing.assert_array_equal(estimator.score_samples(X[rows]), scores[rows])


@pytest.mark.parametrize("cls, noise", list(zip(CLASSES, NOISES, strict=True)))
def test_save_pickle_and_clone_keep_everything(cls, noise, tmp_path):
    estimator = tiny(cls, noise=noise, eta=0.5, t_start=12, contamination=0.1).fit(HEALTHY)
    estimator.save(tmp_path / "model")
    loaded, unpickled = cls.load(tmp_path / "model"), pickle.loads(pickle.dumps(estimator))
    before, after = estimator.get_params(deep=False), loaded.get_params(deep=False)
    assert {name: after[name] for name in before if name != "trainer"} == {
        name: before[name] for name in before if name != "trainer"
    }
    again = clone(estimator).fit(HEALTHY)
    for other in (loaded, unpickled, again):
        for call in ("predict_maps", "predict_masks", "decision_function", "predict"):
            np.testing.assert_array_equal(getattr(other, call)(HEALTHY), getattr(estimator, call)(HEALTHY))
    assert loaded.history_ == estimator.history_
    np.testing.assert_array_equal(loaded.fit(HEALTHY).predict_maps(HEALTHY), estimator.predict_maps(HEALTHY))


def test_both_share_one_training(tmp_path, monkeypatch):
    steps, step = [], TrainingLoop._step

    def counting(loop):
        steps.append(loop.run.step)
        return step(loop)

    monkeypatch.setattr(TrainingLoop, "_step", counting)
    trainer = Trainer(2, max_steps=5, checkpoint_dir=tmp_path)
    first = tiny(trainer=trainer).fit(HEALTHY)
    assert len(steps) == first.history_[-1]["step"] > 0
    steps.clear()
    changes = {"t_start": 12, "n_steps": 3, "n_guidance": 3, "eta": 1.0}
    second = tiny(ImplicitGuidanceDiffusion, trainer=trainer, **changes).fit(HEALTHY)
    assert not steps and second.history_ == first.history_
    for mine, theirs in zip(first.denoiser_.parameters(), second.denoiser_.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for changed in ({"noise": "simplex"}, {"n_timesteps": 60}):
        steps.clear()
        tiny(trainer=trainer, **changed).fit(HEALTHY)
        assert steps


@both_classes
def test_changed_parameters_of_the_map_make_thresholds_stale(cls):
    estimator = tiny(cls).fit(HEALTHY)
    with pytest.warns(UserWarning, match="calibrated with {'t_start': 20}, now {'t_start': 10}"):
        estimator.set_params(t_start=10).predict(HEALTHY[:2])


# It finds something


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both classes, after one training of a network that lets the noise of every pixel through."""
    runs = tmp_path_factory.mktemp("runs")
    trainer = Trainer(
        10**6, max_steps=120, batch_size=8, learning_rate=4e-3, ema_decay=0.95, checkpoint_dir=runs
    )
    shape = UNetConfig(
        base_channels=16,
        channel_multipliers=(1, 2),
        n_res_blocks=1,
        attention_levels=(),
        n_heads=2,
        patch_size=2,
        norm_groups=4,
    )
    times = {"n_timesteps": 200, "t_start": 60, "n_steps": 6}
    X = make_slices(80, 32, 32)
    return {
        cls: tiny(cls, denoiser=shape, trainer=trainer, smoothing_px=1, **times).fit(X) for cls in CLASSES
    }


@both_classes
def test_pasted_anomalies_stand_out(cls, trained):
    X = make_slices(20, 32, 32, seed=7)
    lesion = np.zeros((32, 32), bool)
    lesion[10:16, 12:18] = True
    sick = np.where(lesion, np.float32(0.95), X)
    estimator = trained[cls]
    assert estimator.score_samples(sick).max() < estimator.score_samples(X).min()
    maps = estimator.predict_maps(sick)
    assert maps.dtype == np.float32 and 0 <= maps.min() and maps.max() <= 1
    assert not maps[X == 0].any()
    assert maps[:, lesion].mean() > 2.5 * maps[:, (X[0] > 0) & ~lesion].mean()


# Errors


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"noise": "white"}, "noise must be one of .*'gaussian', 'simplex'.*, got 'white'. Use 'gaussian'."),
        ({"n_timesteps": 20}, "n_timesteps must be an integer of 21 or more, got 20. The paper's is 1000."),
        ({"n_timesteps": 50.0}, "n_timesteps must be an integer of 21 or more, got 50.0. "),
        ({"t_start": 51}, "t_start must be an integer in 1..50, n_timesteps, got 51. The paper's is 250"),
        ({"t_start": 0}, "t_start must be an integer in 1..50, n_timesteps, got 0. "),
        ({"n_steps": 21}, "n_steps must be an integer in 1..20, t_start, got 21. Take fewer steps."),
        ({"n_steps": 2.0}, "n_steps must be an integer in 1..20, t_start, got 2.0. "),
        ({"eta": 1.5}, "eta must lie in 0..1, got 1.5. Use 1 for DDPM."),
        ({"eta": None}, "eta must lie in 0..1, got None. Use 1"),
    ],
)
def test_errors_before_anything_is_trained(changes, message, monkeypatch):
    monkeypatch.setattr(Trainer, "optimise", None)
    for cls in CLASSES:
        with pytest.raises(ValueError, match=message):
            tiny(cls, **changes).fit(HEALTHY)


@pytest.mark.parametrize("value", [0, 5, 1.5])
def test_guidance_is_between_one_and_all_steps(value):
    with pytest.raises(ValueError, match=f"n_guidance must be an integer in 1..4, n_steps, got {value}. "):
        tiny(ImplicitGuidanceDiffusion, n_guidance=value).fit(HEALTHY)


def test_the_smallest_number_of_timesteps_is_the_schedules():
    NoiseSchedule.linear(21)
    with pytest.raises(ValueError, match="beta"):
        NoiseSchedule.linear(20)


@both_classes
def test_what_was_trained_with_stays_when_parameters_change(cls):
    estimator = tiny(cls).fit(HEALTHY)
    before = estimator.predict_maps(HEALTHY[:2])
    estimator.set_params(n_timesteps=estimator.n_timesteps + 20, noise="gaussian")
    np.testing.assert_array_equal(estimator.predict_maps(HEALTHY[:2]), before)


def test_restored_slices_are_those_that_the_map_compares_with():
    estimator = tiny(PartialDiffusion, smoothing_px=0).fit(HEALTHY)
    restored, maps = estimator.restore(HEALTHY[:3]), estimator.predict_maps(HEALTHY[:3])
    assert restored.shape == (3, *HEALTHY.shape[1:]) and not restored[HEALTHY[:3] == 0].any()
    np.testing.assert_allclose(np.abs(restored - HEALTHY[:3]), maps, atol=1e-5)


def test_after_fit_the_networks_own_number_of_times_counts():
    estimator = tiny(PartialDiffusion).fit(HEALTHY)
    maps = estimator.predict_maps(HEALTHY[:2])
    n_timesteps = estimator.n_timesteps_
    estimator.set_params(n_timesteps=10 * n_timesteps)
    np.testing.assert_array_equal(estimator.predict_maps(HEALTHY[:2]), maps)
    with pytest.raises(ValueError, match=f"t_start must be an integer in 1..{n_timesteps}, n_timesteps"):
        estimator.set_params(t_start=n_timesteps + 1).predict_maps(HEALTHY[:2])
