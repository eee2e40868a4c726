import itertools

import nibabel as nib
import numpy as np
import pytest

from madad.mri.nifti import read_volume, write_like
from madad.mri.registration import AffineRegistration
from madad.mri.slice_geometry import AXES
from madad.mri.volume_preprocessor import PreprocessedVolume, VolumePreprocessor
from madad.mri.volume_slicer import VolumeSlicer
from madad.testing import tiny_detector
from madad.volumes.prediction import find_components, predict_volume, slices_of_contrasts


class Mirror:
    """A detector that returns what it is given: the lesion of an image is its map."""

    map_threshold_ = 0.8

    def predict_maps(self, images, *, brain_mask):
        return np.where(brain_mask, images, 0)


GRIDS = {
    "plain": np.diag([1.0, 1, 1]),
    "left-handed": np.diag([-1.0, 1, 1]),
    "LPS": np.diag([-1.0, -1, 1]),
    "permuted": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "anisotropic": np.diag([0.8, 0.8, 2.5]),
    "oblique": nib.eulerangles.euler2mat(z=0.2, x=0.3) @ np.diag([-1.0, 1, 1.5]),
}


def scan(linear, shape=(24, 28, 20)):
    """A brain of 0.4 in which a lesion of 1 marks some voxels of the file."""
    values = np.zeros(shape, np.float32)
    values[3:-3, 3:-3, 3:-3] = 0.4
    values[6:10, 12:17, 8:12] = 1.0
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = [-20, 15, 7]
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, 2)
    return image


def prepared(image):
    brain = read_volume(image).values > 0
    return VolumePreprocessor(template=False, center=None).preprocess(image, brain)


@pytest.mark.parametrize(("plane", "grid"), list(zip(itertools.cycle(AXES), GRIDS, strict=False)))
def test_a_lesion_of_the_file_is_in_the_files_map_at_the_same_place(plane, grid, tmp_path):
    image = scan(GRIDS[grid])
    volume = prepared(image)
    slicer = VolumeSlicer(plane, spacing_mm=None).fit([volume.volume])
    prediction = predict_volume(Mirror(), volume, slicer)
    maps, labels = prediction.on_source()
    write_like(tmp_path / "map.nii.gz", maps, volume.source)
    write_like(tmp_path / "labels.nii.gz", labels, volume.source, dtype=np.uint8)
    lesion = np.asarray(image.dataobj) == 1
    written = nib.load(tmp_path / "map.nii.gz")
    np.testing.assert_allclose(np.asarray(written.dataobj), np.asarray(image.dataobj), atol=1e-6)
    np.testing.assert_array_equal(written.affine, image.affine)
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "labels.nii.gz").dataobj) == 1, lesion)
    (component,) = prediction.components
    place = image.affine @ [*np.argwhere(lesion).mean(axis=0), 1]
    np.testing.assert_allclose(component.center_mm, place[:3], atol=1e-4)
    assert component.volume_ml == pytest.approx(lesion.sum() * abs(np.linalg.det(GRIDS[grid])) / 1000)
    assert component.peak == 1


def test_through_another_world_and_back():
    image = scan(GRIDS["plain"])
    source = read_volume(image)
    matrix = np.diag([1.25, 1.25, 1.25, 1.0])  # the template is larger
    matrix[:3, 3] = [3, -2, 5]
    shape, affine = (40, 46, 36), np.eye(4)
    affine[:3, 3] = (matrix @ [-20, 15, 7, 1])[:3]
    registration = AffineRegistration(matrix, 1.0, 1.0)
    empty = read_volume(nib.Nifti1Image(np.zeros(shape, np.float32), affine))
    there = PreprocessedVolume(empty, source, "given", registration).from_source(source.values)
    volume = PreprocessedVolume(read_volume(nib.Nifti1Image(there, affine)), source, "given", registration)
    slicer = VolumeSlicer().fit([volume.volume])
    prediction = predict_volume(Mirror(), volume, slicer, threshold=0.7)
    maps, labels = prediction.on_source()
    lesion = source.values == 1
    assert maps.shape == source.shape and maps[lesion].min() > 0.6
    assert 2 * (lesion & (labels == 1)).sum() / (lesion.sum() + (labels == 1).sum()) > 0.9
    (component,) = prediction.components
    assert component.volume_ml == pytest.approx(lesion.sum() / 1000, rel=0.15)  # of the scan
    expected = matrix @ source.affine @ [*np.argwhere(lesion).mean(axis=0), 1]
    np.testing.assert_allclose(component.center_mm, expected[:3], atol=0.5)


def test_components_are_numbered_by_their_peaks():
    values = np.zeros((12, 12, 12), np.float32)
    values[1:4, 1:4, 1:4] = 0.5
    values[6:8, 6:8, 6:8] = 0.9
    values[8, 8, 8] = 0.7  # touches the last one at a corner
    values[11, 0, 0] = 0.6
    labels, components = find_components(values, 0.5, np.diag([2.0, 2, 2, 1]))
    assert [component.label for component in components] == [1, 2, 3]
    assert [round(component.peak, 3) for component in components] == [0.9, 0.6, 0.5]
    assert labels[8, 8, 8] == 1 and labels[11, 0, 0] == 2 and labels[2, 2, 2] == 3
    assert components[0].volume_ml == pytest.approx(9 * 8 / 1000)
    labels, components = find_components(values, 0.5, np.diag([2.0, 2, 2, 1]), min_volume_ml=0.05)
    assert len(components) == 2 and labels[11, 0, 0] == 0 and labels.max() == 2
    assert find_components(values, 1.1, np.eye(4))[1] == []
    labels, components = find_components(np.zeros((3, 3, 3)), 0.0, np.eye(4))
    assert not labels.any() and components == []  # zero is never anomalous


