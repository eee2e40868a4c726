import importlib.util
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from madad import MaskedDiffusionAnomalyDetector
from madad._runtime import distributed
from madad._runtime.distributed import ALONE, Team, is_first_process, join
from madad.baselines import PartialDiffusion

SCRIPT = Path(__file__).parents[1] / "distributed" / "together.py"
DIFFERENT_BY_SPEED = ("samples_per_second", "peak_memory_mib")

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


def load_script():
    spec = importlib.util.spec_from_file_location("distributed_together", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


together = load_script()


# One process


def test_a_process_that_nobody_started_with_others_is_alone():
    assert join() is ALONE and is_first_process() and not dist.is_initialized()


@pytest.mark.parametrize(("size", "n"), [(1, 5), (2, 5), (3, 2), (4, 0)])
def test_shares_are_neighbours_and_all_there_is(size, n):
    shares = Team(0, size).shares(n)
    assert [i for share in shares for i in share] == list(range(n)) and len(shares) == size
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_everything_stays_as_it_is():
    values, state = [torch.ones(2), torch.zeros(3)], ({"a": torch.ones(1)}, {"b": 2})
    ALONE.copy_(values)
    ALONE.mean_(values, 0.5)
    assert torch.equal(values[0], torch.ones(2)) and torch.equal(values[1], torch.zeros(3))
    assert ALONE.highest(1.5, 2) == (1.5, 2) and ALONE.gather("x") == ["x"]
    assert ALONE.broadcast(values) is values and ALONE.broadcast_state(state) is state
    with pytest.raises(ZeroDivisionError):
        ALONE.first(lambda: 1 / 0)


def test_buckets_hold_one_type_and_are_bounded(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 10)
    tensors = [torch.zeros(n, dtype=dtype) for n, dtype in [(4, None), (6, None), (1, None), (30, None)]]
    tensors += [torch.zeros(2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    buckets = list(distributed._buckets(tensors))
    assert [[len(tensor) for tensor in bucket] for bucket in buckets] == [[4, 6], [1], [30], [2, 3]]


@pytest.fixture
def launched(monkeypatch):
    """The environment of one of torchrun's processes."""
    values = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_only_the_first_of_those_that_torchrun_started_writes(launched, monkeypatch, tmp_path):
    assert not is_first_process()
    with distributed.alone():
        assert is_first_process() and join() is ALONE
    monkeypatch.setenv("RANK", "0")
    assert is_first_process()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert is_first_process() and join() is ALONE


@pytest.mark.parametrize(
    ("n_gpus", "per_node", "backend"), [(0, 2, "gloo"), (2, 2, "cpu:gloo,cuda:nccl"), (1, 2, "gloo")]
)
def test_nccl_is_for_processes_with_a_gpu_each(launched, monkeypatch, n_gpus, per_node, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert distributed._backend() == backend


# Two processes


@pytest.fixture(scope="module")
def folder(torchrun, tmp_path_factory):
    """Where two processes went through all tasks."""
    folder = tmp_path_factory.mktemp("together")
    done = torchrun(SCRIPT, folder)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "destroy_process_group" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """What each of them found."""
    return [pickle.loads((folder / f"rank{rank}.pkl").read_bytes()) for rank in range(2)]


@pytest.mark.slow
def test_nothing_of_a_group_is_left_when_the_process_ends(ranks):
    """Else its threads find no interpreter, and abort the process after its work is done."""
    for before, after in (rank["left"] for rank in ranks):
        assert after == 0 and (before > 0 or not Path("/proc/self/task").exists())


def losses(history):
    return [record["loss"] for record in history]


def without_speeds(history):
    return [{name: record[name] for name in record if name not in DIFFERENT_BY_SPEED} for record in history]


@pytest.mark.slow
def test_all_processes_end_with_the_same(ranks):
    """Bit by bit: weights, buffers, histories with their speeds, thresholds, seeds, warnings."""
    for task in together.TASKS:
        first, second = ({**rank[task.__name__], "own": None} for rank in ranks)
        assert first == second, task.__name__


@pytest.mark.slow
def test_a_loss_without_draws_has_the_curve_of_one_process(ranks, tmp_path):
    """Uneven shares of a batch included (4 and 3 of 7): only the order of the sums differs."""
    alone, both = together.plain(tmp_path)["history"], ranks[0]["plain"]["history"]
    assert [list(record) for record in both] == [list(record) for record in alone]
    for one, other in zip(without_speeds(alone), without_speeds(both), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_batch_is_shared_and_each_process_draws_for_itself(ranks):
    shares = [[index for index, *_ in rank["noisy"]["own"]] for rank in ranks]
    steps = list(zip(*shares, strict=True))
    assert len(steps) == 16 and all((len(one), len(other)) == (3, 2) for one, other in steps)
    epochs = [sum((one + other for one, other in steps[i : i + 4]), []) for i in range(0, 16, 4)]
    assert all(len(set(epoch)) == len(epoch) == 20 for epoch in epochs) and epochs[0] != epochs[1]
    draws = [value for rank in ranks for _, *values in rank["noisy"]["own"] for value in values]
    assert len(set(draws)) == len(draws) == 2 * 2 * 16
    assert not ranks[0]["noisy"]["moved"]  # torch's global generator


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_they_go_on_bitwise(ranks):
    whole, resumed = ranks[0]["noisy"], ranks[0]["stopped"]
    assert len(resumed["warned"]) == 1 and resumed["files"] == 1
    assert resumed["warned"][0].startswith("training was stopped by SIGTERM at step 7 of 16. Make the same")
    assert resumed["first"][-1]["step"] == 7 and len(resumed["own"]) == 9
    assert resumed["weights"] == whole["weights"]
    assert without_speeds(resumed["history"]) == without_speeds(whole["history"])
    for rank in ranks:
        assert rank["stopped"]["own"] == rank["noisy"]["own"][7:]


@pytest.mark.slow
def test_what_two_have_finished_is_read_back_by_one(folder, ranks, tmp_path):
    (written,) = (folder / "noisy").iterdir()
    shutil.copy(written, tmp_path)
    alone, both = together.noisy(tmp_path), ranks[0]["noisy"]
    assert alone["own"] == [] and (alone["weights"], alone["history"]) == (both["weights"], both["history"])


@pytest.mark.slow
def test_the_slowest_process_decides_when_time_is_up(ranks):
    history = ranks[0]["timed"]["history"]
    assert 2 < history[-1]["step"] < 16  # 0.4 s of steps that take one of them 0.02 s
    assert history[-1]["learning_rate"] < 0.1  # the peak: it falls with the time


@pytest.mark.slow
def test_callbacks_are_asked_in_the_first_process_for_all(ranks):
    assert [rank["asked"]["own"] for rank in ranks] == [[3, 4, 6], []]
    assert ranks[1]["asked"]["history"][-1]["step"] == 6


@pytest.mark.slow
def test_errors_come_to_all(ranks):
    for rank in ranks:
        small, other_data, _ = rank["refused"]["own"]
        assert small.startswith("ValueError: batch_size must be at least 1 for each of 2 processes, got 1")
        assert other_data.startswith("ValueError: X must be the same in each process, got [(30, 32, 32), (31")
    assert ranks[0]["refused"]["own"][2].startswith("ZeroDivisionError")
    assert ranks[1]["refused"]["own"][2].startswith("FirstFailedError: the process of rank 0 must succeed")


@pytest.mark.slow
def test_what_a_process_starts_itself_is_alone(ranks):
    assert ranks[1]["children"]["own"] == [(1, True)] * 2  # workers of loky
    assert all(rank["children"]["here"] == [1, (1, True)] for rank in ranks)


@pytest.mark.slow
def test_latents_that_are_encoded_by_shares_are_those_of_one_process(ranks):
    assert ranks[0]["latents"]["same"] == [True] * 12


@pytest.mark.slow
def test_a_detector_learns_as_it_does_alone(ranks, tmp_path):
    """Within 5 % and 15 % in each epoch: other draws of posteriors, masks and noise, and few of them."""
    alone, both = together.detector(tmp_path)["histories"], ranks[0]["detector"]["histories"]
    np.testing.assert_allclose(losses(both["autoencoder"]), losses(alone["autoencoder"]), rtol=0.05)
    np.testing.assert_allclose(losses(both["denoiser"]), losses(alone["denoiser"]), rtol=0.15)
    assert losses(alone["denoiser"])[-1] < 0.2 * losses(alone["denoiser"])[0]


@pytest.mark.slow
def test_a_model_is_written_once_and_predicts_as_any_other(folder, ranks):
    found, model = ranks[0]["detector"], MaskedDiffusionAnomalyDetector.load(folder / "detector" / "model")
    assert together.facts_of(model) == {name: found[name] for name in ("weights", "thresholds", "histories")}
    np.testing.assert_array_equal(model.predict_maps(together.SLICES.images[:3]), found["own"])
    assert set(model.predict(together.SLICES.images)) <= {-1, 1}
    assert not list((folder / "detector").glob(".model*"))


@pytest.mark.slow
def test_memory_is_the_first_processes(folder, ranks):
    found = ranks[0]["detector"]
    assert found["hit"] == {name: found[name] for name in ("weights", "thresholds", "histories")}
    assert len(list((folder / "detector" / "memory").rglob("output.pkl"))) == 2


@pytest.mark.slow
def test_gathered_thresholds_are_bitwise_those_of_one_process(folder, ranks):
    images, found = together.SLICES.images, ranks[0]["detector"]
    model = MaskedDiffusionAnomalyDetector.load(folder / "detector" / "model")
    model.calibrate(images[found["held_out"]])
    assert [model.offset_, model.map_threshold_] == found["thresholds"]

    X, found = images[:24].reshape(4, 1, 6, 32, 32), ranks[0]["volumes"]
    assert len(found["held_out"]) == 1  # fewer volumes than processes
    model = MaskedDiffusionAnomalyDetector.load(folder / "volumes" / "model")
    offset, threshold = model.calibrate(X).offset_, model.calibrate(X[found["held_out"]]).map_threshold_
    assert [offset, threshold] == found["thresholds"]


@pytest.mark.slow
def test_baselines_fit_as_they_are(folder, ranks):
    found, model = ranks[0]["baseline"], PartialDiffusion.load(folder / "baseline" / "model")
    assert together.digest(model.denoiser_) == found["weights"]
    model.calibrate(together.SLICES.images[found["held_out"]])
    assert [model.offset_, model.map_threshold_] == found["thresholds"]


@pytest.mark.slow
def test_the_example_prints_once_and_leaves_one_model(folder, ranks):
    (out, err), others = ranks[0]["example"]["own"], ranks[1]["example"]["own"]
    assert err == "" and others == ("", "")
    assert [line.split(":")[0] for line in out.splitlines()] == [
        *("autoencoder", "denoiser", "2 processes; model")
    ]
    model = MaskedDiffusionAnomalyDetector.load(folder / "example" / "model")
    assert model.history_[-1]["step"] == 4 and model.trainer.max_steps == 4
