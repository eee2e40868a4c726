import contextlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sklearn.base import clone
from torch import nn

import madad.training.loop
import madad.training.trainer
from madad._runtime.random import isolated_seed
from madad.nn.layers import RecomputedBlock
from madad.training import TensorBoard, Trainer, TrainingState, TrainingStoppedWarning, graceful_stop
from madad.training.trainer import DEFAULTS

PLAIN = {"warmup_fraction": 0.0, "ema_decay": 0.0, "weight_decay": 0.0, "gradient_clip": math.inf}
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


def squared_error(module, index, generator, step):
    error = (module(POINTS[index])[:, 0] - TARGETS[index]).square().mean()
    return error, {"root": error.detach().sqrt()}


def noisy_error(module, index, generator, step):
    noise = 0.1 * torch.randn(len(index), 3, generator=generator)
    return (module(POINTS[index] + noise)[:, 0] - TARGETS[index]).square().mean(), {}


def train(trainer, module=None, loss=squared_error, *, seed=0, **options):
    module = line() if module is None else module
    return module, trainer.optimise(module, loss, N, generator=seeded(seed), **options)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def recorded(loss=squared_error, sink=None):
    """The loss, noting the index and the weights at each call."""

    def wrapped(module, index, generator, step):
        sink.append((index.clone(), weights(module).clone()))
        return loss(module, index, generator, step)

    return wrapped


# Properties


def test_a_convex_problem_converges_to_its_solution():
    module, history = train(Trainer(200, batch_size=8, learning_rate=0.05, **PLAIN))
    np.testing.assert_allclose(weights(module), [1, -2, 0.5, 0.7], atol=1e-3)
    assert history[-1]["loss"] < 1e-5 < 0.1 < history[0]["loss"]


def test_the_module_ends_in_evaluation_mode_and_is_trained_in_training_mode():
    modes = []

    def loss(module, index, generator, step):
        modes.append(module.training)
        return squared_error(module, index, generator, step)

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
    "epochs, max_steps, steps", [(2, math.inf, 6), (math.inf, 4, 4), (1, 100, 3), (5, 15, 15), (3, 1, 1)]
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


@pytest.mark.parametrize("max_time", [1, 3, 34, 35, 100])
def test_time_ends_training_wherever_it_runs_out(monkeypatch, max_time):
    monkeypatch.setattr(madad.training.loop, "time", Clock(1.0))
    seen = []
    module, history = train(Trainer(1000, max_time=max_time, batch_size=8), loss=recorded(sink=seen))
    assert max_time / 3 - 1 <= len(seen) <= max_time  # a look at the clock per step, and two per epoch
    assert len(seen) == (history[-1]["step"] if history else 0)
    assert torch.isfinite(weights(module)).all() and not module.training


def test_the_cpu_clock_counts_what_the_process_worked(monkeypatch):
    class Both(Clock):
        def monotonic(self):
            return 1e9  # a wall clock that stands still

        def process_time(self):
            return super().monotonic()

    seen = []
    monkeypatch.setattr(madad.training.loop, "time", Both(1.0))
    train(Trainer(1000, max_time=30, clock="cpu", batch_size=8), loss=recorded(sink=seen))
    assert 9 <= len(seen) <= 30


def test_the_learning_rate_decays_with_the_time(monkeypatch):
    monkeypatch.setattr(madad.training.loop, "time", Clock(1.0))
    _, history = train(Trainer(10_000, max_time=300, batch_size=8, warmup_fraction=0.0))
    rates = [record["learning_rate"] for record in history]
    assert rates == sorted(rates, reverse=True) and rates[0] > 9e-4
    assert rates[-1] == pytest.approx(1e-5)  # 1 % of the peak


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
        assert list(record) == [
            *("step", "loss", "root", "learning_rate", "samples_per_second", "peak_memory_mib")
        ]
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
    validated = []
    train(trainer, validation_loss=recorded(sink=validated), n_validation=1)
    assert torch.equal(validated[-1][1], weights(module))
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

    def loss(module, index, generator, step):
        return 1000 * squared_error(module, index, generator, step)[0], {}

    def note(state):  # the gradient of the last step, as the optimiser saw it
        norms.append(torch.cat([p.grad.flatten() for p in state.module.parameters()]).norm())

    for clip in (0.5, math.inf):
        train(Trainer(5, batch_size=8, gradient_clip=clip, callbacks=(note,)), line(), loss)
        assert len(norms) == 5
        assert (max(norms) <= 0.5 + 1e-5) if clip == 0.5 else (min(norms) > 10)
        norms.clear()


def test_weight_decay_pulls_to_zero():
    def nothing(module, index, generator, step):
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

    def loss(module, index, generator, step):
        dtypes.add(module(POINTS[index]).dtype)
        return squared_error(module, index, generator, step)

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
    trainer = Trainer(7, learning_rate=0.3, precision="float32", callbacks=(TensorBoard("runs"),))
    copy = clone(trainer)
    assert copy is not trainer and copy.get_params() == trainer.get_params()
    assert copy.set_params(max_steps=3).max_steps == 3
    assert set(trainer.get_params()) == {
        *("max_epochs", "max_steps", "max_time", "clock", "batch_size", "learning_rate"),
        *("weight_decay", "warmup_fraction", "ema_decay", "gradient_clip", "precision"),
        *("validation_fraction", "validate_every", "patience", "checkpoint_dir", "checkpoint_every_s"),
        *("resume", "callbacks", "compile", "channels_last", "accumulate", "activation_checkpointing"),
    }


