"""Signals that stop a training in good order."""

import signal
import threading
import warnings

import pytest
import torch
from tasks import (
    HERE,
    Interruption,
    everything,
    interrupt,
    same,
    squared_error,
    train,
    weights,
    without_speeds,
)

from madad.training import Trainer, TrainingStoppedWarning, graceful_stop


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
    assert len(caught) == 1 and caught[0].filename == HERE
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
