"""What a trainer tells its callbacks, and what they answer."""

import os
import pickle
import sys
import threading
import types

import numpy as np
import pytest
from sklearn.base import clone
from tasks import line, squared_error, train

from madad.training import TensorBoard, Trainer, TrainingState


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


# TensorBoard


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
