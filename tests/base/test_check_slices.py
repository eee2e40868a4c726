import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from madad.base.check_slices import as_numpy, check_slices
from madad.base.slice_stack import ROWS_PER_CHECK

RNG = np.random.default_rng(0)
X3 = RNG.random((5, 4, 6)).astype(np.float32)
X4 = RNG.random((5, 2, 4, 6)).astype(np.float32)
ALL = np.arange(5)


# Layouts


def test_slices_get_one_channel():
    stack = check_slices(X3)
    assert len(stack) == 5 and stack.image_shape == (1, 4, 6) and not stack.is_flat
    np.testing.assert_array_equal(stack.images(ALL), X3[:, None])
    assert stack.images(ALL).dtype == np.float32


def test_channels_stay():
    stack = check_slices(X4, image_shape=(2, 4, 6))
    assert stack.image_shape == (2, 4, 6)
    np.testing.assert_array_equal(stack.images([3, 0]), X4[[3, 0]])


@pytest.mark.parametrize("image_shape, X", [((4, 6), X3), ((1, 4, 6), X3), ((2, 4, 6), X4), ([4, 6], X3)])
def test_flat_rows_are_folded_by_image_shape(image_shape, X):
    stack = check_slices(X.reshape(5, -1), image_shape=image_shape)
    assert stack.is_flat
    np.testing.assert_array_equal(stack.images(ALL), X.reshape(5, -1, 4, 6))


def test_flat_rows_of_a_square_number_are_folded_to_that_square():
    X = RNG.random((3, 25), np.float32)
    np.testing.assert_array_equal(check_slices(X).images([0, 1, 2]), X.reshape(3, 1, 5, 5))


@pytest.mark.parametrize("n_features, side", [(1, 1), (2, 2), (24, 5), (26, 6)])
def test_other_flat_rows_are_padded_with_background_to_the_next_square(n_features, side):
    X = RNG.random((3, n_features), np.float32) + 0.0
    stack = check_slices(X)
    rows = stack.images([0, 1, 2]).reshape(3, -1)
    assert stack.image_shape == (1, side, side)
    np.testing.assert_array_equal(rows[:, :n_features], X)
    assert not rows[:, n_features:].any()
    assert not stack.brain([0, 1, 2]).reshape(3, -1)[:, n_features:].any()


def test_padding_is_background_in_any_range():
    X = 100 + RNG.random((3, 7))
    stack = check_slices(X, intensity_range=(100, 101))
    rows = stack.images([0, 1, 2]).reshape(3, -1)
    np.testing.assert_allclose(rows[:, :7], X - 100, atol=1e-6)
    np.testing.assert_array_equal(rows[:, 7:], 0)


# Types and ranges


@pytest.mark.parametrize("dtype, largest", [(np.uint8, 255), (np.uint16, 65535)])
def test_unsigned_integers_have_the_range_of_their_type(dtype, largest):
    X = RNG.integers(0, largest + 1, (5, 4, 6)).astype(dtype)
    X[0, 0, 0] = largest
    images = check_slices(X).images(ALL)
    np.testing.assert_allclose(images[:, 0], X.astype(np.float64) / largest, rtol=1e-6)
    assert images.max() == 1


def test_an_explicit_range_holds_for_unsigned_integers_too():
    X = RNG.integers(0, 101, (5, 4, 6)).astype(np.uint8)
    images = check_slices(X, intensity_range=(0, 100)).images(ALL)
    np.testing.assert_allclose(images[:, 0], X / 100, rtol=1e-6)
    with pytest.raises(ValueError, match=r"X must lie in 0\.\.50, got values from \d+ to \d+"):
        check_slices(X, intensity_range=(0, 50))


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.float16, np.float64, ">f4"])
def test_every_real_type_is_read_as_float32(dtype):
    X = RNG.integers(0, 2, (5, 4, 6)).astype(dtype)
    images = check_slices(X).images(ALL)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images[:, 0], X.astype(np.float32))


