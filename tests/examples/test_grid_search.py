import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
from sklearn.model_selection import ParameterGrid

SCRIPT = Path(__file__).parents[2] / "examples" / "grid_search.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("examples_grid_search", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folds_train_on_healthy_subjects_and_test_on_lesions_of_others(example):
    _, lesion_masks, subjects = example.make_data(24, 10, 16)
    lesion_masks[-1] = False  # the other slice of this patient keeps its lesion
    has_lesion = lesion_masks.any(axis=(1, 2))
    patients = set(subjects[has_lesion])
    assert len(patients) == 5
    folds = list(example.healthy_to_lesion_folds(lesion_masks, subjects))
    assert len(folds) >= 2
    for train, test in folds:
        assert len(train) > 0 and not patients & set(subjects[train])
        assert len(test) > 0 and has_lesion[test].all()
        assert not set(subjects[train]) & set(subjects[test])
    assert sorted(np.concatenate([test for _, test in folds])) == np.flatnonzero(has_lesion).tolist()


def test_a_subject_with_healthy_slices_and_lesions_is_never_trained_on(example):
    subjects = np.repeat([f"s{i}" for i in range(8)], 3)
    lesion_masks = np.zeros((24, 4, 4), bool)
    lesion_masks[[0, 4, 8, 9]] = True  # one slice of each of s0..s3
    for train, test in example.healthy_to_lesion_folds(lesion_masks, subjects):
        assert set(subjects[train]) <= {"s4", "s5", "s6", "s7"}
        assert set(subjects[test]) <= {"s0", "s1", "s2", "s3"}


def test_candidates_come_in_the_order_of_the_heat_maps_cells(example):
    for grid in (example.GRID, example.QUICK_GRID):
        names = (example.GAMMA, example.LAMBDA, example.RATIO)
        in_order = [tuple(candidate[name] for name in names) for candidate in ParameterGrid(grid)]
        assert in_order == list(itertools.product(*(grid[name] for name in names)))


@pytest.mark.slow
def test_quick_search_trains_each_network_once(example, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(example.QUICK_GRID, example.RATIO, [0.6])
    files = ["--out", str(tmp_path / "map.png"), "--memory", str(tmp_path / "cache")]
    arguments = ["--quick", "--steps", "4", *files]
    search, trained = example.main(arguments)
    grid, results = example.QUICK_GRID, search.cv_results_
    values = [grid[name] for name in (example.GAMMA, example.LAMBDA, example.RATIO)]
    in_order = [
        tuple(p[n] for n in (example.GAMMA, example.LAMBDA, example.RATIO)) for p in results["params"]
    ]
    assert in_order == list(itertools.product(*values))  # the heat map's cells rely on it
    assert all(value in grid[name] for name, value in search.best_params_.items())
    assert results["mean_test_score"][search.best_index_] == max(results["mean_test_score"])
    assert 0 < max(results["mean_test_score"]) <= 1

    n_fits = len(in_order) * search.n_splits_
    expected = {"autoencoder": search.n_splits_, "denoiser": n_fits // len(grid[example.GAMMA])}
    assert trained == expected
    assert trained["denoiser"] < n_fits
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"{n_fits} fits" in printed
    assert f"{expected['autoencoder']} autoencoders and {expected['denoiser']} denoisers trained" in printed

    again, trained = example.main(arguments)
    assert not trained  # all from the cache
    np.testing.assert_array_equal(again.cv_results_["mean_test_score"], results["mean_test_score"])
