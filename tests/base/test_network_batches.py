import numpy as np
import pytest
import torch

from madad.base.check_slices import check_slices
from madad.base.network_batches import network_batches

IMAGES = np.random.default_rng(0).random((5, 2, 4, 3)).astype(np.float32)


@pytest.mark.parametrize(("size", "n_valid"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (8, [5])])
def test_every_slice_comes_once_in_batches_of_one_size(size, n_valid):
    stack = check_slices(IMAGES)
    batches = list(network_batches(stack, size, torch.device("cpu")))
    assert [batch.n_valid for batch in batches] == n_valid
    assert all(len(batch.x) == len(batch.brain) == len(batch.rows) == size for batch in batches)
    x = torch.cat([batch.x[: batch.n_valid] for batch in batches])
    np.testing.assert_allclose(x, 2 * IMAGES - 1, atol=1e-6)
    brain = np.concatenate([batch.brain[: batch.n_valid] for batch in batches])
    np.testing.assert_array_equal(brain, (IMAGES > 0).any(axis=1, keepdims=True))
    rows = np.concatenate([batch.rows[: batch.n_valid] for batch in batches])
    np.testing.assert_array_equal(rows, np.arange(5))


def test_what_fills_a_batch_is_its_last_slice():
    last = list(network_batches(check_slices(IMAGES), 4, torch.device("cpu")))[-1]
    assert torch.equal(last.x[1:], last.x[:1].expand(3, -1, -1, -1)) and last.rows.tolist() == [4] * 4


def test_rows_count_in_the_stack_that_is_read():
    part = check_slices(IMAGES).subset(np.array([4, 1]))
    (batch,) = network_batches(part, 2, torch.device("cpu"))
    assert batch.rows.tolist() == [0, 1]
    np.testing.assert_allclose(batch.x, 2 * IMAGES[[4, 1]] - 1, atol=1e-6)
