import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import madad.saving.model_folder
from madad.saving.model_folder import (
    CALIBRATION,
    CARD,
    CONFIG,
    FORMAT_VERSION,
    README,
    read_card,
    read_config,
    read_model,
    write_card,
    write_model,
)

TENSORS = {
    "first": {
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "count": np.array(3),
        "none": np.zeros((0, 2)),
    },
    "second": {"w": np.arange(6.0).reshape(2, 3).T},  # not contiguous
}


# Writing


@pytest.fixture
def model(tmp_path) -> Path:
    path = tmp_path / "model"
    write_model(path, {"a": 1}, {"threshold": 0.5}, TENSORS)
    return path


def contents(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_model_comes_back(model):
    config, calibration, tensors = read_model(model, ("first", "second"))
    assert config == {"format": "madad", "format_version": FORMAT_VERSION, "a": 1}
    assert calibration == {"threshold": 0.5}
    for name, arrays in TENSORS.items():
        assert set(tensors[name]) == set(arrays)
        for key, value in arrays.items():
            np.testing.assert_array_equal(tensors[name][key], value, strict=True)


def test_a_model_is_these_files_and_nothing_else(model, tmp_path):
    assert set(contents(tmp_path)) == {
        f"model/{name}" for name in (CONFIG, CALIBRATION, "first.safetensors", "second.safetensors")
    }
    assert set(load_file(model / "first.safetensors")) == {"w", "count", "none"}


def test_a_network_alone_has_no_calibration(tmp_path):
    write_model(tmp_path / "model", {"class": "Network"}, None, TENSORS)
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        CONFIG,
        "first.safetensors",
        "second.safetensors",
    }
    assert read_config(tmp_path / "model")["class"] == "Network"
    with pytest.raises(FileNotFoundError, match="calibration.json must exist, got no such file"):
        read_model(tmp_path / "model", ("first",))
    write_model(tmp_path / "model", {}, {"threshold": 0.5}, TENSORS)
    assert read_model(tmp_path / "model", ("first",))[1] == {"threshold": 0.5}
    write_model(tmp_path / "model", {}, None, TENSORS)
    assert not (tmp_path / "model" / CALIBRATION).exists()