def test_every_parameter_is_none_and_has_a_default():
    parameters = Trainer().get_params()
    assert set(parameters) == set(DEFAULTS) and set(parameters.values()) == {None}
    assert Trainer().resolved().get_params() == dict(DEFAULTS)
    module, history = train(Trainer(3))
    explicit, same_history = train(Trainer(**{**DEFAULTS, "max_epochs": 3}))
    assert torch.equal(weights(module), weights(explicit))
    assert without_speeds(history) == without_speeds(same_history)


def test_the_users_value_holds_before_the_stages_and_that_before_the_default():
    trainer = Trainer(2, learning_rate=0.5, callbacks=[print])
    before = trainer.get_params()
    resolved = trainer.resolved(max_epochs=9, max_steps=7, batch_size=4)
    assert resolved.get_params() == {**DEFAULTS, "max_steps": 7, "batch_size": 4} | trainer._given()
    assert resolved.callbacks is trainer.callbacks and trainer.get_params() == before
    assert resolved.resolved(max_steps=1, batch_size=1).get_params() == resolved.get_params()
    with pytest.raises(ValueError, match="^learning_rate must be positive, got -1"):
        Trainer(learning_rate=-1).resolved()


@pytest.mark.parametrize(
    "given, steps",
    [
        *[({}, 5), ({"max_epochs": 1}, 3), ({"max_epochs": 9}, 5), ({"max_steps": 4}, 4)],
        *[({"max_steps": 7}, 6), ({"max_steps": math.inf}, 6), ({"max_epochs": math.inf}, 5)],
    ],
)
def test_a_bound_that_is_left_open_is_the_stages_and_holds_besides(given, steps):
    _, history = train(Trainer(batch_size=8, **given).resolved(max_epochs=2, max_steps=5))
    assert history[-1]["step"] == steps


def test_a_training_without_any_bound_is_refused():
    with pytest.raises(ValueError, match="^max_epochs must be finite where max_steps .*, got inf"):
        train(Trainer(math.inf))


@pytest.mark.parametrize("own, limit, holds", [(None, 5, 5), (3, 5, 3), (9, 5, 5), (3, math.inf, 3)])
def test_of_two_limits_of_time_the_smaller_holds(own, limit, holds):
    assert Trainer(math.inf, max_time=own).resolved(at_most_s=limit).max_time == holds


def test_stages_share_how_a_run_is_kept_and_computed_and_not_its_recipe():
    shared = {
        **{"checkpoint_dir": "runs", "checkpoint_every_s": 7, "resume": False, "callbacks": (print,)},
        **{"clock": "cpu", "precision": "bfloat16", "compile": True, "channels_last": True},
        "activation_checkpointing": True,
    }
    other = Trainer(3, batch_size=4, learning_rate=0.5, max_time=9.0, accumulate=2, **shared)
    assert Trainer().sharing(other)._given() == shared
    own = Trainer(2, clock="wall", callbacks=())
    assert own.sharing(other)._given() == shared | own._given()
    assert own.sharing(None).get_params() == own.get_params()


def test_housekeeping_decides_nothing():
    trainer, kept = Trainer(2).resolved(), {"checkpoint_dir": "runs", "checkpoint_every_s": 1}
    other = clone(trainer).set_params(**kept, resume=False, activation_checkpointing=True)
    assert trainer.decisive() == other.decisive()
    for name, value in {"precision": "bfloat16", "callbacks": (print,), "clock": "cpu"}.items():
        assert trainer.decisive() != clone(trainer).set_params(**{name: value}).decisive()


def test_what_another_process_cannot_use_is_left_out():
    trainer = Trainer(2, checkpoint_dir="runs", callbacks=(print,), resume=False)
    assert trainer.portable()._given() == {"max_epochs": 2, "resume": False}
    assert trainer.checkpoint_dir == "runs"


