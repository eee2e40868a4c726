import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from sklearn.base import clone

from madad.mri.nifti import read_volume, write_like
from madad.mri.registration import mni_template
from madad.mri.resampling import resample_to
from madad.mri.volume_preprocessor import VolumePreprocessor
from madad.mri.volume_slicer import VolumeSlicer


@pytest.fixture
def stripped():
    """A stripped brain of 1 litre: an ellipsoid with two tissues, on an oblique left-handed grid."""
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (40, 48, 36)], indexing="ij"), axis=-1)
    place = (grid - [20, 24, 18]) / [13, 17, 12]
    radius = np.linalg.norm(place, axis=-1)
    values = np.where(radius < 1, 300.0, 0.0) + np.where(radius < 0.6, 100.0, 0.0)
    turn = nib.eulerangles.euler2mat(z=0.1, x=0.05)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-4.5, 4.5, 4.5])
    affine[:3, 3] = -affine[:3, :3] @ [20, 24, 18]
    return nib.Nifti1Image(values.astype(np.int16), affine)


def test_without_template_it_stays_on_its_grid(stripped):
    prepared = VolumePreprocessor(template=False).preprocess(stripped)
    source = read_volume(stripped)
    assert prepared.registration is None and prepared.brain_made_by == "stripped"
    np.testing.assert_array_equal(prepared.brain_mask, source.values > 0)
    inside = prepared.volume.values[prepared.brain_mask]
    assert np.median(inside) == pytest.approx(0.4)
    assert inside.max() == pytest.approx(0.4 * 4 / 3, rel=1e-5)
    np.testing.assert_array_equal(prepared.to_source(prepared.volume.values), prepared.volume.values)


def test_a_given_mask_is_the_brain(stripped):
    mask = np.zeros(stripped.shape, np.uint8)
    mask[12:28, 12:36, 10:26] = 1
    as_image = nib.Nifti1Image(mask, stripped.affine)
    preprocessor = VolumePreprocessor(template=False, center=None)
    prepared = preprocessor.preprocess(stripped, as_image)
    assert prepared.brain_made_by == "given"
    brain = (read_volume(as_image).values > 0) & (read_volume(stripped).values > 0)
    np.testing.assert_array_equal(prepared.brain_mask, brain)
    other = nib.Nifti1Image(mask, np.diag([3.0, 3, 3, 1]))
    with pytest.raises(ValueError, match="volumes must lie on one grid"):
        preprocessor.preprocess(stripped, other)
    with pytest.raises(ValueError, match="one entry for each of 1 volumes, got 2"):
        preprocessor.transform([stripped], brain_masks=[None, None])


def test_intensities_can_stay(stripped):
    prepared = VolumePreprocessor(template=False, center=None).preprocess(stripped)
    np.testing.assert_array_equal(prepared.volume.values, read_volume(stripped).values)


def tilted_brain():
    """The template's brain on an oblique, left-handed grid of 3 mm."""
    template = mni_template()
    affine = np.eye(4)
    affine[:3, :3] = nib.eulerangles.euler2mat(z=0.1, x=0.15) @ np.diag([-3.0, 3, 3])
    affine[:3, 3] = [5, -20, 10] - affine[:3, :3] @ [32, 38, 32]
    values = np.where(template.brain_mask, 1000 * template.values, 0)
    values = resample_to(values, template.affine, (64, 76, 64), affine)
    return nib.Nifti1Image(values, affine)


@pytest.fixture(scope="module")
def two_contrasts():
    """Two contrasts of `tilted_brain` on the template."""
    pytest.importorskip("SimpleITK", reason="registration needs the extra mri")
    pytest.importorskip("nilearn", reason="the template comes with nilearn")
    scan = tilted_brain()
    return VolumePreprocessor().preprocess_contrasts([scan, other_contrast(scan)])


