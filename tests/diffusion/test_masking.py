import numpy as np
import pytest
import torch
from scipy import ndimage

from madad.diffusion import EitherMask, RandomBlobs, RandomPatches
from madad.diffusion.masking import restrict_to_brain, smooth_field

MASKINGS = {
    "patches": RandomPatches(),
    "blobs": RandomBlobs(),
    "either": EitherMask(),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("masking", MASKINGS.values(), ids=MASKINGS)
@pytest.mark.parametrize("size", [(16, 16), (7, 5), (1, 3)])
def test_masks_are_zeros_and_ones_and_follow_the_generator_alone(masking, size):
    drawn = masking.draw(6, *size, seeded())
    assert drawn.shape == (6, 1, *size) and drawn.dtype == torch.float32
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        state = torch.random.get_rng_state()
        assert torch.equal(masking.draw(6, *size, seeded()), drawn)
        assert torch.equal(torch.random.get_rng_state(), state)
    if size == (16, 16):
        assert not torch.equal(masking.draw(6, *size, seeded(1)), drawn)


# Patches


@pytest.mark.parametrize(
    ("ratio", "expected", "spread"),
    [(0.4, 0.2, 0.4 / 12**0.5), ((0.3, 0.5), 0.4, 0.2 / 12**0.5), ((0.7, 0.7), 0.7, 0), (0, 0, 0)],
)
def test_share_of_noised_positions_is_uniform_in_the_range(ratio, expected, spread):
    shares = RandomPatches(ratio, sizes=(1,)).draw(2000, 32, 32, seeded()).mean(dim=(1, 2, 3))
    assert float(shares.mean()) == pytest.approx(expected, abs=0.01)
    binomial = (expected * (1 - expected)) / 1024
    assert float(shares.std()) == pytest.approx((spread**2 + binomial) ** 0.5, abs=0.006)


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), (8,), (3,)])
def test_expected_share_does_not_depend_on_the_patch_sizes(sizes):
    shares = RandomPatches(0.4, sizes).draw(4000, 16, 24, seeded()).mean(dim=(1, 2, 3))
    assert float(shares.mean()) == pytest.approx(0.2, abs=0.015)


def cell_sizes(noise_mask, sizes):
    """All (height, width) of grids on which the mask is constant within every cell."""
    found = []
    for height in sizes:
        for width in sizes:
            rows, columns = (
                np.arange(0, noise_mask.shape[0], height),
                np.arange(0, noise_mask.shape[1], width),
            )
            counts = np.add.reduceat(np.add.reduceat(noise_mask, rows, axis=0), columns, axis=1)
            areas = np.add.reduceat(np.add.reduceat(np.ones_like(noise_mask), rows, axis=0), columns, axis=1)
            if ((counts == 0) | (counts == areas)).all():
                found.append((height, width))
    return found


@pytest.mark.parametrize(
    ("sizes", "size"), [((1, 2, 4, 8), (32, 32)), ((2, 4), (17, 23)), ((3, 5), (17, 23))]
)
def test_patches_are_cells_of_a_grid_of_a_listed_size(sizes, size):
    drawn = RandomPatches((0.5, 0.5), sizes).draw(150, *size, seeded())
    found = [cell_sizes(noise_mask, sizes) for noise_mask in drawn[:, 0].numpy()]
    assert all(found)
    assert {max(each) for each in found} == {(a, b) for a in sizes for b in sizes}


@pytest.mark.parametrize("probabilities", [None, (0.2, 0.3, 0.3, 0.2), (0.0, 1.0, 0.0, 0.0)])
def test_heights_and_widths_follow_their_probabilities_independently(probabilities):
    sizes = (1, 2, 4, 8)
    drawn = RandomPatches((0.5, 0.5), sizes, probabilities).draw(1500, 32, 32, seeded())
    # With half of 16 or more cells noised, a coarser grid fits by chance in hardly any sample.
    counts = np.zeros((4, 4))
    for noise_mask in drawn[:, 0].numpy():
        height, width = max(cell_sizes(noise_mask, sizes))
        counts[sizes.index(height), sizes.index(width)] += 1
    expected = np.full(4, 0.25) if probabilities is None else np.array(probabilities)
    np.testing.assert_allclose(counts / len(drawn), np.outer(expected, expected), atol=0.03)


# Blobs


def test_blobs_are_few_solid_and_of_the_stated_size():
    blobs = RandomBlobs(radius=(0.15, 0.15), n_blobs=(1, 1), roughness=0.0)
    weight = torch.zeros(100, 1, 64, 64)
    weight[..., 24:40, 24:40] = 1
    drawn = blobs.draw(100, 64, 64, seeded(), weight)[:, 0].numpy()
    assert all(ndimage.label(noise_mask)[1] == 1 for noise_mask in drawn)
    # A stretched disc keeps its area, radius 0.15 * 64.
    np.testing.assert_allclose(drawn.sum(axis=(1, 2)), np.pi * 9.6**2, rtol=0.05)


def test_rough_blobs_stay_mostly_in_one_piece_each():
    drawn = RandomBlobs(radius=(0.1, 0.2), n_blobs=(2, 2)).draw(200, 64, 64, seeded())[:, 0].numpy()
    n_pieces = np.array([ndimage.label(noise_mask)[1] for noise_mask in drawn])
    assert np.median(n_pieces) <= 2 and n_pieces.mean() < 3