@pytest.mark.parametrize("parts", [2, 3, 7, 100])
def test_a_batch_in_parts_is_the_same_step(parts):
    sizes = []

    def loss(module, index, generator, step):
        sizes.append(len(index))
        return squared_error(module, index, generator, step)[0], {
            "squared": squared_error(module, index, 0, 0)[0].detach()
        }

    def rival_loss(rival, index, generator, step):
        return squared_error(rival, index, generator, step)[0], {}

    ends = []
    for accumulate in (1, parts):
        rival = line()
        trainer = Trainer(3, batch_size=7, accumulate=accumulate, **PLAIN)
        module, history = train(trainer, loss=loss, rival=rival, rival_loss=rival_loss)
        ends.append(
            (weights(module), weights(rival), [(r["loss"], r["squared"], r["rival_loss"]) for r in history])
        )
    for one, in_parts in zip(*ends, strict=True):
        np.testing.assert_allclose(one, in_parts, rtol=2e-5, atol=1e-6)
    steps = 3 * (N // 7)
    assert sizes[:steps] == [7] * steps
    assert len(sizes) == steps * (1 + min(parts, 7)) and sum(sizes[steps:]) == 7 * steps


def test_activation_checkpointing_computes_blocks_again_and_changes_no_bit():
    class Block(RecomputedBlock):
        calls = 0

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def compute(self, x):
            Block.calls += 1
            return torch.dropout(torch.tanh(self.linear(x)), 0.3, self.training)

    ends = []
    for again in (False, True):
        Block.calls = 0
        with isolated_seed(3):
            module = nn.Sequential(Block(), nn.Linear(3, 1))
            trained, _ = train(Trainer(2, batch_size=8, activation_checkpointing=again), module)
        ends.append(weights(trained))
        assert Block.calls == 6 * (1 + again)
        assert not module[0].recompute  # as before
    assert torch.equal(*ends)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(value):
    def loss(module, index, generator, step):
        return module.weight.sum() * value, {}

    with pytest.raises(FloatingPointError, match=r"loss must stay finite, got nan at step 3.*learning_rate"):
        train(Trainer(5, batch_size=8), loss=loss)


WRONG = {
    "max_epochs": (0, -3),
    "max_steps": (0, -3),
    "max_time": (0, -3, math.nan),
    "clock": ("sun",),
    "batch_size": (0, -3, "yes"),
    "learning_rate": (0, -0.1, math.nan),
    "weight_decay": (-0.1, math.nan),
    "warmup_fraction": (1.0, -0.1, math.nan),
    "ema_decay": (1.0, -0.1, math.nan),
    "validation_fraction": (1.0, -0.1, math.nan),
    "validate_every": (0, -1, 1.5, "x"),
    "patience": (0, -1, 1.5, "x"),
    "checkpoint_every_s": (-1, math.nan),
    "resume": (True, "always"),
    "compile": ("yes",),
    "channels_last": ("yes",),
    "activation_checkpointing": ("yes",),
    "accumulate": (0, -1, 1.5, math.inf),
    "gradient_clip": (0, -1.0, math.nan),
    "precision": ("float16", 32),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_parameters_are_refused(name):
    for value in WRONG[name]:
        with pytest.raises(ValueError, match=f"^{name} must ") as caught:
            train(Trainer().set_params(**{name: value}))
        assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    "name, value",
    [("checkpoint_dir", 3), *[("callbacks", value) for value in (print, (print, "stop"))]],
)
def test_parameters_of_a_wrong_type_are_refused(name, value):
    with pytest.raises(TypeError, match=f"^{name} must ") as caught:
        train(Trainer().set_params(**{name: value}))
    assert f"got {value!r}" in str(caught.value)


# Validation


def without_speeds(history):
    return [
        {
            name: value
            for name, value in record.items()
            if name not in ("samples_per_second", "peak_memory_mib")
        }
        for record in history
    ]


def scripted(losses, n_batches=3):
    """A validation loss that reads its values from a list, one per epoch."""
    return lambda module, index, generator, step: (torch.tensor(losses[step // n_batches - 1]), {})


def test_the_module_ends_with_the_averaged_weights_that_did_best():
    module, history = train(
        Trainer(30, batch_size=8, learning_rate=0.3, ema_decay=0.8),
        loss=noisy_error,
        validation_loss=squared_error,
        n_validation=5,
    )
    losses = [record["validation_loss"] for record in history]
    assert len(losses) == 30 and np.argmin(losses) < 29
    assert [i for i, record in enumerate(history) if "best" in record] == [np.argmin(losses)]
    assert history[np.argmin(losses)]["best"] is True
    error = POINTS[:5].double() @ weights(module)[:3].double() + weights(module)[3].double() - TARGETS[:5]
    assert min(losses) == pytest.approx(error.square().mean().item(), rel=1e-4)


def test_validation_is_over_all_samples_in_batches():
    def own_index(module, index, generator, step):
        sizes.append(len(index))
        return index.double().square().mean(), {}

    sizes = []
    _, history = train(Trainer(1, batch_size=3), validation_loss=own_index, n_validation=7)
    assert sizes == [3, 3, 1] and history[0]["validation_loss"] == pytest.approx(91 / 7)


def test_validation_is_in_evaluation_mode_without_gradients_and_draws_the_same_each_time():
    def validation_loss(module, index, generator, step):
        assert not module.training and not torch.is_grad_enabled()
        draws.append(torch.cat([torch.randn(2, generator=generator), torch.randn(2)]))
        return draws[-1].sum(), {}

    draws = []
    _, history = train(Trainer(3, batch_size=8), validation_loss=validation_loss, n_validation=2)
    assert len(draws) == 3 and all(torch.equal(draw, draws[0]) for draw in draws)
    assert len({record["validation_loss"] for record in history}) == 1


def test_validation_leaves_the_training_as_it_is():
    def run(**options):
        seen = []
        trainer = Trainer(6, batch_size=8, learning_rate=0.05)
        with isolated_seed(3):
            module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 1))
            train(trainer, module, recorded(noisy_error, seen), **options)
        return torch.stack([values for _, values in seen])

    assert torch.equal(run(), run(validation_loss=noisy_error, n_validation=10))


@pytest.mark.parametrize(
    "losses, patience, epochs, best",
    [
        ([3.0, 2.0, 1.0, 2.0, 2.0, 0.0], 2, 5, 3),
        ([3.0, 2.0, 1.0, 2.0, 0.5, 1.0], 2, 6, 5),
        ([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], 1, 2, 1),
        ([math.nan, 2.0, math.inf, math.nan, 1.0, 0.0], 2, 4, 2),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], math.inf, 6, 1),
    ],
)
def test_patience_counts_validations_without_a_lower_loss(losses, patience, epochs, best):
    trainer = Trainer(6, batch_size=8, patience=patience, learning_rate=0.1, ema_decay=0.0)
    seen, options = [], {"validation_loss": scripted(losses), "n_validation": 1}
    module, history = train(trainer, loss=recorded(sink=seen), **options)
    assert len(history) == epochs and len(seen) == 3 * epochs
    assert [record["step"] for record in history if record.get("best")] == [3 * best]
    if best < epochs:
        assert torch.equal(weights(module), seen[3 * best][1])


