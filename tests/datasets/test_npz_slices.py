import numpy as np
import pytest
from sklearn.utils import Bunch

from madad.datasets import crop_to_brain, load_slices
from madad.mri.intensity import FOREGROUND_FLOOR


def disc(shape, center, radius):
    y, x = np.ogrid[: shape[0], : shape[1]]
    return (y - center[0]) ** 2 + (x - center[1]) ** 2 <= radius**2


def arrays(shape=(120, 100), n=4):
    """Disc-shaped brains with a disc-shaped lesion of label 4 and a skull around."""
    brain = disc(shape, (60, 50), 40)
    lesion = disc(shape, (60, 60), 12)
    image = np.where(lesion, 150, np.where(brain, 100, 240)).astype(np.uint8)
    return {
        "image": np.stack([image] * n),
        "brain_mask": np.stack([brain] * n).astype(np.uint8),
        "lesion_mask": np.stack([4 * lesion] * n).astype(np.uint8),
        "subject": np.array(["b", "b", "a", "a"][:n]),
        "z_frac": np.linspace(0.2, 0.8, n).astype(np.float32),
        "modality": np.array("T1"),
        "spacing_mm": np.array([1.0, 1.0, 3.0], dtype=np.float32),
    }


@pytest.fixture
def save(tmp_path):
    def write(without=(), **changes):
        path = tmp_path / "slices.npz"
        content = {**arrays(), **changes}
        np.savez(path, **{key: value for key, value in content.items() if key not in without})
        return path

    return write


def test_file_grid_is_kept_and_skull_removed(save):
    data = load_slices(save())
    source = arrays()
    np.testing.assert_array_equal(data.images > 0, source["brain_mask"] > 0)
    np.testing.assert_array_equal(data.brain_masks, source["brain_mask"] > 0)
    np.testing.assert_array_equal(data.lesion_masks, source["lesion_mask"] > 0)
    np.testing.assert_allclose(data.images[data.lesion_masks], 0.6, rtol=1e-6)
    np.testing.assert_allclose(data.images[data.brain_masks & ~data.lesion_masks], 0.4, rtol=1e-6)
    assert data.subjects.tolist() == ["b", "b", "a", "a"]
    assert data.modality == "T1" and data.spacing_mm == (1.0, 1.0) and data.has_lesion_masks


@pytest.mark.parametrize("size", [32, 64, 128, 200])
def test_disc_stays_a_disc_and_the_lesion_keeps_its_area(save, size):
    data = load_slices(save(), size=size)
    assert data.images.shape == (4, size, size)
    assert data.spacing_mm == pytest.approx((120 / size, 120 / size))
    brain = data.brain_masks[0]
    height, width = brain.any(axis=1).sum(), brain.any(axis=0).sum()
    assert abs(height - width) <= 1
    assert height == pytest.approx(81 * size / 120, abs=1.5)
    area = data.lesion_masks[0].sum() * (120 / size) ** 2
    assert area == pytest.approx((arrays()["lesion_mask"][0] > 0).sum(), rel=0.06)
    np.testing.assert_array_equal(data.images > 0, data.brain_masks)


def test_resampling_leaves_no_dark_rim(save):
    data = load_slices(save(without=["lesion_mask"], image=np.full((4, 120, 100), 100, np.uint8)), size=48)
    np.testing.assert_allclose(data.images[data.brain_masks], 0.4, rtol=1e-5)
    assert not data.has_lesion_masks and not data.lesion_masks.any()


def test_fine_texture_is_averaged_away_not_aliased(save):
    stripes = np.where(np.arange(100) % 2, 80, 120).astype(np.uint8)
    data = load_slices(save(image=np.broadcast_to(stripes, (4, 120, 100))), size=30)
    assert data.images[data.brain_masks].std() < 0.02


def test_spacing_makes_pixels_square(save):
    brain = disc((120, 100), (60, 50), 40)[:, ::2]  # columns 2 mm apart
    stack = np.stack([brain] * 4)
    path = save(
        without=["lesion_mask"],
        image=(100 * stack).astype(np.uint8),
        brain_mask=stack,
        spacing_mm=np.array([1.0, 2.0]),
    )
    for data in (load_slices(path, spacing_mm=2.0, size=64), load_slices(path, size=60)):
        height, width = data.brain_masks[0].any(axis=1).sum(), data.brain_masks[0].any(axis=0).sum()
        assert data.spacing_mm == pytest.approx((2.0, 2.0))
        assert abs(height - width) <= 1 and abs(height - 40) <= 1
    assert load_slices(path, spacing_mm=2.0).images.shape == (4, 60, 50)


def test_padding_alone_copies_pixels(save):
    data, source = load_slices(save(), size=151, spacing_mm=1.0), load_slices(save())
    np.testing.assert_array_equal(data.images[:, 16:136, 26:126], source.images)
    assert data.brain_masks.sum() == source.brain_masks.sum()


def test_z_range_selects_and_sets_the_scale(save):
    image = arrays()["image"].copy()
    image[0] //= 2
    data = load_slices(save(image=image), z_range=(0.3, 0.7))
    np.testing.assert_allclose(data.z_frac, [0.4, 0.6], rtol=1e-6)
    assert data.subjects.tolist() == ["b", "a"]
    for slice_, brain in zip(data.images, data.brain_masks, strict=True):
        assert np.median(slice_[brain]) == pytest.approx(0.4)


