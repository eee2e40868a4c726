"""Slices as the networks take them: batches of one size on the device, with their brain masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from madad._runtime.tensors import fixed_batches, to_network
from madad.base.slice_stack import SliceStack


class NetworkBatch(NamedTuple):
    """Some slices of a stack, filled up to one size; only the first ``n_valid`` count.

    Attributes
    ----------
    rows : ndarray of int, (size,)
        Which slices of the stack; the last one is repeated.
    x : Tensor of shape (size, C, H, W), in -1..1
        Network images, on the device.
    brain : ndarray of shape (size, 1, H, W), bool
        Their brain masks.
    n_valid : int
        How many leading slices are no repetition.
    """

    rows: np.ndarray
    x: Tensor
    brain: np.ndarray
    n_valid: int


def network_batches(stack: SliceStack, size: int, device: torch.device) -> Iterator[NetworkBatch]:
    """Read a stack in batches of exactly ``size`` slices.

    Kernels choose their summation order by shape: batches of one shape make a slice's result independent of
    its company.

    Parameters
    ----------
    stack : SliceStack
        What is read, from the first slice to the last.
    size : int
        Slices of each batch, 1 or more.
    device : torch.device
        Where the images go.

    Yields
    ------
    NetworkBatch
    """
    for rows, n_valid in fixed_batches(len(stack), size):
        yield NetworkBatch(rows, to_network(stack.images(rows), device), stack.brain(rows), n_valid)
