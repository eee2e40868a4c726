from dataclasses import dataclass

import numpy as np
import pytest
import torch

from madad.diffusion import (
    CORRUPTIONS,
    ErasedLatents,
    ForeignLatents,
    GaussianNoise,
    Mixture,
    SmoothOffset,
    teaches_repainting,
)

ALL = {"foreign": ForeignLatents(), "smooth": SmoothOffset(), **CORRUPTIONS}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=seeded(99), dtype=dtype)


@dataclass(frozen=True)
class Constant:
    value: float

    def fill(self, z0, generator):
        return torch.full_like(z0, self.value)


@pytest.mark.parametrize("corruption", ALL.values(), ids=ALL)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 3, 8, 8), torch.float32),
        ((1, 4, 16, 8), torch.float32),
        ((3, 1, 7, 5), torch.float64),
        ((2, 2, 1, 1), torch.float64),
    ],
)
def test_fill_keeps_shape_and_dtype_and_follows_the_generator_alone(corruption, shape, dtype):
    z0 = latents(*shape, dtype=dtype)
    copy = z0.clone()
    fill = corruption.fill(z0, seeded())
    assert fill.shape == z0.shape and fill.dtype == dtype and fill.isfinite().all()
    assert torch.equal(z0, copy)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        state = torch.random.get_rng_state()
        assert torch.equal(corruption.fill(z0, seeded()), fill)
        assert torch.equal(torch.random.get_rng_state(), state)
    if z0.numel() > 100:
        assert not torch.equal(corruption.fill(z0, seeded(1)), fill)


def test_gaussian_noise_has_the_moments_and_ignores_the_latent():
    fill = GaussianNoise().fill(torch.full((8, 4, 64, 64), 50.0), seeded())
    flat = fill.flatten().double().numpy()
    assert abs(flat.mean()) < 0.01 and abs(flat.std() - 1) < 0.01
    assert abs((flat**3).mean()) < 0.03 and abs((flat**4).mean() - 3) < 0.1
    pairs = np.corrcoef(fill.permute(1, 0, 2, 3).reshape(4, -1).numpy())
    assert np.abs(pairs - np.eye(4)).max() < 0.02


def test_erased_latents_are_zero():
    z0 = latents(3, 2, 4, 5)
    fill = ErasedLatents().fill(z0, seeded())
    assert fill.shape == z0.shape and not fill.any()


@pytest.mark.parametrize("n", [2, 3, 8])
def test_foreign_latents_are_another_sample_as_a_whole(n):
    """Every fill is a rearrangement of the positions of one OTHER sample; channels stay together."""
    z0 = latents(n, 3, 8, 16)
    for seed in range(20):
        for i, fill in enumerate(ForeignLatents().fill(z0, seeded(seed))):
            positions = {tuple(vector) for vector in fill.flatten(1).T.tolist()}
            sources = [
                k for k in range(n) if positions == {tuple(vector) for vector in z0[k].flatten(1).T.tolist()}
            ]
            assert len(sources) == 1 and sources[0] != i


def test_foreign_latents_are_rolled_and_perhaps_mirrored():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    z0 = torch.stack([rows, columns]).expand(2, 2, 16, 16).contiguous()
    mirrored = []
    for seed in range(60):
        fill = ForeignLatents().fill(z0, seeded(seed))
        for sample in fill.long():
            shift = (sample[0, 0] - 0) % 16  # of the rows: the same along each
            assert ((sample[0] - rows.long()) % 16 == shift[0]).all()
            assert 2 <= min(int(shift[0]), 16 - int(shift[0])) <= 5
            step = (sample[1].diff(dim=1) % 16).unique().tolist()
            assert step in ([1], [15])
            mirrored.append(step == [15])
    assert 0.35 < np.mean(mirrored) < 0.65


def test_foreign_latents_of_a_single_sample_come_from_itself_displaced():
    z0 = latents(1, 2, 16, 16)
    fill = ForeignLatents().fill(z0, seeded())
    assert torch.equal(fill.flatten().sort().values, z0.flatten().sort().values)
    assert not torch.isclose(fill, z0).any(dim=1).float().mean() > 0.1


