import json
import math
from pathlib import Path

from madad import LatentAutoencoder, MaskedDiffusionAnomalyDetector, Trainer
from madad.saving.format_1 import from_format_1
from madad.saving.model_folder import from_json, to_json
from madad.training.trainer import DEFAULTS

GOLDEN = Path(__file__).parents[1] / "golden" / "model"
CLASSES = {"Trainer": Trainer, "LatentAutoencoder": LatentAutoencoder}


def of_format_1(value):
    return from_json(from_format_1(json.loads(json.dumps(to_json(value)))), CLASSES)


def test_the_trainers_of_a_saved_model_mean_what_they_meant():
    loaded = MaskedDiffusionAnomalyDetector.load(GOLDEN)
    stages = ((loaded.autoencoder, 300, "auto"), (loaded, 1500, 16))
    for estimator, steps, batch_size in stages:
        given = estimator.trainer.resolved(max_epochs=1, max_steps=7, batch_size=3, learning_rate=9.0)
        expected = {"max_epochs": 10**6, "max_steps": steps, "batch_size": batch_size, "learning_rate": 2e-3}
        assert given.get_params() == {**DEFAULTS, **expected}


def test_none_was_no_bound_no_clipping_and_no_patience():
    was = Trainer(2, max_steps=5)
    assert of_format_1({"trainers": [was]})["trainers"][0].get_params() == was.get_params() | {
        **{"max_time": math.inf, "gradient_clip": math.inf, "patience": math.inf},
        **{"batch_size": "auto", "validate_every": "epoch"},
    }


def test_an_autoencoder_without_a_trainer_had_the_defaults():
    assert of_format_1(LatentAutoencoder("tiny")).trainer.get_params() == dict(DEFAULTS)
    assert of_format_1({"trainer": None, "gamma": None}) == {"trainer": None, "gamma": None}
