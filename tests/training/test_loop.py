"""The loop of a training: its steps, its records, its validations, and when it stops."""

import math

import numpy as np
import pytest
import torch
from tasks import PLAIN, POINTS, TARGETS, Clock, N, line, noisy_error, recorded, squared_error, train, weights
from torch import nn

import madad.training.loop
from madad._runtime.random import isolated_seed
from madad.training import Trainer


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


# Bounds


@pytest.mark.parametrize(
    "epochs, max_steps, steps", [(2, math.inf, 6), (math.inf, 4, 4), (1, 100, 3), (5, 15, 15), (3, 1, 1)]
)
def test_the_smaller_of_epochs_and_steps_ends_training(epochs, max_steps, steps):
    seen = []
    _, history = train(Trainer(epochs, max_steps=max_steps, batch_size=8), loss=recorded(sink=seen))
    assert len(seen) == steps == history[-1]["step"]
    assert len(history) == math.ceil(steps / 3)


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


# Steps


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


def test_the_learning_rate_decays_with_the_time(monkeypatch):
    monkeypatch.setattr(madad.training.loop, "time", Clock(1.0))
    _, history = train(Trainer(10_000, max_time=300, batch_size=8, warmup_fraction=0.0))
    rates = [record["learning_rate"] for record in history]
    assert rates == sorted(rates, reverse=True) and rates[0] > 9e-4
    assert rates[-1] == pytest.approx(1e-5)  # 1 % of the peak


def test_a_step_has_the_learning_rate_of_the_schedule():
    seen = []
    train(Trainer(3, batch_size=N, learning_rate=0.01, **PLAIN), loss=recorded(sink=seen))
    first_move = seen[1][1] - seen[0][1]
    np.testing.assert_allclose(first_move.abs(), 0.01, rtol=1e-4)  # Adam's first step is the rate itself


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(value):
    def loss(module, index, generator, step):
        return module.weight.sum() * value, {}

    with pytest.raises(FloatingPointError, match=r"loss must stay finite, got nan at step 3.*learning_rate"):
        train(Trainer(5, batch_size=8), loss=loss)


def test_no_step_waits_for_the_value_of_its_loss(monkeypatch):
    reads, to_float = [], torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: reads.append(1) or to_float(self))
    _, history = train(Trainer(2, batch_size=2))
    assert len(history) == 2 and len(reads) == 4  # loss and root, once an epoch


# Records and the bar


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


def test_the_bar_shows_its_name_the_loss_and_the_end(capsys):
    _, history = train(Trainer(2, batch_size=8), description="denoiser", verbose=True)
    shown = capsys.readouterr().err
    assert "denoiser" in shown and "6/6" in shown and f"loss={history[-1]['loss']:.4f}" in shown


def test_nothing_is_shown_by_default(capsys):
    train(Trainer(2))
    assert capsys.readouterr() == ("", "")


# Validation


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


# A rival


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


def test_a_rivals_loss_that_is_not_finite_is_an_error():
    def rival_loss(rival, index, generator, step):
        return rival.weight.sum() * math.nan, {}

    with pytest.raises(FloatingPointError, match="^rival_loss must stay finite, got nan at step 3"):
        train(Trainer(2, batch_size=8), rival=line(), rival_loss=rival_loss)
