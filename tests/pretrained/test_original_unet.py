"""The original U-Net against a small functional implementation of it, and against arrays."""

import math
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from madad.diffusion import MaskedDDIM, NoiseSchedule, masked_diffusion_loss
from madad.pretrained.original_unet import load_original_unet


def original_unet(weights, z, t_zero_based, n_heads):
    """What the original computes: `z0_hat` and the logit of P(clean)."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def residual(name, x):
        hidden = F.silu(weights.norm(f"{name}.in_layers.0", x, 1e-5))
        hidden = weights.conv(f"{name}.in_layers.2", hidden)
        hidden = hidden + linear(f"{name}.emb_layers.1", F.silu(embedding))[:, :, None, None]
        hidden = F.silu(weights.norm(f"{name}.out_layers.0", hidden, 1e-5))
        hidden = weights.conv(f"{name}.out_layers.3", hidden)
        skip = f"{name}.skip_connection"
        return hidden + (weights.conv(skip, x) if f"{skip}.weight" in weights else x)

    def attention(name, x):
        """The legacy order: channels belong to heads first, then to queries, keys and values."""
        batch, channels, *_ = x.shape
        tokens = weights.norm(f"{name}.norm", x, 1e-5).flatten(2)
        qkv = F.conv1d(tokens, weights[f"{name}.qkv.weight"], weights[f"{name}.qkv.bias"])
        per_head = channels // n_heads
        q, k, v = qkv.reshape(batch * n_heads, 3 * per_head, -1).split(per_head, dim=1)
        scores = torch.einsum("bct,bcs->bts", q, k / per_head**0.5).softmax(dim=-1)
        attended = torch.einsum("bts,bcs->bct", scores, v).reshape(batch, channels, -1)
        out = F.conv1d(attended, weights[f"{name}.proj_out.weight"], weights[f"{name}.proj_out.bias"])
        return x + out.view_as(x)

    def layer(name, x):
        if f"{name}.in_layers.0.weight" in weights:
            return residual(name, x)
        if f"{name}.qkv.weight" in weights:
            return attention(name, x)
        if f"{name}.op.weight" in weights:
            return weights.conv(f"{name}.op", x, stride=2)
        if f"{name}.conv.weight" in weights:
            return weights.conv(f"{name}.conv", x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        return x

    def blocks(part):
        return range(1 + max(int(m[1]) for name in weights if (m := re.match(rf"{part}\.(\d+)\.", name))))

    half = weights["time_embed.0.weight"].shape[1] // 2
    angles = t_zero_based[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
    embedding = linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))
    embedding = linear("time_embed.2", F.silu(embedding))
    x, skips = weights.conv("input_blocks.0.0", z), []
    skips.append(x)
    for k in blocks("input_blocks")[1:]:
        x = layer(f"input_blocks.{k}.1", layer(f"input_blocks.{k}.0", x))
        skips.append(x)
    for i in range(3):
        x = layer(f"middle_block.{i}", x)
    for k in blocks("output_blocks"):
        x = torch.cat([x, skips.pop()], dim=1)
        for i in range(3):
            x = layer(f"output_blocks.{k}.{i}", x)
    z0_hat = weights.conv("out.2", F.silu(weights.norm("out.0", x, 1e-5)))
    return z0_hat, weights.conv("mt_out.1", weights.norm("mt_out.0", x, 1e-5))


UNETS = [
    ({}, 4),
    ({"multipliers": (1, 2, 2), "attention_levels": (1,), "n_res": 2, "latent_channels": 4}, 2),
    ({"multipliers": (1,), "attention_levels": ()}, 1),
]


@pytest.mark.parametrize(("shape", "n_heads"), UNETS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_original_unet_computes_the_same(foreign, tmp_path, shape, n_heads, suffix):
    weights = foreign.original_unet_weights(**shape)
    path = tmp_path / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(dict(weights), path)
    unet = load_original_unet(path, n_heads=n_heads)
    z = torch.randn(3, unet.config.latent_channels, 8, 12, generator=weights.generator)
    t_zero_based = torch.tensor([0, 4, 9])
    with torch.no_grad():
        z0_hat, noise_logit = unet(z, t_zero_based + 1)
    expected, clean_logit = original_unet(weights, z, t_zero_based, n_heads)
    assert not unet.training and unet.config.n_heads == n_heads
    foreign.close(z0_hat, expected)
    foreign.close(noise_logit, -clean_logit)
    foreign.close(torch.sigmoid(noise_logit), 1 - torch.sigmoid(clean_logit))


def test_number_of_heads_changes_the_function_and_defaults_to_the_originals(foreign, tmp_path):
    weights = foreign.original_unet_weights()
    save_file(weights, tmp_path / "a.safetensors")
    assert load_original_unet(tmp_path / "a.safetensors").config.n_heads == 4
    save_file(foreign.original_unet_weights(192, (1,), 1, ()), tmp_path / "b.safetensors")
    assert load_original_unet(tmp_path / "b.safetensors").config.n_heads == 6
    z, t = torch.randn(1, 3, 8, 8, generator=weights.generator), torch.ones(1)
    with torch.no_grad():
        two, four = (load_original_unet(tmp_path / "a.safetensors", n_heads=n)(z, t)[0] for n in (2, 4))
    assert not torch.allclose(two, four, atol=1e-3)
    with pytest.raises(ValueError, match="n_heads must divide the number of channels 32, got 5"):
        load_original_unet(tmp_path / "a.safetensors", n_heads=5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda module: module,
        lambda module: {"model": module, "optimizer": {"lr": 1e-4}},
        lambda module: {f"module.{name}": value for name, value in module.state_dict().items()},
        lambda module: {"model": {}, "ema": module.state_dict(), "epoch": 3},
    ],
    ids=["module", "checkpoint", "distributed", "ema"],
)
def test_checkpoints_of_the_original_load(foreign, tmp_path, monkeypatch, wrap):
    """Also whole pickled modules whose class is nowhere to be imported from."""
    weights = foreign.original_unet_weights()
    gone = types.ModuleType("gone_package")
    gone.UNetModel = type("UNetModel", (nn.Module,), {"__module__": "gone_package"})
    module = foreign.module_of(weights)
    module.__class__ = gone.UNetModel
    monkeypatch.setitem(sys.modules, "gone_package", gone)
    torch.save(wrap(module), tmp_path / "model.pt")
    monkeypatch.delitem(sys.modules, "gone_package")
    save_file(weights, tmp_path / "weights.safetensors")
    found, expected = (load_original_unet(tmp_path / n) for n in ("model.pt", "weights.safetensors"))
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.fixture(scope="module")
def original(reference_dir):
    arrays = load_file(reference_dir / "mad_ad_reference_outputs.safetensors")
    return load_original_unet(reference_dir / "mad_ad_unet_ch32.safetensors"), arrays


@torch.no_grad()
def test_original_unet_reproduces_its_reference_outputs(foreign, original):
    unet, arrays = original
    z0_hat, noise_logit = unet(arrays["unet_z"], arrays["unet_t_zero_based"] + 1)
    foreign.close(z0_hat, arrays["unet_z0_hat"])
    foreign.close(1 - torch.sigmoid(noise_logit), arrays["unet_clean_probability"])


@torch.no_grad()
def test_losses_of_the_original_unet_are_reproduced(foreign, original):
    unet, arrays = original
    t, noise_mask = arrays["unet_t_zero_based"] + 1, 1 - arrays["fwd_keep_mask"]
    z0_hat, noise_logit = unet(arrays["fwd_z_t"], t)
    z0_loss, mask_loss = masked_diffusion_loss(arrays["fwd_z0"], z0_hat, noise_mask, noise_logit, "mse")
    foreign.close(z0_loss, arrays["loss_mse_per_sample"])
    foreign.close(mask_loss, arrays["loss_mask_mse_per_sample"])
    foreign.close(z0_loss + 0.001 * mask_loss, arrays["loss_total_per_sample"])


@torch.no_grad()
@pytest.mark.parametrize("n_steps", [5, 10])
def test_restorations_of_the_original_unet_are_reproduced(foreign, original, n_steps):
    unet, arrays = original
    schedule = NoiseSchedule.cosine(10)
    start, end = (arrays[f"ddim{n_steps}_eta0_{which}"] for which in ("start", "end"))
    foreign.close(MaskedDDIM(n_steps).restore(unet, start, schedule).z_restored, end)
    if n_steps == 5:
        times = [t + 1 for t in arrays["timesteps_5_zero_based"].tolist()]
        assert sorted(schedule.timesteps(5)) == sorted(times)
