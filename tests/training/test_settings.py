import math
from dataclasses import asdict

import pytest

from madad.training import Trainer
from madad.training.settings import DEFAULTS, RULES, Settings


def test_each_parameter_of_a_trainer_has_a_default_that_its_rule_allows():
    assert set(DEFAULTS) == set(RULES) == set(Trainer().get_params())
    open_alone = [name for name, value in DEFAULTS.items() if not RULES[name].allows(value)]
    assert open_alone == ["checkpoint_dir"] and DEFAULTS["checkpoint_dir"] is None
    assert asdict(Settings()) == dict(DEFAULTS)


@pytest.mark.parametrize(
    ("given", "n_samples", "found"), [("auto", 100, 32), (5, 100, 5), (5, 3, 3), ("auto", 3, 3)]
)
def test_the_trainers_batch_comes_first_and_is_never_larger_than_the_data(given, n_samples, found):
    assert Settings(batch_size=given).batch_size_of(n_samples, 32) == found


@pytest.mark.parametrize(
    ("epochs", "steps", "found"), [(2, math.inf, 14), (2, 5, 5), (math.inf, 5, 5), (0.5, 99, 3.5)]
)
def test_the_smaller_bound_holds(epochs, steps, found):
    assert Settings(max_epochs=epochs, max_steps=steps).steps_of(7) == found


@pytest.mark.parametrize(("given", "found"), [("epoch", 7), (3, 3)])
def test_validations_follow_epochs_or_steps(given, found):
    assert Settings(validate_every=given).validation_period(7) == found
