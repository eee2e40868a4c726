import json
import math
from dataclasses import fields

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from benchmarks.methods import (
    BOTTLENECK_STEPS,
    INFERENCE_ABLATIONS,
    METHODS,
    NOT_FOR_PAPER,
    QUICK_METHODS,
    SIZES,
    TRAINING_ABLATIONS,
    Conditions,
)
from benchmarks.tables import OURS, PAPERS, PUBLISHED
from madad import MaskedDiffusionAnomalyDetector, Trainer
from madad.base.map_detector import AnomalyMapDetector
from madad.datasets import make_brain_slices
from madad.diffusion import MaskedDDIM, make_repair
from madad.maps import MapRecipe
from madad.maps.differences import image_map
from madad.maps.smoothing import finish_map
from madad.presets import INFERENCE_KNOBS, PRESETS
from madad.stages.denoiser import OBJECTIVE_KNOBS

TABLES = {"methods": METHODS, "quick": QUICK_METHODS, "ablations": TRAINING_ABLATIONS}
ALL = [(table, name) for table, methods in TABLES.items() for name in methods]
UNTRAINED = ("intensity", "patch features")
# Maps, fills and losses; the networks and their training are those of the run.
THE_PAPERS = {knob: PRESETS["paper"][knob] for knob in (*OBJECTIVE_KNOBS, *INFERENCE_KNOBS)}


def trainers(detector) -> dict[str, Trainer]:
    """Trainers by stage; none where nothing is trained."""
    found = {"only": getattr(detector, "trainer", None)}
    if isinstance(detector, MaskedDiffusionAnomalyDetector):
        found = {"autoencoder": detector.autoencoder.trainer, "denoiser": detector.trainer}
    return {stage: trainer for stage, trainer in found.items() if trainer is not None}


def bounds(trainer):
    """What ends the training."""
    values = {name: getattr(trainer, name) for name in ("max_epochs", "max_steps", "max_time")}
    return {name: value for name, value in values.items() if value not in (None, math.inf)}


def effective(detector) -> dict:
    """Each parameter as it counts: its own value, or the preset's."""
    preset = PRESETS[detector.preset]
    own = detector.get_params(deep=False)
    return {name: preset.get(name) if value is None else value for name, value in own.items()}


@pytest.mark.parametrize("size", SIZES)
def test_each_method_is_an_unfitted_detector(size, tmp_path):
    conditions = Conditions(seed=3, size=size, precision="float32", device="cpu", checkpoints=tmp_path)
    for table, name in ALL:
        detector = TABLES[table][name](conditions)
        assert isinstance(detector, AnomalyMapDetector)
        with pytest.raises(NotFittedError):
            check_is_fitted(detector)
        assert (detector.random_state, detector.device, detector.verbose) == (3, "cpu", False), name
        assert repr(clone(detector)) == repr(detector)
        assert bool(trainers(detector)) != name.startswith(UNTRAINED), name
        if isinstance(detector, MaskedDiffusionAnomalyDetector):
            own = {"tiny": "tiny", "small": "auto", "paper": "kl-f8"}[size]
            changed = "factor" in name or table == "quick"
            assert (detector.autoencoder.size == own) != changed, name
            preset = "paper" if name == PAPERS else "tiny" if size == "tiny" else "small"
            assert detector.preset == preset, name
        if trainers(detector) and "denoiser" in detector.get_params():
            assert detector.denoiser == {"tiny": "tiny", "small": "small", "paper": "L"}[size], name


@pytest.mark.parametrize("size", SIZES)
def test_a_size_trains_all_methods_alike(size, tmp_path):
    conditions = Conditions(seed=3, size=size, precision="float32", checkpoints=tmp_path)
    usual = {"tiny": {"max_steps": 20}, "small": {"max_steps": 3000}, "paper": {"max_epochs": 300}}[size]
    for table, name in ALL:
        extent = {"max_steps": BOTTLENECK_STEPS} if size == "small" and name in ("AE", "VAE") else usual
        for trainer in trainers(TABLES[table][name](conditions)).values():
            trainer.check()
            assert bounds(trainer) == extent, name
            assert (trainer.precision, trainer.checkpoint_dir) == ("float32", tmp_path), name
            if size == "paper":
                assert trainer.batch_size == 96 and trainer.learning_rate <= 5e-4, name
            else:
                assert trainer.batch_size in (16, 32) and trainer.learning_rate in (1e-3, 2e-3), name


