import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from madad.mri.healthy_intensities import CUBE_VOXELS, MIN_SEEN, MIN_TISSUE_CONTRAST, HealthyIntensities
from madad.mri.nifti import read_volume
from madad.mri.registration import AffineRegistration
from madad.mri.volume_preprocessor import PreprocessedVolume

SHAPE = (42, 50, 38)  # no multiples of a cube's edge
HERE = AffineRegistration(np.eye(4), 0.1, 0.97)
BRAIN = np.linalg.norm((np.indices(SHAPE).T - [21, 25, 19]) / [19, 23, 17], axis=-1).T < 1
TISSUE = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SHAPE), 3)
TISSUE = 0.4 + 0.05 * np.sign(TISSUE)  # light, dark


def prepared(tissue=TISSUE, *, brain=BRAIN, registration=HERE, seed=None):
    noise = 0 if seed is None else np.random.default_rng(seed).normal(0, 0.03, SHAPE)
    values = np.where(brain, np.clip(tissue + noise, 1 / 255, 1), 0).astype(np.float32)
    volume = read_volume(nib.Nifti1Image(values, np.eye(4)))
    return PreprocessedVolume(volume, volume, "given", registration)


@pytest.fixture
def healthy():
    intensities = HealthyIntensities()
    for seed in range(5):
        intensities.add(prepared(seed=seed))
    return intensities


def test_one_alone_has_its_own_contrast():
    intensities = HealthyIntensities()
    intensities.add(prepared())
    assert intensities.tissue_contrast(prepared()) == 1


def test_contrast_is_that_of_the_tissue(healthy):
    assert healthy.tissue_contrast(prepared(seed=9)) == pytest.approx(1, abs=0.05)
    assert healthy.tissue_contrast(prepared(0.8 - TISSUE, seed=9)) == pytest.approx(-1, abs=0.05)
    assert healthy.tissue_contrast(prepared(0.3 + 0.25 * TISSUE, seed=9)) == pytest.approx(0.25, abs=0.05)
    flat = healthy.tissue_contrast(prepared(np.full(SHAPE, 0.4), seed=9))
    assert abs(flat) < 0.05 < MIN_TISSUE_CONTRAST


def test_a_lesion_and_dark_fluid_do_not_change_it(healthy):
    lesion = TISSUE.copy()
    lesion[10:20, 20:32, 10:22] = 1.0
    assert healthy.tissue_contrast(prepared(lesion, seed=9)) == pytest.approx(1, abs=0.1)
    fluid = TISSUE.copy()
    fluid[18:26, 15:35, 16:24] = 0.1
    assert healthy.tissue_contrast(prepared(fluid, seed=9)) == pytest.approx(1, abs=0.1)


def test_order_does_not_matter(healthy):
    other = HealthyIntensities()
    for seed in (3, 0, 4, 2, 1):
        other.add(prepared(seed=seed))
    assert other.n == healthy.n
    for name, values in healthy.to_arrays().items():
        np.testing.assert_allclose(other.to_arrays()[name], values, rtol=1e-5, atol=1e-6)


def test_it_comes_back_from_its_arrays_and_can_be_added_to(healthy):
    arrays = {name: np.array(value) for name, value in healthy.to_arrays().items()}
    back = HealthyIntensities.from_arrays(arrays)
    assert back.n == 5
    for name, values in healthy.to_arrays().items():
        np.testing.assert_array_equal(back.to_arrays()[name], values)
    assert back.tissue_contrast(prepared(seed=9)) == healthy.tissue_contrast(prepared(seed=9))
    for intensities in (back, healthy):
        intensities.add(prepared(seed=5))
    np.testing.assert_array_equal(back.total, healthy.total)
    np.testing.assert_array_equal(back.deciles, healthy.deciles)


def test_sums_and_deciles_by_plain_loops(healthy):
    n = CUBE_VOXELS
    total, count = np.zeros((10, 12, 9)), np.zeros((10, 12, 9))
    deciles = []
    for seed in range(5):
        brain = BRAIN.copy()
        brain[:20] &= seed != 0  # half of the first is missing
        values = prepared(brain=brain, seed=seed).volume.values.astype(np.float64)
        deciles.append(np.percentile(values[brain], np.arange(10, 100, 10)))
        for place in np.ndindex(total.shape):
            cube = tuple(slice(n * i, n * i + n) for i in place)
            if brain[cube].all():
                total[place] += values[cube].mean()
                count[place] += 1
    found = HealthyIntensities()
    for seed in range(5):
        brain = BRAIN.copy()
        brain[:20] &= seed != 0
        found.add(prepared(brain=brain, seed=seed))
    np.testing.assert_allclose(found.total, total, rtol=1e-5)
    np.testing.assert_array_equal(found.count, count)
    np.testing.assert_allclose(found.deciles, np.mean(deciles, axis=0), rtol=1e-6)
    assert found.count.max() == 5 and (found.count == 4).any()


def test_without_a_place_in_the_template_only_the_deciles_are_known(healthy):
    own = HealthyIntensities()
    own.add(prepared(registration=None))
    assert own.n == 1 and own.total.size == 0 and own.deciles[4] > 0
    assert own.tissue_contrast(prepared()) is None
    assert healthy.tissue_contrast(prepared(registration=None)) is None


def test_volumes_on_their_own_grids_may_be_registered_to_another_contrast():
    own = HealthyIntensities()
    values = np.zeros((20, 20, 20), np.float32)
    values[4:16, 4:16, 4:16] = 0.4
    small = read_volume(nib.Nifti1Image(values, np.eye(4)))
    own.add(prepared(), in_template=False)
    own.add(PreprocessedVolume(small, small, "given", HERE), in_template=False)
    assert own.n == 2 and own.total.size == 0
    assert own.tissue_contrast(prepared()) is None


def test_too_little_in_common_is_not_known(healthy):
    corner = np.zeros(SHAPE, bool)
    corner[12:20, 20:28, 12:20] = True
    assert healthy.tissue_contrast(prepared(brain=corner)) is None
    # cubes that fewer than three healthy brains have do not count
    halves = HealthyIntensities()
    half = BRAIN.copy()
    half[21:] = False
    for seed in range(MIN_SEEN):
        halves.add(prepared(brain=half, seed=seed))
    halves.add(prepared(seed=8))
    assert halves.tissue_contrast(prepared(brain=BRAIN & ~half)) is None
    assert halves.tissue_contrast(prepared(brain=half)) == pytest.approx(1, abs=0.05)


def test_healthy_brains_of_one_brightness_tell_nothing():
    intensities = HealthyIntensities()
    intensities.add(prepared(np.full(SHAPE, 0.4)))
    assert intensities.tissue_contrast(prepared()) is None
