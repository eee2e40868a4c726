"""Slices of an array and back, without files; `test_slices.py` has the volumes."""

import numpy as np
import pytest

from madad.mri.slice_geometry import AXES, SliceGeometry, as_frame

VALUES = np.random.default_rng(0).uniform(0, 1, (5, 6, 7)).astype(np.float32)


def geometry(plane="axial", shape=None, starts=(0.0, 0.0, 0.0), steps=(1.0, 1.0, 1.0)):
    shape = tuple(VALUES.shape[axis] for axis in AXES[plane]) if shape is None else shape
    positions = tuple(starts[0] + steps[0] * np.arange(shape[0]))
    return SliceGeometry(plane, VALUES.shape, shape, starts, steps, positions)


@pytest.mark.parametrize(
    ("plane", "voxel", "pixel"),
    [  # right, front, up -> slice, row from the top, column
        ("axial", (1, 2, 3), (3, 3, 1)),
        ("coronal", (1, 2, 3), (2, 3, 1)),
        ("sagittal", (1, 2, 3), (1, 3, 2)),
    ],
)
def test_where_a_voxel_goes(plane, voxel, pixel):
    marked = np.zeros(VALUES.shape, bool)
    marked[voxel] = True
    assert [tuple(place) for place in np.argwhere(as_frame(marked, plane))] == [pixel]
    cut = geometry(plane).to_slices(marked)
    assert cut.dtype == bool and [tuple(place) for place in np.argwhere(cut)] == [pixel]


@pytest.mark.parametrize("plane", AXES)
def test_copies_come_back_exactly(plane):
    whole = geometry(plane)
    assert whole.is_copy and whole.n_slices == VALUES.shape[AXES[plane][0]]
    np.testing.assert_array_equal(whole.to_volume(whole.to_slices(VALUES)), VALUES)
    labels = (10 * VALUES).astype(np.int16)
    back = whole.to_volume(whole.to_slices(labels))
    assert back.dtype == np.int16
    np.testing.assert_array_equal(back, labels)


def test_padding_is_zero_and_is_cut_off_again():
    padded = geometry(shape=(7, 10, 9), starts=(0.0, -2.0, -2.0))
    slices = padded.to_slices(VALUES)
    assert padded.is_copy and slices.shape == (7, 10, 9)
    assert not slices[:, :2].any() and not slices[:, :, 7:].any()
    np.testing.assert_array_equal(padded.to_volume(slices), VALUES)


def test_finer_pixels_lie_on_the_line_between_voxels():
    finer = geometry(shape=(7, 11, 9), steps=(1.0, 0.5, 0.5))
    slices = finer.to_slices(VALUES)
    assert not finer.is_copy
    frame = as_frame(VALUES, "axial")
    np.testing.assert_allclose(slices[:, ::2, ::2], frame, atol=1e-6)
    np.testing.assert_allclose(slices[:, 1::2, ::2], (frame[:, :-1] + frame[:, 1:]) / 2, atol=1e-6)


def test_resampling_does_not_mix_brain_and_background():
    values, brain = np.zeros(VALUES.shape, np.float32), np.zeros(VALUES.shape, bool)
    values[1:4, 1:5], brain[1:4, 1:5] = 0.7, True
    slices = geometry(shape=(7, 4, 4), starts=(0.0, 0.25, 0.25), steps=(1.0, 1.4, 1.4)).to_slices(
        values, brain
    )
    assert set(np.round(np.unique(slices), 5)) == {0.0, np.float32(0.7).round(5)}


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"values must have the shape of the volume, got \(5, 6, 6\)"):
        geometry().to_slices(VALUES[..., :6])
    with pytest.raises(ValueError, match=r"brain_mask must have the shape"):
        geometry(steps=(1.0, 0.5, 1.0)).to_slices(VALUES, VALUES[..., :6] > 0)
    with pytest.raises(ValueError, match=r"maps must have the shape of the slices, got \(6, 6, 5\)"):
        geometry().to_volume(np.zeros((6, 6, 5)))