def test_without_a_finite_validation_the_average_stays():
    options = {"validation_loss": scripted([math.nan] * 2), "n_validation": 1}
    module, history = train(Trainer(2, batch_size=8), **options)
    assert torch.equal(weights(module), weights(train(Trainer(2, batch_size=8))[0]))
    assert not any("best" in record for record in history)


@pytest.mark.parametrize(
    "every, records, validated",
    [
        (2, [2, 3, 4, 6, 8], [2, 4, 6, 8]),
        (6, [3, 6, 8], [6, 8]),
        (100, [3, 6, 8], [8]),
        ("epoch", [3, 6, 8], None),
    ],
)
def test_a_record_ends_with_an_epoch_and_with_a_validation(every, records, validated):
    trainer, states = Trainer(9, max_steps=8, batch_size=8, validate_every=every), []
    trainer.set_params(callbacks=[states.append])
    _, history = train(trainer, validation_loss=squared_error, n_validation=3)
    assert [record["step"] for record in history] == records == [state.step for state in states]
    assert [r["step"] for r in history if "validation_loss" in r] == (validated or records)
    _, plain = train(Trainer(9, max_steps=8, batch_size=8))
    widths = np.diff([0, *records])
    total = sum(width * record["loss"] for width, record in zip(widths, history, strict=True))
    assert total == pytest.approx(3 * plain[0]["loss"] + 3 * plain[1]["loss"] + 2 * plain[2]["loss"])


@pytest.mark.parametrize("options", [{}, {"validation_loss": squared_error}, {"n_validation": 3}])
def test_patience_with_nothing_to_validate_on_is_an_error(options):
    with pytest.raises(ValueError, match=r"^patience must be math.inf .*got 4.*validation_fraction"):
        train(Trainer(patience=4), **options)


# A rival


def own_line(rival, index, generator, step):
    return squared_error(rival, index, generator, step)


def test_a_rival_is_trained_by_adamw_with_its_own_betas_and_the_same_rates():
    rival, by_hand = line(), line()
    trainer = Trainer(8, learning_rate=0.05, gradient_clip=math.inf, weight_decay=0.1)
    _, history = train(trainer, rival=rival, rival_loss=own_line)
    optimiser = torch.optim.AdamW(by_hand.parameters(), lr=0.05, betas=(0.5, 0.9), weight_decay=0.1)
    for record in history:
        value, _ = squared_error(by_hand, torch.arange(N), None, 0)
        assert record["rival_loss"] == pytest.approx(value.item(), rel=1e-5)
        optimiser.param_groups[0]["lr"] = record["learning_rate"]
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    np.testing.assert_allclose(weights(rival), weights(by_hand), rtol=1e-4)
    assert not rival.training and rival.weight.any()


def test_a_rival_answers_each_step_with_the_same_batch_or_not_at_all():
    def loss(module, index, generator, step):
        calls.append(("module", step, index.tolist()))
        return squared_error(module, index, generator, step)

    def rival_loss(rival, index, generator, step):
        assert rival.training
        calls.append(("rival", step, index.tolist()))
        before.append(weights(rival))
        if step < 4:
            return None
        return squared_error(rival, index, generator, step)[0], {"guess": float(step)}

    calls, before = [], []
    rival = line()
    module, history = train(Trainer(2, batch_size=8), loss=loss, rival=rival, rival_loss=rival_loss)
    assert [call[:2] for call in calls] == [(role, step) for step in range(6) for role in ("module", "rival")]
    assert all(mine[2] == its[2] for mine, its in zip(calls[::2], calls[1::2], strict=True))
    assert (
        not torch.stack(before[:5]).any() and before[5].any() and not torch.equal(before[5], weights(rival))
    )
    assert "guess" not in history[0] and history[1]["guess"] == 4.5  # the mean over its own two steps
    assert torch.equal(weights(module), weights(train(Trainer(2, batch_size=8))[0]))