@pytest.mark.parametrize(
    ("magnitude", "channels", "tissue_share"),
    [((0.5, 3.0), 4, 0.0), ((2.0, 2.0), 1, 1.0), ((0.5, 3.0), 4, 1.0)],
)
def test_smooth_offset_has_the_stated_magnitude(magnitude, channels, tissue_share):
    z0 = latents(400, channels, 16, 16)
    corruption = SmoothOffset(magnitude, noise=0.0, flatten=0.0, tissue_share=tissue_share, patchy=0.0)
    offset = corruption.fill(z0, seeded()) - z0
    # Averaged over the slow variation of 30 %; Euclidean over channels.
    length = offset.mean(dim=(2, 3)).square().sum(dim=1).sqrt().numpy()
    low, high = magnitude
    assert length.min() > 0.5 * low and length.max() < 1.5 * high
    assert length.mean() == pytest.approx((low + high) / 2, rel=0.06)
    direction = offset.mean(dim=(2, 3))
    assert abs(float((direction > 0).float().mean()) - 0.5) < 0.06  # brighter as often as darker
    along = offset / direction[:, :, None, None]
    torch.testing.assert_close(along, along[:, :1].expand_as(along), rtol=1e-2, atol=1e-2)  # one direction


def test_offset_between_tissues_points_from_one_to_the_other():
    tissues = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 0.0, 2.0]])
    z0 = tissues[0][:, None, None].expand(200, 3, 16, 16).clone()
    z0[..., 8:] = tissues[1][:, None, None]
    offset = SmoothOffset(noise=0.0, flatten=0.0, patchy=0.0).fill(z0, seeded()) - z0
    along = torch.nn.functional.normalize(tissues[1] - tissues[0], dim=0)
    cosine = torch.cosine_similarity(offset.mean(dim=(2, 3)), along[None]).numpy()
    between = np.abs(cosine) > 0.9999
    # Two places of the same tissue give no direction (chance about 1/2): it is random there.
    assert 0.4 < between.mean() < 0.8
    assert np.abs((cosine[between] > 0).mean() - 0.5) < 0.15


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_offset_of_a_latent_without_tissue_is_random_and_of_full_length(value):
    z0 = torch.full((100, 4, 8, 8), value)
    offset = SmoothOffset((2.0, 2.0), noise=0.0, flatten=0.0, patchy=0.0).fill(z0, seeded()) - z0
    length = offset.mean(dim=(2, 3)).square().sum(dim=1).sqrt()
    assert (length - 2).abs().max() < 1


@pytest.mark.parametrize("patchy", [0.0, 0.3, 1.0])
def test_patchy_offsets_have_two_directions_in_that_share_of_the_samples(patchy):
    z0 = torch.zeros(400, 5, 16, 16)
    fill = SmoothOffset((2.0, 2.0), noise=0.0, flatten=0.0, tissue_share=0.0, patchy=patchy).fill(
        z0, seeded()
    )
    spread = torch.linalg.svdvals(fill.flatten(2).double())  # rank 1 = one direction
    two = (spread[:, 1] > 1e-4 * spread[:, 0]).double()
    assert float(two.mean()) == pytest.approx(patchy, abs=0.06)
    assert (spread[:, 2] < 1e-4 * spread[:, 0]).all()


def test_smooth_offset_flattens_and_adds_noise_as_told():
    z0 = 10 * latents(300, 2, 8, 8)
    kept = SmoothOffset((0.0, 0.0), noise=0.0, flatten=0.6).fill(z0, seeded()) / z0
    torch.testing.assert_close(kept, kept[:, :1, :1, :1].expand_as(kept))
    share = kept[:, 0, 0, 0].numpy()
    assert share.min() >= 0.4 - 1e-5 and share.max() <= 1 + 1e-5 and abs(share.mean() - 0.7) < 0.03
    noise = SmoothOffset((0.0, 0.0), noise=0.3, flatten=0.0).fill(z0, seeded()) - z0
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("probabilities", [None, (0.2, 0.5, 0.3), (0.0, 1.0, 0.0)])
def test_mixture_picks_one_corruption_per_sample(probabilities):
    mixture = Mixture((Constant(0.0), Constant(1.0), Constant(2.0)), probabilities)
    fill = mixture.fill(torch.zeros(3000, 2, 2, 2), seeded())
    picked = fill[:, 0, 0, 0]
    assert torch.equal(fill, picked[:, None, None, None].expand_as(fill))
    shares = np.bincount(picked.long().numpy(), minlength=3) / 3000
    np.testing.assert_allclose(shares, probabilities or np.full(3, 1 / 3), atol=0.03)


def test_what_erases_is_found_in_mixtures_too():
    assert teaches_repainting(ErasedLatents()) and teaches_repainting(CORRUPTIONS["mixture"])
    assert teaches_repainting(Mixture((GaussianNoise(), Mixture((ErasedLatents(),)))))
    assert not teaches_repainting(GaussianNoise()) and not teaches_repainting(Constant(0.0))
    assert not teaches_repainting(Mixture((GaussianNoise(), ErasedLatents()), (1.0, 0.0)))