def test_on_the_template_and_back(tmp_path, two_contrasts):
    scan = tilted_brain()
    prepared = VolumePreprocessor().preprocess(scan)
    assert prepared.volume.shape == (197, 233, 189) and prepared.registration.overlap > 0.95
    inside = mni_template().brain_mask & prepared.brain_mask
    expected = mni_template().values[inside]
    assert np.corrcoef(prepared.volume.values[inside], expected)[0, 1] > 0.8
    assert np.median(prepared.volume.values[prepared.brain_mask]) == pytest.approx(0.4, abs=1e-3)
    lesion = np.zeros(prepared.source.shape, bool)
    lesion[17:24, 30:38, 26:34] = True
    there = prepared.from_source(lesion)
    back = prepared.to_source(there.astype(np.float32)) > 0.5
    assert 2 * (back & lesion).sum() / (back.sum() + lesion.sum()) > 0.9
    # through slices of the template's space and a file on the grid of the source
    slicer = VolumeSlicer(spacing_mm=2.0).fit([prepared.volume])
    _, _, geometry = slicer.slices_of(prepared.volume)
    maps = geometry.to_slices(there.astype(np.float32))
    write_like(tmp_path / "map.nii.gz", prepared.to_source(geometry.to_volume(maps)), prepared.source)
    written = nib.load(tmp_path / "map.nii.gz")
    np.testing.assert_allclose(written.affine, scan.affine, atol=1e-5)
    found = read_volume(written).values > 0.5
    assert 2 * (found & lesion).sum() / (found.sum() + lesion.sum()) > 0.85
    again, _ = two_contrasts
    np.testing.assert_array_equal(again.volume.values, prepared.volume.values)


def test_it_is_an_estimator(stripped):
    preprocessor = clone(VolumePreprocessor(template=False, bias_field=False)).set_params(target=0.3)
    (prepared,) = preprocessor.fit([stripped]).transform([stripped])
    assert np.median(prepared.volume.values[prepared.brain_mask]) == pytest.approx(0.3)


def test_what_cannot_be_scaled_names_its_file(stripped, tmp_path):
    values = stripped.get_fdata() - 1000.0
    nib.save(nib.Nifti1Image(values, stripped.affine), tmp_path / "low.nii")
    mask = np.ones(read_volume(stripped).shape, bool)
    with pytest.raises(ValueError, match=r"images must have a positive median .* subject '.*low\.nii'"):
        VolumePreprocessor(template=False).preprocess(tmp_path / "low.nii", mask)


# Contrasts of one subject


MOVED = nib.affines.from_matvec(nib.eulerangles.euler2mat(z=0.12, y=-0.08, x=0.1), [7.0, -9.0, 5.0])


def other_contrast(scan):
    """The same grid, other intensities, also where there was none."""
    return nib.Nifti1Image(700 - 0.5 * scan.get_fdata(), scan.affine)


def moved_brain(shape=(52, 80, 40)):
    """The template's brain with light and dark exchanged, turned by `MOVED`, on its own grid of 35 mm^3."""
    template = mni_template()
    affine = MOVED @ nib.affines.from_matvec(np.diag([3.5, 2.5, 4.0]), [-85, -120, -70])
    values = np.where(template.brain_mask, 1100 - 1000 * template.values, 0)
    return nib.Nifti1Image(resample_to(values, template.affine, shape, affine, MOVED), affine)


def test_contrasts_on_one_grid_share_brain_and_place(stripped):
    first, second = VolumePreprocessor(template=False).preprocess_contrasts(
        [stripped, other_contrast(stripped)]
    )
    np.testing.assert_array_equal(second.brain_mask, first.brain_mask)
    assert second.registration is None and second.brain_made_by == first.brain_made_by == "stripped"
    np.testing.assert_array_equal(
        first.volume.values, VolumePreprocessor(template=False).preprocess(stripped).volume.values
    )
    inside = first.brain_mask
    expected = read_volume(other_contrast(stripped)).values[inside]
    np.testing.assert_allclose(
        second.volume.values[inside], np.clip(0.4 * expected / np.median(expected), 1 / 255, 1), rtol=1e-5
    )


