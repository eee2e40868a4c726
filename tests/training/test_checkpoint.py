"""The file of a training: its name, its format, and what happens where it cannot be read or written."""

import json
import os
import sys

import pytest
from safetensors import safe_open
from tasks import HERE, Interruption, N, everything, interrupt, line, own_line, same, seeded, squared_error
from torch import nn

from madad.training import Trainer


def test_a_checkpoint_is_tensors_and_json(tmp_path, uninterrupted):
    with pytest.raises(Interruption):
        everything(tmp_path, at=[10], happens=interrupt)
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("training-") and len(path.stem) == len("training-") + 12
    with safe_open(path, "pt") as file:
        facts, names = json.loads(file.metadata()["facts"]), set(file.keys())
    assert (facts["step"], facts["finished"], facts["format_version"]) == (10, False, 1)
    assert facts["history"] != [] and set(facts["totals"]) >= {"loss", "term", "plain"}
    assert names >= {
        "module/0.weight",
        "module/1.running_mean",
        "rival/weight",
        "order",
        "best/1.running_var",
    }
    assert names >= {"average/0", "module.optimiser/0/exp_avg", "rival.optimiser/1/step", "random/generator"}


# Names


def fit_line(directory, trainer=None, module=None, n=N, seed=0, **options):
    settings = {"checkpoint_dir": directory, "batch_size": 8} | (trainer or {})
    Trainer(2, **settings).optimise(module or line(), squared_error, n, generator=seeded(seed), **options)


def biased():
    module = line()
    nn.init.ones_(module.bias)
    return module


def frozen():
    module = line()
    module.bias.requires_grad_(False)
    return module


def with_rival(rival):
    return {"rival": rival, "rival_loss": own_line}


@pytest.mark.parametrize(
    "change",
    [
        {"trainer": {"learning_rate": 0.1}},
        {"trainer": {"max_time": 100.0}},
        {"trainer": {"batch_size": "auto"}, "batch_size": 9},
        {"n": 20},
        {"seed": 1},
        {"module": biased()},
        {"module": frozen()},
        {"description": "other"},
        {"identity": "other data"},
        with_rival(line()),
        with_rival(biased()),
        {"validation_loss": squared_error, "n_validation": 3},
    ],
)
def test_runs_that_differ_have_different_files(tmp_path, change):
    fit_line(tmp_path)
    fit_line(tmp_path, **with_rival(nn.Linear(3, 1)))
    fit_line(tmp_path, **change)
    assert len(list(tmp_path.iterdir())) == 3


def test_what_does_not_decide_the_result_does_not_name_the_file(tmp_path):
    fit_line(tmp_path)
    for trainer in ({"checkpoint_every_s": 7}, {"callbacks": [print]}, {"resume": False}):
        fit_line(tmp_path, trainer)
        fit_line(tmp_path / "elsewhere", trainer)
    names = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert len(names) == 1


def test_a_description_may_be_no_file_name(tmp_path):
    fit_line(tmp_path, description="stage 1/2: grüße")
    assert [path.name[:-24] for path in tmp_path.iterdir()] == ["stage_1_2_grüße-"]


def test_another_runs_file_is_not_taken(tmp_path):
    fit_line(tmp_path)
    fit_line(tmp_path, seed=1)
    first, second = tmp_path.iterdir()
    first.write_bytes(second.read_bytes())
    with pytest.warns(UserWarning, match="belongs to another run"):
        fit_line(tmp_path)
        fit_line(tmp_path, seed=1)


# Damage


def damage(path, kind):
    content = path.read_bytes()
    if kind == "empty":
        content = b""
    elif kind == "no checkpoint":
        content = b"\x02\0\0\0\0\0\0\0{}"
    elif isinstance(kind, float):
        content = content[: int(kind * len(content))]
    else:
        place = kind % len(content)
        content = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["empty", "no checkpoint", 0.99, 700])
def test_a_damaged_checkpoint_is_named_and_training_starts_anew(tmp_path, uninterrupted, kind):
    with pytest.raises(Interruption):
        everything(tmp_path, at=[9], happens=interrupt)
    (path,) = tmp_path.iterdir()
    damage(path, kind)
    seen = []
    with pytest.warns(UserWarning, match=r"safetensors must be a checkpoint.*damaged.*starts anew") as caught:
        assert same(everything(tmp_path, seen), uninterrupted)
    assert seen == list(range(16)) and len(caught) == 1 and str(path) in str(caught[0].message)
    assert caught[0].filename == HERE
    assert same(everything(tmp_path), uninterrupted)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_disk_that_fails_ends_no_training(tmp_path, monkeypatch, uninterrupted, broken):
    def fail(*args):
        raise OSError(28, "No space left on device")

    with pytest.warns(UserWarning, match=r"^checkpoint_dir must .*No space left") as caught:
        assert same(
            everything(tmp_path, at=[6], happens=lambda: monkeypatch.setattr(os, broken, fail)), uninterrupted
        )
    assert len(caught) == 1 and str(tmp_path) in str(caught[0].message) and caught[0].filename == HERE
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    seen = []
    assert same(everything(tmp_path, seen), uninterrupted) and seen[0] == 6


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, uninterrupted):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))

    try:
        with pytest.warns(UserWarning, match=r"^checkpoint_dir must .*File too large") as caught:
            result = everything(tmp_path, at=[6], happens=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same(result, uninterrupted) and len(caught) == 1 and len(list(tmp_path.iterdir())) == 1
    seen = []
    assert same(everything(tmp_path, seen), uninterrupted) and seen[0] == 6


def test_a_directory_that_cannot_be_made_ends_no_training(tmp_path, uninterrupted):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="^checkpoint_dir must ") as caught:
        assert same(everything(tmp_path / "file" / "below"), uninterrupted)
    assert len(caught) == 1


def test_what_a_killed_writer_left_is_cleared_away(tmp_path):
    fit_line(tmp_path)
    (path,) = tmp_path.iterdir()
    leftover = tmp_path / f".{path.name}-abc"
    leftover.mkdir()
    (leftover / "new").write_bytes(b"half")
    fit_line(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
