import sys

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("SimpleITK", reason="registration needs the extra mri")
pytest.importorskip("nilearn", reason="the template ships with nilearn")

import SimpleITK

from madad.mri.registration import AffineRegistration, mni_template, register_affine
from madad.mri.resampling import resample_mask, resample_to


def turned(x_deg, y_deg, z_deg):
    return nib.eulerangles.euler2mat(*np.deg2rad([z_deg, y_deg, x_deg]))


# What registration has to find: a nod of 10 degrees, a shift of 15 mm, a head 5 % smaller than the template.
HIDDEN = nib.affines.from_matvec(turned(10, 0, 0) / 0.95, [8.0, -10.0, 7.5])
SHAPE = (56, 64, 60)
AXES = {
    "upright": np.diag([3.5, 3.5, 3.5]),
    "left-handed": np.array([[-3.5, 0, 0], [0, 3.5, 0], [0, 0, 3.5]]),
    "permuted": np.array([[0, 0, 3.5], [-3.5, 0, 0], [0, 3.5, 0]]),
    "oblique": turned(5, 8, -12) @ np.diag([-3.5, -3.5, 3.5]),
    "sheared": np.array([[3.5, 0.4, 0], [0, 3.2, 0.3], [0.2, 0, 4.0]]),
}


def hidden_brain(axes="upright"):
    """Return the template's brain as a scanner might have seen it: values, affine, brain mask."""
    template, linear = mni_template(), AXES[axes]
    center_mm = nib.affines.apply_affine(np.linalg.inv(HIDDEN), [0, -18, 5])
    affine = nib.affines.from_matvec(linear, center_mm - linear @ (np.array(SHAPE) - 1) / 2)
    back = np.linalg.inv(HIDDEN)
    brain = resample_mask(template.brain_mask, template.affine, SHAPE, affine, back)
    return resample_to(template.values, template.affine, SHAPE, affine, back) * brain, affine, brain


def error_mm(matrix, affine, brain):
    """Return how far the corners of the brain's bounding box are from where they should be, on average."""
    low, high = np.argwhere(brain).min(axis=0), np.argwhere(brain).max(axis=0)
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True)), axis=-1).reshape(-1, 3)
    world = nib.affines.apply_affine(affine, corners)
    apart = nib.affines.apply_affine(matrix, world) - nib.affines.apply_affine(HIDDEN, world)
    return np.linalg.norm(apart, axis=1).mean()


@pytest.mark.parametrize("axes", AXES)
def test_known_map_is_recovered_whatever_the_axes(axes):
    values, affine, brain = hidden_brain(axes)
    assert error_mm(np.eye(4), affine, brain) > 15
    found = register_affine(values, affine, brain)
    assert error_mm(found.matrix, affine, brain) < 1.5
    assert found.overlap > 0.97
    assert found.similarity > 0.2
    assert not found.is_poor


@pytest.mark.parametrize("degrees", [-40, 40])
def test_head_that_nods_is_turned_back(degrees):
    values, affine, brain = hidden_brain()
    nod = nib.affines.from_matvec(turned(degrees, 0, 0))
    assert error_mm(register_affine(values, nod @ affine, brain).matrix @ nod, affine, brain) < 2


def test_contrast_does_not_matter():
    values, affine, brain = hidden_brain()
    fluid_bright = np.where(brain, 500 - 300 * values + 200 * (values < 0.3), 0)
    found = register_affine(fluid_bright, affine, brain)
    assert error_mm(found.matrix, affine, brain) < 1.5
    assert not found.is_poor


def test_lesion_and_noise_do_not_matter():
    values, affine, brain = hidden_brain()
    lesioned = values + np.random.default_rng(0).normal(0, 0.05, SHAPE)
    lesioned[30:38, 30:38, 34:42] = 5
    assert error_mm(register_affine(lesioned, affine, brain).matrix, affine, brain) < 2


