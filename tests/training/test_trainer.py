import math

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

import madad.training
from madad._random import isolated_seed
from madad.training import Trainer

PLAIN = {"warmup_fraction": 0.0, "ema_decay": 0.0, "weight_decay": 0.0, "gradient_clip": None}
N = 24


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


POINTS = torch.randn(N, 3, generator=seeded(1))
TARGETS = POINTS @ torch.tensor([1.0, -2.0, 0.5]) + 0.7


def line():
    """A linear model that starts at zero."""
    module = nn.Linear(3, 1)
    with torch.no_grad():
        module.weight.zero_()
        module.bias.zero_()
    return module


def squared_error(module, index, generator):
    error = (module(POINTS[index])[:, 0] - TARGETS[index]).square().mean()
    return error, {"root": error.detach().sqrt()}


def noisy_error(module, index, generator):
    noise = 0.1 * torch.randn(len(index), 3, generator=generator)
    return (module(POINTS[index] + noise)[:, 0] - TARGETS[index]).square().mean(), {}


def train(trainer, module=None, loss=squared_error, *, seed=0, **options):
    module = line() if module is None else module
    return module, trainer.optimise(module, loss, N, generator=seeded(seed), **options)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def recorded(loss=squared_error, sink=None):
    """The loss, noting the index and the weights at each call."""

    def wrapped(module, index, generator):
        sink.append((index.clone(), weights(module).clone()))
        return loss(module, index, generator)

    return wrapped


# Properties


def test_a_convex_problem_converges_to_its_solution():
    module, history = train(Trainer(200, batch_size=8, learning_rate=0.05, **PLAIN))
    np.testing.assert_allclose(weights(module), [1, -2, 0.5, 0.7], atol=1e-3)
    assert history[-1]["loss"] < 1e-5 < 0.1 < history[0]["loss"]


def test_the_module_ends_in_evaluation_mode_and_is_trained_in_training_mode():
    modes = []

    def loss(module, index, generator):
        modes.append(module.training)
        return squared_error(module, index, generator)

    module, _ = train(Trainer(1), line().eval(), loss)
    assert modes == [True] and not module.training


def test_one_seed_gives_one_result_bitwise_and_another_seed_another():
    trainer = Trainer(5, batch_size=7)
    (a, history_a), (b, history_b), (c, _) = (train(trainer, loss=noisy_error, seed=s) for s in (0, 0, 1))
    assert torch.equal(weights(a), weights(b)) and not torch.equal(weights(a), weights(c))
    assert [record["loss"] for record in history_a] == [record["loss"] for record in history_b]


def test_the_global_generator_is_neither_used_nor_moved():
    modules = [line(), line()]
    for seed, module in enumerate(modules):
        with isolated_seed(seed):
            before = torch.get_rng_state()
            train(Trainer(3, batch_size=5), module, noisy_error)
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*(weights(module) for module in modules))


def test_an_epoch_visits_each_sample_at_most_once_in_a_new_order():
    seen = []
    train(Trainer(3, batch_size=7), loss=recorded(sink=seen))
    epochs = [torch.cat([index for index, _ in seen[i : i + 3]]) for i in (0, 3, 6)]
    assert len(seen) == 9
    for epoch in epochs:
        assert len(epoch) == len(set(epoch.tolist())) == 21  # the incomplete batch is left out
        assert set(epoch.tolist()) <= set(range(N))
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize(
    "options, call, expected",
    [({}, {}, 24), ({}, {"batch_size": 6}, 6), ({"batch_size": 5}, {"batch_size": 6}, 5)],
)
def test_the_trainers_batch_size_comes_first_and_never_exceeds_the_data(options, call, expected):
    seen = []
    train(Trainer(1, **options), loss=recorded(sink=seen), **call)
    assert {len(index) for index, _ in seen} == {expected}


# Bounds


@pytest.mark.parametrize(
    "epochs, max_steps, steps", [(2, None, 6), (100, 4, 4), (1, 100, 3), (5, 15, 15), (3, 1, 1)]
)
def test_the_smaller_of_epochs_and_steps_ends_training(epochs, max_steps, steps):
    seen = []
    _, history = train(Trainer(epochs, max_steps=max_steps, batch_size=8), loss=recorded(sink=seen))
    assert len(seen) == steps == history[-1]["step"]
    assert len(history) == math.ceil(steps / 3)


