"""scikit-learn's callbacks on both estimators."""

import copy
import importlib.util
import io
import pickle
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
from sklearn.base import BaseEstimator, clone
from sklearn.frozen import FrozenEstimator

from madad._runtime.tensors import state_to_numpy
from madad.base import sklearn_callbacks
from madad.testing import tiny_autoencoder, tiny_detector
from madad.training import Trainer

needs_framework = pytest.mark.skipif(sklearn_callbacks.framework is None, reason="scikit-learn < 1.9")
LEFT_BY_A_FIT = {"_skl_callbacks_to_teardown", "_callback_fit_ctx", "_parent_callback_ctx"}


class Recorder:
    """Notes each hook, the task and what came with it; asks to stop at the end of the n-th task of a name."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at  # (name, n)
        self.calls = []

    def setup(self, estimator, context):
        self.calls.append(("setup", path(context), None))

    def teardown(self, estimator, context):
        self.calls.append(("teardown", path(context), None))

    def on_fit_task_begin(self, estimator, context, *, X=None):
        self.calls.append(("begin", path(context), {"X": X, "max_subtasks": context.max_subtasks}))

    def on_fit_task_end(self, estimator, context, *, X=None, y=None, metadata=None, fitted_estimator=None):
        given = {"X": X, "y": y, "metadata": metadata, "fitted_estimator": fitted_estimator}
        self.calls.append(("end", path(context), given))
        return (context.task_name, context.task_id) == self.stop_at

    def tree(self):
        """The calls as lines: a task's path from the fit downwards, > for its begin and < for its end."""
        sign = {"begin": ">", "end": "<"}
        return [f"{sign[hook]} {where}" for hook, where, _ in self.calls if hook in sign]

    def given(self, hook, where):
        return [given for called, place, given in self.calls if (called, place) == (hook, where)]


class Propagated(Recorder):
    max_propagation_depth = None


class Failing(Recorder):
    def on_fit_task_end(self, estimator, context):
        raise RuntimeError("no more")


def path(context):
    own = context.source_task_name or context.task_name
    name = f"{own}{context.task_id}" if own == "epoch" else own
    return name if context.parent is None else f"{path(context.parent)}/{name}"


def epochs(where, n):
    return [f"{sign} {where}/epoch{i}" for i in range(n) for sign in "><"]


@pytest.fixture(scope="module")
def slices():
    return np.random.default_rng(0).random((24, 16, 16)).astype(np.float32)


def short(n_epochs=3, **options):
    return Trainer(n_epochs, batch_size=12, **options)


def detector(**overrides):
    autoencoder = tiny_autoencoder(trainer=short(2))
    return tiny_detector(**{"autoencoder": autoencoder, "trainer": short(3)} | overrides)


def weights(estimator):
    networks = {"autoencoder": getattr(estimator, "autoencoder_", estimator).network_}
    if hasattr(estimator, "denoiser_"):
        networks["denoiser"] = estimator.denoiser_
    return {role: state_to_numpy(network) for role, network in networks.items()}


def is_clean(estimator):
    return not LEFT_BY_A_FIT & vars(estimator).keys()


@needs_framework
def test_an_autoencoder_tells_of_its_epochs(slices):
    callback = Recorder()
    autoencoder = tiny_autoencoder(trainer=short(3)).set_callbacks(callback).fit(slices)
    assert callback.tree() == ["> fit", *epochs("fit", 3), "< fit"]
    assert [hook for hook, *_ in callback.calls if hook in ("setup", "teardown")] == ["setup", "teardown"]
    assert (callback.calls[0][0], callback.calls[-1][0]) == ("setup", "teardown")
    (begin,), (end,) = callback.given("begin", "fit"), callback.given("end", "fit")
    assert begin["max_subtasks"] == 3
    np.testing.assert_array_equal(begin["X"], slices)
    np.testing.assert_array_equal(end["fitted_estimator"].transform(slices), autoencoder.transform(slices))
    for i, record in enumerate(autoencoder.history_):
        (given,) = callback.given("end", f"fit/epoch{i}")
        assert (given["metadata"], given["fitted_estimator"]) == (record, None)
    assert is_clean(autoencoder)


