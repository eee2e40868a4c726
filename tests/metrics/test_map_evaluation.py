import itertools

import numpy as np
import pytest

from madad import metrics
from madad.metrics import MapEvaluation, map_evaluation

THRESHOLD, EXACT = 0.4, 1e-12


def streamed(batches, directory=None, **options):
    with MapEvaluation(directory) as evaluation:
        for lesion_masks, anomaly_maps, brain_masks, *subjects in batches:
            evaluation.update(
                lesion_masks, anomaly_maps, brain_masks, subjects=subjects[0] if subjects else None
            )
        return evaluation.result(THRESHOLD, **options)


def split(arrays, *at):
    """The same images in batches."""
    return [[array[start:stop] for array in arrays] for start, stop in itertools.pairwise([0, *at, None])]


def approx(results):
    """Equal thresholds, numbers to 1e-12, and None where there was None."""
    return {
        key: value if value is None or "threshold" in key else pytest.approx(value, abs=EXACT)
        for key, value in results.items()
    }


@pytest.fixture(params=[1, 6, 2**20], ids="{} per range".format)
def pixels_per_range(request, monkeypatch):
    monkeypatch.setattr(map_evaluation, "PIXELS_PER_RANGE", request.param)


@pytest.mark.parametrize(
    ("n_levels", "dtype"), [(1, np.float64), (3, np.float16), (9, np.float32), (10**4, np.float64)]
)
def test_results_are_those_of_the_single_functions(n_levels, dtype, random_case, pixels_per_range):
    for seed in range(4):
        arrays = lesion_masks, anomaly_maps, brain_masks = random_case(
            seed, n=10, n_levels=n_levels, dtype=dtype
        )
        subjects = np.array(list("baabcccbaa"))
        results = streamed(split([*arrays, subjects], 1, 6))
        assert results["auprc"] == pytest.approx(metrics.auprc(*arrays), abs=EXACT)
        assert results["auroc"] == pytest.approx(metrics.auroc(*arrays), abs=EXACT)
        per_image, pooled = metrics.max_dice_per_image(*arrays), metrics.max_dice_pooled(*arrays)
        assert results["max_dice_per_image"] == pytest.approx(per_image.dice, abs=EXACT)
        assert results["oracle_threshold_per_image"] == per_image.oracle_threshold
        assert (results["max_dice_pooled"], results["oracle_threshold_pooled"]) == pooled
        for name, threshold in (("max_dice_per_image", per_image.oracle_threshold), ("calibrated_dice", 0.4)):
            dice = metrics.dice_per_image(lesion_masks, anomaly_maps, threshold, brain_masks)
            assert results[name] == pytest.approx(np.nanmean(dice), abs=EXACT)
            assert results[f"{name}_ci95"] == list(metrics.bootstrap_ci(dice, subjects))


def test_all_tied_maps(pixels_per_range):
    lesion_masks = np.arange(40).reshape(4, 10) % 3 == 0
    results = streamed(split([lesion_masks, np.full((4, 10), 0.7), np.ones((4, 10))], 1))
    share = lesion_masks.mean()
    assert (results["auprc"], results["auroc"]) == (pytest.approx(share), 0.5)
    assert results["max_dice_pooled"] == pytest.approx(2 * share / (1 + share))
    assert results["oracle_threshold_per_image"] == results["oracle_threshold_pooled"] == 0.7


def test_of_equally_good_thresholds_the_highest_wins(pixels_per_range):
    lesion_masks, anomaly_maps = [[1, 0, 0, 1]] * 2, [[9.0, 8, 7, 6]] * 2  # 2 / 3 at 9 and at 6
    results = streamed([(lesion_masks, anomaly_maps, None)])
    assert results["max_dice_pooled"] == pytest.approx(2 / 3)
    assert results["oracle_threshold_per_image"] == results["oracle_threshold_pooled"] == 9


def test_neither_batches_nor_order_nor_folder_change_anything(random_case, pixels_per_range, tmp_path):
    arrays = [*random_case(3, n=12, n_levels=40), np.repeat([4, 1, 2, 7], 3)]
    expected = streamed([arrays])
    for at in ((1,), (5, 6, 11), range(1, 12)):
        assert streamed(split(arrays, *at)) == expected
        assert streamed(split(arrays, *at), tmp_path) == expected
    order = np.random.default_rng(0).permutation(12)
    assert streamed(split([array[order] for array in arrays], 3)) == approx(expected)
    assert not list(tmp_path.iterdir())


def test_nor_does_the_size_of_ranges_and_blocks(random_case, monkeypatch):
    arrays = random_case(2, n=12, n_levels=500)
    expected = streamed([arrays])
    monkeypatch.setattr(map_evaluation, "PIXELS_PER_RANGE", 3)
    monkeypatch.setattr(map_evaluation, "IMAGES_PER_BLOCK", 5)
    assert streamed([arrays]) == approx(expected)
    monkeypatch.setattr(map_evaluation, "INTERVAL_LEVELS", 10)
    coarse = streamed([arrays])["auprc_ci95"]
    monkeypatch.setattr(map_evaluation, "PIXELS_PER_RANGE", 2**20)
    assert streamed([arrays])["auprc_ci95"] == pytest.approx(coarse, abs=EXACT)


def test_images_of_other_sizes_equal_padded_ones(random_case):
    lesion_masks, anomaly_maps, brain_masks = random_case(5)
    brain_masks[3:, 4:] = brain_masks[:3, :, 3:] = False
    parts = [
        [array[:3, :, :3] for array in (lesion_masks, anomaly_maps, brain_masks)],
        [array[3:, :4].reshape(4, 2, 2, 5) for array in (lesion_masks, anomaly_maps, brain_masks)],
    ]
    assert streamed(parts) == streamed([(lesion_masks, anomaly_maps, brain_masks)])


