"""scikit-learn's callbacks on our estimators; before 1.9 it has none, and nothing happens here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

try:
    import sklearn.callback as framework
except ImportError:  # scikit-learn < 1.9
    framework = None

with_callbacks = getattr(framework, "with_callbacks", lambda method: method)
_CallbackSupportMixin: Any = getattr(framework, "CallbackSupportMixin", object)


class CallbackSupport(_CallbackSupportMixin):
    """Base of an estimator with ``set_callbacks``, where scikit-learn has callbacks.

    Callbacks belong to an object, as in ``clone``, and to no copy of its state: pickles, joblib's hashes and
    caches have none of them.
    """

    def __getstate__(self):
        """State without callbacks, and without what a fit leaves on the estimator for them."""
        of_callbacks = ("_skl_callbacks", "_skl_callbacks_to_teardown")
        of_contexts = ("_callback_fit_ctx", "_parent_callback_ctx")
        state = super().__getstate__()
        return {name: value for name, value in state.items() if name not in of_callbacks + of_contexts}


class FitTask:
    """A task of a fit: its callbacks are told of its begin and its end, and of its sub-tasks.

    Parameters
    ----------
    estimator : estimator or None
        The one that is being fitted.
    context : sklearn.callback.CallbackContext or None
        Tells the callbacks; None = nobody is told.
    **data
        ``X`` and ``y`` for the callbacks that ask for them, or callables that give them.
    """

    def __init__(self, estimator=None, context=None, **data):
        self.estimator = estimator
        self.context = context
        self.data = data

    @classmethod
    def of_fit(cls, estimator, max_subtasks: int | None, **data) -> FitTask:
        """Begin the fit of an estimator, in a method `with_callbacks`. None = any number of sub-tasks."""
        if framework is None:
            return cls()
        return cls(estimator, estimator._init_callback_context(max_subtasks=max_subtasks), **data)._begin()

    @property
    def was_stopped(self) -> bool:
        """Whether a callback ended a training in here early."""
        return getattr(self.context, "was_stopped", False)

    def end(self, **details) -> bool:
        """Say that the task is done; True = a callback asks to stop here."""
        if self.context is None:
            return False
        return self.context.call_on_fit_task_end(estimator=self.estimator, **self.data, **details)

    def end_fit(self) -> None:
        """Say that the estimator is fitted."""
        self.end(reconstruction_attributes={})

    @contextmanager
    def stage(self, name: str, max_subtasks: int | None = 0, *, fits=None) -> Iterator[FitTask]:
        """A sub-task; where it is the fit of another estimator, ``fits``, that one hears of it too."""
        if self.context is None:
            yield self
            return
        stage = self._subtask(name, max_subtasks)
        with nullcontext() if fits is None else stage.context.propagate_callback_context(fits):
            stage._begin()
            yield stage
            stage.end()

    @contextmanager
    def epochs(self, trainer) -> Iterator[Any]:
        """A copy of a `madad.training.Trainer` whose records are sub-tasks of this one, for one training.

        Each is called ``"epoch"``, and its ``metadata`` at the end is the record. One begins before it is
        known whether the training goes on: a training that patience, time, a signal or a callback of the
        trainer's own ends has one last epoch that is empty.
        """
        if not hasattr(self.estimator, "_skl_callbacks"):
            yield trainer
            return
        epochs, watched = _Epochs(self), copy.copy(trainer)
        watched.callbacks = (*trainer.callbacks, epochs)
        yield watched
        epochs.close()

    def _subtask(self, name: str, max_subtasks: int | None = 0) -> FitTask:
        return FitTask(self.estimator, self.context.subcontext(name, max_subtasks=max_subtasks))

    def _begin(self) -> FitTask:
        self.context.call_on_fit_task_begin(estimator=self.estimator, **self.data)
        return self


NO_TASK = FitTask()


class _Epochs:
    """A trainer's callback that ends one epoch and begins the next."""

    def __init__(self, task: FitTask):
        self.task = task
        self.current: FitTask | None = task._subtask("epoch")._begin()

    def __call__(self, state) -> str | None:
        asks_to_stop = self.current is not None and self.current.end(metadata=state.record)
        is_last = state.step >= state.total_steps
        self.current = None if asks_to_stop or is_last else self.task._subtask("epoch")._begin()
        context = self.task.context if asks_to_stop and not is_last else None
        while context is not None:  # up to the estimator that fits this one
            context.was_stopped = True
            context = context.parent
        return "stop" if asks_to_stop else None

    def close(self) -> None:
        """End the epoch that was begun and never trained."""
        if self.current is not None:
            self.current.end()