@needs_framework
def test_a_detector_tells_of_both_stages(slices):
    propagated, own = Propagated(), Recorder()
    fitted = detector().set_callbacks(propagated, own).fit(slices, y=np.zeros(24))
    of_denoiser = ["> fit/denoiser", *epochs("fit/denoiser", 3), "< fit/denoiser"]
    of_autoencoder = ["> fit/autoencoder", *epochs("fit/autoencoder", 2), "< fit/autoencoder"]
    assert propagated.tree() == ["> fit", *of_autoencoder, *of_denoiser, "< fit"]
    assert own.tree() == ["> fit", "> fit/autoencoder", "< fit/autoencoder", *of_denoiser, "< fit"]
    for callback in (propagated, own):
        assert [hook for hook, *_ in callback.calls].count("teardown") == 1
        assert [given["max_subtasks"] for given in callback.given("begin", "fit")] == [2]
        assert [given["max_subtasks"] for given in callback.given("begin", "fit/denoiser")] == [3]
    (end,) = own.given("end", "fit")
    assert end["X"] is slices and end["y"].shape == (24,)
    np.testing.assert_array_equal(end["fitted_estimator"].predict_maps(slices), fitted.predict_maps(slices))
    assert is_clean(fitted) and is_clean(fitted.autoencoder_) and is_clean(fitted.autoencoder)
    assert not hasattr(fitted.autoencoder_, "_skl_callbacks")

    shared, callback = FrozenEstimator(fitted.autoencoder_), Propagated()
    detector(autoencoder=shared).set_callbacks(callback).fit(slices)
    assert callback.tree() == ["> fit", *of_denoiser, "< fit"]
    assert callback.given("begin", "fit")[0]["max_subtasks"] == 1


@needs_framework
def test_the_first_stage_heeds_its_own_callbacks(slices):
    own = Recorder()
    autoencoder = tiny_autoencoder(trainer=short(2)).set_callbacks(own)
    detector(autoencoder=autoencoder).fit(slices)
    assert own.tree() == ["> fit/autoencoder", *epochs("fit/autoencoder", 2), "< fit/autoencoder"]
    autoencoder.set_callbacks(Propagated())
    with pytest.raises(TypeError, match="Register them directly on the meta-estimator"):
        detector(autoencoder=autoencoder).set_callbacks(Propagated()).fit(slices)


@needs_framework
def test_a_callback_stops_a_training_in_good_order(slices):
    callback = Propagated(stop_at=("epoch", 1))
    fitted = detector(trainer=short(50)).set_callbacks(callback).fit(slices)
    assert callback.tree()[-7:-1] == ["> fit/denoiser", *epochs("fit/denoiser", 2), "< fit/denoiser"]
    assert [len(history) for history in (fitted.autoencoder_.history_, fitted.history_)] == [2, 2]
    assert fitted.predict_maps(slices).shape == slices.shape

    autoencoder = tiny_autoencoder(trainer=short(50)).set_callbacks(Recorder(stop_at=("epoch", 0)))
    assert len(autoencoder.fit(slices).history_) == 1
    assert np.isfinite(autoencoder.transform(slices)).all()


@needs_framework
@pytest.mark.parametrize(
    "options",
    [
        {"validation_fraction": 0.3, "patience": 1, "learning_rate": 1e3},
        {"callbacks": [lambda state: "stop"]},
        {"max_time": 1e-6},
    ],
)
def test_a_training_that_others_end_has_a_last_empty_epoch(slices, options):
    callback = Recorder()
    autoencoder = tiny_autoencoder(trainer=short(50, **options)).set_callbacks(callback).fit(slices)
    n = len(autoencoder.history_)
    assert n < 50 and callback.tree() == ["> fit", *epochs("fit", n + 1), "< fit"]
    assert callback.given("end", f"fit/epoch{n}")[0]["metadata"] is None
    assert callback.given("begin", "fit")[0]["max_subtasks"] == (None if "max_time" in options else 50)