def test_images_of_two_precisions_equal_all_in_the_finer_one(random_case, tmp_path):
    lesion_masks, anomaly_maps, brain_masks = arrays = random_case(6)
    fine = streamed([(lesion_masks, anomaly_maps.astype(float), brain_masks)])
    first, second = split(arrays, 3)
    second[1] = second[1].astype(float)
    assert streamed([first, second]) == streamed([first, second], tmp_path) == fine


def test_an_image_without_brain_changes_counts_of_subjects_alone(random_case, tmp_path):
    arrays = random_case(7)
    empty = [np.zeros((1, 4)), np.full((1, 4), np.nan), np.zeros((1, 4))]
    more, less = streamed([empty, arrays], tmp_path), streamed([arrays])
    for key in ("auprc", "auroc", "max_dice_per_image", "max_dice_pooled", "calibrated_dice"):
        assert more[key] == less[key]


def test_quantised_auprc_interval_stays_close_to_the_exact_one(monkeypatch):
    rng = np.random.default_rng(0)
    lesion_masks = rng.random((10, 60, 60)) < 0.1
    anomaly_maps = rng.normal(size=lesion_masks.shape) + 1.5 * lesion_masks
    exact = metrics.evaluate_maps(lesion_masks, anomaly_maps)["auprc_ci95"]
    monkeypatch.setattr(map_evaluation, "INTERVAL_LEVELS", 300)
    coarse = metrics.evaluate_maps(lesion_masks, anomaly_maps)["auprc_ci95"]
    assert coarse != exact
    np.testing.assert_allclose(coarse, exact, atol=5e-3)


def test_levels_of_the_interval_are_numpys_quantiles():
    rng = np.random.default_rng(1)
    values = rng.integers(0, 50, (6, 80)).astype(np.float32)
    images = map_evaluation.SortedImages()
    images.add((row[:60], row[60:]) for row in values)
    expected = np.unique(np.quantile(values[:, :60], np.linspace(0, 1, 30), method="lower"))
    np.testing.assert_array_equal(map_evaluation._lesion_quantiles(images, 30), expected[::-1])


def test_results_can_be_asked_for_in_between(random_case):
    first, second = split(random_case(8), 4)
    evaluation = MapEvaluation()
    evaluation.update(*first)
    assert evaluation.result(THRESHOLD) == streamed([first])
    evaluation.update(*second)
    assert evaluation.result(THRESHOLD) == evaluation.result(THRESHOLD) == streamed([first, second])


def test_a_generator_is_drawn_from_in_turn(random_case):
    arrays = random_case(9)
    first, second = (streamed([arrays], random_state=np.random.RandomState(0)) for _ in range(2))
    assert first == second != streamed([arrays])


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_bad_batch_leaves_the_others_as_they_were(where, random_case, tmp_path):
    lesion_masks, anomaly_maps, brain_masks = arrays = random_case(4)
    labels = list("aabbccc")
    broken = anomaly_maps.copy()
    broken[-1][brain_masks[-1]] = np.nan
    with MapEvaluation(tmp_path if where == "folder" else None) as evaluation:
        evaluation.update(*arrays, subjects=labels)
        before = evaluation.result()
        for batch, subjects in [
            ((lesion_masks, broken, brain_masks), labels),
            ((lesion_masks[:3], anomaly_maps, brain_masks), labels),
            (arrays, labels[:2]),
            (arrays, None),
        ]:
            with pytest.raises(ValueError, match="must"):
                evaluation.update(*batch, subjects=subjects)
        assert evaluation.result() == before
        evaluation.update(*arrays, subjects=labels)
        assert evaluation.result()["auprc"] == pytest.approx(before["auprc"], abs=EXACT)


def results_of(lesion_masks, anomaly_maps, threshold=None):
    evaluation = MapEvaluation()
    evaluation.update(lesion_masks, anomaly_maps)
    return evaluation.result(threshold)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lesions, maps: MapEvaluation().result(), "lesion_masks must have ... got none in 0 slices"),
        (lambda lesions, maps: results_of(lesions & False, maps), "lesion_masks must have ... got none in 7"),
        (lambda lesions, maps: results_of(lesions | True, maps), "must leave ... lesion in all 210 pixels"),
        (lambda lesions, maps: results_of(lesions, maps, np.nan), "threshold must not be NaN, got nan"),
        (lambda lesions, maps: MapEvaluation("/missing"), "directory must be a folder, got '/missing'"),
        (
            lambda lesions, maps: MapEvaluation().update(lesions, maps, subjects=[1]),
            "subjects must have shape (7,), got (1,)",
        ),
    ],
)
def test_wrong_values_raise_value_errors(call, message, random_case, as_pattern):
    lesions, maps, _ = random_case(0)
    with pytest.raises(ValueError, match=as_pattern(message)):
        call(lesions, maps)


@pytest.mark.parametrize("ways", [("labels", None), (None, "labels")])
def test_subjects_are_named_in_every_update_or_in_none(ways, random_case):
    arrays, evaluation = random_case(0), MapEvaluation()
    first, second = (None if way is None else list("aabbccc") for way in ways)
    evaluation.update(*arrays, subjects=first)
    got = f"got {ways[1] or 'None'} after {ways[0] or 'None'}"
    with pytest.raises(ValueError, match=f"subjects must be given in every update or in none, {got}"):
        evaluation.update(*arrays, subjects=second)


def test_a_threshold_must_be_a_number(random_case):
    with pytest.raises(TypeError, match="threshold must be a number, got 'high'"):
        results_of(*random_case(0)[:2], "high")
