import numpy as np
import pytest

from madad._runtime.distributed import ALONE
from madad.stages.memory import StageMemory


class Training:
    """Counts its calls, and gives another result each time."""

    def __init__(self):
        self.n_calls = 0

    def __call__(self):
        self.n_calls += 1
        return np.full(3, self.n_calls)


def keep(memory, train, stage, *decisive, stopped=False):
    return StageMemory(memory, ALONE).result(stage, train, lambda: decisive, lambda: stopped)


def test_a_result_is_known_by_what_decides_it(tmp_path):
    train = Training()
    first = keep(str(tmp_path), train, "denoiser", 1, np.arange(4))
    again = keep(str(tmp_path), train, "denoiser", 1, np.arange(4))
    assert train.n_calls == 1
    np.testing.assert_array_equal(first, again)
    keep(str(tmp_path), train, "denoiser", 2, np.arange(4))
    keep(str(tmp_path), train, "autoencoder", 1, np.arange(4))
    keep(str(tmp_path), train, "denoiser", 1, np.arange(5))
    assert train.n_calls == 4


def test_a_stopped_training_is_given_and_not_kept(tmp_path):
    train = Training()
    cut = keep(str(tmp_path), train, "denoiser", stopped=True)
    whole = keep(str(tmp_path), train, "denoiser")
    assert (cut[0], whole[0], train.n_calls) == (1, 2, 2)
    assert keep(str(tmp_path), train, "denoiser", stopped=True)[0] == 2  # known: nothing is trained


def test_without_memory_nothing_is_kept_and_nothing_hashed():
    def asked():
        raise AssertionError("hashing takes time")

    train = Training()
    for n in (1, 2):
        assert StageMemory(None, ALONE).result("denoiser", train, asked, lambda: False)[0] == n
    assert StageMemory(None, ALONE).directory is None


def test_an_error_of_a_training_is_its_own(tmp_path):
    def fail():
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        keep(str(tmp_path), fail, "denoiser")
    assert keep(str(tmp_path), Training(), "denoiser")[0] == 1


def test_the_directory_is_that_of_a_memory_on_a_disk(tmp_path):
    assert StageMemory(str(tmp_path), ALONE).directory == str(tmp_path)
