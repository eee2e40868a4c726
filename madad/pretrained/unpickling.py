"""Read tensors out of pickled files from strangers without running anything they contain."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
from torch import Tensor


def _rebuild_tensor(*args):
    return torch._utils._rebuild_tensor_v2(*args)


def _rebuild_parameter(*args):
    return torch._utils._rebuild_parameter(*args)


# What rebuilds tensors, and nothing else. Every other global becomes an `InertStub`; storages are rebuilt by
# `torch.load` itself. Functions of our own, because a pickle can set attributes of what it is given.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): torch.Size,
}
_ALLOWED |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

_MODULE_STATE = ("_parameters", "_buffers", "_modules")


class InertStub:
    """Stands for an object of any class: keeps a module's tensors and children, forgets the rest."""

    def __new__(cls, *args, **kwargs):
        """Take and forget."""
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        """Take and forget."""

    def __setstate__(self, state):
        if isinstance(state, dict):
            kept = {key: state.get(key) for key in _MODULE_STATE}
            vars(self).update({key: value for key, value in kept.items() if isinstance(value, dict)})

    def __call__(self, *args, **kwargs):
        """Stand for whatever a call would give, too."""
        return InertStub()

    def __setitem__(self, key, value):
        """Take an item of a pickled dict subclass, and forget it."""

    def append(self, value):
        """Take an item of a pickled list or set, and forget it."""

    def extend(self, values):
        """Take items of a pickled list, and forget them."""

    add = append


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        return _ALLOWED.get((module, name), InertStub)

    def __setattr__(self, name, value):
        super().__setattr__(name, _storages_only(value) if name == "persistent_load" else value)


def _storages_only(persistent_load):
    """Files of before 2020 refer to classes too, by their source, which torch would compare and may write."""

    def load(saved_id):
        if isinstance(saved_id, tuple) and saved_id[:1] not in (("storage",), (b"storage",)):
            return InertStub
        return persistent_load(saved_id)

    return load


def _inert_load(file, **kwargs):
    return _InertUnpickler(file, **kwargs).load()


# torch.load wants a module-like object; it reads through these names alone.
_INERT_PICKLE = SimpleNamespace(
    Unpickler=_InertUnpickler, load=_inert_load, UnpicklingError=pickle.UnpicklingError, __name__="inert"
)


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a pickled file without running anything in it.

    Parameters
    ----------
    path : Path
        A ``.pt``, ``.pth``, ``.ckpt`` or ``.bin`` file.

    Returns
    -------
    dict of str to Tensor
        Tensors by name, as stored, on the CPU.

    Raises
    ------
    ValueError
        If the file is damaged, a TorchScript archive, or holds no tensors.

    Notes
    -----
    Plain state dicts are read with ``weights_only=True``. Where the file holds whole pickled modules,
    every class but those that rebuild tensors is replaced by `InertStub`, so that nothing of it is run.
    """
    if _is_torchscript(path):
        raise ValueError(
            f"{path} must be a checkpoint, got a TorchScript archive. Save its state_dict instead."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whole modules, or damaged: the inert reader tells which
        try:
            content = torch.load(path, map_location="cpu", pickle_module=_INERT_PICKLE, weights_only=False)
        except Exception as error:
            raise ValueError(
                f"{path} must be a PyTorch checkpoint, got a file that cannot be read "
                f"({type(error).__name__}: {error}). Download it again."
            ) from error
    tensors = _named_tensors(content)
    if not tensors:
        raise ValueError(f"{path} must hold named tensors, got none. Save a state_dict.")
    return tensors


def _is_torchscript(path: Path) -> bool:
    """Asked of the reader that `torch.load` uses, which would run the archive."""
    try:
        return "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    except RuntimeError:  # no zip archive
        return False


def _named_tensors(content) -> dict[str, Tensor]:
    """Tensors of the first part that has any: state dicts, checkpoints that wrap one, stubs of modules.

    Loops instead of recursion, and each part once: the nesting is a stranger's choice.
    """
    pending, seen = [content], set()
    while pending:
        part = pending.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        tensors: dict[str, Tensor] = {}
        if isinstance(part, InertStub):
            tensors = _module_tensors(part)
        elif isinstance(part, dict):
            tensors = {str(key): value for key, value in part.items() if isinstance(value, Tensor)}
            first = [part[key] for key in ("ema", "state_dict", "model") if key in part]
            pending += reversed([*first, *part.values()])
        if tensors:
            return tensors
    return {}


def _module_tensors(module: InertStub) -> dict[str, Tensor]:
    """Named tensors of a module and its children; a child that has two names is read under one of them."""
    pending, seen = [("", module)], set()
    tensors: dict[str, Tensor] = {}
    while pending:
        prefix, stub = pending.pop()
        if not isinstance(stub, InertStub) or id(stub) in seen:
            continue
        seen.add(id(stub))
        state = vars(stub)
        for group in ("_parameters", "_buffers"):
            for name, value in state.get(group, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{prefix}{name}"] = value.detach()
        pending += [(f"{prefix}{name}.", child) for name, child in state.get("_modules", {}).items()]
    return tensors