def test_objects_and_lists_of_numbers_are_read():
    for X in (X3.astype(object), X3.tolist()):
        np.testing.assert_allclose(check_slices(X).images(ALL)[:, 0], X3, rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_are_read(dtype):
    X = torch.from_numpy(X3).to(dtype).requires_grad_()
    images = check_slices(X).images(ALL)
    np.testing.assert_array_equal(images[:, 0], X.detach().float().numpy())


def test_float16_beyond_its_precision_is_scaled_in_more():
    X = np.array([[[0, 1000], [30000, 65504]]], np.float16)
    images = check_slices(X, intensity_range=(0, 65504)).images([0])
    np.testing.assert_allclose(images[0, 0], X[0].astype(np.float64) / 65504, rtol=1e-6)


def test_a_narrow_range_far_from_zero_keeps_its_precision():
    X = 1e9 + RNG.random((5, 4, 6))
    stack = check_slices(X, intensity_range="data")
    expected = (X - X.min()) / (X.max() - X.min())
    np.testing.assert_allclose(stack.images(ALL)[:, 0], expected, atol=1e-6)


def test_rounding_errors_beyond_the_range_are_allowed():
    X = X3.astype(np.float64)
    X[0, 0, :2] = 1 + 1e-9, -1e-9
    assert check_slices(X).images([0]).max() == 1


@pytest.mark.parametrize("X", [X3 * 40 - 7, (X3 * 40).astype(np.uint8), (X3 * 40 - 7).astype(np.int64)])
def test_range_of_the_data(X):
    stack = check_slices(X, intensity_range="data")
    low, high = float(X.min()), float(X.max())
    assert stack.intensity_range == (low, high)
    np.testing.assert_allclose(stack.images(ALL)[:, 0], (X - low) / (high - low), atol=1e-6)


@pytest.mark.parametrize("value", [0, 3.5, -2])
def test_constant_data_have_a_range_too(value):
    stack = check_slices(np.full((3, 4, 4), value), intensity_range="data")
    assert stack.intensity_range == (value, value + 1)
    np.testing.assert_array_equal(stack.images([0, 1]), 0)


# Brain masks


def test_brain_is_above_zero_by_default():
    X = np.where(X3 < 0.4, 0, X3)
    np.testing.assert_array_equal(check_slices(X).brain(ALL), (X > 0)[:, None])


def test_brain_is_where_any_channel_is_above_zero():
    X = np.where(X4 < 0.6, 0, X4)
    expected = (X[:, 0] > 0) | (X[:, 1] > 0)
    np.testing.assert_array_equal(check_slices(X).brain(ALL)[:, 0], expected)
    flat = check_slices(X.reshape(5, -1), image_shape=(2, 4, 6))
    np.testing.assert_array_equal(flat.brain(ALL)[:, 0], expected)


@pytest.mark.parametrize(
    ("X", "convert"),
    [
        (X3, np.asarray),
        (X4, np.asarray),
        (X3, torch.from_numpy),
        (X3, lambda m: m.astype(int)),
        (X4, lambda m: m * 1.0),
    ],
)
def test_a_given_brain_mask_is_used(X, convert):
    brain_mask = X3 > 0.3
    brain = check_slices(X, brain_mask=convert(brain_mask)).brain([1, 4])
    assert brain.dtype == bool
    np.testing.assert_array_equal(brain[:, 0], brain_mask[[1, 4]])


def test_a_brain_mask_of_channelled_slices_may_have_a_channel():
    brain_mask = X3 > 0.3
    brain = check_slices(X4, brain_mask=brain_mask[:, None]).brain(ALL)
    np.testing.assert_array_equal(brain[:, 0], brain_mask)


def test_a_flat_brain_mask_is_folded_as_its_slice():
    brain_mask = RNG.random((3, 7)) > 0.3
    brain = check_slices(RNG.random((3, 7)), brain_mask=brain_mask).brain([0, 1, 2])
    assert brain.shape == (3, 1, 3, 3)
    np.testing.assert_array_equal(brain.reshape(3, 9)[:, :7], brain_mask)
    assert not brain.reshape(3, 9)[:, 7:].any()


# Memory


@pytest.fixture
def large_file(tmp_path):
    """A read-only memory map of 32 MiB that is long in samples."""
    shape = (4 * ROWS_PER_CHECK * 4, 64, 32)
    written = np.memmap(tmp_path / "slices.dat", np.float32, "w+", shape=shape)
    written[::5] = 0.5
    written.flush()
    return np.memmap(tmp_path / "slices.dat", np.float32, "r", shape=shape)


@pytest.mark.parametrize("flat", [False, True])
def test_a_memory_map_is_read_by_batch_and_never_copied_whole(large_file, flat):
    X = large_file.reshape(len(large_file), -1) if flat else large_file
    image_shape = (64, 32) if flat else None
    tracemalloc.start()
    with pytest.raises(ValueError, match="brain_mask must be boolean"):  # masks are read by batch, too
        check_slices(X, image_shape=image_shape, brain_mask=X)
    stack = check_slices(X, image_shape=image_shape)
    for start in range(0, len(stack), 512):
        images = stack.subset(np.arange(start, start + 512)).images(np.arange(8))
        stack.brain(np.arange(start, start + 8))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.shares_memory(stack.values, large_file)
    assert peak < large_file.nbytes / 8
    np.testing.assert_array_equal(images[:, 0], large_file[start : start + 8])


def test_a_large_slice_is_read():
    X = np.zeros((1, 1000, 1000), np.uint8)
    X[0, 300:700, 300:700] = 200
    stack = check_slices(X)
    assert stack.images([0]).mean() == pytest.approx(0.16 * 200 / 255)
    assert stack.brain([0]).sum() == 160_000


# Errors


def refused(error, match, X, **options):
    with pytest.raises(error, match=match):
        check_slices(X, **options)


@pytest.mark.parametrize("shape", [(), (16,), (4, 4, 1, 1, 4, 4)])
def test_rank_must_fit(shape):
    refused(ValueError, rf"^X must have shape .*got \({', '.join(map(str, shape))},?\)", np.zeros(shape))


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0), (0, 9), (3, 4, 0)])
def test_data_must_not_be_empty(shape):
    message = rf"X must hold at least one sample .* got shape \({shape[0]}, {shape[1]}.*minimum of 1"
    refused(ValueError, message, np.zeros(shape))


