import sys

import numpy as np
import pytest

pytest.importorskip("PIL", reason="pillow reads PNG files")

from PIL import Image

from madad.datasets import load_png_slices


def arrays(shape=(48, 40)):
    """A box-shaped brain with a brighter lesion, and grey around that is no brain."""
    brain = np.zeros(shape, np.uint8)
    brain[8:40, 6:34] = 255
    lesion = np.zeros(shape, np.uint8)
    lesion[12:18, 20:28] = 255
    image = np.where(lesion, 150, np.where(brain, 100, 30)).astype(np.uint8)
    return {"T1": image, "brainmask": brain, "segmentation": lesion}


@pytest.fixture
def save(tmp_path):
    def write(stem, without=(), mode="L", shape=(48, 40), **changes):
        for kind, array in (arrays(shape) | changes).items():
            if kind not in without:
                Image.fromarray(array).convert(mode).save(tmp_path / f"{stem}-{kind}.png")
        return tmp_path

    return write


def test_layout_of_the_original_code(save):
    save("sub-b_1-slice_10")
    save("sub-b_1-slice_9", T1=(arrays()["T1"] // 2).astype(np.uint8))
    root = save("a-slice_077", T2=arrays()["T1"])
    (root / "a-slice_077-T1.png.txt").touch()
    data = load_png_slices(root, modality="T1")
    assert data.subjects.tolist() == ["a", "sub-b_1", "sub-b_1"] and data.z_index.tolist() == [77, 9, 10]
    for image, brain, lesion in zip(data.images, data.brain_masks, data.lesion_masks, strict=True):
        np.testing.assert_array_equal(brain, arrays()["brainmask"] > 0)
        np.testing.assert_array_equal(lesion, arrays()["segmentation"] > 0)
        np.testing.assert_array_equal(image > 0, brain)
    np.testing.assert_allclose(data.images[0][data.lesion_masks[0]], 0.6, rtol=1e-6)
    assert data.images[2].max() == pytest.approx(2 * data.images[1].max())  # one scale per subject
    assert data.images.dtype == np.float32 and data.has_lesion_masks and data.modality == "T1"
    assert data.z_frac is None and data.spacing_mm is None


def test_healthy_folders_need_no_segmentation(save):
    data = load_png_slices(save("a-slice_1", without=("segmentation",)), modality="T1", center=None)
    assert not data.has_lesion_masks and not data.lesion_masks.any()
    np.testing.assert_allclose(data.images[data.images > 0.5], 150 / 255, rtol=1e-6)


def test_size_brings_slices_together_and_stretches_none(save):
    save("a-slice_1")
    root = save("b-slice_1", shape=(96, 96))
    with pytest.raises(ValueError, match=r"size must be given .*\(48, 40\).*'b', \(96, 96\)"):
        load_png_slices(root, modality="T1")
    data = load_png_slices(root, modality="T1", size=24)
    assert data.images.shape == (2, 24, 24)
    rows, columns = np.nonzero(data.brain_masks[0])
    assert np.ptp(rows) + 1 == 16 and np.ptp(columns) + 1 == 14


def test_a_lesion_counts_inside_the_brain_only(save):
    lesion = np.full((48, 40), 1, np.uint8)  # labels as well as 255
    data = load_png_slices(save("a-slice_1", segmentation=lesion), modality="T1")
    np.testing.assert_array_equal(data.lesion_masks, data.brain_masks)


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        ({}, {"modality": "FLAIR"}, ["root", "-FLAIR.png", "'T1'", "modality"]),
        ({}, {"modality": "brainmask"}, ["root", "-brainmask.png", "modality"]),
        ({"without": ["brainmask"]}, {}, ["brainmask", "'a-slice_1-T1.png'", "'a-slice_1-brainmask.png'"]),
        ({"mode": "RGB"}, {}, ["8-bit grey", "'RGB'", "a-slice_1-T1.png", "'L'"]),
        (
            {"brainmask": np.ones((9, 9), np.uint8)},
            {},
            ["brainmask", "(9, 9)", "(48, 40)", "'a'", "one grid"],
        ),
        ({"segmentation": np.ones((9, 9), np.uint8)}, {}, ["segmentation", "(9, 9)", "(48, 40)", "'a'"]),
        ({}, {"size": 24.5}, ["size", "24.5"]),
        ({}, {"center": "mean"}, ["center", "'mean'"]),
    ],
)
def test_bad_folders_and_arguments_are_named(save, content, arguments, words):
    with pytest.raises(ValueError) as error:
        load_png_slices(save("a-slice_1", **content), **{"modality": "T1"} | arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_gaps_in_a_folder_are_named(save, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"root must name an existing folder, got .*nowhere"):
        load_png_slices(tmp_path / "nowhere", modality="T1")
    save("a-slice_1")
    root = save("a-slice_2", without=("segmentation",))
    with pytest.raises(ValueError, match=r"segmentation for each.*'a-slice_2-segmentation.png', black"):
        load_png_slices(root, modality="T1")
    save("a-slice_2", shape=(50, 50))
    with pytest.raises(
        ValueError, match=r"one size per subject, got \[\(48, 40\), \(50, 50\)\] for 'a' \(T1\)"
    ):
        load_png_slices(root, modality="T1")


def test_without_pillow_the_extra_is_named(save, monkeypatch):
    root = save("a-slice_1")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pillow must be installed .*madad\[plot\]"):
        load_png_slices(root, modality="T1")
