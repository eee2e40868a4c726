"""Files from strangers: nothing in them runs, and what cannot be read is one clear error."""

import builtins
import io
import os
import pickle
import subprocess
import sys
import types
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from madad.pretrained.unpickling import InertStub, read_pickled_tensors

SAVE = {
    "zip": lambda content, path: torch.save(content, path),
    "legacy": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
}
both_formats = pytest.mark.parametrize("save", SAVE.values(), ids=SAVE)


class Hostile:
    """Calls `function` with `arguments` when unpickled the usual way."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker):
    touch = f"open({str(marker)!r}, 'w').close()"
    return {
        "system": Hostile(os.system, f"touch {marker}"),
        "eval": Hostile(builtins.eval, touch),
        "exec": Hostile(builtins.exec, touch),
        "open": Hostile(builtins.open, str(marker), "w"),
        "subprocess": Hostile(subprocess.check_call, ["touch", str(marker)]),
        "getattr": Hostile(getattr, Hostile(__import__, "os"), "system"),
        "torch.load": Hostile(torch.load, str(marker) + ".pt"),
        "torch.hub": Hostile(torch.hub.load_state_dict_from_url, "file:///nowhere"),
        "torch.save": Hostile(torch.save, {}, str(marker)),
    }


ATTACKS = list(attacks(""))


@pytest.mark.parametrize(
    "attack, save, beside_tensors",
    [
        *((attack, "zip", True) for attack in ATTACKS),
        *[("eval", "zip", False), ("eval", "legacy", True), ("eval", "legacy", False)],
    ],
)
def test_hostile_checkpoint_runs_nothing(tmp_path, attack, save, beside_tensors):
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    hostile = attacks(marker)[attack]
    weight = torch.arange(3.0)
    SAVE[save]({"weight": weight, "extra": hostile} if beside_tensors else hostile, path)
    if beside_tensors:
        tensors = read_pickled_tensors(path)
        assert list(tensors) == ["weight"] and torch.equal(tensors["weight"], weight)
    else:
        with pytest.raises(ValueError, match="weights.pt must hold named tensors, got none"):
            read_pickled_tensors(path)
    assert not marker.exists() and sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "attack, protocol",
    [
        *((attack, pickle.HIGHEST_PROTOCOL) for attack in ATTACKS),
        *(("system", protocol) for protocol in range(pickle.HIGHEST_PROTOCOL)),
    ],
)
def test_hostile_bare_pickle_runs_nothing(tmp_path, attack, protocol):
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(attacks(marker)[attack], protocol))
    with pytest.raises(ValueError, match="weights.pt must be a PyTorch checkpoint, got a file that cannot"):
        read_pickled_tensors(path)
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path):
    for name in ("system", "eval", "subprocess"):
        marker = tmp_path / name
        pickle.loads(pickle.dumps(attacks(marker)[name]))
        assert marker.exists()


class HostileState:
    """Its class is unknown to the reader; its state and items want to change what they are given to."""

    def __init__(self, function):
        self.function = function

    def __reduce__(self):
        return self.function, (), {"__call__": print}, iter([1, 2]), iter([("a", 1)])


def test_stub_takes_state_items_and_calls_and_keeps_nothing(tmp_path):
    torch.save({"weight": torch.ones(1), "extra": HostileState(types.SimpleNamespace)}, tmp_path / "a.pt")
    assert list(read_pickled_tensors(tmp_path / "a.pt")) == ["weight"]
    stub = InertStub(1, key=2)
    stub.__setstate__(({"_parameters": {}}, {"__class__": int}))
    stub.__setstate__({"__wrapped__": print, "dump_patches": True, "_modules": 3})
    stub.append(1)
    stub.extend([1])
    stub.add(1)
    stub["key"] = 1
    assert isinstance(stub("anything"), InertStub) and vars(stub) == {}


def test_pickle_cannot_change_what_rebuilds_tensors(tmp_path):
    """BUILD with a pair of states sets attributes of whatever is on the stack, functions of torch too."""
    path = tmp_path / "a.pt"
    bare = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
        b"N}X\x08\x00\x00\x00tamperedI1\ns\x86b."  # (None, {"tampered": 1}), BUILD
    )
    path.write_bytes(bare)
    with pytest.raises(ValueError, match="cannot be read"):
        read_pickled_tensors(path)
    assert not hasattr(torch._utils._rebuild_tensor_v2, "tampered")


def test_source_of_legacy_classes_is_neither_compared_nor_written(tmp_path, monkeypatch):
    """torch writes the difference of a class' source as a .patch file if the pickled class asks for it."""
    monkeypatch.chdir(tmp_path)

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            return ("module", Patching(), "file.py", "class A: pass") if item == "class" else None

    class Patching:
        def __reduce__(self):
            state = {"dump_patches": True, "__name__": "marker", "__wrapped__": Hostile}
            return types.SimpleNamespace, (), state

    buffer = io.BytesIO()
    for item in (MAGIC_NUMBER, PROTOCOL_VERSION, {"little_endian": True}):
        pickle.dump(item, buffer, protocol=2)
    Pickler(buffer, protocol=2).dump(["class"])
    pickle.dump([], buffer, protocol=2)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="must hold named tensors"):
        read_pickled_tensors(tmp_path / "a.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


# Honest files


class Unknown(nn.Module):
    """A module whose class the reader does not import."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(2, 3, 1), nn.Sequential(nn.BatchNorm2d(3), nn.Linear(2, 2))])
        self.scale = nn.Parameter(torch.randn(2))
        self.register_buffer("coarse", torch.randn(3).half())
        self.register_parameter("absent", None)
        self.activation = nn.functional.silu
        self.options = {"classes": [nn.Linear, Unknown], "set": {1, 2}}


@pytest.fixture
def module_file(tmp_path, monkeypatch):
    """A module whose class can no longer be imported once it is saved."""

    def write(save, wrap=lambda module: module):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = Unknown()
        state = module.state_dict()
        gone = types.ModuleType("gone_package")
        gone.Unknown = Unknown
        monkeypatch.setitem(sys.modules, "gone_package", gone)
        monkeypatch.setattr(Unknown, "__module__", "gone_package")
        with warnings.catch_warnings():
            # Without its source file torch cannot save the source beside the class, and says so.
            warnings.filterwarnings("ignore", "Couldn't retrieve source code", UserWarning)
            save(wrap(module), tmp_path / "module.pt")
        monkeypatch.delitem(sys.modules, "gone_package")
        return state, tmp_path / "module.pt"

    return write


@both_formats
@pytest.mark.parametrize(
    "wrap",
    [
        lambda module: module,
        lambda module: {"model": module, "epoch": 3},
        lambda module: {"epoch": 3, "anything": {"deeper": module}},
        lambda module: {"optimizer": Hostile(print), "ema": module, "model": nn.Linear(1, 1)},
    ],
)
def test_whole_module_is_read_to_its_tensors(module_file, save, wrap):
    expected, path = module_file(save, wrap)
    tensors = read_pickled_tensors(path)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value)
        assert not tensors[name].requires_grad


@both_formats
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {}, "ema": state, "args": types.SimpleNamespace(lr=1.0)},
        lambda state: OrderedDict(trainer={"state_dict": state}),
    ],
)
def test_state_dicts_and_checkpoints_around_them(tmp_path, save, wrap):
    state = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).state_dict()
    save(wrap(state), tmp_path / "state.ckpt")
    tensors = read_pickled_tensors(tmp_path / "state.ckpt")
    assert list(tensors) == list(state)
    assert all(torch.equal(tensors[name], value) for name, value in state.items())


def test_moving_averages_come_before_the_raw_weights(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "ema": {"a": torch.ones(1)}}, tmp_path / "a.pt")
    assert read_pickled_tensors(tmp_path / "a.pt")["a"] == 1


# Files that cannot be read


def test_contents_that_contain_themselves_or_grow_exponentially_end(tmp_path):
    itself = {}
    itself["model"] = itself
    doubled = {}
    for _ in range(60):
        doubled = {"a": doubled, "b": doubled}
    for content in (itself, doubled, {"a": [1, 2]}, [torch.ones(1)], 3):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(ValueError, match="a.pt must hold named tensors, got none"):
            read_pickled_tensors(tmp_path / "a.pt")


def test_modules_that_contain_themselves_end(module_file):
    def wrap(module):
        module.blocks.append(module)
        module.blocks.append(module)
        return module

    _, path = module_file(SAVE["zip"], wrap)
    assert "scale" in read_pickled_tensors(path)


@both_formats
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_truncated_files_are_named(tmp_path, save, share):
    path = tmp_path / "weights.pt"
    save({"weight": torch.randn(50, 50)}, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="weights.pt must be a PyTorch checkpoint, got a file that cannot"):
        read_pickled_tensors(path)


@pytest.mark.parametrize(
    "content", [b"not a checkpoint", b"PK\x03\x04" + bytes(100), b"\x80\x02", bytes(600)]
)
def test_foreign_files_are_named(tmp_path, content):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ValueError, match="weights.pt must be a PyTorch checkpoint, got a file that cannot"):
        read_pickled_tensors(tmp_path / "weights.pt")


def test_torchscript_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.\w+` is", DeprecationWarning)
        warnings.filterwarnings("ignore", r".*torch\.jit\.\w+` is", FutureWarning)
        try:
            torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
        except (RuntimeError, Warning) as error:
            pytest.skip(f"TorchScript cannot be written here: {error}")
    with pytest.raises(ValueError, match="script.pt must be a checkpoint, got a TorchScript archive"):
        read_pickled_tensors(tmp_path / "script.pt")