def test_filters_across_slices():
    class Spike:
        map_threshold_ = 0.5

        def predict_maps(self, images, *, brain_mask):
            maps = np.zeros_like(images)
            maps[7, 6:12, 6:12] = 1
            return maps

    volume = prepared(scan(GRIDS["plain"]))
    slicer = VolumeSlicer(spacing_mm=None).fit([volume.volume])
    plain = predict_volume(Spike(), volume, slicer)
    assert plain.score < 0 and len(plain.components) == 1
    assert predict_volume(Spike(), volume, slicer, median_slices=3).components == []
    smooth = predict_volume(Spike(), volume, slicer, smoothing_mm=2.0)
    assert 0 < smooth.anomaly_map.max() < 0.3
    assert smooth.anomaly_map.sum() == pytest.approx(plain.anomaly_map.sum(), rel=0.1)


def test_with_a_real_detector():
    rng = np.random.default_rng(0)
    images = rng.uniform(0.2, 0.9, (12, 32, 32)).astype(np.float32)
    detector = tiny_detector(random_state=0).fit(images)
    volume = prepared(scan(GRIDS["plain"]))
    slicer = VolumeSlicer(spacing_mm=None, shape=(32, 32)).fit([volume.volume])
    prediction = predict_volume(detector, volume, slicer)
    slices, masks, _ = slicer.slices_of(volume.volume, volume.brain_mask)
    as_sample = slices[None, None]
    assert prediction.score == pytest.approx(
        float(detector.score_samples(as_sample, brain_mask=masks[None])[0]), rel=1e-5
    )
    assert not prediction.anomaly_map[~volume.brain_mask].any()


@pytest.mark.parametrize(
    ("name", "value"),
    [("median_slices", 2), ("median_slices", 0), ("smoothing_mm", -1.0), ("min_volume_ml", np.nan)],
)
def test_parameters_out_of_range_are_named(name, value):
    volume = prepared(scan(GRIDS["plain"]))
    slicer = VolumeSlicer(spacing_mm=None).fit([volume.volume])
    with pytest.raises(ValueError, match=f"{name} must"):
        predict_volume(Mirror(), volume, slicer, **{name: value})


def contrasts(grid="oblique"):
    """A scan and two others of it, on one grid."""
    image = scan(GRIDS[grid])
    others = [nib.Nifti1Image(factor * image.get_fdata(), image.affine) for factor in (0.5, 0.25)]
    brain = read_volume(image).values > 0
    return VolumePreprocessor(template=False, center=None).preprocess_contrasts([image, *others], brain)


@pytest.mark.parametrize(("plane", "spacing_mm"), list(zip(AXES, [None, 1.3, 1.3], strict=True)))
def test_contrasts_are_channels_in_order(plane, spacing_mm):
    volumes = contrasts("anisotropic" if spacing_mm else "permuted")
    slicer = VolumeSlicer(plane, spacing_mm=spacing_mm).fit([volumes[0].volume])
    images, masks, geometry = slices_of_contrasts(slicer, volumes)
    assert images.shape == (len(masks), 3, *slicer.shape_) and images.dtype == np.float32
    for channel, volume in enumerate(volumes):
        alone, its_masks, its_geometry = slices_of_contrasts(slicer, [volume])
        np.testing.assert_array_equal(images[:, channel], alone)
        np.testing.assert_array_equal(masks, its_masks)
        assert geometry == its_geometry
    np.testing.assert_allclose(images[:, 2], 0.25 * images[:, 0], rtol=1e-5)
    turned = slices_of_contrasts(slicer, volumes[::-1])[0]
    np.testing.assert_array_equal(turned, images[:, ::-1])


def test_a_map_of_contrasts_is_on_the_grid_of_the_first():
    class OfChannel:
        map_threshold_ = 0.3

        def __init__(self, channel):
            self.channel = channel

        def predict_maps(self, images, *, brain_mask):
            return np.where(brain_mask, images[:, self.channel], 0)

    volumes = contrasts()
    slicer = VolumeSlicer(spacing_mm=None).fit([volumes[0].volume])
    for channel, volume in enumerate(volumes):
        prediction = predict_volume(OfChannel(channel), volumes, slicer)
        np.testing.assert_allclose(prediction.anomaly_map, volume.volume.values, atol=1e-6)
        assert prediction.preprocessed is volumes[0]


def test_contrasts_on_different_grids_are_refused():
    first, second = contrasts()[0], contrasts("plain")[1]
    slicer = VolumeSlicer(spacing_mm=None).fit([first.volume])
    for call in (
        lambda: slices_of_contrasts(slicer, [first, second]),
        lambda: predict_volume(Mirror(), [first, second], slicer),
    ):
        with pytest.raises(ValueError, match="volumes must lie on one grid, got .* mm between corners"):
            call()
