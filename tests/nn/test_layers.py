"""The blocks against plain NumPy float64 implementations of their formulas."""

import einops
import numpy as np
import pytest
import torch

from madad.nn import layers


def randomised(module, seed=0):
    """The module with random weights everywhere: norms and biases start as ones and zeros otherwise."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def random_tensor(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_array(tensor):
    return tensor.detach().double().numpy()


def conv(x, module, stride=1, padding=1):
    """Convolution as a sum over the kernel's offsets."""
    weight, bias = as_array(module.weight), as_array(module.bias)
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding))) if np.isscalar(padding) else x
    k = weight.shape[-1]
    h, w = (x.shape[2] - k) // stride + 1, (x.shape[3] - k) // stride + 1
    out = np.zeros((len(x), len(weight), h, w)) + bias[:, None, None]
    for i in range(k):
        for j in range(k):
            window = x[:, :, i : i + stride * h : stride, j : j + stride * w : stride]
            out += np.einsum("oc,bchw->bohw", weight[:, :, i, j], window)
    return out


def group_norm(x, module):
    grouped = x.reshape(len(x), module.num_groups, -1)
    mean, variance = grouped.mean(axis=2, keepdims=True), grouped.var(axis=2, keepdims=True)
    normed = ((grouped - mean) / np.sqrt(variance + module.eps)).reshape(x.shape)
    return normed * as_array(module.weight)[:, None, None] + as_array(module.bias)[:, None, None]


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize(("out_channels", "time_channels"), [(4, 5), (6, None), (6, 5)])
def test_residual_block_equals_its_formula(out_channels, time_channels):
    block = randomised(layers.ResidualBlock(4, out_channels, time_channels=time_channels, norm_groups=2))
    x, time_embedding = random_tensor(2, 4, 5, 3), random_tensor(2, 5)
    hidden = conv(silu(group_norm(as_array(x), block.norm1)), block.conv1)
    if time_channels:
        weight, bias = as_array(block.time.weight), as_array(block.time.bias)
        hidden += (silu(as_array(time_embedding)) @ weight.T + bias)[:, :, None, None]
    hidden = conv(silu(group_norm(hidden, block.norm2)), block.conv2)
    shortcut = as_array(x) if out_channels == 4 else conv(as_array(x), block.shortcut, padding=0)
    np.testing.assert_allclose(as_array(block(x, time_embedding)), shortcut + hidden, rtol=1e-4, atol=1e-4)


def test_dropout_works_in_training_only():
    block = randomised(layers.ResidualBlock(4, 4, dropout=0.9, norm_groups=2))
    x = random_tensor(1, 4, 8, 8)
    torch.testing.assert_close(block(x), block(x), rtol=0, atol=0)
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(block.train()(x), block(x))


@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_attention_equals_a_loop_over_heads(n_heads):
    block = randomised(layers.SelfAttention(8, n_heads=n_heads, norm_groups=2))
    x = random_tensor(2, 8, 3, 5)
    query, key, value = np.split(conv(group_norm(as_array(x), block.norm), block.qkv, padding=0), 3, axis=1)
    attended = np.empty_like(query).reshape(2, 8, 15)
    for sample in range(2):
        for head in np.split(np.arange(8), n_heads):
            q, k, v = (part[sample, head].reshape(len(head), 15) for part in (query, key, value))
            scores = np.exp(q.T @ k / np.sqrt(len(head)))
            attended[sample, head] = v @ (scores / scores.sum(axis=1, keepdims=True)).T
    expected = as_array(x) + conv(attended.reshape(x.shape), block.out, padding=0)
    np.testing.assert_allclose(as_array(block(x)), expected, rtol=1e-4, atol=1e-4)


def test_attention_moves_with_a_permutation_of_the_positions():
    block = randomised(layers.SelfAttention(8, n_heads=2, norm_groups=2))
    x = random_tensor(1, 8, 4, 4)
    torch.testing.assert_close(block(x.flip(2, 3)), block(x).flip(2, 3), rtol=1e-4, atol=1e-5)


def test_number_of_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="n_heads must divide the number of channels 8, got 3"):
        layers.SelfAttention(8, n_heads=3, norm_groups=2)


@pytest.mark.parametrize(
    ("asymmetric", "before", "size"), [(False, 1, (6, 8)), (True, 0, (6, 8)), (True, 0, (7, 5))]
)
def test_downsample_pads_where_it_says(asymmetric, before, size):
    block = randomised(layers.Downsample(3, asymmetric=asymmetric))
    x = random_tensor(2, 3, *size)
    padded = np.pad(as_array(x), ((0, 0), (0, 0), (before, 1), (before, 1)))
    expected = conv(padded, block.conv, stride=2, padding=None)
    np.testing.assert_allclose(as_array(block(x)), expected, rtol=1e-5, atol=1e-5)


def test_upsample_repeats_and_smooths():
    block = randomised(layers.Upsample(3))
    x = random_tensor(2, 3, 4, 5)
    expected = conv(as_array(x).repeat(2, axis=2).repeat(2, axis=3), block.conv)
    np.testing.assert_allclose(as_array(block(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_stem_folds_blocks_and_head_unfolds_them(patch_size):
    stem = randomised(layers.SpaceToDepthConv(2, 6, patch_size))
    x = random_tensor(2, 2, 8, 12)
    blocks = einops.rearrange(as_array(x), "b c (h p) (w q) -> b (c p q) h w", p=patch_size, q=patch_size)
    np.testing.assert_allclose(as_array(stem(x)), conv(blocks, stem.conv), rtol=1e-4, atol=1e-5)

    for activate in (True, False):
        head = randomised(layers.DepthToSpaceHead(6, 2, patch_size, activate=activate, norm_groups=3))
        hidden = group_norm(as_array(stem(x)), head.norm)
        folded = conv(silu(hidden) if activate else hidden, head.conv)
        p = patch_size
        expected = einops.rearrange(folded, "b (c p q) h w -> b c (h p) (w q)", p=p, q=p)
        np.testing.assert_allclose(as_array(head(stem(x))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [8, 9])
def test_sinusoidal_embedding_equals_its_formula(channels):
    position = np.array([0, 1, 9])
    frequency = 10_000.0 ** (-np.arange(4) / 4)
    angles = position[:, None] * frequency
    expected = np.concatenate([np.cos(angles), np.sin(angles), np.zeros((3, channels % 2))], axis=1)
    embedded = layers.sinusoidal_embedding(torch.from_numpy(position), channels)
    np.testing.assert_allclose(embedded.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (1, 9)])
def test_padding_repeats_the_border_below_and_to_the_right(size):
    x = random_tensor(2, 3, *size)
    below, right = -size[0] % 4, -size[1] % 4
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, below), (0, right)), mode="edge")
    np.testing.assert_array_equal(layers.pad_to_multiple(x, 4).numpy(), expected)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("side", [3, 5])
def test_attention_of_few_positions_does_not_depend_on_the_thread(side):
    """Two threads have buffers of their own: a slice's digits are the same in either."""
    attention = layers.SelfAttention(16, n_heads=2, norm_groups=4).eval()
    x = torch.randn(16, 16, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(attention(x.roll(5, dims=0)), attention(x).roll(5, dims=0))