class Clock:
    """Time that passes by ``tick`` at each look."""

    def __init__(self, tick):
        self.now, self.tick = 0.0, tick

    def monotonic(self):
        self.now += self.tick
        return self.now


@pytest.mark.parametrize("max_time", [1, 2, 3, 4, 5, 10, 33, 34, 35, 36, 37, 100])
def test_time_ends_training_wherever_it_runs_out(monkeypatch, max_time):
    monkeypatch.setattr(madad.training, "time", Clock(1.0))
    seen = []
    module, history = train(
        Trainer(1000, max_time=max_time, batch_size=8), loss=recorded(sink=seen)
    )  # three looks at the clock per step, three per epoch
    assert len(seen) <= max_time / 2
    assert len(seen) == (history[-1]["step"] if history else 0)
    assert torch.isfinite(weights(module)).all() and not module.training


def test_the_learning_rate_decays_with_the_time(monkeypatch):
    monkeypatch.setattr(madad.training, "time", Clock(1.0))
    _, history = train(Trainer(10_000, max_time=300, batch_size=8, warmup_fraction=0.0))
    rates = [record["learning_rate"] for record in history]
    assert rates == sorted(rates, reverse=True) and rates[0] > 9e-4 and rates[-1] < 1e-4


# Formulas


def test_history_holds_the_means_of_each_epoch():
    seen = []
    _, history = train(
        Trainer(2, batch_size=8, max_steps=5, learning_rate=0.1, **PLAIN), loss=recorded(sink=seen)
    )
    losses = []
    for index, values in seen:
        error = POINTS[index].double() @ values[:3].double() + values[3].double() - TARGETS[index].double()
        losses.append(float(error.square().mean()))
    for record, part in zip(history, (losses[:3], losses[3:]), strict=True):
        assert set(record) == {"step", "loss", "root", "learning_rate", "samples_per_second"}
        assert record["loss"] == pytest.approx(np.mean(part), rel=1e-5)
        assert record["root"] == pytest.approx(np.mean(np.sqrt(part)), rel=1e-5)
        assert record["samples_per_second"] > 0
    assert [record["step"] for record in history] == [3, 5]


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3])
def test_learning_rate_rises_linearly_and_falls_as_half_a_cosine(warmup):
    steps, peak = 40, 0.02
    trainer = Trainer(steps, batch_size=N, learning_rate=peak, warmup_fraction=warmup)
    _, history = train(trainer)
    for step, record in enumerate(history):
        progress = step / steps
        if progress < warmup:
            expected = peak * max(progress / warmup, 0.01)
        else:
            expected = peak * max(np.cos(np.pi / 2 * (progress - warmup) / (1 - warmup)) ** 2, 0.01)
        assert record["learning_rate"] == pytest.approx(expected, rel=1e-9)


def test_a_step_has_the_learning_rate_of_the_schedule():
    seen = []
    train(Trainer(3, batch_size=N, learning_rate=0.01, **PLAIN), loss=recorded(sink=seen))
    first_move = seen[1][1] - seen[0][1]
    np.testing.assert_allclose(first_move.abs(), 0.01, rtol=1e-4)  # Adam's first step is the rate itself


def test_weights_end_as_their_exponential_moving_average():
    seen, decay = [], 0.9
    trainer = Trainer(10, batch_size=8, learning_rate=0.05, ema_decay=decay)
    module, _ = train(trainer, loss=recorded(sink=seen))
    last, _ = train(Trainer(**(trainer.get_params() | {"ema_decay": 0.0})))
    after_each_step = [values.double().numpy() for _, values in seen[1:]] + [weights(last).double().numpy()]
    average = np.zeros(4)
    for step, values in enumerate(after_each_step):
        kept = min(decay, (1 + step) / (10 + step))
        average = kept * average + (1 - kept) * values
    np.testing.assert_allclose(weights(module), average, rtol=1e-5)
    assert np.abs(average - after_each_step[-1]).max() > 1e-3


