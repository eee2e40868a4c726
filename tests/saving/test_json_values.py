"""Values and parts as JSON and back, and what is neither written nor read."""

import json
import math
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import pytest
import torch

from madad.diffusion import ErasedLatents, GaussianNoise, Mixture, SmoothOffset
from madad.nn import AutoencoderConfig, UNetConfig
from madad.saving import json_values
from madad.saving.json_values import PARTS, from_json, is_listed, to_json
from madad.stages.augmentation import SliceAugmentation
from madad.stages.autoencoder import LatentAutoencoder
from madad.training import Trainer


def through_json(value):
    return from_json(json.loads(json.dumps(to_json(value, "value"), allow_nan=False)))


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -3, 0.1, 1e-300, "text", "", math.inf, -math.inf, (), [], {}),
        (1, (2.5, (True, None)), ["a", ("b",)]),
        [(1, 2), [3, (4,)]],
        {"a": (1, 2), "b": {"c": [math.inf, (None,)]}},
    ],
    ids=str,
)
def test_plain_values_come_back_equal_and_of_their_type(value):
    back = through_json(value)
    assert back == value and repr(back) == repr(value)


def test_nan_comes_back():
    assert math.isnan(through_json((math.nan,))[0])


@pytest.mark.parametrize(
    "value, plain",
    [
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.float64("inf"), math.inf),
    ],
)
def test_numpys_scalars_come_back_as_plain_ones(value, plain):
    back = through_json(value)
    assert back == plain and type(back) is type(plain)


@pytest.mark.parametrize(
    "value",
    [
        AutoencoderConfig(image_channels=2, channel_multipliers=(1, 2)),
        UNetConfig(attention_levels=(), dropout=0.25),
        SliceAugmentation(n_copies=2, noise=0.01),
        Mixture((GaussianNoise(), SmoothOffset((0.5, 2.0), noise=0.1)), (0.25, 0.75)),
        Mixture((ErasedLatents(), Mixture())),
    ],
    ids=lambda value: type(value).__name__,
)
def test_parts_come_back_equal(value):
    back = through_json({"value": [value]})["value"]
    assert back == [value] and type(back[0]) is type(value)


def test_estimators_come_back_with_their_parameters_but_not_with_those_of_a_machine(tmp_path):
    value = LatentAutoencoder(
        AutoencoderConfig(latent_channels=3),
        init=tmp_path,
        trainer=Trainer(max_time=12.5, batch_size=np.int64(4), checkpoint_dir=tmp_path, callbacks=(print,)),
        intensity_range=(0.0, 255.0),
        device=torch.device("cpu"),
        random_state=np.random.RandomState(0),
        verbose=True,
    )
    back = through_json(value)
    assert type(back) is LatentAutoencoder and type(back.trainer) is Trainer
    plain, expected = back.get_params(), value.get_params()
    assert plain.pop("trainer") is not expected.pop("trainer")
    of_machine = {"device": "auto", "random_state": None, "verbose": False, "init": str(tmp_path)}
    of_run = {f"trainer__{name}": getattr(Trainer(), name) for name in ("checkpoint_dir", "callbacks")}
    assert plain == expected | of_machine | of_run


# What is refused


class Object:
    pass


@dataclass
class Own:
    """Describes itself, as a part would."""

    value: int = 1

    def to_config(self):
        return {"value": self.value}


class MyTrainer(Trainer):
    pass


@dataclass(frozen=True)
class MyNoise(GaussianNoise):
    pass


def namesake():
    class Trainer:
        def to_config(self):
            return {}

    return Trainer()


@pytest.mark.parametrize(
    "value",
    [
        *(Object(), {1, 2}, np.zeros(2), torch.device("cpu"), torch.zeros(1), Own, b"bytes", 1j, len),
        *(Own(), MyTrainer(), MyNoise(), namesake(), Trainer, lambda x_hat, x: 0),
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],  # workers must agree
)
def test_what_could_not_be_rebuilt_is_refused_by_name(value):
    for holder, name in (
        ({"deep": [(0, value)]}, r"deep\[0\]\[1\]"),
        ({"parameters": {"corruption": Mixture((GaussianNoise(), value))}}, r"corruption\.corruptions\[1\]"),
        ({"autoencoder": LatentAutoencoder(augmentation=value)}, r"autoencoder\.augmentation"),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be a number, text, .*joblib") as caught:
            to_json(holder, "")
        assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize("key", [1, None, ("a",), "__class__", "__tuple__", "__float__"])
def test_keys_that_would_come_back_as_something_else_are_refused(key):
    with pytest.raises(TypeError, match=r"^the keys of given\.inner must be texts .*got .*Rename it"):
        to_json({"inner": {key: 1}}, "given")


@pytest.mark.parametrize(
    "name", ["Own", "os.system", "Popen", "FrozenEstimator", "MaskedUNet", None, ["Trainer"]]
)
def test_a_class_that_is_not_listed_is_neither_imported_nor_built(name, monkeypatch):
    monkeypatch.setattr(json_values, "import_module", lambda module: pytest.fail(f"imported {module}"))
    content = [{"__class__": name, "fields": {"value": 1}}]
    with pytest.raises(
        ValueError, match=r"classes in config.json must be among \['AutoencoderConfig'"
    ) as caught:
        from_json({"deep": {"__tuple__": content}})
    assert f"got {name!r}" in str(caught.value)


@pytest.mark.parametrize("name", PARTS)
def test_each_listed_name_is_a_part_of_that_module(name):
    kind = getattr(import_module(PARTS[name]), name)
    assert is_listed(kind, PARTS)
    part = kind()
    assert type(through_json(part)) is kind
    assert through_json(part).to_config().keys() == part.to_config().keys()