def test_number_of_blobs_covers_its_range():
    blobs = RandomBlobs(radius=(0.03, 0.03), n_blobs=(1, 4), roughness=0.0)
    drawn = blobs.draw(300, 64, 64, seeded())[:, 0].numpy()
    n_pieces = [ndimage.label(noise_mask, np.ones((3, 3)))[1] for noise_mask in drawn]
    assert set(n_pieces) == {1, 2, 3, 4}


def test_blob_centres_follow_the_weight():
    rows, columns = np.mgrid[:48, :48]
    brain = torch.from_numpy(np.hypot(rows - 15, columns - 15) < 12).float()
    weight = brain.expand(200, 1, 48, 48)
    drawn = RandomBlobs(radius=(0.04, 0.2)).draw(200, 48, 48, seeded(), weight)
    assert float((drawn * weight).sum() / drawn.sum()) > 0.6
    anywhere = RandomBlobs(radius=(0.04, 0.2)).draw(200, 48, 48, seeded())
    assert float((anywhere * weight).sum() / anywhere.sum()) < 0.4


def test_a_slice_without_brain_still_gets_a_mask():
    drawn = RandomBlobs(radius=(0.2, 0.2)).draw(3, 16, 16, seeded(), torch.zeros(3, 1, 16, 16))
    assert (drawn.sum(dim=(1, 2, 3)) > 0).all()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_either_takes_whole_samples_of_one_kind(share):
    """Patches of ratio 1 cover everything, blobs of this radius never do."""
    either = EitherMask(RandomPatches((1.0, 1.0)), RandomBlobs(radius=(0.1, 0.1), n_blobs=(1, 1)), share)
    is_blob = (either.draw(1500, 16, 16, seeded()).mean(dim=(1, 2, 3)) < 1).float()
    assert float(is_blob.mean()) == pytest.approx(share, abs=0.04)


# Brain


def test_papers_rule_keeps_every_position_with_brain():
    brain_fraction = torch.tensor([[0.0, 1e-6, 0.5], [0.0, 0.95, 1.0]])[None, None]
    inside = restrict_to_brain(torch.ones(1, 1, 2, 3), brain_fraction, "paper")
    assert inside.flatten().tolist() == [0, 1, 1, 0, 1, 1]
    assert restrict_to_brain(torch.zeros(1, 1, 2, 3), brain_fraction).sum() == 0


@pytest.mark.parametrize("size", [(8, 8), (7, 8), (8, 9), (5, 7)])
def test_originals_rule_keeps_blocks_of_16_pixels_with_90_percent_brain(size):
    rng = np.random.default_rng(0)
    pixels = rng.random((3, size[0] * 8, size[1] * 8)) < 0.95
    pixels[0, 16:32, 16:32] = np.arange(256).reshape(16, 16) < 231  # 90.2 %
    pixels[0, :16, :16] = np.arange(256).reshape(16, 16) < 230  # 89.8 %
    pixels[1, :, :20] = False
    expected = np.zeros((3, 1, *size))
    for i in range(0, size[0], 2):
        for j in range(0, size[1], 2):
            block = pixels[:, 8 * i : 8 * i + 16, 8 * j : 8 * j + 16]  # smaller at an odd border
            enough = block.sum(axis=(1, 2)) >= 0.9 * 256
            expected[:, 0, i : i + 2, j : j + 2] = enough[:, None, None]
    brain_fraction = torch.nn.functional.avg_pool2d(torch.from_numpy(pixels)[:, None].float(), 8)
    inside = restrict_to_brain(torch.ones(3, 1, *size), brain_fraction, "original")
    np.testing.assert_array_equal(inside.numpy(), expected)
    assert expected[0, 0, 2, 2] == 1 and expected[0, 0, 0, 0] == 0


def test_smooth_fields_are_smooth_seeded_and_of_about_unit_spread():
    fields = smooth_field(300, 1, 64, 64, seeded())
    assert torch.equal(fields, smooth_field(300, 1, 64, 64, seeded()))
    assert 0.6 < float(fields.std()) < 1.1 and abs(float(fields.mean())) < 0.05
    assert float(fields.diff(dim=2).std()) < 0.15 * float(fields.std())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomPatches(1.2), r"mask_ratio must .*0\.\.1.*got 1.2"),
        (lambda: RandomPatches(-0.1), "mask_ratio must .*got -0.1"),
        (lambda: RandomPatches((0.5, 0.2)), r"mask_ratio must .*got \(0.5, 0.2\)"),
        (lambda: RandomPatches(float("nan")), "mask_ratio must .*got nan"),
        (lambda: RandomPatches(sizes=()), r"mask_patch_sizes must be positive integers, got \(\)"),
        (lambda: RandomPatches(sizes=(0, 1)), r"mask_patch_sizes must .*got \(0, 1\)"),
        (lambda: RandomPatches(sizes=(1.5,)), r"mask_patch_sizes must .*got \(1.5,\)"),
        (
            lambda: RandomPatches(size_probabilities=(0.5, 0.5)),
            r"mask_patch_probabilities must be 4 numbers .*got \(0.5, 0.5\)",
        ),
        (
            lambda: RandomPatches(sizes=(1, 2), size_probabilities=(1.5, -0.5)),
            r"mask_patch_probabilities must .*got \(1.5, -0.5\)",
        ),
        (
            lambda: RandomPatches(sizes=(1, 2), size_probabilities=(0.5, 0.4)),
            r"mask_patch_probabilities must .*sum to 1.*got \(0.5, 0.4\)",
        ),
        (
            lambda: restrict_to_brain(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2), "all"),
            "brain_rule must be 'paper' or 'original', got 'all'",
        ),
    ],
)
def test_wrong_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