@pytest.mark.parametrize(
    ("value", "place", "intensity_range"),
    [
        (np.nan, 0, (0, 1)),
        (np.nan, ROWS_PER_CHECK + 1, "data"),
        (np.inf, ROWS_PER_CHECK + 1, (0, 300)),
        (-np.inf, 0, "data"),
    ],
)
def test_values_must_be_finite(value, place, intensity_range):
    X = np.zeros((ROWS_PER_CHECK + 5, 2, 2), np.float32)
    X[place, 1, 1] = value
    message = rf"Input X contains NaN or infinity; X must be finite, got values from .*{abs(value)}"
    refused(ValueError, message, X, intensity_range=intensity_range)


def test_values_must_lie_in_the_range():
    message = r"^X must lie in 0\.\.1, got values from -0\.5 to 1\.5\. Scale it with"
    refused(ValueError, message, np.array([[[-0.5, 1.5]]]))
    refused(ValueError, r"^X must lie in 0\.\.1, got values from 0 to 255", np.array([[[0, 255]]]))
    message = r"^slices must lie in -1\.\.1, got values from -1\.1 to 0"
    refused(ValueError, message, np.array([[[-1.1, 0]]]), intensity_range=(-1, 1), input_name="slices")


@pytest.mark.parametrize(
    "value",
    ["percentile", (1, 0), (1, 1), (0, np.nan), (0, np.inf), (-np.inf, 1), (0, 1, 2), None, ("a", "b")],
)
def test_intensity_range_must_be_one(value):
    with pytest.raises(ValueError, match="^intensity_range must be") as caught:
        check_slices(X3, intensity_range=value)
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize("value", [(4,), (1, 2, 4, 6), 24, (0, 6), (-4, -6), (4.5, 6), ("a", "b")])
def test_image_shape_must_be_one(value):
    for X in (X3, X3.reshape(5, -1)):
        with pytest.raises(ValueError, match="^image_shape must be") as caught:
            check_slices(X, image_shape=value)
        assert f"got {value!r}" in str(caught.value)


def test_image_shape_must_agree_with_the_slices():
    message = r"image_shape must agree with X, got \(6, 4\) and X of shape \(5, 4, 6\)"
    refused(ValueError, message, X3, image_shape=(6, 4))
    message = r"image_shape must hold as many pixels as X has features, got \(5, 5\) for 24 features"
    refused(ValueError, message, X3.reshape(5, -1), image_shape=(5, 5))


@pytest.mark.parametrize("shape", [(4, 6), (4, 4, 6), (5, 6, 4), (5, 24), (5, 2, 4, 6)])
def test_brain_mask_must_fit(shape):
    for X in (X3, X4):
        with pytest.raises(ValueError, match=r"brain_mask must have shape \(5, 4, 6\) to go with X") as error:
            check_slices(X, brain_mask=np.ones(shape, bool))
        assert f"got {shape}" in str(error.value)


def test_a_flat_brain_mask_must_fit_its_rows():
    message = r"brain_mask must have shape \(5, 24\) to go with X of shape \(5, 48\), got \(5, 48\)"
    X = X4.reshape(5, -1)
    refused(ValueError, message, X, image_shape=(2, 4, 6), brain_mask=np.ones((5, 48), bool))


@pytest.mark.parametrize("value", [2, -1, 0.5, np.nan])
def test_brain_mask_must_hold_nothing_but_0_and_1(value):
    brain_mask = np.ones((5, 4, 6))
    brain_mask[4, 3, 5] = value
    refused(
        ValueError, "brain_mask must be boolean or hold only 0 and 1, got float64", X3, brain_mask=brain_mask
    )


def test_sparse_data_are_refused():
    sparse = SimpleNamespace(toarray=lambda: X3)
    refused(TypeError, "Sparse data was passed for X, but dense data is required", sparse)


def test_complex_data_are_refused():
    refused(ValueError, "Complex data not supported: X must be real, got complex64", X3 * 1j)


@pytest.mark.parametrize("values, error", [("abc", ValueError), ([{}, {}, {}], TypeError)])
def test_objects_are_refused(values, error):
    X = np.empty((1, 1, 3), object)
    X[0, 0] = list(values)
    refused(error, r"X must be numeric, got objects \(.*\)\. Stack equal slices", X)


@pytest.mark.parametrize("X", [np.array([[["a", "b"]]]), np.array([[["2020-01-01"]]], "datetime64[D]")])
def test_text_and_dates_are_refused(X):
    refused(TypeError, f"X must be numeric, got {X.dtype}".replace("[", r"\["), X)


def test_slices_of_several_shapes_are_refused():
    message = "X must hold slices of one shape, got .*inhomogeneous.* Pad or crop them"
    refused(ValueError, message, [np.zeros((4, 4)), np.zeros((4, 5))])
    with pytest.raises(ValueError, match="brain_mask must hold slices of one shape"):
        as_numpy([[1, 2], [3]], "brain_mask")