def test_subjects_share_a_scale(save):
    image = arrays()["image"].copy()
    image[1] //= 2
    data = load_slices(save(image=image))
    assert np.median(data.images[0][data.brain_masks[0]]) == pytest.approx(
        2 * np.median(data.images[1][data.brain_masks[1]]), rel=1e-5
    )


def test_center_none_keeps_eight_bit_values(save):
    image = arrays()["image"].copy()
    image[:, 60, 20] = 0  # dark, but brain
    data = load_slices(save(image=image), center=None)
    np.testing.assert_allclose(data.images[data.lesion_masks], 150 / 255, rtol=1e-6)
    np.testing.assert_allclose(data.images[:, 60, 20], FOREGROUND_FLOOR)


def test_named_contrast_sets_the_modality(save):
    path = save(without=["image", "modality", "spacing_mm", "z_frac"], image_flair=arrays()["image"])
    data = load_slices(path, image="image_flair", size=64)
    assert data.modality == "FLAIR" and data.spacing_mm is None and data.z_frac is None


def test_cropping_the_brain_is_refused_with_the_size_that_holds_it(save):
    with pytest.raises(ValueError, match="size must hold the brain, got 60 where it needs 82"):
        load_slices(save(), size=60, spacing_mm=1.0)
    data = load_slices(save(), size=82, spacing_mm=1.0)
    assert data.brain_masks.sum() == (arrays()["brain_mask"] > 0).sum()


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ({}, {"image": "image_t1"}, ["image", "'image_t1'", "brain_mask"]),
        ({"without": ["subject"]}, {}, ["path", "subject", "z_frac"]),
        ({"without": ["z_frac"]}, {"z_range": (0, 1)}, ["z_range", "(0, 1)", "z_frac"]),
        ({}, {"z_range": (0.9, 1.0)}, ["z_range", "(0.9, 1.0)", "0.20 to 0.80"]),
        ({"without": ["spacing_mm"]}, {"spacing_mm": 2.0}, ["spacing_mm", "2.0"]),
        ({}, {"spacing_mm": -1.0}, ["spacing_mm", "-1.0"]),
        ({}, {"size": 64.5}, ["size", "64.5"]),
        ({}, {"center": "mean"}, ["center", "'mean'"]),
        ({"image": arrays()["image"] / 255}, {"center": None}, ["center", "float64"]),
        ({"brain_mask": np.ones((4, 9, 9))}, {}, ["brain_mask", "(4, 9, 9)", "(4, 120, 100)"]),
        ({"lesion_mask": np.ones((4, 9, 9))}, {}, ["lesion_mask", "(4, 9, 9)"]),
        ({"subject": np.array(["a"])}, {}, ["subject", "(1,)"]),
        ({"subject": np.array(["a", "b", "c", None], dtype=object)}, {}, ["path", "pickled"]),
    ],
)
def test_bad_files_and_arguments_are_named(save, content, arguments, words):
    with pytest.raises(ValueError) as error:
        load_slices(save(**content), **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_files_that_are_no_npz_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must name an existing file.*nowhere\.npz"):
        load_slices(tmp_path / "nowhere.npz")
    np.save(tmp_path / "array.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"path must name an \.npz file.*array\.npy"):
        load_slices(tmp_path / "array.npy")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ixi_t1_mni_middle.npz", {"size": 64}),
        (
            "brats_multicontrast.npz",
            {"size": 96, "spacing_mm": 2.0, "image": "image_t1", "z_range": (0.6, 0.7)},
        ),
    ],
)
def test_real_slices(name, arguments, data_dir):
    data = load_slices(data_dir / name, **arguments)
    np.testing.assert_array_equal(data.images > 0, data.brain_masks)
    assert data.images.max() <= 1 and data.modality == "T1"
    assert data.has_lesion_masks == ("brats" in name) == data.lesion_masks.any()
    for subject in np.unique(data.subjects):
        of_subject = data.subjects == subject
        assert np.median(data.images[of_subject][data.brain_masks[of_subject]]) == pytest.approx(
            0.4, abs=0.04
        )


def test_crop_to_brain_centres_every_brain_and_keeps_its_pixels():
    images = np.zeros((2, 40, 40), np.float32)
    images[0, 3:13, 20:26] = 0.5
    images[1, 25:40, 0:9] = np.linspace(0.1, 0.9, 15 * 9).reshape(15, 9)
    data = Bunch(images=images, brain_masks=images > 0, subjects=np.array(["a", "b"]))
    cropped = crop_to_brain(data, (20, 12))
    assert cropped.images.shape == cropped.brain_masks.shape == (2, 20, 12)
    for before, after, mask in zip(images, cropped.images, cropped.brain_masks, strict=True):
        np.testing.assert_array_equal(np.sort(before[before > 0]), np.sort(after[after > 0]))
        np.testing.assert_array_equal(mask, after > 0)
        rows, columns = np.nonzero(mask)
        assert abs((rows.min() + rows.max()) - 19) <= 1 and abs((columns.min() + columns.max()) - 11) <= 1
    assert cropped.subjects is data.subjects


def test_crop_to_brain_refuses_to_cut():
    images = np.ones((1, 10, 10), np.float32)
    with pytest.raises(ValueError, match=r"shape must hold every brain, got \(8, 12\).*needs 10"):
        crop_to_brain(Bunch(images=images, brain_masks=images > 0), (8, 12))