def test_contrasts_on_one_grid_have_one_matrix(two_contrasts):
    first, second = two_contrasts
    assert second.registration is first.registration
    np.testing.assert_array_equal(second.brain_mask, first.brain_mask)
    np.testing.assert_array_equal(second.volume.affine, first.volume.affine)
    inside = first.brain_mask
    assert np.corrcoef(first.volume.values[inside], second.volume.values[inside])[0, 1] < -0.95


@pytest.mark.parametrize("template", [False, True])
def test_another_grid_is_registered_to_the_first(template):
    pytest.importorskip("SimpleITK", reason="registration needs the extra mri")
    pytest.importorskip("nilearn", reason="the template comes with nilearn")
    first, second = VolumePreprocessor(template=template).preprocess_contrasts(
        [tilted_brain(), moved_brain()]
    )
    np.testing.assert_array_equal(second.brain_mask, first.brain_mask)
    np.testing.assert_array_equal(second.volume.affine, first.volume.affine)
    assert (first.registration is None) == (not template) and second.registration.overlap > 0.95
    # voxels of the second are where they were before it moved
    matrix = second.registration.matrix
    if template:
        matrix = np.linalg.inv(first.registration.matrix) @ matrix
    world = nib.affines.apply_affine(second.source.affine, np.argwhere(second.source.values > 0))
    before = nib.affines.apply_affine(np.linalg.inv(MOVED), world)
    apart_mm = np.linalg.norm(nib.affines.apply_affine(matrix, world) - before, axis=1)
    assert np.linalg.norm(world - before, axis=1).mean() > 10
    assert apart_mm.max() < 1.5
    deep = ndimage.binary_erosion(first.brain_mask, iterations=5 if template else 2)
    values, others = first.volume.values, second.volume.values
    assert np.corrcoef(values[deep], others[deep])[0, 1] < -0.9
    border = first.brain_mask & ~ndimage.binary_erosion(first.brain_mask)
    assert np.median(others[border]) > np.median(others[deep])  # fluid, and nothing of the background
    # what is drawn on the second
    lesion = np.zeros(second.source.shape, bool)
    lesion[20:32, 30:46, 14:22] = True
    there = second.from_source(lesion)
    place = first.volume.affine @ [*np.argwhere(there).mean(axis=0), 1]
    if template:
        place = np.linalg.inv(first.registration.matrix) @ place
    expected = np.linalg.inv(MOVED) @ second.source.affine @ [*np.argwhere(lesion).mean(axis=0), 1]
    np.testing.assert_allclose(place, expected, atol=1.5)
    back = second.to_source(there)
    assert 2 * (back & lesion).sum() / (back.sum() + lesion.sum()) > 0.85


@pytest.mark.parametrize(
    ("template", "slices", "message"),
    [
        (False, slice(0, 18), r"show 80% of the brain, got 3\d% in .*slab\.nii"),
        (True, slice(0, 18), r"show 80% of the brain, got 3\d% in .*slab\.nii"),
        (False, slice(20, 32), r"show the same brain, got .*slab\.nii, which fits .* when stretched 1\.\d\d"),
    ],
)
def test_a_contrast_that_shows_too_little_is_refused(template, slices, message, tmp_path):
    pytest.importorskip("SimpleITK", reason="registration needs the extra mri")
    pytest.importorskip("nilearn", reason="the template comes with nilearn")
    slab = moved_brain().slicer[:, :, slices]
    nib.save(slab, tmp_path / "slab.nii")
    with pytest.raises(ValueError, match=f"volumes must {message}.*Leave this contrast out"):
        VolumePreprocessor(template=template).preprocess_contrasts([tilted_brain(), tmp_path / "slab.nii"])