@needs_framework
@pytest.mark.parametrize("make", [lambda **o: tiny_autoencoder(trainer=short(**o)), detector])
def test_errors_tear_callbacks_down(slices, make):
    for broken, options, error in (
        (
            Propagated(),
            {"trainer": short(learning_rate=1e30)} if make is detector else {"learning_rate": 1e30},
            FloatingPointError,
        ),
        (Failing(), {}, RuntimeError),
    ):
        estimator = make(**options).set_callbacks(broken)
        with pytest.raises(error):
            estimator.fit(slices)
        hooks = [hook for hook, *_ in broken.calls]
        assert (hooks[0], hooks[-1], hooks.count("teardown")) == ("setup", "teardown", 1)
        assert is_clean(estimator)


@needs_framework
def test_callbacks_change_nothing_that_is_learnt_or_kept(slices, tmp_path):
    plain, watched = detector(), detector().set_callbacks(Propagated())
    assert plain.get_params().keys() == watched.get_params().keys()
    for name, estimator in (("plain", plain), ("watched", watched)):
        estimator.fit(slices).save(tmp_path / name)
    assert np.array_equal(plain.predict_maps(slices), watched.predict_maps(slices))
    np.testing.assert_equal(weights(plain), weights(watched))
    for file in (tmp_path / "plain").iterdir():
        if file.suffix == ".safetensors":  # histories have times, and a card its name
            assert file.read_bytes() == (tmp_path / "watched" / file.name).read_bytes()
        assert b"Propagated" not in (tmp_path / "watched" / file.name).read_bytes()


@needs_framework
@pytest.mark.parametrize("make", [tiny_autoencoder, tiny_detector])
def test_callbacks_follow_the_object_and_no_copy_of_its_state(make):
    callback, plain = Recorder(), make()
    watched = make().set_callbacks(callback)
    assert clone(watched)._skl_callbacks == [callback]
    for copied in (pickle.loads(pickle.dumps(watched)), copy.deepcopy(watched)):
        assert not hasattr(copied, "_skl_callbacks")
    assert joblib.hash(watched) == joblib.hash(plain)
    assert repr(watched) == repr(plain)


@needs_framework
def test_memory_knows_no_callbacks(slices, tmp_path):
    first, second = Propagated(), Propagated()
    estimator = detector(memory=str(tmp_path))
    expected = weights(estimator.set_callbacks(first).fit(slices))
    assert len(first.tree()) == 16
    again = clone(estimator).set_callbacks(second).fit(slices)  # from the cache: no stage is a task
    assert second.tree() == ["> fit", "< fit"]
    np.testing.assert_equal(weights(again), expected)
    assert again.history_ == estimator.history_
    kept = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert kept and not any(name in text for text in kept for name in (b"Propagated", b"FitTask("))


@needs_framework
@pytest.mark.parametrize(("stop_at", "n_records"), [(("epoch", 0), 1), (("epoch", 2), 3)])
def test_memory_keeps_no_training_that_a_callback_cut_short(slices, tmp_path, stop_at, n_records):
    estimator = detector(memory=str(tmp_path)).set_callbacks(Recorder(stop_at))  # sees the second stage only
    assert len(estimator.fit(slices).history_) == n_records
    callback = Propagated()
    assert len(clone(estimator).set_callbacks(callback).fit(slices).history_) == 3
    assert "> fit/autoencoder" not in callback.tree()
    assert ("> fit/denoiser" in callback.tree()) == (n_records < 3)

    estimator = detector(memory=str(tmp_path / "other")).set_callbacks(Propagated(("epoch", 0)))
    assert len(estimator.fit(slices).autoencoder_.history_) == 1
    assert len(clone(estimator).set_callbacks().fit(slices).autoencoder_.history_) == 2