@pytest.mark.parametrize("options", [{"rival": line()}, {"rival_loss": own_line}])
def test_a_rival_without_its_loss_is_an_error(options):
    with pytest.raises(ValueError, match="^rival and rival_loss must be given together, got .*None"):
        train(Trainer(1), **options)


def test_a_rivals_loss_that_is_not_finite_is_an_error():
    def rival_loss(rival, index, generator, step):
        return rival.weight.sum() * math.nan, {}

    with pytest.raises(FloatingPointError, match="^rival_loss must stay finite, got nan at step 3"):
        train(Trainer(2, batch_size=8), rival=line(), rival_loss=rival_loss)


# Callbacks and reports


def test_callbacks_see_the_state_after_each_record():
    states, module = [], line()
    trainer = Trainer(3, max_steps=5, batch_size=8, callbacks=(states.append,))
    _, history = train(trainer, module, description="second stage")
    assert [(state.step, state.epoch) for state in states] == [(3, 1), (5, 2)]
    for state, record in zip(states, history, strict=True):
        assert isinstance(state, TrainingState) and state.record == record and state.module is module
        assert (state.stage, state.total_steps) == ("second stage", 5)
    with pytest.raises(AttributeError):
        states[0].step = 7


def test_a_callback_stops_training_and_the_others_are_still_asked():
    heard = []
    trainer = Trainer(9, batch_size=8, callbacks=[lambda state: "stop" if state.epoch == 2 else None])
    trainer.callbacks.append(lambda state: heard.append(state.step))
    module, history = train(trainer)
    assert [record["step"] for record in history] == heard == [3, 6] and not module.training


@pytest.mark.parametrize("answer", [True, "Stop", 0, np.zeros(2)])
def test_a_callback_that_answers_anything_else_is_an_error(answer):
    with pytest.raises(ValueError, match="^a callback must return None or 'stop', got ") as caught:
        train(Trainer(1, callbacks=[lambda state: answer]))
    assert f"got {answer!r}" in str(caught.value)


class FakeWriter:
    """Writes into a list that all share; an open file, so that no copy may hold one."""

    written: list = []

    def __init__(self, log_dir):
        self.log_dir, self.file = log_dir, threading.Lock()

    def add_scalar(self, name, value, step):
        self.written.append((self.log_dir, name, value, step))

    def flush(self):
        self.written.append("flushed")


def test_tensorboard_gets_the_numbers_of_each_record(monkeypatch):
    fake = types.SimpleNamespace(SummaryWriter=FakeWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(FakeWriter, "written", [])
    board = TensorBoard("runs")
    options = {"description": "denoiser", "validation_loss": squared_error, "n_validation": 2}
    _, history = train(Trainer(2, batch_size=8, callbacks=[board]), **options)
    expected = []
    for record in history:
        names = [name for name in record if name not in ("step", "best")]
        expected += [(os.path.join("runs", "denoiser"), name, record[name], record["step"]) for name in names]
        expected.append("flushed")
    assert FakeWriter.written == expected
    for copy in (pickle.loads(pickle.dumps(board)), clone(Trainer(callbacks=[board])).callbacks[0]):
        assert copy == board and copy is not board and not copy._writers


def test_tensorboard_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        train(Trainer(1, callbacks=[TensorBoard("runs")]))


def test_peak_memory_is_that_of_the_process_or_unknown(monkeypatch):
    _, history = train(Trainer(1))
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
        assert 0.9 * peak < history[0]["peak_memory_mib"] < 100 * peak
    monkeypatch.setitem(sys.modules, "resource", None)
    assert train(Trainer(1))[1][0]["peak_memory_mib"] is None


def test_no_step_waits_for_the_value_of_its_loss(monkeypatch):
    reads, to_float = [], torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: reads.append(1) or to_float(self))
    _, history = train(Trainer(2, batch_size=2))
    assert len(history) == 2 and len(reads) == 4  # loss and root, once an epoch


# Speed


