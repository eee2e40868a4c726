import copy
import errno
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks
from torch import nn

import madad
import madad.stages.latent_cache
import madad.training.checkpoint
from madad import MaskedDiffusionAnomalyDetector, Trainer
from madad._runtime.random import isolated_seed
from madad._runtime.tensors import state_to_numpy
from madad.diffusion import ForeignLatents, GaussianNoise, Mixture
from madad.metrics import max_dice_per_image, max_dice_scorer
from madad.nn import UNET_SIZES
from madad.presets import PRESETS
from madad.testing import tiny_autoencoder, tiny_detector
from madad.training import TrainingStoppedWarning

MAPS = ("image", "latent", "mask")


def make_slices(n, height=16, width=16, seed=0):
    """Ellipses with smooth and random texture, background 0."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = ((2 * y + 1) / height - 1) ** 2 + ((2 * x + 1) / width - 1) ** 2 < 0.75
    waves = 0.1 * np.sin(x / 3 + rng.uniform(0, 6, (n, 1, 1)))
    values = 0.4 + waves + 0.05 * rng.standard_normal((n, height, width))
    return np.where(inside, values.clip(0.02, 1), 0).astype(np.float32)


def make_lesions(n, height=16, width=16, seed=1):
    """Slices with a bright square each, and its mask."""
    X, masks = make_slices(n, height, width, seed), np.zeros((n, height, width), bool)
    for i in range(n):
        top, left = height // 2 - i % 4, width // 2 - i % 3
        masks[i, top : top + 4, left : left + 4] = True
    return np.where(masks, np.float32(0.95), X), masks


def strict_detector(**overrides):
    return tiny_detector(**({"intensity_range": (0.0, 1.0)} | overrides))


def brief():
    return Trainer(1, max_steps=2)


@pytest.fixture(scope="module")
def healthy():
    return make_slices(40)


@pytest.fixture(scope="module")
def fitted(healthy):
    """Never change it: take `copied`."""
    return strict_detector().fit(healthy)


@pytest.fixture
def copied(fitted):
    return pickle.loads(pickle.dumps(fitted))


@pytest.fixture
def trainings(monkeypatch):
    """How often each stage was trained."""
    counts, optimise = Counter(), Trainer.optimise

    def counting(self, *args, **kwargs):
        counts[kwargs["description"]] += 1
        return optimise(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "optimise", counting)
    return counts


# scikit-learn


@parametrize_with_checks([tiny_detector(autoencoder=tiny_autoencoder(trainer=brief()), trainer=brief())])
def test_scikit_learn_check(estimator, check):
    check(estimator)


def test_scikit_learn_has_more_than_40_checks():
    assert len(list(estimator_checks_generator(tiny_detector()))) > 40


def search_data():
    healthy, (lesioned, masks) = make_slices(24), make_lesions(8)
    X, y = np.concatenate([healthy, lesioned]), np.concatenate([np.zeros(healthy.shape, bool), masks])
    return X, y, [(np.arange(24), np.arange(24, 32))]


def test_grid_search_over_training_and_inference_parameters():
    X, y, cv = search_data()
    grid = {"gamma": [0.05, 1.0], "mask_loss_weight": [1e-3, 1.0], "mask_ratio": [0.2, 0.4]}
    search = GridSearchCV(strict_detector(anomaly_map="image"), grid, scoring=max_dice_scorer, cv=cv)
    search.fit(X, y)
    assert len(search.cv_results_["params"]) == 8
    assert search.best_estimator_.predict_maps(X).shape == X.shape
    scores = search.cv_results_["mean_test_score"]
    for i, params in enumerate(search.cv_results_["params"]):
        by_hand = strict_detector(anomaly_map="image", **params).fit(X[:24]).predict_maps(X[24:])
        assert scores[i] == max_dice_per_image(y[24:], by_hand).dice
    for name, low, high in (("gamma", 0.05, 1.0), ("mask_loss_weight", 1e-3, 1.0), ("mask_ratio", 0.2, 0.4)):
        at = [scores[search.cv_results_[f"param_{name}"].data == value] for value in (low, high)]
        assert (at[0] != at[1]).any(), name  # none of the three is without effect


def test_grid_search_in_two_processes_gives_the_scores_of_one():
    X, y, cv = search_data()
    grid = {"gamma": [0.05, 1.0], "mask_ratio": [0.4]}
    one, two = (
        GridSearchCV(
            strict_detector(anomaly_map="image"),
            grid,
            scoring=max_dice_scorer,
            cv=cv,
            n_jobs=n_jobs,
            refit=False,
        ).fit(X, y)
        for n_jobs in (1, 2)
    )
    np.testing.assert_allclose(
        one.cv_results_["mean_test_score"], two.cv_results_["mean_test_score"], rtol=1e-4
    )


@pytest.mark.parametrize("cached", [True, False])
def test_memory_trains_each_fold_once(cached, tmp_path, trainings):
    X, y, _ = search_data()
    cv = [(np.arange(0, 16), np.arange(24, 32)), (np.arange(8, 24), np.arange(24, 32))]
    gammas = [0.02, 0.1, 0.2, 0.4, 2.0] if cached else [0.02, 0.1]
    detector = strict_detector(anomaly_map="image", memory=str(tmp_path) if cached else None)
    search = GridSearchCV(detector, {"gamma": gammas}, scoring=max_dice_scorer, cv=cv, refit=False)
    search.fit(X, y)
    expected = len(cv) if cached else len(cv) * len(gammas)
    assert trainings == {"autoencoder": expected, "denoiser": expected}
    assert len(set(search.cv_results_["mean_test_score"])) > 1  # gamma still reaches the maps


def test_memory_tells_data_seeds_and_training_parameters_apart(healthy, tmp_path, trainings):
    detector = strict_detector(memory=str(tmp_path))
    first = detector.fit(healthy).predict_maps(healthy)
    assert trainings == {"autoencoder": 1, "denoiser": 1}
    again = clone(detector).fit(healthy)
    np.testing.assert_array_equal(again.predict_maps(healthy), first)
    assert trainings == {"autoencoder": 1, "denoiser": 1}
    clone(detector).set_params(mask_loss_weight=0.5).fit(healthy)
    assert trainings == {"autoencoder": 1, "denoiser": 2}
    clone(detector).set_params(random_state=9).fit(healthy)
    clone(detector).fit(healthy[:30])
    assert trainings == {"autoencoder": 3, "denoiser": 4}


def test_memory_is_not_spoilt_by_the_estimators_it_gave(healthy, tmp_path):
    detector = strict_detector(memory=str(tmp_path)).fit(healthy)
    expected = detector.predict_maps(healthy)
    with torch.no_grad():
        next(detector.denoiser_.parameters()).add_(1.0)
    np.testing.assert_array_equal(clone(detector).fit(healthy).predict_maps(healthy), expected)


# The same slice, the same result


NOISY = {"eta": 0.7, "n_steps": 5, "mask_threshold": 0.4}


@pytest.mark.parametrize(("shape", "knobs"), [((16, 16), {}), ((17, 23), NOISY)], ids=["default", "noisy"])
def test_results_do_not_depend_on_company_or_order(shape, knobs, two_threads):
    X = make_slices(24, *shape)
    detector = strict_detector(**knobs).fit(X)
    rng = np.random.default_rng(0)
    choices = [np.array([7]), np.arange(24)[::-1], rng.permutation(24)[:19], rng.integers(0, 24, 34)]
    for kind in MAPS:
        detector.set_params(anomaly_map=kind)
        maps, scores = detector.predict_maps(X), detector.score_samples(X)
        assert maps.max() > 0
        for rows in choices:
            np.testing.assert_array_equal(detector.predict_maps(X[rows]), maps[rows])
            np.testing.assert_array_equal(detector.score_samples(X[rows]), scores[rows])


def test_image_maps_do_not_depend_on_whether_others_in_the_batch_are_repaired(fitted, copied):
    X = np.concatenate([make_slices(6, seed=5), make_lesions(6)[0]])
    largest = copied.set_params(anomaly_map="mask", smoothing_px=0).predict_maps(X).max(axis=(1, 2))
    threshold = float(np.median(largest))  # repairs some slices of the batch and not others
    copied.set_params(anomaly_map="image", n_steps=1, mask_threshold=threshold)
    together = copied.predict_maps(X)
    alone = np.concatenate([copied.predict_maps(X[i : i + 1]) for i in range(len(X))])
    np.testing.assert_array_equal(together, alone)


def test_one_seed_one_result_and_another_seed_another(healthy, fitted):
    before = torch.get_rng_state()
    twin, other = strict_detector().fit(healthy), strict_detector(random_state=1).fit(healthy)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone
    np.testing.assert_array_equal(twin.predict_maps(healthy), fitted.predict_maps(healthy))
    assert (twin.offset_, twin.map_threshold_) == (fitted.offset_, fitted.map_threshold_)
    assert not np.array_equal(other.predict_maps(healthy), fitted.predict_maps(healthy))


def test_another_process_gives_the_same_maps(fitted, healthy, tmp_path):
    fitted.save(tmp_path / "model")
    joblib.dump(fitted, tmp_path / "model.joblib")
    np.save(tmp_path / "X.npy", healthy)
    script = (
        "import joblib, numpy as np\n"
        "from madad import MaskedDiffusionAnomalyDetector\n"
        "X = np.load('X.npy')\n"
        "detectors = {'saved': MaskedDiffusionAnomalyDetector.load('model'), "
        "'dumped': joblib.load('model.joblib')}\n"
        "for name, detector in detectors.items():\n"
        "    for kind in ('image', 'latent', 'mask'):\n"
        "        detector.set_params(anomaly_map=kind)\n"
        "        np.save(f'{name}-{kind}', detector.predict_maps(X))\n"
    )
    package = str(Path(madad.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=True,
        timeout=120,
    )
    here = pickle.loads(pickle.dumps(fitted))
    for kind in MAPS:
        expected = here.set_params(anomaly_map=kind).predict_maps(healthy)
        for name in ("saved", "dumped"):
            np.testing.assert_array_equal(np.load(tmp_path / f"{name}-{kind}.npy"), expected)


# Saving


def test_a_pickle_holds_arrays_and_nothing_of_torch(fitted, healthy):
    found = set()

    class Listing(pickle.Unpickler):
        def find_class(self, module, name):
            found.add(module.partition(".")[0])
            return super().find_class(module, name)

    restored = Listing(io.BytesIO(pickle.dumps(fitted))).load()
    assert "torch" not in found and {"numpy", "madad"} <= found
    np.testing.assert_array_equal(restored.predict_maps(healthy), fitted.predict_maps(healthy))
    np.testing.assert_array_equal(restored.predict(healthy), fitted.predict(healthy))
    assert pickle.dumps(restored) == pickle.dumps(pickle.loads(pickle.dumps(restored)))


def test_save_and_load_keep_everything(healthy, tmp_path):
    parameters = {
        "autoencoder": tiny_autoencoder(latent_channels=3, intensity_range=(0.0, 1.0)),
        "trainer": Trainer(2, max_steps=3, batch_size=8, learning_rate=2e-3),
        "corruption": Mixture((GaussianNoise(), ForeignLatents()), (0.3, 0.7)),
        "anomaly_map": "image",
        "gamma": math.inf,
        "mask_ratio": (0.1, 0.3),
        "mask_patch_sizes": (1, 2),
        "contamination": 0.1,
        "random_state": 3,
    }
    detector = strict_detector(**parameters).fit(healthy)
    detector.set_params(verbose=True, memory=str(tmp_path / "cache")).save(tmp_path / "model")
    before = torch.get_rng_state()
    loaded = MaskedDiffusionAnomalyDetector.load(str(tmp_path / "model"))
    assert torch.equal(torch.get_rng_state(), before)

    assert (loaded.device, loaded.memory, loaded.verbose) == ("auto", None, False)
    before, after = detector.get_params(deep=False), loaded.get_params(deep=False)
    for name in before.keys() - {"autoencoder", "trainer", "memory", "verbose"}:
        assert after[name] == before[name] and type(after[name]) is type(before[name]), name
    assert after["trainer"].get_params() == parameters["trainer"].get_params()
    without_trainer = parameters["autoencoder"].get_params(deep=False) | {"trainer": None}
    assert after["autoencoder"].get_params(deep=False) | {"trainer": None} == without_trainer
    for name in ("offset_", "map_threshold_", "calibrated_with_", "history_", "image_shape_", "preset_"):
        assert getattr(loaded, name) == getattr(detector, name), name
    assert loaded.autoencoder_.history_ == detector.autoencoder_.history_
    for call in ("predict_maps", "predict_masks", "restore", "decision_function", "predict"):
        np.testing.assert_array_equal(getattr(loaded, call)(healthy), getattr(detector, call)(healthy))

    refitted = loaded.fit(healthy)  # the parameters say all
    np.testing.assert_array_equal(refitted.predict_maps(healthy), detector.predict_maps(healthy))


def test_save_and_load_with_a_shared_autoencoder(healthy, tmp_path, trainings):
    shared = tiny_autoencoder(intensity_range=(0.0, 1.0)).fit(healthy)
    detector = strict_detector(autoencoder=FrozenEstimator(shared)).fit(healthy)
    assert trainings == {"autoencoder": 1, "denoiser": 1}
    assert detector.autoencoder_ is shared
    detector.save(tmp_path / "model")
    loaded = MaskedDiffusionAnomalyDetector.load(tmp_path / "model")
    assert isinstance(loaded.autoencoder, FrozenEstimator)
    assert loaded.autoencoder.estimator is loaded.autoencoder_
    np.testing.assert_array_equal(loaded.predict_maps(healthy), detector.predict_maps(healthy))
    np.testing.assert_array_equal(loaded.autoencoder_.transform(healthy), shared.transform(healthy))
    loaded.fit(healthy)
    assert trainings == {"autoencoder": 1, "denoiser": 2}


def test_saving_again_replaces_the_model_and_nothing_else(fitted, healthy, tmp_path):
    fitted.save(tmp_path / "model")
    other = strict_detector(random_state=5).fit(healthy)
    other.save(tmp_path / "model")
    loaded = MaskedDiffusionAnomalyDetector.load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_maps(healthy), other.predict_maps(healthy))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="path must be new.*notes"):
        fitted.save(tmp_path / "notes")
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"


def edit_config(change):
    def damage(model):
        config = json.loads((model / "config.json").read_text())
        change(config)
        (model / "config.json").write_text(json.dumps(config))

    return damage


def hostile(config):
    config["parameters"]["trainer"] = {
        "__class__": "subprocess.Popen",
        "fields": {"args": ["touch", "executed"]},
    }


DAMAGES = {
    "unknown class": (edit_config(hostile), ValueError, r"classes in .* must be among .*subprocess\.Popen"),
    "other estimator": (
        edit_config(lambda config: config.update({"class": "IsolationForest"})),
        ValueError,
        "must hold a MaskedDiffusionAnomalyDetector, got 'IsolationForest'",
    ),
    "newer format": (
        edit_config(lambda config: config.update(format_version=99)),
        ValueError,
        "format_version must be at most 2, got 99",
    ),
    "part missing": (
        edit_config(lambda config: config.pop("denoiser")),
        ValueError,
        "parts that do not fit .*denoiser",
    ),
    "unknown parameter": (
        edit_config(lambda config: config["parameters"].update(wings=2)),
        ValueError,
        "parts that do not fit .*wings",
    ),
    "weights of another network": (
        lambda model: (model / "autoencoder.safetensors").replace(model / "denoiser.safetensors"),
        (ValueError, FileNotFoundError),
        r"autoencoder\.safetensors must exist",
    ),
    "swapped weights": (
        lambda model: (model / "denoiser.safetensors").write_bytes(
            (model / "autoencoder.safetensors").read_bytes()
        ),
        ValueError,
        "parts that do not fit",
    ),
    "truncated weights": (
        lambda model: (model / "denoiser.safetensors").write_bytes(
            (model / "denoiser.safetensors").read_bytes()[:-100]
        ),
        ValueError,
        r"denoiser\.safetensors must be a safetensors file, got a damaged one",
    ),
    "no calibration": (
        lambda model: (model / "calibration.json").unlink(),
        FileNotFoundError,
        r"calibration\.json must exist",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_models_raise_one_clear_error(name, fitted, tmp_path, monkeypatch):
    damage, error, message = DAMAGES[name]
    monkeypatch.chdir(tmp_path)
    fitted.save("model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=f"(?s){message}"):
        MaskedDiffusionAnomalyDetector.load("model")
    assert not (tmp_path / "executed").exists()


def test_a_folder_without_a_model_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="path must be a model directory.*nowhere"):
        MaskedDiffusionAnomalyDetector.load(tmp_path / "nowhere")


class OwnDenoiser(nn.Module):
    """The call of MaskedUNet with a convolution for a body."""

    def __init__(self, latent_channels=2):
        super().__init__()
        self.body = nn.Conv2d(latent_channels + 1, latent_channels + 1, 3, padding=1)

    def forward(self, z_t, t):
        time = (t / 10)[:, None, None, None].expand(-1, 1, *z_t.shape[2:])
        out = self.body(torch.cat([z_t, time], dim=1))
        return z_t + out[:, :-1], out[:, -1:]


def test_an_own_denoiser_works_but_cannot_be_saved(healthy, tmp_path):
    module = OwnDenoiser()
    untrained = module.body.weight.detach().clone()
    detector = strict_detector(denoiser=module, anomaly_map="latent").fit(healthy)
    assert torch.equal(module.body.weight, untrained)  # a copy is trained
    assert not torch.equal(detector.denoiser_.body.weight, untrained)
    maps = detector.predict_maps(healthy)
    np.testing.assert_array_equal(detector.predict_maps(healthy[::-1])[::-1], maps)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(detector)).predict_maps(healthy), maps)
    with pytest.raises(TypeError, match="denoiser must be a MaskedUNet to be saved, got OwnDenoiser"):
        detector.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_own_corruption_works_but_cannot_be_saved(healthy, tmp_path):
    class Ones:
        def fill(self, z0, generator):
            return torch.ones_like(z0)

    detector = strict_detector(corruption=Ones()).fit(healthy)
    with pytest.raises(TypeError, match="corruption must be .* got <.*Ones"):
        detector.save(tmp_path / "model")


# Parameters and thresholds


def test_inference_parameters_take_effect_without_training(healthy, copied, trainings):
    copied.set_params(anomaly_map="image", gamma=0.2, n_steps=2).calibrate(healthy)
    before = copied.predict_maps(healthy)
    copied.set_params(gamma=0.02)
    assert not np.array_equal(copied.predict_maps(healthy), before)  # no warning: maps need no threshold
    for method in (copied.predict, copied.decision_function, copied.predict_masks):
        with pytest.warns(UserWarning, match=r"calibrated with \{'gamma': 0\.2\}, now \{'gamma': 0\.02\}"):
            method(healthy)
    copied.calibrate(healthy)
    copied.predict(healthy)  # warnings are errors here
    assert not trainings


def test_ten_per_cent_contamination_flags_ten_per_cent_of_the_training_slices(healthy):
    detector = strict_detector(contamination=0.1)
    predicted = detector.fit_predict(healthy)
    assert (predicted == -1).sum() == 4 and (predicted == 1).sum() == 36
    np.testing.assert_array_equal(predicted, detector.predict(healthy))
    decision = detector.decision_function(healthy)
    np.testing.assert_array_equal(decision, detector.score_samples(healthy) - detector.offset_)
    np.testing.assert_array_equal(predicted == -1, decision < 0)


def pooled(anomaly_map, brain):
    """Mean of the largest one per cent, at least one."""
    inside = np.sort(anomaly_map[brain].astype(np.float64))
    return inside[-max(1, round(len(inside) / 100)) :].mean()


def test_thresholds_are_quantiles_of_held_out_healthy_maps(healthy):
    detector = strict_detector(image_specificity=0.8, pixel_specificity=0.9).fit(healthy)
    rows = detector.calibration_rows_
    assert len(rows) == 6 and len(set(rows.tolist())) == 6  # 0.15 of 40
    maps, brain = detector.predict_maps(healthy[rows]), healthy[rows] > 0
    assert detector.map_threshold_ == pytest.approx(np.quantile(maps[brain], 0.9), rel=1e-6)
    scores = np.array([-pooled(*pair) for pair in zip(maps, brain, strict=True)])
    np.testing.assert_allclose(detector.score_samples(healthy[rows]), scores, rtol=1e-6)
    assert detector.offset_ == pytest.approx(-np.quantile(-scores, 0.8), rel=1e-6)
    masks = detector.predict_masks(healthy[rows])
    assert masks.dtype == bool
    np.testing.assert_array_equal(masks, maps >= np.float32(detector.map_threshold_))
    assert masks[brain].mean() == pytest.approx(0.1, abs=0.01)


def test_a_pixel_at_the_threshold_is_in_the_mask(copied, healthy):
    maps = copied.predict_maps(healthy)
    copied.map_threshold_ = float(maps.max())
    np.testing.assert_array_equal(copied.predict_masks(healthy), maps == maps.max())


def test_calibrate_takes_all_slices_that_it_is_given(copied):
    others = make_slices(15, seed=9)
    copied.calibrate(others)
    maps = copied.predict_maps(others)
    assert copied.map_threshold_ == pytest.approx(np.quantile(maps[others > 0], 0.99), rel=1e-6)
    copied.set_params(contamination=0.2).calibrate(others)
    assert (copied.predict(others) == -1).sum() == 3


def test_training_never_sees_the_held_out_slices(healthy, fitted):
    rows = fitted.calibration_rows_
    changed = healthy.copy()
    changed[rows] = make_slices(len(rows), seed=77)
    twin = strict_detector().fit(changed)
    np.testing.assert_array_equal(twin.predict_maps(healthy), fitted.predict_maps(healthy))
    assert twin.map_threshold_ != fitted.map_threshold_


@pytest.mark.parametrize("as_text", [False, True])
def test_groups_are_held_out_whole(healthy, as_text):
    groups = np.repeat(np.arange(10), 4)
    groups = np.char.add("subject-", groups.astype(str)) if as_text else groups
    held_out = strict_detector().fit(healthy, groups=groups).calibration_rows_
    kept = np.setdiff1d(np.arange(40), held_out)
    assert len(held_out) == 8  # 0.15 of ten groups, rounded up
    assert not set(groups[held_out]) & set(groups[kept])


def test_a_single_group_is_split_by_slice(healthy):
    assert len(strict_detector().fit(healthy, groups=np.zeros(40)).calibration_rows_) == 6


# What the fit itself checks, and one value for each part that it hands others to.
BAD_PARAMETERS = [
    ("contamination", 0.6, "contamination must .* got 0.6"),
    ("contamination", 0, r"contamination must be 'auto' or in \(0, 0\.5\], got 0"),
    ("contamination", "some", "contamination must .* got 'some'"),
    ("eta", 1.5, r"eta must lie in 0\.\.1, got 1\.5"),
    ("mask_threshold", -0.1, r"mask_threshold must lie in 0\.\.1, got -0\.1"),
    ("repaint", 1.5, r"repaint must be above 0 and at most 1, got 1\.5"),
    ("preset", "huge", "preset must be .* got 'huge'"),
    ("anomaly_map", "heat", "anomaly_map must be one of .* got 'heat'"),
    ("n_steps", 11, r"n_steps must lie in 1\.\.10, .* got 11"),
    ("n_timesteps", 0, "n_timesteps must .* got 0"),
    ("step_spacing", "odd", "spacing must .* got 'odd'"),
    ("gamma", math.nan, "gamma must be positive, got nan"),
    ("smoothing_px", -1, "smoothing_px must .* got -1"),
    ("reference", "cubed", "reference must be one of .* got 'cubed'"),
    ("map_difference", "cubed", "map_difference must be one of .* got 'cubed'"),
    ("denoiser", "nope", "denoiser must be one of .* got 'nope'"),
    ("corruption", "nope", "corruption must be one of .* got 'nope'"),
    ("mask_shape", "stars", "mask_shape must be one of .* got 'stars'"),
    ("mask_loss", "hinge", "loss must .* got 'hinge'"),
    ("mask_loss_weight", -1, "mask_loss_weight must be 0 or more, got -1"),
    ("mask_ratio", 1.5, r"ratio must .* got .*1\.5"),
    ("brain_rule", "none", "rule must .* got 'none'"),
    ("trainer", Trainer(learning_rate=-1.0), "learning_rate must .* got -1"),
    ("autoencoder", "nope", "size must be .* got 'nope'"),
    ("intensity_range", (1, 0), r"intensity_range must .* low < high, got \(1, 0\)"),
    ("image_shape", (8, 8), r"image_shape must agree with X, got \(8, 8\) and X of shape \(12, 16, 16\)"),
    ("device", "abacus", "device must be 'auto' or .* got 'abacus'"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD_PARAMETERS)
def test_bad_parameters_are_refused_before_anything_is_trained(name, value, message, trainings):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        strict_detector(**({"anomaly_map": "image"} | {name: value})).fit(make_slices(12))
    assert not trainings


def test_an_autoencoder_of_another_kind_is_a_type_error():
    with pytest.raises(TypeError, match="autoencoder must be a LatentAutoencoder, .* got 3"):
        strict_detector(autoencoder=3).fit(make_slices(12))


@pytest.mark.parametrize("preset", ["paper", "original"])
def test_published_presets_are_followed_where_nothing_else_is_given(preset):
    values = PRESETS[preset]
    own = {"autoencoder": tiny_autoencoder(), "denoiser": "tiny", "trainer": brief()}
    detector = MaskedDiffusionAnomalyDetector(preset, **own, device="cpu", random_state=0)
    detector.fit(make_slices(12))
    assert detector.preset_ == preset
    calibrated = detector.calibrated_with_
    assert {"eta", "reference", "gamma"} <= calibrated.keys()
    assert calibrated == {name: values[name] for name in calibrated}
    for name in (values.keys() & detector.get_params(deep=False)) - own.keys():
        assert detector._value_of(name) == values[name], name
    assert detector._value_of("denoiser") == "tiny"  # the user's own comes first
    assert detector.history_[-1]["step"] == 1  # the given trainer, one batch of twelve slices


def test_constructor_only_stores():
    detector = MaskedDiffusionAnomalyDetector("nonsense", gamma=-1, autoencoder=3, mask_ratio="much")
    assert detector.get_params(deep=False)["mask_ratio"] == "much"
    assert clone(detector).gamma == -1


# Maps


@pytest.mark.parametrize("kind", MAPS)
def test_maps_are_shares_and_zero_outside_the_brain(kind, copied, healthy):
    copied.set_params(anomaly_map=kind)
    X = np.concatenate([healthy[:3], make_lesions(3)[0], np.zeros((1, 16, 16), np.float32)])
    maps = copied.predict_maps(X)
    assert maps.dtype == np.float32 and maps.shape == X.shape
    assert maps.min() >= 0 and 0 < maps.max() <= 1
    assert not maps[X == 0].any()
    assert copied.score_samples(X)[-1] == 0  # nothing but background
    half = np.zeros(X.shape, bool)
    half[:, :, :8] = True
    masked = copied.predict_maps(X, brain_mask=half)
    assert not masked[~half].any() and masked[-1, :, :8].shape == (16, 8)
    assert copied.score_samples(X[:1], brain_mask=half[:1]) == -pooled(masked[0], half[0])


def test_a_slice_of_background_is_normal(copied):
    empty = np.zeros((2, 16, 16), np.float32)
    assert not copied.predict_maps(empty).any() and not copied.predict_masks(empty).any()
    np.testing.assert_array_equal(copied.score_samples(empty), [0, 0])
    np.testing.assert_array_equal(copied.predict(empty), [1, 1])


def test_the_mask_given_to_fit_is_used(healthy):
    half = np.zeros(healthy.shape, bool)
    half[:, :, :8] = True
    detector = strict_detector().fit(healthy, brain_mask=half)
    as_numbers = strict_detector().fit(healthy, brain_mask=half.astype(np.uint8))
    assert detector.map_threshold_ == as_numbers.map_threshold_
    rows = detector.calibration_rows_
    maps = detector.predict_maps(healthy[rows], brain_mask=half[rows])
    assert detector.map_threshold_ == pytest.approx(np.quantile(maps[half[rows]], 0.99), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.05, math.inf])
@pytest.mark.parametrize("difference", ["absolute", "squared"])
def test_image_map_is_the_clipped_difference_to_the_input(gamma, difference, copied):
    X = make_lesions(4)[0]
    copied.set_params(anomaly_map="image", reference="input", map_difference=difference, gamma=gamma)
    copied.set_params(smoothing_px=0, mask_threshold=0.0)
    restored, maps = copied.restore(X), copied.predict_maps(X)
    distance = np.abs(2 * restored.astype(np.float64) - 2 * X)  # on the network's scale of -1..1
    largest = 4 if difference == "squared" else 2
    distance = distance**2 if difference == "squared" else distance
    limit = min(gamma, largest)
    where = (X > 0) & (restored > 0) & (restored < 1)  # where restored is not clipped
    assert where.sum() > 100 and maps[where].max() > 0
    np.testing.assert_allclose(maps[where], (np.minimum(distance, limit) / limit)[where], atol=1e-5)


def test_what_is_not_flagged_is_not_touched(copied):
    X = make_lesions(5)[0]
    copied.set_params(mask_threshold=1.0, reference="reconstruction")
    for kind in ("image", "latent"):
        assert not copied.set_params(anomaly_map=kind).predict_maps(X).any()
    autoencoder = copied.autoencoder_
    expected = np.where(X > 0, autoencoder.inverse_transform(autoencoder.transform(X)), 0)
    np.testing.assert_array_equal(copied.restore(X), expected)
    copied.set_params(mask_threshold=0.0)
    assert not np.array_equal(copied.restore(X), expected)


def test_channels(healthy):
    X = np.stack([healthy, 0.5 * make_slices(40, seed=3)], axis=1)
    detector = strict_detector(mask_threshold=0.2, anomaly_map="image").fit(X)
    maps, restored = detector.predict_maps(X[:5]), detector.restore(X[:5])
    assert maps.shape == (5, 16, 16) and restored.shape == (5, 2, 16, 16)
    assert detector.image_shape_ == (2, 16, 16)
    blind = X[:5].copy()
    blind[:, 1, 8] = 0
    assert not np.array_equal(detector.predict_maps(blind), maps)  # the second channel counts
    brain = (X[:5] > 0).any(axis=1)
    np.testing.assert_array_equal(detector.predict_maps(X[:5], brain_mask=brain), maps)
    np.testing.assert_array_equal(detector.predict_maps(X[:5], brain_mask=brain[:, None]), maps)
    with pytest.raises(ValueError, match=r"X must have slices of shape \(2, 16, 16\).* got \(1, 16, 16\)"):
        detector.predict_maps(healthy)


@pytest.mark.parametrize("shape", [None, (8, 32), (2, 8, 16)])
def test_flat_rows_are_folded(shape):
    X = make_slices(20)
    folded = X.reshape(20, *(shape or (16, 16)))
    images = strict_detector(anomaly_map="image", mask_threshold=0.2).fit(folded)
    rows = clone(images).set_params(image_shape=shape).fit(X.reshape(20, -1))
    assert images.n_features_in_ == rows.n_features_in_ == 256
    flat = X.reshape(20, -1)
    np.testing.assert_array_equal(rows.predict_maps(flat), images.predict_maps(folded).reshape(20, -1))
    np.testing.assert_array_equal(rows.restore(flat), images.restore(folded).reshape(20, -1))
    np.testing.assert_array_equal(rows.score_samples(flat), images.score_samples(folded))
    assert rows.predict_maps(flat).shape == (20, 128 if shape == (2, 8, 16) else 256)
    assert images.restore(folded).shape == folded.shape
    mask = images.predict_maps(folded) > 0.01
    np.testing.assert_array_equal(
        rows.predict_maps(flat, brain_mask=mask.reshape(20, -1)),
        images.predict_maps(folded, brain_mask=mask).reshape(20, -1),
    )


def test_flat_rows_of_any_length_are_padded_to_a_square():
    rows = make_slices(20).reshape(20, -1)[:, :250]
    square = np.pad(rows, ((0, 0), (0, 6))).reshape(20, 16, 16)
    flat, images = (strict_detector(anomaly_map="latent").fit(X) for X in (rows, square))
    assert flat.image_shape_ == (1, 16, 16)
    maps = images.predict_maps(square).reshape(20, -1)
    np.testing.assert_array_equal(flat.predict_maps(rows), maps[:, :250])
    np.testing.assert_array_equal(flat.restore(rows), images.restore(square).reshape(20, -1)[:, :250])


def test_default_smoothing_is_a_fixed_share_of_the_slice(copied, healthy):
    default = copied.predict_maps(healthy)
    copied.set_params(smoothing_px=5 / 16)
    np.testing.assert_allclose(copied.predict_maps(healthy), default, rtol=1e-6)  # 5 px at 256
    copied.set_params(smoothing_px=0)
    assert not np.allclose(copied.predict_maps(healthy), default)


# Input


def test_not_fitted():
    X = make_slices(2)
    detector = strict_detector()
    for name in ("predict_maps", "predict_masks", "restore", "score_samples", "decision_function", "predict"):
        with pytest.raises(NotFittedError, match="MaskedDiffusionAnomalyDetector"):
            getattr(detector, name)(X)
    for call in (detector.calibrate, detector.save):
        with pytest.raises(NotFittedError):
            call(X)


def with_value(value):
    X = make_slices(12)
    X[3, 8, 8] = value
    return X


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((2, 1, 1, 4, 8, 8)), r"X must have shape .* got \(2, 1, 1, 4, 8, 8\)"),
        (with_value(np.nan), "X must be finite, got .*nan"),
        (with_value(1.5), r"X must lie in 0\.\.1, got values from 0 to 1\.5"),
    ],
    ids=["six axes", "NaN", "too bright"],
)
def test_bad_input_raises(X, message, fitted):
    for method in (strict_detector().fit, fitted.predict_maps, fitted.predict, fitted.restore):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            method(X)


def test_one_slice_is_too_few_to_fit():
    with pytest.raises(ValueError, match="X must have at least 2 samples .* got n_samples = 1"):
        strict_detector().fit(make_slices(1))


def test_another_size_than_in_fit_raises(fitted):
    with pytest.raises(ValueError, match=r"X must have slices of shape \(1, 16, 16\).* got \(1, 20, 16\)"):
        fitted.predict_maps(make_slices(2, 20, 16))


def test_mismatched_masks_raise(fitted, healthy):
    message = r"brain_mask must have shape \(40, 16, 16\) .* got \(39, 16, 16\)"
    for method in (fitted.predict_maps, fitted.predict, strict_detector().fit):
        with pytest.raises(ValueError, match=message):
            method(healthy, brain_mask=healthy[1:] > 0)
    with pytest.raises(ValueError, match="brain_mask must be boolean or hold only 0 and 1, got float32"):
        fitted.predict_maps(healthy, brain_mask=healthy)
    with pytest.raises(ValueError, match="inconsistent numbers of samples.*40.*39"):
        strict_detector().fit(healthy, groups=np.arange(39))


@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_constant_slices_work(value):
    X = np.full((8, 16, 16), value, np.float32)
    detector = strict_detector().fit(X)
    for kind in MAPS:
        detector.set_params(anomaly_map=kind).calibrate(X)
        maps = detector.predict_maps(X)
        assert np.isfinite(maps).all() and np.isfinite([detector.offset_, detector.map_threshold_]).all()
        assert (maps == maps[0]).all()  # all slices are the same
        assert len(set(detector.predict(X))) == 1
    assert value > 0 or not maps.any()


def test_one_slice_can_be_predicted(fitted, healthy):
    assert fitted.predict_maps(healthy[:1]).shape == (1, 16, 16)
    assert fitted.predict(healthy[:1]).shape == (1,)


@pytest.mark.parametrize("shape", [(10, 10), (17, 23), (3, 40), (16, 1), (1, 16)])
def test_any_size_works(shape):
    X = 0.05 + 0.9 * np.random.default_rng(0).random((10, *shape), dtype=np.float32)
    detector = strict_detector(mask_threshold=0.1).fit(X)
    for kind in MAPS:
        detector.set_params(anomaly_map=kind)
        maps, restored = detector.predict_maps(X), detector.restore(X)
        assert maps.shape == restored.shape == X.shape
        assert np.isfinite(maps).all() and np.isfinite(restored).all()
        assert maps.any(axis=(1, 2)).all()


def test_slices_of_a_million_pixels_work():
    X = np.zeros((2, 1000, 1000), np.float16)
    X[:, 100:900, 200:800] = 0.4 + 0.1 * np.random.default_rng(0).random((2, 800, 600))
    denoiser = replace(UNET_SIZES["tiny"], patch_size=8)  # attention over 16 x 16 tokens
    autoencoder = tiny_autoencoder(trainer=brief(), flip=False)
    detector = strict_detector(autoencoder=autoencoder, denoiser=denoiser, trainer=brief(), n_steps=1).fit(X)
    maps = detector.predict_maps(X)
    assert maps.shape == (2, 1000, 1000) and maps.any(axis=(1, 2)).all()
    assert not maps[X == 0].any()
    np.testing.assert_array_equal(detector.predict_maps(X[1:])[0], maps[1])


def test_unsigned_integers_have_the_range_of_their_type(healthy):
    X = (255 * healthy).astype(np.uint8)
    scaled = X.astype(np.float32) / np.float32(255)
    of_integers, of_floats = strict_detector().fit(X), strict_detector().fit(scaled)
    expected = of_floats.predict_maps(scaled)
    np.testing.assert_array_equal(of_integers.predict_maps(X), expected)
    np.testing.assert_array_equal(of_integers.predict_maps(scaled), expected)
    np.testing.assert_array_equal(of_integers.restore(X), of_floats.restore(scaled))


def test_a_given_intensity_range_scales(healthy, fitted):
    detector = strict_detector(intensity_range=(0, 4)).fit(4 * healthy)
    np.testing.assert_allclose(detector.predict_maps(4 * healthy), fitted.predict_maps(healthy), atol=1e-6)


@pytest.mark.parametrize("kind", ["float64", "bfloat16 tensor", "memmap", "list"])
def test_other_containers_and_types(kind, fitted, healthy, tmp_path):
    if kind == "float64":
        X = healthy.astype(kind)
    elif kind == "bfloat16 tensor":
        X = torch.from_numpy(healthy).to(torch.bfloat16)
    elif kind == "memmap":
        np.save(tmp_path / "X.npy", healthy)
        X = np.load(tmp_path / "X.npy", mmap_mode="r")
        assert not X.flags.writeable
    else:
        X = healthy.tolist()
    as_float32 = X.float().numpy() if kind == "bfloat16 tensor" else np.asarray(X, dtype=np.float32)
    expected = fitted.predict_maps(as_float32)
    np.testing.assert_array_equal(fitted.predict_maps(X), expected)
    refitted = strict_detector().fit(X)
    if np.array_equal(as_float32, healthy):
        np.testing.assert_array_equal(refitted.predict_maps(X), expected)
    if kind == "memmap":
        mask = np.load(tmp_path / "X.npy", mmap_mode="r") > 0
        np.testing.assert_array_equal(fitted.predict_maps(X, brain_mask=mask), expected)
        np.testing.assert_array_equal(np.load(tmp_path / "X.npy"), healthy)


@pytest.mark.parametrize("kind", ["image", "latent", "mask"])
def test_slices_without_brain_cost_nothing_and_change_nothing(kind, fitted, healthy, monkeypatch):
    detector = copy.deepcopy(fitted).set_params(anomaly_map=kind, mask_threshold=0.0, batch_size=4)
    X = np.zeros((11, *healthy.shape[1:]), np.float32)
    shown = [2, 3, 7, 8, 9]
    X[shown] = healthy[:5]
    expected = (
        detector.predict_maps(healthy[:5]),
        detector.score_samples(healthy[:5]),
        detector.restore(healthy[:5]),
    )
    passes = []
    encode = detector.autoencoder_.encode
    monkeypatch.setattr(detector.autoencoder_, "encode", lambda x: passes.append(len(x)) or encode(x))
    for result, of_shown in zip(
        (detector.predict_maps(X), detector.score_samples(X), detector.restore(X)),
        expected,
        strict=True,
    ):
        np.testing.assert_array_equal(result[shown], of_shown)
        assert not np.delete(result, shown, axis=0).any()
    assert passes == [4, 4] * 3
    passes.clear()
    assert not detector.predict_maps(0 * X).any() and not passes


def test_maps_of_a_large_memory_map_are_one_too(fitted, healthy, tmp_path, monkeypatch):
    np.save(tmp_path / "X.npy", healthy)
    X = np.load(tmp_path / "X.npy", mmap_mode="r")
    expected = fitted.predict_maps(healthy)
    assert type(fitted.predict_maps(X)) is np.ndarray  # small
    monkeypatch.setattr("madad.base.slice_stack.LARGE_RESULT", 1)
    assert type(fitted.predict_maps(healthy)) is np.ndarray
    maps = fitted.predict_maps(X)
    assert isinstance(maps, np.memmap)
    np.testing.assert_array_equal(maps, expected)
    maps[0] = 1  # an array like any other
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(maps))[1:], expected[1:])
    np.testing.assert_array_equal(fitted.predict_masks(X), expected >= np.float32(fitted.map_threshold_))
    assert list(tmp_path.iterdir()) == [tmp_path / "X.npy"]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_disk_without_room_for_maps_is_named(fitted, healthy, tmp_path, monkeypatch):
    np.save(tmp_path / "X.npy", healthy)
    monkeypatch.setattr("madad.base.slice_stack.LARGE_RESULT", 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"^TMPDIR must have room for \d+ bytes of maps, got .*No space left"):
        fitted.predict_maps(np.load(tmp_path / "X.npy", mmap_mode="r"))


def test_bfloat16_at_prediction_moves_maps_a_little(fitted, healthy):
    rough = copy.deepcopy(fitted).set_params(precision="bfloat16", anomaly_map="latent")
    exact = copy.deepcopy(fitted).set_params(anomaly_map="latent").predict_maps(healthy)
    maps = rough.predict_maps(healthy)
    assert maps.dtype == np.float32
    assert 0 < np.abs(maps - exact).max() and np.abs(maps - exact)[healthy > 0].mean() < 0.02
    with pytest.raises(ValueError, match=r"^precision must be .*got 'float8'"):
        rough.set_params(precision="float8").predict_maps(healthy)


def compile_and_compare(fitted, healthy):
    detector = copy.deepcopy(fitted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own compiler
        maps = detector.set_params(compile=True).predict_maps(healthy)
    np.testing.assert_allclose(maps, fitted.predict_maps(healthy), atol=1e-4)
    np.testing.assert_array_equal(
        detector.set_params(compile=False).predict_maps(healthy), fitted.predict_maps(healthy)
    )


def test_traced_networks_give_the_same_maps(fitted, healthy, monkeypatch):
    """All but the compiler itself, which takes half a minute."""
    graphs = []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=as_it_is))
    compile_and_compare(fitted, healthy)
    assert len(graphs) >= 2  # of the encoder and of the denoiser


@pytest.mark.evidence
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_networks_give_the_same_maps(fitted, healthy):
    compile_and_compare(fitted, healthy)


def test_booleans_are_images_of_zero_and_one(fitted, healthy):
    X = healthy > 0.4
    np.testing.assert_array_equal(fitted.predict_maps(X), fitted.predict_maps(X.astype(np.float32)))


def test_input_is_never_changed(healthy):
    X, mask = healthy.copy(), healthy > 0
    mask_before = mask.copy()
    detector = strict_detector(mask_threshold=0.0).fit(X, brain_mask=mask)
    detector.predict_maps(X, brain_mask=mask), detector.restore(X, brain_mask=mask)
    np.testing.assert_array_equal(X, healthy)
    np.testing.assert_array_equal(mask, mask_before)


def test_any_range_is_taken_from_the_data_if_asked_for(healthy, fitted):
    detector = tiny_detector().fit(300 * healthy - 100)
    assert detector.intensity_range_ == (-100.0, pytest.approx(300 * healthy.max() - 100))
    detector.predict_maps(400 * healthy)  # later data may exceed it


def test_progress_is_shown_on_request_only(healthy, capsys):
    strict_detector(verbose=False).fit(healthy).predict(healthy)
    quiet = capsys.readouterr()
    assert quiet.out == quiet.err == ""
    strict_detector(verbose=True).fit(healthy)
    shown = capsys.readouterr().err
    for stage in ("autoencoder", "denoiser"):
        bar = shown[shown.rindex(f"{stage}: 100%") :]
        assert "loss=" in bar.split("\r")[0]


def test_a_failed_fit_leaves_an_unfitted_estimator(healthy):
    detector = strict_detector(trainer=Trainer(0))
    with pytest.raises(ValueError, match=r"max_epochs must be positive, got 0"):
        detector.fit(healthy)
    with pytest.raises(NotFittedError):
        detector.predict_maps(healthy)


def test_a_shared_autoencoder_must_fit_the_slices(healthy):
    of_another_size = tiny_autoencoder(intensity_range=(0.0, 1.0)).fit(make_slices(8, 20, 20))
    with pytest.raises(ValueError, match=r"autoencoder must be fitted on slices of shape \(1, 16, 16\)"):
        strict_detector(autoencoder=FrozenEstimator(of_another_size)).fit(healthy)
    with pytest.raises(NotFittedError):
        strict_detector(autoencoder=FrozenEstimator(tiny_autoencoder())).fit(healthy)
    with pytest.raises(TypeError, match=r"FrozenEstimator\(LatentAutoencoder\).*got Trainer"):
        strict_detector(autoencoder=FrozenEstimator(Trainer())).fit(healthy)


def test_no_healthy_pixel_is_flagged_where_the_maps_are_exactly_zero(healthy):
    detector = strict_detector(anomaly_map="image", mask_threshold=1.0).fit(healthy)
    assert detector.map_threshold_ > 0
    assert not detector.predict_masks(healthy).any()


def test_a_failed_refit_leaves_no_mixture_of_two_models(healthy, copied):
    with pytest.raises(ValueError, match="mask_loss"):
        copied.set_params(mask_loss="l1").fit(healthy)
    with pytest.raises(NotFittedError):
        copied.predict_maps(healthy)


# Long trainings

MANY = make_slices(120)  # three batches per epoch for the autoencoder, seven for the denoiser
UNCUT = {"autoencoder": list(range(6)), "denoiser": list(range(14))}


def long_detector(checkpoint_dir=None, callbacks=(), every_s=0, **overrides):
    saving = {"checkpoint_dir": checkpoint_dir, "checkpoint_every_s": every_s, "callbacks": callbacks}
    return strict_detector(trainer=Trainer(2, batch_size=28, **saving), **overrides)


def learnt(detector):
    """All that a fit decides, as one array."""
    autoencoder = detector.autoencoder_
    values = [autoencoder.latent_shift_, autoencoder.latent_scale_, detector.predict_maps(MANY[:9])]
    values += [np.array([detector.offset_, detector.map_threshold_])]
    for network in (autoencoder.network_, detector.denoiser_):
        values += state_to_numpy(network).values()
    return np.concatenate([np.ravel(value).astype(np.float64) for value in values])


@pytest.fixture(scope="module")
def uncut():
    return learnt(long_detector().fit(MANY))


@pytest.fixture
def steps(monkeypatch):
    """The steps that were trained, by stage."""
    done, optimise = defaultdict(list), Trainer.optimise

    def noting(self, module, loss, *args, **kwargs):
        def noted(module, index, generator, step):
            done[kwargs["description"]].append(step)
            return loss(module, index, generator, step)

        return optimise(self, module, noted, *args, **kwargs)

    monkeypatch.setattr(Trainer, "optimise", noting)
    return done


KILLED = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("test_detector", sys.argv[1])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)

def kill(state):
    if (state.stage, state.step) == (sys.argv[3], int(sys.argv[4])):
        os.kill(os.getpid(), signal.SIGKILL)

tests.long_detector(sys.argv[2], [kill]).fit(tests.MANY)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("stage, step", [("autoencoder", 3), ("denoiser", 7)])
def test_a_fit_killed_in_either_stage_goes_on_to_bitwise_the_same_result(stage, step, tmp_path, uncut, steps):
    package = str(Path(madad.__file__).parents[1])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, __file__, str(tmp_path), stage, str(step)],
        env=os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    np.testing.assert_array_equal(learnt(long_detector(tmp_path).fit(MANY)), uncut)
    left = {stage: UNCUT[stage][step - 1 :]}  # the last checkpoint is of the step before
    assert steps == (UNCUT | left if stage == "autoencoder" else left)
    names = sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir())
    assert names == ["autoencoder", "denoiser"]
    steps.clear()
    np.testing.assert_array_equal(learnt(long_detector(tmp_path).fit(MANY)), uncut)
    assert not steps  # both stages were read back


def test_runs_that_share_a_directory_do_not_meet(tmp_path, uncut, steps):
    directory, mine = tmp_path / "runs", long_detector(tmp_path / "runs", every_s=1e9)
    np.testing.assert_array_equal(learnt(mine.fit(MANY)), uncut)
    steps.clear()
    expected = learnt(long_detector(corruption="gaussian").fit(MANY))
    others = [
        ({}, make_slices(120, seed=1)),
        ({}, np.flip(MANY, axis=0)),
        ({"random_state": 1}, MANY),
        ({"autoencoder": tiny_autoencoder(intensity_range=(0.0, 1.0), trainer=brief())}, MANY),
        ({"mask_loss_weight": 0.5}, MANY),
        ({"corruption": "gaussian"}, MANY),
    ]
    for changes, X in others:
        steps.clear()
        other = clone(mine).set_params(**changes).fit(X)
        assert steps["denoiser"] == UNCUT["denoiser"]
    np.testing.assert_array_equal(learnt(other), expected)
    names = Counter(path.name.rpartition("-")[0] for path in directory.iterdir())
    assert names == {"autoencoder": 5, "denoiser": 7}  # corruption and weight are the denoiser's alone
    steps.clear()
    np.testing.assert_array_equal(learnt(mine.fit(MANY)), uncut)
    assert not steps


STOP_AT = []  # a function's content is its name: it has the same hash when it stops nothing any more


def terminate_once(state):
    if (state.stage, state.step) in STOP_AT:
        STOP_AT.clear()
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("stage", "step", "checkpoints"),
    [("autoencoder", 3, True), ("denoiser", 7, True), ("denoiser", 7, False)],
)
def test_a_signal_leaves_a_usable_estimator_and_nothing_half_trained_in_memory(
    stage, step, checkpoints, tmp_path, uncut, steps
):
    STOP_AT[:] = [(stage, step)]
    directory = tmp_path / "runs" if checkpoints else None
    detector = long_detector(directory, (terminate_once,), memory=str(tmp_path / "memory"))
    with pytest.warns(TrainingStoppedWarning) as caught:
        maps = detector.fit(MANY).predict_maps(MANY)
    messages = [str(warning.message) for warning in caught]
    assert messages[0].startswith(f"{stage} was stopped by SIGTERM at step {step} of {len(UNCUT[stage])}. ")
    if stage == "autoencoder":
        assert messages[1].startswith("denoiser gets a single step, because SIGTERM came before it. ")
        assert steps == {"autoencoder": [0, 1, 2], "denoiser": [0]}
    assert len(messages) == (2 if stage == "autoencoder" else 1)
    assert np.isfinite(maps).all() and detector.predict(MANY).shape == (120,)
    names = sorted(path.name.rpartition("-")[0] for path in tmp_path.glob("runs/*"))
    assert names == (["autoencoder"] if stage == "autoencoder" else sorted(UNCUT)) * checkpoints
    steps.clear()
    np.testing.assert_array_equal(learnt(detector.fit(MANY)), uncut)
    left = {stage: UNCUT[stage][step * checkpoints :]}
    assert steps == (UNCUT | left if stage == "autoencoder" else left)
    steps.clear()
    np.testing.assert_array_equal(learnt(clone(detector).fit(MANY)), uncut)
    assert not steps


def full_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", ["full", "no directory"])
def test_a_disk_that_cannot_be_written_costs_one_warning_per_stage(kind, tmp_path, monkeypatch, uncut):
    directory = tmp_path / "runs"
    if kind == "full":
        monkeypatch.setattr(madad.training.checkpoint, "save_file", full_disk)
    else:
        directory.write_text("a file")
    with pytest.warns(UserWarning, match="checkpoint_dir must have room and be writable") as caught:
        detector = long_detector(directory).fit(MANY)
    assert len(caught) == 2
    np.testing.assert_array_equal(learnt(detector), uncut)


def test_no_subject_is_in_training_and_validation_of_either_stage(monkeypatch):
    subjects = np.repeat(np.arange(20), 6)
    X = MANY.copy()
    X[:, 8, 8] = (subjects + 1) / 32  # each slice says whose it is
    seen, optimise, cache = defaultdict(set), Trainer.optimise, madad.stages.latent_cache.cache_latents

    def noting_images(self, module, *args, **kwargs):
        def note(module, inputs):
            values = (inputs[0][:, 0, 8, 8] + 1) / 2
            seen["images", "training" if module.training else "validation"] |= set(values.tolist())

        if kwargs["description"] == "autoencoder":
            module.register_forward_pre_hook(note)
        return optimise(self, module, *args, **kwargs)

    def noting_latents(autoencoder, stack, **options):
        part = "validation" if ("latents", "training") in seen else "training"
        seen["latents", part] = set(stack.images(np.arange(len(stack)))[:, 0, 8, 8].tolist())
        return cache(autoencoder, stack, **options)

    monkeypatch.setattr(Trainer, "optimise", noting_images)
    monkeypatch.setattr(madad.stages.denoiser, "cache_latents", noting_latents)
    trainer = Trainer(9, validation_fraction=0.25)
    autoencoder = tiny_autoencoder(intensity_range=(0.0, 1.0), trainer=trainer, flip=False)
    detector = strict_detector(autoencoder=autoencoder, trainer=trainer).fit(X, groups=subjects)
    held_out = set(X[detector.calibration_rows_, 8, 8].tolist())
    for stage in ("images", "latents"):
        training, validation = seen[stage, "training"], seen[stage, "validation"]
        assert (len(training), len(validation), len(held_out)) == (12, 5, 3)
        assert training | validation | held_out == set(X[:, 8, 8].tolist())


class Recorder:
    """A callback with a memory, and with a lock if it is not to be copied."""

    def __init__(self, lock=None):
        self.stages, self.lock = [], lock

    def __call__(self, state):
        self.stages.append(state.stage)


def ignore(state):
    pass


def test_the_callbacks_that_were_given_are_called(tmp_path):
    recorder = Recorder(threading.Lock())
    detector = long_detector(tmp_path / "runs", [recorder, lambda state: None])
    detector.fit(MANY).save(tmp_path / "model")
    assert recorder.stages == ["autoencoder"] * 2 + ["denoiser"] * 2
    other = Recorder()
    own = tiny_autoencoder(intensity_range=(0.0, 1.0), trainer=Trainer(1, callbacks=[other]))
    strict_detector(autoencoder=own).fit(MANY).save(tmp_path / "own")
    assert other.stages == ["autoencoder"] and own.trainer.callbacks == [other]
    for model in ("model", "own"):
        loaded = MaskedDiffusionAnomalyDetector.load(tmp_path / model)
        trainers = [loaded.trainer, loaded.autoencoder_.trainer, getattr(loaded.autoencoder, "trainer", None)]
        for trainer in trainers:
            assert trainer is None or (trainer.callbacks, trainer.checkpoint_dir) == (None, None)


def test_a_detector_with_checkpoints_is_saved_cloned_and_pickled(tmp_path, steps):
    trainer = Trainer(1, checkpoint_dir=tmp_path / "runs", callbacks=(ignore,))
    own = tiny_autoencoder(intensity_range=(0.0, 1.0), trainer=clone(trainer))
    detector = strict_detector(autoencoder=own, trainer=trainer).fit(MANY)
    detector.save(tmp_path / "model")
    loaded = MaskedDiffusionAnomalyDetector.load(tmp_path / "model")
    for restored in (loaded, pickle.loads(pickle.dumps(detector))):
        np.testing.assert_array_equal(learnt(restored), learnt(detector))
    for trainer in (loaded.trainer, loaded.autoencoder.trainer, loaded.autoencoder_.trainer):
        assert (trainer.checkpoint_dir, trainer.callbacks) == (None, None)
    steps.clear()
    for copied in (
        clone(detector),
        pickle.loads(pickle.dumps(strict_detector(**detector.get_params(deep=False)))),
    ):
        assert copied.trainer.checkpoint_dir == tmp_path / "runs" and copied.trainer.callbacks == (ignore,)
        np.testing.assert_array_equal(learnt(copied.fit(MANY)), learnt(detector))
    assert not steps


class Ones:
    def fill(self, z0, generator):
        return torch.ones_like(z0)


@pytest.mark.parametrize("keeps", ["memory", "checkpoint_dir"])
def test_what_has_no_hash_is_refused_before_anything_is_trained(keeps, tmp_path, trainings):
    class Local(Ones):
        pass

    def squares(x_hat, x):
        return (x_hat - x).square().mean()

    autoencoder = tiny_autoencoder(perceptual=squares, trainer=Trainer(1), intensity_range=(0.0, 1.0))
    strict_detector(corruption=Local(), autoencoder=autoencoder, trainer=brief()).fit(MANY)
    trainings.clear()
    if keeps == "memory":
        kept = {"memory": str(tmp_path)}
        refused = [{"corruption": Local()}, {"trainer": Trainer(callbacks=[lambda state: None])}]
    else:
        kept = {"trainer": Trainer(1, checkpoint_dir=tmp_path)}
        autoencoder.set_params(trainer__checkpoint_dir=tmp_path)
        refused = [{"corruption": Local()}]
    for wrong in refused:
        with pytest.raises(
            TypeError, match="a parameter must be something that pickle can hold, got what it"
        ):
            strict_detector(**(kept | wrong)).fit(MANY)
    assert not trainings
    with pytest.raises(TypeError, match="something that pickle can hold.*squares"):
        strict_detector(**kept, autoencoder=autoencoder).fit(MANY)
    assert not trainings
    strict_detector(**kept, corruption=Ones()).fit(MANY)


@pytest.mark.parametrize("kind", ["path", "Memory", "nothing"])
def test_large_latents_are_in_a_file_under_memory(kind, tmp_path, monkeypatch, uncut):
    places, rows_on_disk = [], madad.stages.latent_cache.RowsOnDisk

    def noting(directory, *args):
        places.append(str(directory))
        return rows_on_disk(directory, *args)

    monkeypatch.setattr(madad.stages.latent_cache, "RowsOnDisk", noting)
    monkeypatch.setattr(madad.stages.latent_cache, "LARGE_CACHE", 0)
    memory = {"path": str(tmp_path), "Memory": joblib.Memory(tmp_path, verbose=0), "nothing": None}[kind]
    np.testing.assert_array_equal(learnt(long_detector(memory=memory).fit(MANY)), uncut)
    assert places == ([] if memory is None else [str(tmp_path)] * 3)


def test_memory_does_not_mind_where_checkpoints_are(tmp_path, trainings):
    for trainer in (
        Trainer(1),
        Trainer(1, checkpoint_dir=tmp_path / "runs", checkpoint_every_s=1, resume=False),
    ):
        strict_detector(memory=str(tmp_path / "memory"), trainer=trainer).fit(MANY)
    assert trainings == {"autoencoder": 1, "denoiser": 1}
    for changes in ({"batch_size": 16}, {"precision": "bfloat16"}, {"callbacks": (ignore,)}):
        trainings.clear()
        strict_detector(memory=str(tmp_path / "memory"), trainer=Trainer(1, **changes)).fit(MANY)
        assert trainings["denoiser"] == 1


def test_a_network_of_ones_own_is_found_in_memory(tmp_path, trainings):
    for seed, n_trained in ((0, 1), (0, 1), (1, 2)):
        with isolated_seed(seed):
            denoiser = OwnDenoiser()
        strict_detector(memory=str(tmp_path), denoiser=denoiser).fit(MANY)
        assert trainings == {"autoencoder": 1, "denoiser": n_trained}


FROM_A_FILE = """
import resource, sys
import numpy as np
import madad.stages.latent_cache
from madad import LatentAutoencoder, Trainer
from madad.nn import AutoencoderConfig
from madad.testing import tiny_detector