@pytest.mark.parametrize("size", SIZES)
def test_a_budget_of_time_is_the_same_for_all(size):
    for table, name in ALL:
        detector = TABLES[table][name](Conditions(seed=0, budget_s=100.0, size=size))
        stages = {stage: bounds(trainer) for stage, trainer in trainers(detector).items()}
        if isinstance(detector, MaskedDiffusionAnomalyDetector):
            assert stages == {"autoencoder": {"max_time": 100.0}, "denoiser": {"max_time": 100.0}}, name
            assert detector.max_time == 100.0, name  # for both together
        elif stages:
            capped = {"max_steps": BOTTLENECK_STEPS} if size == "small" and name in ("AE", "VAE") else {}
            assert stages == {"only": {"max_time": 100.0} | capped}, name


@pytest.mark.parametrize(("steps", "split"), [(10, (1, 9)), (1, (1, 1))])
def test_steps_are_the_same_for_all(steps, split):
    for size in SIZES:
        for table, name in ALL:
            detector = TABLES[table][name](Conditions(seed=0, steps=steps, size=size))
            stages = {stage: bounds(trainer) for stage, trainer in trainers(detector).items()}
            if isinstance(detector, MaskedDiffusionAnomalyDetector):
                autoencoder, denoiser = ({"max_steps": n} for n in split)
                assert stages == {"autoencoder": autoencoder, "denoiser": denoiser}, name
            elif stages:
                assert stages == {"only": {"max_steps": steps}}, name


def test_the_papers_method_keeps_the_papers_choices():
    for size in SIZES:
        detector = METHODS[PAPERS](Conditions(seed=0, size=size))
        values = effective(detector)
        assert {name: values[name] for name in THE_PAPERS} == THE_PAPERS
        ours = effective(METHODS[OURS](Conditions(seed=0, size=size)))
        assert {name for name in THE_PAPERS if ours[name] != THE_PAPERS[name]} >= {
            "corruption",
            "mask_shape",
            "repaint",
            "map_difference",
        }


def test_rows_of_inference_parameters_need_no_training():
    for name, parameters in INFERENCE_ABLATIONS.items():
        assert parameters and set(parameters) <= set(INFERENCE_KNOBS), name
        for base, preset in ((OURS, "small"), (PAPERS, "paper")):
            if base == OURS or name not in NOT_FOR_PAPER:
                knobs = {knob: PRESETS[preset][knob] for knob in INFERENCE_KNOBS} | parameters
                repair = {field.name: knobs[field.name] for field in fields(MaskedDDIM)}
                make_repair(MaskedDDIM(**repair), knobs["repaint"])
                MapRecipe(**{field.name: knobs[field.name] for field in fields(MapRecipe)})
                assert knobs["n_steps"] <= PRESETS[preset]["n_timesteps"], name


def test_each_row_of_inference_parameters_is_another_one():
    rows = [json.dumps(parameters, sort_keys=True) for parameters in INFERENCE_ABLATIONS.values()]
    assert len(set(rows)) == len(rows)
    assert set(PUBLISHED) <= set(INFERENCE_ABLATIONS) and set(NOT_FOR_PAPER) <= set(INFERENCE_ABLATIONS)


def test_rows_of_training_parameters_change_what_is_learnt():
    ours = effective(METHODS[OURS](Conditions(seed=0)))
    for name, method in TRAINING_ABLATIONS.items():
        row = effective(method(Conditions(seed=0)))
        changed = {parameter for parameter in row if repr(row[parameter]) != repr(ours[parameter])}
        assert changed and not changed & set(INFERENCE_KNOBS), name
        assert name not in INFERENCE_ABLATIONS and name not in METHODS, name
        assert changed == {"autoencoder"} if "autoencoder" in name else "autoencoder" not in changed, name


def test_our_map_of_another_method_is_made_of_its_restored_slices(tmp_path):
    slices = make_brain_slices(12, size=32, lesions=0.5, random_state=0)
    images, brain = slices.images, slices.brain_masks
    detectors = [METHODS[name](Conditions(seed=0, steps=2, size="tiny")) for name in ("DAE", "DAE, our map")]
    plain, ours = (detector.fit(images, brain_mask=brain) for detector in detectors)
    restored = ours.restore(images, brain_mask=brain)
    np.testing.assert_array_equal(restored, plain.restore(images, brain_mask=brain))  # the same training
    raw = image_map(
        2 * restored[:, None] - 1,
        2 * images[:, None] - 1,
        gamma=PRESETS["small"]["gamma"],
        difference=PRESETS["small"]["map_difference"],
        brain_mask=brain,
    )
    maps = ours.predict_maps(images, brain_mask=brain)
    np.testing.assert_allclose(maps, finish_map(raw, brain, None, images[:, None]), atol=1e-5)
    assert np.abs(maps - plain.predict_maps(images, brain_mask=brain)).max() > 0.01
    ours.save(tmp_path / "model")
    loaded = type(ours).load(tmp_path / "model")
    np.testing.assert_array_equal(loaded.predict_maps(images, brain_mask=brain), maps)
