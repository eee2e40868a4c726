"""The parameters of a trainer: what they may be, what holds where they are None, and what stages share."""

import math

import numpy as np
import pytest
import torch
from sklearn.base import clone
from tasks import POINTS, line, own_line, recorded, squared_error, train, weights, without_speeds
from torch import nn

from madad.training import TensorBoard, Trainer
from madad.training.settings import DEFAULTS


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


@pytest.mark.parametrize("own, limit, holds", [(None, 5, 5), (3, 5, 3), (9, 5, 5), (3, math.inf, 3)])
def test_of_two_limits_of_time_the_smaller_holds(own, limit, holds):
    assert Trainer(math.inf, max_time=own).resolved(at_most_s=limit).max_time == holds


@pytest.mark.parametrize(
    "options, call, expected",
    [({}, {}, 24), ({}, {"batch_size": 6}, 6), ({"batch_size": 5}, {"batch_size": 6}, 5)],
)
def test_the_trainers_batch_size_comes_first_and_never_exceeds_the_data(options, call, expected):
    seen = []
    train(Trainer(1, **options), loss=recorded(sink=seen), **call)
    assert {len(index) for index, _ in seen} == {expected}


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


# How it computes


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


# Refused values


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


def test_a_training_without_any_bound_is_refused():
    with pytest.raises(ValueError, match="^max_epochs must be finite where max_steps .*, got inf"):
        train(Trainer(math.inf))


@pytest.mark.parametrize("options", [{}, {"validation_loss": squared_error}, {"n_validation": 3}])
def test_patience_with_nothing_to_validate_on_is_an_error(options):
    with pytest.raises(ValueError, match=r"^patience must be math.inf .*got 4.*validation_fraction"):
        train(Trainer(patience=4), **options)


@pytest.mark.parametrize("options", [{"rival": line()}, {"rival_loss": own_line}])
def test_a_rival_without_its_loss_is_an_error(options):
    with pytest.raises(ValueError, match="^rival and rival_loss must be given together, got .*None"):
        train(Trainer(1), **options)