madad.stages.latent_cache.LARGE_CACHE = 0
path, side, directory = sys.argv[1], int(sys.argv[2]), sys.argv[3]
X = np.memmap(path, np.uint8, "r").reshape(-1, side, side)
trainer = Trainer(1, max_steps=3, checkpoint_dir=directory + "/runs", validation_fraction=0.1)
shape = {"base_channels": 4, "latent_channels": 2, "channel_multipliers": (1,), "n_res_blocks": 1}
size = AutoencoderConfig(**shape, patch_size=8, mid_attention=False, norm_groups=2, linear_shortcut=True)
detector = tiny_detector(
    autoencoder=LatentAutoencoder(size, trainer=trainer),
    trainer=trainer,
    n_steps=1,
    smoothing_px=0,
    memory=directory + "/memory",
    intensity_range=(0.0, 1.0),
)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

detector.fit(np.array(X[:600]))  # what torch and the batches take
before = peak()
detector.fit(X)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs the peak of a process")
def test_slices_in_a_file_never_come_into_memory_as_a_whole(tmp_path):
    side, mebibytes = 128, 96
    with open(tmp_path / "slices", "wb") as file:  # a brain here and there
        file.truncate(mebibytes * 2**20)
        for i, brain in enumerate((255 * make_slices(256, side, side)).astype(np.uint8)):
            file.seek(i * mebibytes * 2**12 // side**2 * side**2)
            file.write(brain.tobytes())
    package = str(Path(madad.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FROM_A_FILE, tmp_path / "slices", str(side), tmp_path],
        env=os.environ | {"PYTHONPATH": package},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.4 * mebibytes, done.stdout


def test_another_corruption_after_fit_teaches_a_fitted_network_nothing(healthy):
    detector = strict_detector(corruption="gaussian").fit(healthy)
    maps = detector.predict_maps(healthy)
    for corruption in ("mixture", "of another name"):
        np.testing.assert_array_equal(detector.set_params(corruption=corruption).predict_maps(healthy), maps)


def test_a_batch_of_no_slices_is_refused_at_fit_and_later(healthy, copied):
    copied.set_params(batch_size=0)
    for call in (copied.predict_maps, copied.fit):
        with pytest.raises(ValueError, match=r"batch_size must be a whole number above 0 or None, got"):
            call(healthy)


@pytest.mark.parametrize(
    ("corruption", "repaint", "expected"),
    [(None, None, 0.3), ("gaussian", None, 0.0), (GaussianNoise(), None, 0.0), ("gaussian", 0.2, 0.2)],
)
def test_only_a_network_that_saw_erased_latents_repaints_by_default(healthy, corruption, repaint, expected):
    detector = strict_detector(corruption=corruption, repaint=repaint).fit(healthy)
    assert detector.calibrated_with_["repaint"] == expected
