import threading

import numpy as np
import pytest
import torch
from torch import nn

from madad._runtime.tensors import (
    MAX_BATCH,
    PIXELS_PER_BATCH,
    compile_in_place,
    default_batch_size,
    fixed_batches,
    fixed_parts,
    forward_batch_size,
    inference,
    one_ahead,
    pad_with_background,
    resolve_device,
    state_from_numpy,
    state_to_numpy,
    to_images,
    to_network,
)
from madad.nn import AUTOENCODER_SIZES
from madad.nn.autoencoder import KL_F8

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n, batch_size", [(1, 1), (1, 4), (7, 3), (6, 3), (5, 8), (100, 32)])
def test_fixed_batches_cover_every_index_once_in_order_in_batches_of_one_size(n, batch_size):
    seen = []
    for index, n_valid in fixed_batches(n, batch_size):
        assert index.shape == (batch_size,) and 1 <= n_valid <= batch_size
        assert (index[n_valid:] == index[n_valid - 1]).all()
        seen.extend(index[:n_valid])
    assert seen == list(range(n))


def test_no_samples_make_no_batch():
    assert list(fixed_batches(0, 4)) == []


def test_default_batch_size_falls_with_the_slice():
    sides = [16, 64, 128, 181, 256, 512, 1000, 1024, 4096]
    sizes = [default_batch_size(side, side) for side in sides]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == MAX_BATCH and sizes[-1] == 1
    for side, size in zip(sides, sizes, strict=True):
        assert type(size) is int
        assert size == 1 or size * side * side <= PIXELS_PER_BATCH
        assert default_batch_size(side // 2, side * 2) == default_batch_size(side * 2, side // 2)


def test_images_to_network_and_back():
    images = RNG.random((3, 2, 5, 4)).astype(np.float32)
    x = to_network(images[..., ::-1], CPU)  # negative strides, too
    np.testing.assert_allclose(x.numpy(), 2 * images[..., ::-1].astype(np.float64) - 1, atol=1e-6)
    np.testing.assert_allclose(to_images(x), images[..., ::-1], atol=1e-6)
    assert to_images(x).dtype == np.float32


def test_to_network_copies_and_to_images_clips():
    images = np.array([[[[0.0, 0.5, 1.0]]]], np.float32)
    x = to_network(images, CPU)
    x += 5
    np.testing.assert_array_equal(images, [[[[0, 0.5, 1]]]])
    clipped = to_images(torch.tensor([-3.0, -1.0, 0.0, 1.0, 1.5], dtype=torch.bfloat16))
    np.testing.assert_array_equal(clipped, np.float32([0, 0, 0.5, 1, 1]))


@pytest.mark.parametrize("height, width, multiple", [(5, 8, 4), (8, 8, 4), (1, 3, 8), (30, 34, 4), (7, 5, 1)])
def test_pad_with_background_pads_below_and_right_only(height, width, multiple):
    x = torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(0))
    padded = pad_with_background(x, multiple, -1.0)
    expected = np.full((2, 1, -(-height // multiple) * multiple, -(-width // multiple) * multiple), -1.0)
    expected[:, :, :height, :width] = x
    np.testing.assert_array_equal(padded, expected.astype(np.float32))


def test_inference_restores_the_mode_of_every_part_even_after_an_error():
    trained, frozen = nn.Sequential(nn.Dropout(), nn.Dropout()), nn.Dropout().eval()
    trained[1].eval()
    before = [trained.training, trained[0].training, trained[1].training, frozen.training]
    with pytest.raises(KeyError), inference(trained, frozen):
        assert not any(part.training for part in [trained, *trained, frozen])
        assert torch.is_inference_mode_enabled()
        raise KeyError
    assert [trained.training, trained[0].training, trained[1].training, frozen.training] == before
    assert not torch.is_inference_mode_enabled()


def test_state_round_trip():
    def network(seed):
        generator = torch.Generator().manual_seed(seed)
        module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
        for value in module.state_dict().values():
            value.copy_(torch.rand(value.shape, generator=generator) * 100)
        return module

    source, target = network(0), network(1)
    state = state_to_numpy(source)
    assert all(type(value) is np.ndarray for value in state.values())
    assert state_from_numpy(target, state) is target
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name])
    with torch.no_grad():
        target[0].weight.zero_()
    assert source[0].weight.any() and state["0.weight"].any(), "the filled module shares no memory"


def test_a_state_of_another_module_is_refused():
    with pytest.raises(RuntimeError, match="weight"):
        state_from_numpy(nn.Linear(2, 2), state_to_numpy(nn.Linear(3, 2)))
    with pytest.raises(RuntimeError, match="bias"):
        state_from_numpy(nn.Linear(2, 2), {"weight": np.zeros((2, 2), np.float32)})


@pytest.mark.parametrize(("local_rank", "gpu"), [("0", 0), ("1", 1), ("3", 1)])
def test_under_torchrun_a_gpu_without_number_is_the_processes_own(monkeypatch, local_rank, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda n, device: None)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", gpu)
    assert resolve_device("cuda:0") == torch.device("cuda", 0) and resolve_device("cpu").type == "cpu"


def test_devices():
    assert resolve_device("cpu") == resolve_device(CPU) == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", None, 1.5])
def test_devices_that_do_not_exist_are_refused(device):
    with pytest.raises(ValueError, match="device must be 'auto' or a device that torch can use") as caught:
        resolve_device(device)
    assert f"got {device!r}" in str(caught.value)


@pytest.mark.parametrize("n, size", [(0, 4), (1, 4), (4, 4), (5, 4), (7, 1)])
def test_fixed_parts_hold_every_row_once_and_are_filled_by_repetition(n, size):
    rows = torch.arange(n) * 3
    parts = list(fixed_parts(rows, size))
    assert all(len(part) == size and 0 < n_valid <= size for part, n_valid in parts)
    assert torch.equal(torch.cat([rows[:0], *(part[:n_valid] for part, n_valid in parts)]), rows)
    assert all((part[n_valid:] == part[n_valid - 1]).all() for part, n_valid in parts)


def test_forward_batches_on_a_cpu_go_by_the_sizes_of_slice_and_network_alone():
    cpu = torch.device("cpu")
    sizes = [forward_batch_size(side, side, cpu, 1) for side in (32, 64, 128, 256, 512, 4096)]
    assert sizes == [16, 16, 16, 4, 1, 1]
    assert [forward_batch_size(64, 64, cpu, 2**k) for k in (23, 24, 25, 26, 28, 40)] == [16, 16, 8, 4, 1, 1]
    fast = AUTOENCODER_SIZES["fast-f4"]
    assert KL_F8.bytes_per_slice(256, 256) > 2**28 > 16 * fast.bytes_per_slice(128, 128)


def test_forward_batches_on_a_gpu_take_half_of_its_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80_000, 10**6))
    gpu = torch.device("cuda")
    assert [forward_batch_size(64, 64, gpu, needed) for needed in (10**6, 40_000, 1000, 600, 1)] == [
        *(1, 1, 32, 64, 256)
    ]


def test_one_ahead_is_map_and_makes_the_next_item_while_it_works():
    events, made = [], threading.Event()

    def items():
        for i in range(3):
            events.append(i)
            if i == 1:
                made.set()
            yield i

    def work(i):
        assert i > 0 or made.wait(10)  # the second item is made before the first is done
        return i * i

    assert list(one_ahead(work, items())) == [0, 1, 4]
    assert list(one_ahead(work, [])) == []


def test_one_ahead_raises_what_was_raised_in_its_thread():
    def fail(i):
        raise ValueError(f"item {i}")

    with pytest.raises(ValueError, match="item 5"):
        list(one_ahead(fail, [5]))


def test_compilation_is_switched_on_and_off_in_place_and_once(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: compiled.append(options) or call)
    module = torch.nn.Linear(2, 2)
    for enabled, expected in ((True, 1), (True, 1), (False, 1), (True, 2)):
        compile_in_place(enabled, module)
        assert len(compiled) == expected and (module._compiled_call_impl is not None) == enabled
    assert "_orig_mod.weight" not in module.state_dict()