@needs_framework
def test_checkpoints_know_no_callbacks(slices, tmp_path):
    trainer = short(2, checkpoint_dir=tmp_path)
    plain = tiny_autoencoder(trainer=trainer).fit(slices)
    callback = Recorder()
    again = tiny_autoencoder(trainer=trainer).set_callbacks(callback).fit(slices)
    assert again.history_ == plain.history_ and len(list(tmp_path.glob("*.safetensors"))) == 1
    assert callback.tree() == ["> fit", "> fit/epoch0", "< fit/epoch0", "< fit"]  # read back: nothing to do


@needs_framework
def test_scikit_learns_own_callbacks(slices, monkeypatch):
    pytest.importorskip("rich")
    from sklearn.callback import ProgressBar, ScoringMonitor
    from sklearn.model_selection import GridSearchCV

    shown = io.StringIO()
    monkeypatch.setattr("sys.stdout", shown)
    bar, monitor = (
        ProgressBar(),
        ScoringMonitor(scoring={"mean": lambda estimator, X, y: estimator.predict(X).mean()}),
    )
    fitted = detector().set_callbacks(bar, monitor).fit(slices, y=np.zeros(24))
    for task in ("MaskedDiffusionAnomalyDetector - fit", "LatentAutoencoder - fit", "Detector - denoiser"):
        assert task in shown.getvalue()
    (row,) = monitor.get_logs().data  # a single fitted estimator is to be had: the final one
    assert (row["task_name"], row["mean"]) == ("fit", fitted.predict(slices).mean())

    callback = Propagated()
    search = GridSearchCV(
        tiny_autoencoder(trainer=short(1)),
        {"kl_weight": [0, 1e-6]},
        scoring=lambda *_: 0.0,
        cv=2,
        refit=False,
    )
    search.set_callbacks(ProgressBar(), callback).fit(slices)
    for sign in "><":
        assert sum(line[0] == sign and line.endswith("/epoch0") for line in callback.tree()) == 4


@pytest.mark.parametrize(
    ("options", "n_samples"),
    [
        ({"max_epochs": 3}, 20),
        ({"max_epochs": 9, "max_steps": 5}, 20),
        ({"max_epochs": 9, "max_steps": 4}, 20),
        ({"max_epochs": 1.2}, 20),
        ({"max_epochs": 3, "batch_size": 100}, 7),
        ({"max_epochs": float("inf"), "max_steps": 3}, 20),
    ],
)
def test_the_number_of_records_is_known_before(options, n_samples):
    import torch

    trainer, module = Trainer(**{"batch_size": 8} | options), torch.nn.Linear(1, 1)

    def loss(module, index, generator, step):
        value = module(torch.ones(len(index), 1)).square().mean()
        return value, {}

    history = trainer.optimise(module, loss, n_samples, generator=torch.Generator())
    assert trainer.max_records(n_samples) == len(history)
    for name, value in (("max_time", 5.0), ("validate_every", 3)):
        assert clone(trainer).set_params(**{name: value}).max_records(n_samples) is None


def test_an_earlier_scikit_learn_has_no_callbacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.callback", None)
    spec = importlib.util.spec_from_file_location("earlier", Path(sklearn_callbacks.__file__))
    earlier = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(earlier)
    assert earlier.framework is None

    class Estimator(earlier.CallbackSupport, BaseEstimator):
        @earlier.with_callbacks
        def fit(self, trainer):
            task = earlier.FitTask.of_fit(self, 2)
            with task.stage("one") as stage, stage.epochs(trainer) as watched:
                assert watched is trainer
            assert not task.was_stopped
            task.end_fit()
            return self

    estimator = Estimator().fit(Trainer())
    assert not hasattr(estimator, "set_callbacks") and vars(estimator) == {}
    assert estimator.__getstate__() == {}
