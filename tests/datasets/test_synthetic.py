import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from sklearn.metrics import average_precision_score

pytest.importorskip("nilearn", reason="the brain template ships with nilearn")

from madad.datasets import make_brain_slices

CONTRASTS = ["T1", "T2", "FLAIR"]


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_ranges_background_and_scale(contrast):
    data = make_brain_slices(6, size=48, lesions=0.5, contrast=contrast, random_state=0)
    assert data.images.shape == data.brain_masks.shape == data.lesion_masks.shape == (6, 48, 48)
    assert data.images.dtype == np.float32
    assert data.images.max() <= 1
    np.testing.assert_array_equal(data.images > 0, data.brain_masks)
    np.testing.assert_array_equal(data.healthy_images > 0, data.brain_masks)
    assert not (data.lesion_masks & ~data.brain_masks).any()
    for image, brain in zip(data.healthy_images, data.brain_masks, strict=True):
        assert np.median(image[brain]) == pytest.approx(0.4, abs=1e-6)
        assert 0.2 < brain.mean() < 0.6
    assert data.modality == contrast
    assert data.spacing_mm == (210 / 48, 210 / 48)


def test_tissue_order_is_that_of_the_contrast():
    dark, bright = {}, {}
    for contrast in CONTRASTS:
        data = make_brain_slices(8, contrast=contrast, random_state=0)
        ventricles = data.images[:, 30:36, 30:35]
        dark[contrast], bright[contrast] = np.percentile(ventricles, (10, 95))
    assert dark["T1"] < 0.25 and dark["FLAIR"] < 0.25 and dark["T2"] > 0.25
    assert bright["T2"] > 0.6 and bright["T1"] < 0.6 and bright["FLAIR"] < 0.6


@pytest.mark.parametrize(
    "make", [lambda: 7, lambda: np.random.RandomState(7), lambda: np.random.default_rng(7)]
)
def test_same_state_same_arrays(make):
    first, second = (make_brain_slices(4, lesions=0.5, random_state=make()) for _ in range(2))
    for key in ("images", "healthy_images", "brain_masks", "lesion_masks", "subjects", "z_mm"):
        np.testing.assert_array_equal(first[key], second[key])


def test_no_state_is_fresh_and_leaves_the_global_one_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002 - it must not be drawn from
    first, second = (make_brain_slices(1, size=32) for _ in range(2))
    assert not np.array_equal(first.images, second.images)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_lesions_do_not_change_the_people():
    healthy = make_brain_slices(5, random_state=1)
    lesioned = make_brain_slices(5, lesions=1.0, random_state=1)
    np.testing.assert_array_equal(lesioned.healthy_images, healthy.images)
    np.testing.assert_array_equal(lesioned.brain_masks, healthy.brain_masks)
    assert not healthy.lesion_masks.any()
    for image, twin, lesion in zip(lesioned.images, healthy.images, lesioned.lesion_masks, strict=True):
        far = ~binary_dilation(lesion, structure=np.ones((3, 3)), iterations=7)
        np.testing.assert_array_equal(image[far], twin[far])
        assert np.abs(image - twin)[lesion].mean() > 0.03


def test_more_samples_only_add_subjects():
    few, many = (make_brain_slices(n, size=32, random_state=2) for n in (3, 5))
    np.testing.assert_array_equal(many.images[:3], few.images)


def test_another_size_shows_the_same_people():
    coarse, fine = (make_brain_slices(4, size=size, random_state=3) for size in (32, 64))
    halved = fine.images.reshape(4, 32, 2, 32, 2).mean(axis=(2, 4))
    inside = coarse.brain_masks & (halved > 0.1)
    assert np.corrcoef(halved[inside], coarse.images[inside])[0, 1] > 0.8
    assert (coarse.brain_masks != (halved > 0.2)).mean() < 0.05


def test_subjects_differ_and_slices_of_one_are_alike():
    data = make_brain_slices(7, slices_per_subject=3, z_range_mm=(10, 20), random_state=4)
    assert data.subjects.tolist() == [f"synthetic-{i:04d}" for i in (0, 0, 0, 1, 1, 1, 2)]
    assert (np.diff(data.z_mm[:3]) > 0).all()
    assert data.z_mm.min() >= 10 and data.z_mm.max() <= 20

    def overlap(i, j):
        a, b = data.brain_masks[[i, j]]
        return (a & b).sum() / (a | b).sum()

    assert min(overlap(0, 1), overlap(3, 4)) > max(overlap(0, 3), overlap(0, 6))


@pytest.mark.parametrize(("lesions", "expected"), [(0.0, 0), (0.3, 3), (1.0, 10)])
def test_exact_number_of_lesions(lesions, expected):
    data = make_brain_slices(10, size=32, lesions=lesions, random_state=5)
    assert data.lesion_masks.any(axis=(1, 2)).sum() == expected


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_no_threshold_finds_the_lesions_but_the_eye_does(contrast):
    data = make_brain_slices(60, lesions=1.0, contrast=contrast, random_state=6)
    truth, values = data.lesion_masks[data.brain_masks], data.images[data.brain_masks]
    assert 0.02 < truth.mean() < 0.06
    for score in (values, -values, np.abs(values - 0.4)):
        assert average_precision_score(truth, score) < 0.25

    contrasts = []
    for image, brain, lesion in zip(data.images, data.brain_masks, data.lesion_masks, strict=True):
        ring = brain & binary_dilation(lesion, iterations=4) & ~binary_dilation(lesion)
        contrasts.append(image[lesion].mean() - image[ring].mean())
    contrasts = np.array(contrasts)
    assert np.mean(np.abs(contrasts) > 0.09) > 0.9
    assert 0.2 < np.mean(contrasts > 0) < 0.8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_samples": 0}, ["n_samples", "got 0"]),
        ({"size": 8}, ["size", "got 8"]),
        ({"size": 64.0}, ["size", "64.0"]),
        ({"slices_per_subject": 0}, ["slices_per_subject", "got 0"]),
        ({"lesions": 1.5}, ["lesions", "1.5"]),
        ({"contrast": "PD"}, ["contrast", "'PD'", "FLAIR"]),
        ({"lesion_radius": (0.1, 0.05)}, ["lesion_radius", "(0.1, 0.05)"]),
        ({"z_range_mm": (0, 90)}, ["z_range_mm", "(0, 90)"]),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError) as error:
        make_brain_slices(**{"n_samples": 1, **change})
    assert all(word in str(error.value) for word in words)
