"""Read tensors out of pickled files from strangers without running anything they contain."""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
from torch import Tensor

# What rebuilds tensors, and nothing else. Every other global becomes an `InertStub`.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}
_ALLOWED |= {("torch", name): getattr(torch, name) for name in dir(torch) if name.endswith("Storage")}
_ALLOWED |= {
    ("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}


class InertStub:
    """Stands for an object of any class: takes whatever it is built from, keeps its state, does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        self.items: dict = {}

    def __setstate__(self, state):
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.__dict__.update({str(key): value for key, value in part.items()})

    def __call__(self, *args, **kwargs):
        return InertStub()

    def __setitem__(self, key, value):
        self.items[key] = value

    def append(self, value):
        """Take a list item of a pickled list subclass, and forget it."""

    def extend(self, values):
        """Take list items of a pickled list subclass, and forget them."""

    add = append


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        return _ALLOWED.get((module, name), InertStub)


def _inert_load(file, **kwargs):
    return _InertUnpickler(file, **kwargs).load()


# torch.load wants a module-like object; it reads through these names alone.
_INERT_PICKLE = SimpleNamespace(
    Unpickler=_InertUnpickler, load=_inert_load, UnpicklingError=pickle.UnpicklingError, __name__="inert"
)


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a ``.pt``, ``.pth`` or ``.ckpt`` file, on the CPU.

    Plain state dicts are read with ``weights_only=True``. Where the file holds whole pickled modules,
    every class but those that rebuild tensors is replaced by `InertStub`, so that nothing of it is run.

    Raises
    ------
    ValueError
        If the file is damaged, a TorchScript archive, or holds no tensors.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise ValueError(
                    f"{path} must be a checkpoint, got a TorchScript archive. Save its state_dict instead."
                )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whole modules, or damaged: the inert reader tells which
        try:
            content = torch.load(
                path, map_location="cpu", pickle_module=_INERT_PICKLE, weights_only=False
            )
        except Exception as error:
            raise ValueError(
                f"{path} must be a PyTorch checkpoint, got a file that cannot be read "
                f"({type(error).__name__}: {error}). Download it again."
            ) from error
    tensors = _named_tensors(content)
    if not tensors:
        raise ValueError(f"{path} must hold named tensors, got none. Save a state_dict.")
    return tensors


def _named_tensors(content) -> dict[str, Tensor]:
    """Flatten state dicts, checkpoints that wrap one, and stubs of modules."""
    if isinstance(content, InertStub):
        return _module_tensors(content)
    if not isinstance(content, dict):
        return {}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors:
        return tensors
    for key in ("ema", "state_dict", "model", *content):
        found = _named_tensors(content.get(key))
        if found:
            return found
    return {}


def _module_tensors(stub: InertStub, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    if depth > 50:
        return tensors
    state = vars(stub)
    for group in ("_parameters", "_buffers"):
        for name, value in (state.get(group) or {}).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value.detach()
    for name, child in (state.get("_modules") or {}).items():
        if isinstance(child, InertStub):
            tensors |= _module_tensors(child, f"{prefix}{name}.", depth + 1)
    return tensors
