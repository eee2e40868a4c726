"""What is the same input: a hash by content, equal in every process."""

from __future__ import annotations

import pickle
from typing import Any

from joblib.hashing import NumpyHasher
from torch import Tensor, uint8


def content_hash(value: Any) -> str:
    """A hash of whatever pickle can hold, arrays, tensors and modules included, as hexadecimal digits.

    Raises
    ------
    TypeError
        If something in it cannot be pickled.
    """
    try:
        return _Hasher().hash(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"with memory or checkpoint_dir a parameter must be something that pickle can hold, got what "
            f"it cannot ({error.args[0]}). Define functions and classes at the top of a module."
        ) from error


class _Hasher(NumpyHasher):
    """joblib's, which takes the address of a tensor's memory for a part of its content."""

    def save(self, obj):
        """Hash tensors as arrays."""
        if isinstance(obj, Tensor):
            values = obj.detach().cpu().contiguous().reshape(-1).view(uint8).numpy()
            obj = (type(obj).__name__, str(obj.dtype), tuple(obj.shape), values)
        super().save(obj)