def test_gradient_clip_bounds_the_norm():
    norms = []

    def loss(module, index, generator):
        if module.weight.grad is not None:  # that of the last step, as the optimiser saw it
            norms.append(torch.cat([p.grad.flatten() for p in module.parameters()]).norm())
        return 1000 * squared_error(module, index, generator)[0], {}

    for clip in (0.5, None):
        train(Trainer(5, batch_size=8, gradient_clip=clip), line(), loss)
        assert (max(norms) <= 0.5 + 1e-5) if clip else (min(norms) > 10)
        norms.clear()


def test_weight_decay_pulls_to_zero():
    def nothing(module, index, generator):
        return 0.0 * module(POINTS[index]).sum(), {}

    options = PLAIN | {"weight_decay": 0.5}
    module = nn.Linear(3, 1)
    start = weights(module)
    _, history = train(Trainer(4, batch_size=N, learning_rate=0.1, **options), module, nothing)
    factor = np.prod([1 - 0.5 * record["learning_rate"] for record in history])
    np.testing.assert_allclose(weights(module), factor * start, rtol=1e-5)


def test_frozen_parameters_stay():
    module = line()
    module.bias.requires_grad_(False)
    train(Trainer(3, batch_size=8), module)
    assert module.bias.item() == 0 and module.weight.any()


def test_bfloat16_is_close_to_float32():
    dtypes, results = set(), {}

    def loss(module, index, generator):
        dtypes.add(module(POINTS[index]).dtype)
        return squared_error(module, index, generator)

    for precision in ("float32", "bfloat16", "auto"):
        trainer = Trainer(100, batch_size=8, learning_rate=0.05, precision=precision)
        results[precision], history = train(trainer, loss=loss)
        assert all(p.dtype == torch.float32 for p in results[precision].parameters())
        assert history[-1]["loss"] < 0.02
    assert dtypes == {torch.float32, torch.bfloat16}
    assert torch.equal(weights(results["auto"]), weights(results["float32"]))
    assert not torch.equal(weights(results["bfloat16"]), weights(results["float32"]))
    np.testing.assert_allclose(weights(results["bfloat16"]), weights(results["float32"]), atol=0.03)


# Reports


def test_the_bar_shows_its_name_the_loss_and_the_end(capsys):
    _, history = train(Trainer(2, batch_size=8), description="denoiser", verbose=True)
    shown = capsys.readouterr().err
    assert "denoiser" in shown and "6/6" in shown and f"loss={history[-1]['loss']:.4f}" in shown


def test_nothing_is_shown_by_default(capsys):
    train(Trainer(2))
    assert capsys.readouterr() == ("", "")


# Parameters and errors


def test_clone_and_parameters():
    trainer = Trainer(7, learning_rate=0.3, precision="float32")
    copy = clone(trainer)
    assert copy is not trainer and copy.get_params() == trainer.get_params()
    assert copy.set_params(max_steps=3).max_steps == 3
    assert set(trainer.get_params()) == {
        *("max_epochs", "max_steps", "max_time", "batch_size", "learning_rate", "weight_decay"),
        *("warmup_fraction", "ema_decay", "gradient_clip", "precision"),
    }


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(value):
    def loss(module, index, generator):
        return module.weight.sum() * value, {}

    with pytest.raises(FloatingPointError, match=r"loss must stay finite, got nan at step 3.*learning_rate"):
        train(Trainer(5, batch_size=8), loss=loss)


@pytest.mark.parametrize(
    "name, value",
    [
        *[
            (name, value)
            for name in ("max_epochs", "max_steps", "batch_size", "max_time")
            for value in (0, -3)
        ],
        ("max_epochs", None),
        ("max_time", math.nan),
        *[("learning_rate", value) for value in (0, -0.1, math.nan)],
        *[("weight_decay", value) for value in (-0.1, math.nan)],
        *[(name, value) for name in ("warmup_fraction", "ema_decay") for value in (1.0, -0.1, math.nan)],
        *[("gradient_clip", value) for value in (0, -1.0, math.nan)],
        *[("precision", value) for value in ("float16", None)],
    ],
)
def test_wrong_parameters_are_refused(name, value):
    trainer = Trainer().set_params(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} must ") as caught:
        train(trainer)
    assert f"got {value!r}" in str(caught.value)