def test_the_loss_runs_the_compiled_module_and_the_weights_stay_in_the_module(monkeypatch):
    class Compiled(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            calls.append(self.module.training)
            return self.module(x)

    calls = []
    monkeypatch.setattr(torch, "compile", Compiled)
    options = {"validation_loss": squared_error, "n_validation": 3}
    module, _ = train(Trainer(2, batch_size=8, compile=True), **options)
    assert calls == [True, True, True, False] * 2
    assert list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(weights(module), weights(train(Trainer(2, batch_size=8), **options)[0]))


def test_channels_last_is_for_the_time_of_training():
    def loss(module, index, generator, step):
        layouts.append(module.weight.is_contiguous(memory_format=torch.channels_last))
        return module(images[index]).square().mean(), {}

    layouts, results = [], []
    images = torch.randn(N, 3, 6, 6, generator=seeded(2))
    for channels_last in (False, True):
        with isolated_seed(0):
            module = nn.Conv2d(3, 4, 3)
        start = module.weight
        train(Trainer(4, batch_size=8, channels_last=channels_last), module, loss)
        assert module.weight is start and module.weight.is_contiguous()
        results.append(weights(module))
    assert layouts == [False] * 12 + [True] * 12
    np.testing.assert_allclose(*results, atol=1e-5)


# Checkpoints


class Interruption(Exception):
    """Stands for whatever ends a process."""


IMAGES = torch.randn(N, 3, 4, 4, generator=seeded(4))


def everything(directory, seen=None, *, at=(), happens=None, **options):
    """Train with all that has a state: buffers, dropout, averages, draws, a rival, validation."""

    def loss(module, index, generator, step):
        if seen is not None:
            seen.append(step)
        if step in at:
            happens()
        noise = torch.randn(len(index), 3, 4, 4, generator=generator)
        output = module(IMAGES[index] + 0.1 * noise)
        term = (output - IMAGES[index, :1]).square().mean()
        return term - 0.01 * rival(output).mean(), {"term": term.detach(), "half": 0.5, "plain": step / 3}

    def rival_loss(network, index, generator, step):
        if step % 4 == 1:
            return None
        real = network(IMAGES[index, :1] + torch.randn(1, generator=generator))
        return (real - 1).square().mean(), {"real": real.detach().mean()}

    def validation_loss(module, index, generator, step):
        noise = torch.randn(len(index), 3, 4, 4, generator=generator)
        return (module(IMAGES[index] + noise) - 0.8).square().mean(), {}

    with isolated_seed(5):
        module = nn.Sequential(
            *(
                nn.Conv2d(3, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.SiLU(),
                nn.Dropout(0.3),
                nn.Conv2d(4, 1, 1),
            )
        )
        rival = nn.Conv2d(1, 1, 3)
        settings = {
            "max_epochs": 4,
            "batch_size": 5,
            "learning_rate": 0.1,
            "ema_decay": 0.7,
            "validate_every": 3,
            "patience": 9,
        }
        trainer = Trainer(checkpoint_dir=directory, **(settings | {"checkpoint_every_s": 0} | options))
        generator = seeded(6)
        with isolated_seed(7):
            history = trainer.optimise(
                module,
                loss,
                N,
                generator=generator,
                rival=rival,
                rival_loss=rival_loss,
                validation_loss=validation_loss,
                n_validation=7,
            )
            after = [torch.rand(3), torch.rand(3, generator=generator)]
    state = [*module.state_dict().values(), *rival.state_dict().values(), *after]
    return torch.cat([value.double().flatten() for value in state]), without_speeds(history)


def interrupt():
    raise Interruption


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1] and list(map(list, a[1])) == list(map(list, b[1]))


@pytest.fixture(scope="module")
def uninterrupted():
    return everything(None)


def test_everything_changes_and_the_best_is_not_the_last(uninterrupted):
    _, history = uninterrupted
    assert [record["step"] for record in history] == [3, 4, 6, 8, 9, 12, 15, 16]
    assert not history[-1].get("best") and sum(record.get("best", False) for record in history) == 1
    assert {"loss", "term", "half", "plain", "rival_loss", "real"} < set(history[0])


@pytest.mark.parametrize(
    "at, every",
    [((0,), 0), ((1,), 4), ((3,), 1e9), ((5,), 0), ((8,), 4), ((15,), 4), ((2, 3, 10), 0)],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, monkeypatch, uninterrupted, at, every):
    monkeypatch.setattr(madad.training.loop, "time", Clock(1.0))
    for step in at:
        with pytest.raises(Interruption):
            everything(tmp_path, at=[step], happens=interrupt, checkpoint_every_s=every)
    seen = []
    assert same(everything(tmp_path, seen, checkpoint_every_s=every), uninterrupted)
    first = {0: at[-1], 1e9: 0}.get(every, seen[0])
    assert seen == list(range(first, 16)) and first <= at[-1]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    "at, options",
    [
        (5, {"ema_decay": 0.0}),
        (10, {"precision": "bfloat16"}),
        (5, {"patience": 1}),
        (5, {"patience": 2}),
        (10, {"channels_last": True}),
    ],
)
def test_other_settings_resume_as_well(tmp_path, options, at):
    expected = everything(None, **options)
    with contextlib.suppress(Interruption):  # patience may come first
        everything(tmp_path, at=[at], happens=interrupt, **options)
    assert same(everything(tmp_path, **options), expected)


KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("test_training", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
tests.everything(sys.argv[2], at=[int(sys.argv[3])], happens=lambda: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_process_killed_by_force_is_resumed_bitwise(tmp_path, uninterrupted):
    package = Path(madad.training.trainer.__file__).parents[2]
    command = [sys.executable, "-c", KILLED, __file__, str(tmp_path), "10"]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    seen = []
    assert same(everything(tmp_path, seen), uninterrupted) and seen == list(range(10, 16))


def test_a_finished_run_is_read_back_at_once(tmp_path, uninterrupted):
    assert same(everything(tmp_path), uninterrupted)
    (path,) = tmp_path.iterdir()
    before, seen = path.read_bytes(), []
    assert same(everything(tmp_path, seen), uninterrupted)
    assert seen == [] and path.read_bytes() == before


def test_a_run_that_a_callback_or_patience_ended_is_finished(tmp_path):
    for options in ({"callbacks": [lambda state: "stop"]}, {"patience": 1}):
        directory, seen = tmp_path / next(iter(options)), []
        first = everything(directory, **options)
        assert first[1][-1]["step"] < 16
        assert same(everything(directory, seen, **options), first) and seen == []


def test_resume_false_starts_anew_and_overwrites(tmp_path, uninterrupted):
    with pytest.raises(Interruption):
        everything(tmp_path, at=[9], happens=interrupt)
    seen = []
    assert same(everything(tmp_path, seen, resume=False), uninterrupted)
    assert seen == list(range(16)) and len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_is_tensors_and_json(tmp_path, uninterrupted):
    with pytest.raises(Interruption):
        everything(tmp_path, at=[10], happens=interrupt)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("training-") and len(path.stem) == len("training-") + 12
    with safe_open(path, "pt") as file:
        facts, names = json.loads(file.metadata()["facts"]), set(file.keys())
    assert (facts["step"], facts["finished"], facts["format_version"]) == (10, False, 1)
    assert facts["history"] != [] and set(facts["totals"]) >= {"loss", "term", "plain"}
    assert names >= {
        "module/0.weight",
        "module/1.running_mean",
        "rival/weight",
        "order",
        "best/1.running_var",
    }
    assert names >= {"average/0", "module.optimiser/0/exp_avg", "rival.optimiser/1/step", "random/generator"}


def fit_line(directory, trainer=None, module=None, n=N, seed=0, **options):
    settings = {"checkpoint_dir": directory, "batch_size": 8} | (trainer or {})
    Trainer(2, **settings).optimise(module or line(), squared_error, n, generator=seeded(seed), **options)


def biased():
    module = line()
    nn.init.ones_(module.bias)
    return module


def frozen():
    module = line()
    module.bias.requires_grad_(False)
    return module


def with_rival(rival):
    return {"rival": rival, "rival_loss": own_line}


@pytest.mark.parametrize(
    "change",
    [
        {"trainer": {"learning_rate": 0.1}},
        {"trainer": {"max_time": 100.0}},
        {"trainer": {"batch_size": "auto"}, "batch_size": 9},
        {"n": 20},
        {"seed": 1},
        {"module": biased()},
        {"module": frozen()},
        {"description": "other"},
        {"identity": "other data"},
        with_rival(line()),
        with_rival(biased()),
        {"validation_loss": squared_error, "n_validation": 3},
    ],
)
def test_runs_that_differ_have_different_files(tmp_path, change):
    fit_line(tmp_path)
    fit_line(tmp_path, **with_rival(nn.Linear(3, 1)))
    fit_line(tmp_path, **change)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_does_not_decide_the_result_does_not_name_the_file(tmp_path):
    fit_line(tmp_path)
    for trainer in ({"checkpoint_every_s": 7}, {"callbacks": [print]}, {"resume": False}):
        fit_line(tmp_path, trainer)
        fit_line(tmp_path / "elsewhere", trainer)
    names = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert len(names) == 1


def test_a_description_may_be_no_file_name(tmp_path):
    fit_line(tmp_path, description="stage 1/2: grüße")
    assert [path.name[:-24] for path in tmp_path.iterdir()] == ["stage_1_2_grüße-"]


def test_the_clock_goes_on_where_an_interrupted_run_was(tmp_path, monkeypatch):
    def run(directory, seen, **options):
        monkeypatch.setattr(madad.training.loop, "time", Clock(1.0))
        everything(directory, seen, max_time=40, max_epochs=math.inf, patience=math.inf, **options)

    whole, first, rest = [], [], []
    run(None, whole)
    with pytest.raises(Interruption):
        run(tmp_path, first, at=[10], happens=interrupt)
    run(tmp_path, rest)
    assert rest[0] == 10 and abs(rest[-1] - whole[-1]) <= 2


def damage(path, kind):
    content = path.read_bytes()
    if kind == "empty":
        content = b""
    elif kind == "no checkpoint":
        content = b"\x02\0\0\0\0\0\0\0{}"
    elif isinstance(kind, float):
        content = content[: int(kind * len(content))]
    else:
        place = kind % len(content)
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["empty", "no checkpoint", 0.99, 700])
def test_a_damaged_checkpoint_is_named_and_training_starts_anew(tmp_path, uninterrupted, kind):
    with pytest.raises(Interruption):
        everything(tmp_path, at=[9], happens=interrupt)
    (path,) = tmp_path.iterdir()
    damage(path, kind)
    seen = []
    with pytest.warns(UserWarning, match=r"safetensors must be a checkpoint.*damaged.*starts anew") as caught:
        assert same(everything(tmp_path, seen), uninterrupted)
    assert seen == list(range(16)) and len(caught) == 1 and str(path) in str(caught[0].message)
    assert caught[0].filename == __file__
    assert same(everything(tmp_path), uninterrupted)


def test_another_runs_file_is_not_taken(tmp_path):
    fit_line(tmp_path)
    fit_line(tmp_path, seed=1)
    first, second = tmp_path.iterdir()
    first.write_bytes(second.read_bytes())
    with pytest.warns(UserWarning, match="belongs to another run"):
        fit_line(tmp_path)
        fit_line(tmp_path, seed=1)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_disk_that_fails_ends_no_training(tmp_path, monkeypatch, uninterrupted, broken):
    def fail(*args):
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match=r"^checkpoint_dir must .*No space left") as caught:
        assert same(
            everything(tmp_path, at=[6], happens=lambda: monkeypatch.setattr(os, broken, fail)), uninterrupted
        )
    assert len(caught) == 1 and str(tmp_path) in str(caught[0].message) and caught[0].filename == __file__
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    seen = []
    assert same(everything(tmp_path, seen), uninterrupted) and seen[0] == 6


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, uninterrupted):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    try:
        with pytest.warns(UserWarning, match=r"^checkpoint_dir must .*File too large") as caught:
            result = everything(tmp_path, at=[6], happens=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(result, uninterrupted) and len(caught) == 1 and len(list(tmp_path.iterdir())) == 1
    seen = []
    assert same(everything(tmp_path, seen), uninterrupted) and seen[0] == 6


def test_a_directory_that_cannot_be_made_ends_no_training(tmp_path, uninterrupted):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="^checkpoint_dir must ") as caught:
        assert same(everything(tmp_path / "file" / "below"), uninterrupted)
    assert len(caught) == 1


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    fit_line(tmp_path)
    (path,) = tmp_path.iterdir()
    leftover = tmp_path / f".{path.name}-abc"
    leftover.mkdir()
    (leftover / "new").write_bytes(b"half")
    fit_line(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


# Signals


def sends(*signals):
    def happens():
        for number in signals:
            signal.raise_signal(number)

    return happens


def handlers():
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture
def same_handlers():
    before = handlers()
    yield
    assert handlers() == before


@pytest.mark.parametrize("number, step", [(signal.SIGINT, 0), (signal.SIGTERM, 4), (signal.SIGINT, 8)])
def test_a_signal_stops_training_in_good_order(tmp_path, uninterrupted, same_handlers, number, step):
    seen, message = (
        [],
        f"^training was stopped by {number.name} at step {step + 1} of 16.*go on from {tmp_path}",
    )
    with pytest.warns(TrainingStoppedWarning, match=message) as caught:
        _, history = everything(tmp_path, seen, at=[step], happens=sends(number), checkpoint_every_s=1e9)
    assert seen == list(range(step + 1)) and history[-1]["step"] == step + 1
    assert len(caught) == 1 and caught[0].filename == __file__
    again = []
    assert same(everything(tmp_path, again, checkpoint_every_s=1e9), uninterrupted)
    assert again == list(range(step + 1, 16))


def test_a_stopped_module_has_the_averaged_weights(same_handlers):
    def loss(module, index, generator, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return squared_error(module, index, generator, step)

    options = {"batch_size": 8, "learning_rate": 0.1, "ema_decay": 0.8}
    with pytest.warns(TrainingStoppedWarning, match="at step 3 of 27. Set the trainer's checkpoint_dir"):
        stopped, history = train(Trainer(9, **options), loss=loss)
    expected, same_history = train(Trainer(9, callbacks=[lambda state: "stop"], **options))
    assert torch.equal(weights(stopped), weights(expected)) and not stopped.training
    assert without_speeds(history) == without_speeds(same_history)


def test_a_signal_in_the_last_step_finds_training_done(tmp_path, uninterrupted, same_handlers):
    assert same(everything(tmp_path, at=[15], happens=sends(signal.SIGTERM)), uninterrupted)


def test_a_second_interrupt_stops_at_once(same_handlers):
    seen = []
    with pytest.raises(KeyboardInterrupt):
        everything(None, seen, at=[3], happens=sends(signal.SIGINT, signal.SIGINT))
    assert seen == [0, 1, 2, 3]


def test_a_signal_in_the_first_stage_stops_the_later_ones_after_a_step(tmp_path, same_handlers):
    steps = []
    with graceful_stop() as outer, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inside = handlers()
        everything(None, steps, at=[3], happens=sends(signal.SIGTERM))
        assert steps == [0, 1, 2, 3] and handlers() == inside and outer.signal == signal.SIGTERM
        steps.clear()
        everything(None, steps)
        assert steps == [0]
    assert [warning.category for warning in caught] == [TrainingStoppedWarning] * 2
    everything(None, steps)
    assert len(steps) == 17


def test_handlers_come_back_after_an_error(same_handlers):
    with pytest.raises(Interruption):
        everything(None, at=[3], happens=interrupt)


def test_ignored_signals_stay_ignored(uninterrupted):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert same(everything(None, at=[3], happens=sends(signal.SIGINT)), uninterrupted)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_trains_without_handlers(uninterrupted):
    def work():
        results.append(everything(None, at=[2], happens=lambda: results.append(handlers())))

    results, before = [], handlers()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0] == before and same(results[1], uninterrupted)