def test_a_card_is_written_beside_it_for_programs_and_people(model, tmp_path):
    card = {"contrasts": ["T1"], "threshold": None}
    write_model(model, {}, {}, TENSORS, card=card, readme="# Größe\n")
    assert read_card(model) == card
    assert (model / README).read_text(encoding="utf-8") == "# Größe\n"
    assert {CARD, README} < {path.name for path in model.iterdir()}
    write_model(model, {"a": 2}, {}, TENSORS, card={}, readme="other")  # is replaced like any model
    assert read_card(model) == {} and (model / README).read_text() == "other"
    write_model(model, {}, {}, TENSORS)
    assert not {CARD, README} & {path.name for path in model.iterdir()}
    with pytest.raises(FileNotFoundError, match="model/card.json must exist, got no such file"):
        read_card(model)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_tensors_may_be_read_by_whom_the_config_may(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_model(tmp_path / "model", {}, {}, TENSORS, card={}, readme="")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_what_a_model_is_is_read_without_its_other_files(model):
    for path in model.iterdir():
        path.unlink() if path.name != CONFIG else None
    assert read_config(str(model)) == {"format": "madad", "format_version": FORMAT_VERSION, "a": 1}


def test_folders_on_the_way_are_made_and_empty_ones_used(tmp_path):
    write_model(tmp_path / "a" / "b" / "model", {}, {}, TENSORS)
    (tmp_path / "empty").mkdir()
    write_model(str(tmp_path / "empty"), {}, {}, TENSORS)
    assert contents(tmp_path / "a" / "b" / "model") == contents(tmp_path / "empty")


def test_a_model_is_replaced_whole(model, tmp_path):
    write_model(model, {"a": 2}, {"threshold": 0.7}, {"first": TENSORS["first"]})
    assert set(contents(tmp_path)) == {f"model/{name}" for name in (CONFIG, CALIBRATION, "first.safetensors")}
    config, calibration, _ = read_model(model, ("first",))
    assert config["a"] == 2 and calibration == {"threshold": 0.7}


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["save_file", "rename"])
def test_an_interrupted_call_leaves_what_was_there(model, tmp_path, monkeypatch, existed, error, where):
    target = model if existed else tmp_path / "other"
    before, rename = contents(tmp_path), Path.rename

    def fail(*arguments):
        raise error

    def fail_at_last(self, goal):
        return fail() if self.name == "new" else rename(self, goal)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        if where == "rename":
            patch.setattr(Path, "rename", fail_at_last)
        else:
            patch.setattr(madad.saving.model_folder, "save_file", fail)
        write_model(target, {"a": 2}, {}, TENSORS)
    assert contents(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"], "no temporary folder is left"


def test_a_model_that_cannot_be_put_back_is_kept_and_named(model, tmp_path, monkeypatch):
    before, rename = contents(model), Path.rename

    def fail_but_first(self, goal):
        if self.name in ("new", "old"):
            raise OSError("the disk is gone")
        return rename(self, goal)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone") as error:
        patch.setattr(Path, "rename", fail_but_first)
        write_model(model, {"a": 2}, {}, TENSORS)
    (kept,) = tmp_path.glob(".model-*/old")
    assert contents(kept) == before
    assert error.value.__notes__ == [f"The model that was in {model} is in {kept} now. Move it back."]


def test_a_card_is_replaced_alone(model):
    write_model(model, {"a": 1}, {}, TENSORS, card={"n": 1}, readme="one")
    before = {name: entry for name, entry in contents(model).items() if name not in (CARD, README)}
    times = {path.name: path.stat().st_mtime_ns for path in model.iterdir() if path.name in before}
    write_card(model, {"n": 2}, "two")
    assert read_card(model) == {"n": 2} and (model / README).read_text() == "two"
    assert {name: entry for name, entry in contents(model).items() if name in before} == before
    assert {path.name: path.stat().st_mtime_ns for path in model.iterdir() if path.name in before} == times
    with pytest.raises(FileNotFoundError, match="path must be a model directory"):
        write_card(model / "nowhere", {}, "")


def test_what_json_cannot_hold_leaves_what_was_there(model, tmp_path):
    before = contents(tmp_path)
    for config in ({"a": math.nan}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_model(model, config, {}, TENSORS)
    assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


def make_file(path):
    path.write_text("a file")


def make_folder(path, **files):
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)


OURS = '{"format": "madad", "format_version": 1}'


@pytest.mark.parametrize(
    "make",
    [
        make_file,
        lambda path: make_folder(path, notes_txt="precious"),
        lambda path: make_folder(path, config_json='{"format": "other"}'),
        lambda path: make_folder(path, config_json="{ damaged"),
        lambda path: make_folder(path, config_json="[1]"),
        lambda path: make_folder(path, config_json=OURS, notes_txt="precious"),
        lambda path: make_folder(path, calibration_json="{}"),
        lambda path: make_folder(path, card_json="{}", README_md="precious"),
    ],
    ids=[
        "file",
        "folder",
        "foreign config",
        "damaged config",
        "list",
        "model and notes",
        "no config",
        "card",
    ],
)
def test_what_is_no_model_is_never_overwritten(tmp_path, make):
    path = tmp_path / "mine"
    make(path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match="path must be new, empty or a madad model, got .*mine"):
        write_model(path, {}, {}, TENSORS)
    assert contents(tmp_path) == before


# Reading what is damaged


def change_config(model, **changes):
    config = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "make", [lambda path: None, make_file, make_folder], ids=["nothing", "file", "empty"]
)
def test_no_model(tmp_path, make):
    make(tmp_path / "missing")
    message = r"path must be a model directory with config\.json, got .*missing\. Give what save"
    with pytest.raises(FileNotFoundError, match=message):
        read_model(tmp_path / "missing", ("first",))


@pytest.mark.parametrize("name", [CALIBRATION, "first.safetensors", "second.safetensors"])
def test_a_missing_file(model, name):
    (model / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"model/{name} must exist, got no such file"):
        read_model(model, ("first", "second"))


@pytest.mark.parametrize("name", [CONFIG, CALIBRATION])
@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff\xfe", lambda b: b"[" * 99999]
)
def test_damaged_json(model, name, damage):
    (model / name).write_bytes(damage((model / name).read_bytes()))
    with pytest.raises(ValueError, match=f"model/{name} must be JSON, got a damaged file"):
        read_model(model, ("first", "second"))


@pytest.mark.parametrize("name", [CONFIG, CALIBRATION])
@pytest.mark.parametrize(
    "text, kind", [("[1, 2]", "list"), ('"a"', "str"), ("null", "NoneType"), ("3", "int")]
)
def test_json_that_is_no_object(model, name, text, kind):
    (model / name).write_text(text)
    with pytest.raises(ValueError, match=f"model/{name} must hold a JSON object, got {kind}"):
        read_model(model, ("first", "second"))


@pytest.mark.parametrize("value", ["diffusers", None, 1])
def test_a_foreign_format(model, value):
    change_config(model, format=value)
    with pytest.raises(ValueError, match=f"config.json must describe a madad model, got format {value!r}"):
        read_model(model, ("first", "second"))


@pytest.mark.parametrize("value", [FORMAT_VERSION + 1, 99, "1", None, 1.5])
def test_a_newer_format(model, value):
    change_config(model, format_version=value)
    message = (
        f"format_version must be at most {FORMAT_VERSION}, got {value!r} in .*model/config.json. Upgrade"
    )
    with pytest.raises(ValueError, match=message):
        read_model(model, ("first", "second"))


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-5], lambda b: b[:20], lambda b: b"", lambda b: b"PK\x03\x04" * 20, lambda b: b + b"more"],
)
def test_damaged_tensors(model, name, damage):
    path = model / f"{name}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        ValueError, match=f"model/{name}.safetensors must be a safetensors file, got a damaged"
    ):
        read_model(model, ("first", "second"))