def test_result_does_not_depend_on_threads():
    values, affine, brain = hidden_brain()
    ask, say = (
        getattr(SimpleITK.ProcessObject, f"{verb}GlobalDefaultNumberOfThreads") for verb in ("Get", "Set")
    )
    before = ask()
    try:
        matrices = []
        for n in (1, 3):
            say(n)
            matrices.append(register_affine(values, affine, brain).matrix)
    finally:
        say(before)
    np.testing.assert_array_equal(matrices[0], matrices[1])


def test_head_without_a_mask_comes_to_lie_on_the_template():
    values, affine, brain = hidden_brain()
    template = mni_template()
    place = np.moveaxis(np.indices(SHAPE), 0, -1)
    at_mm = nib.affines.apply_affine(HIDDEN @ affine, place)
    radius = np.linalg.norm((at_mm - [0, -18, 8]) / [78, 98, 82], axis=-1)
    scalp = (radius > 1.08) & (radius < 1.2) & ~brain
    head = values * template.values.max() + 1.2 * scalp
    found = register_affine(head, affine)
    assert found.overlap is None
    assert error_mm(found.matrix, affine, brain) < 6
    assert not found.is_poor


@pytest.mark.parametrize("degrees", [90, 180])
def test_brain_on_its_nose_or_upside_down_is_poor(degrees):
    values, affine, brain = hidden_brain()
    assert register_affine(values, nib.affines.from_matvec(turned(degrees, 0, 0)) @ affine, brain).is_poor


def test_what_cannot_be_registered_is_poor():
    values, affine, _ = hidden_brain()
    speck = np.zeros(SHAPE, dtype=bool)
    speck[30, 30, 30] = True
    for found in (register_affine(values, affine, speck), register_affine(speck, affine)):
        assert found.is_poor
        assert np.isfinite(found.matrix).all()


@pytest.mark.parametrize(
    ("similarity", "overlap", "is_poor"),
    [(0.06, 0.93, False), (0.04, 0.93, True), (0.06, 0.91, True), (0.06, None, False), (0.04, None, True)],
)
def test_limits_of_poor(similarity, overlap, is_poor):
    assert AffineRegistration(np.eye(4), similarity, overlap).is_poor is is_poor


def test_template_is_read_only_and_loaded_once():
    template = mni_template()
    assert mni_template() is template
    assert 1.7 < template.brain_mask.sum() * abs(np.linalg.det(template.affine)) / 1e6 < 2.0
    with pytest.raises(ValueError, match="read-only"):
        template.values[0, 0, 0] = 1


def test_bad_arguments_are_named():
    values, affine, brain = hidden_brain()
    with pytest.raises(ValueError, match=r"values must show a brain, got 3 everywhere"):
        register_affine(np.full(SHAPE, 3.0), affine)
    with pytest.raises(ValueError, match=r"affine must .* at most 1000 mm, got 1\d{5} mm.*unit"):
        register_affine(values, 1000 * affine, brain)
    with pytest.raises(ValueError, match=r"brain_mask must have the shape of values, got \(2, 2, 2\)"):
        register_affine(values, affine, np.ones((2, 2, 2)))


def test_missing_packages_name_the_extra(monkeypatch):
    values, affine, brain = hidden_brain()
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ImportError, match=r'SimpleITK.*pip install "madad\[mri\]"'):
        register_affine(values, affine, brain)
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(ImportError, match=r'nilearn.*pip install "madad\[mri\]"'):
        mni_template.__wrapped__()


@pytest.mark.parametrize("contrast", ["t1", "flair"])
def test_real_patient_overlaps_with_the_template(data_dir, contrast):
    image = nib.load(data_dir / "volumes" / f"lesion_Brats18_TCIA10_639_1_{contrast}.nii.gz")
    values = image.get_fdata(dtype=np.float32)
    found = register_affine(values, image.affine, values > 0)
    assert found.overlap > 0.95
    assert not found.is_poor
