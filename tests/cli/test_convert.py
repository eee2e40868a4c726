import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from madad import LatentAutoencoder, MaskedDiffusionAnomalyDetector
from madad.nn import AutoencoderConfig, AutoencoderKL, MaskedUNet, UNetConfig
from madad.pretrained.loading import load_autoencoder, load_unet, to_image_channels
from madad.testing import tiny_detector

N_HEADS = 4  # of the original with 32 base channels
AUTOENCODER = AutoencoderConfig(
    image_channels=3, latent_channels=2, base_channels=32, channel_multipliers=(1, 2), n_res_blocks=1
)
UNET = UNetConfig(
    latent_channels=2, base_channels=32, channel_multipliers=(1,), n_res_blocks=1, attention_levels=()
)


def random_network(kind, config):
    """A network of ours, every weight of it random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = kind(config)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
    return network.eval()


def renamed(state, rules):
    found = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    return found


def in_compvis_layout(network):
    """The weights of an `AUTOENCODER` as CompVis would have named them."""
    state = {}
    for name, value in network.state_dict().items():
        if ".qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace(".qkv.", f".{letter}.")] = part.clone()
        else:
            state[name] = value.clone()
    rules = [
        (r"^(encoder|decoder)\.stem\.conv\.", r"\1.conv_in."),
        (r"^(encoder|decoder)\.head\.conv\.", r"\1.conv_out."),
        (r"\.attention\.out\.", ".attention.proj_out."),
        (r"\.head\.norm\.", ".norm_out."),
        (r"^(post_)?quant\.", r"\1quant_conv."),
        (r"\.middle\.block(\d)\.", r".mid.block_\1."),
        (r"\.middle\.attention\.", ".mid.attn_1."),
        (r"encoder\.levels\.0\.1\.", "encoder.down.0.downsample."),
        (r"decoder\.levels\.0\.2\.", "decoder.up.1.upsample."),
        (r"encoder\.levels\.(\d)\.(\d)\.", r"encoder.down.\1.block.\2."),
        (r"decoder\.levels\.0\.(\d)\.", r"decoder.up.1.block.\1."),
        (r"decoder\.levels\.1\.(\d)\.", r"decoder.up.0.block.\1."),
        (r"\.shortcut\.", ".nin_shortcut."),
    ]
    return renamed(state, rules)


def in_original_layout(network, n_heads=N_HEADS):
    """The weights of a `UNET` as the original names, orders and signs them."""
    state = {}
    for name, value in network.state_dict().items():
        if ".attention.qkv." in name:  # by head, then kind
            value = value.unflatten(0, (3, n_heads, -1)).transpose(0, 1).flatten(0, 2)
        if ".attention." in name and value.ndim == 4:
            value = value[..., 0]
        state[name] = (-value if name.startswith("noise_head.conv") else value).contiguous().clone()
    rules = [
        (r"^time_embedding\.", "time_embed."),
        (r"^stem\.conv\.", "input_blocks.0.0."),
        (r"^z0_head\.norm\.", "out.0."),
        (r"^z0_head\.conv\.", "out.2."),
        (r"^noise_head\.norm\.", "mt_out.0."),
        (r"^noise_head\.conv\.", "mt_out.1."),
        (r"\.attention\.out\.", ".attention.proj_out."),
        (r"^middle1\.residual\.", "middle_block.0."),
        (r"^middle1\.attention\.", "middle_block.1."),
        (r"^middle2\.residual\.", "middle_block.2."),
        (r"^down\.0\.blocks\.0\.residual\.", "input_blocks.1.0."),
        (r"^up\.0\.blocks\.(\d)\.residual\.", r"output_blocks.\1.0."),
        (r"_block(s?\.\d\.0|\.[02])\.norm1\.", r"_block\1.in_layers.0."),
        (r"_block(s?\.\d\.0|\.[02])\.conv1\.", r"_block\1.in_layers.2."),
        (r"_block(s?\.\d\.0|\.[02])\.time\.", r"_block\1.emb_layers.1."),
        (r"_block(s?\.\d\.0|\.[02])\.norm2\.", r"_block\1.out_layers.0."),
        (r"_block(s?\.\d\.0|\.[02])\.conv2\.", r"_block\1.out_layers.3."),
        (r"_block(s?\.\d\.0|\.[02])\.shortcut\.", r"_block\1.skip_connection."),
    ]
    return renamed(state, rules)


@pytest.fixture(scope="module")
def autoencoder():
    return random_network(AutoencoderKL, AUTOENCODER)


@pytest.fixture(scope="module")
def unet():
    return random_network(MaskedUNet, UNET)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, autoencoder, unet):
    """A folder with both networks as others would have published them, as safetensors and as pickles."""
    folder = tmp_path_factory.mktemp("sources")
    for name, weights in (("vae", in_compvis_layout(autoencoder)), ("unet", in_original_layout(unet))):
        save_file(weights, folder / f"{name}.safetensors")
        torch.save(weights, folder / f"{name}.pt")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved detector."""
    images = np.random.default_rng(0).uniform(0.1, 1, (4, 16, 16)).astype(np.float32)
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_detector().fit(images).save(path)
    return path


def same(found, expected):
    assert found.config == expected.config and not found.training
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_autoencoder_comes_back_bit_by_bit(run, sources, autoencoder, tmp_path, suffix):
    out = tmp_path / "new" / "vae"
    assert run("convert", sources / f"vae{suffix}", out)[::2] == (0, "")
    assert {path.name for path in out.iterdir()} == {"config.json", "autoencoder.safetensors"}
    assert {path.name for path in out.parent.iterdir()} == {"vae"}
    found, x = load_autoencoder(out), noise(2, 3, 8, 12)
    same(found, autoencoder)
    assert torch.equal(found.encode(x).mean, autoencoder.encode(x).mean)
    assert torch.equal(found.decode(noise(2, 2, 4, 6)), autoencoder.decode(noise(2, 2, 4, 6)))


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_unet_comes_back_bit_by_bit(run, sources, unet, tmp_path, suffix):
    out = tmp_path / "unet"
    assert run("convert", sources / f"unet{suffix}", out)[::2] == (0, "")
    assert {path.name for path in out.iterdir()} == {"config.json", "denoiser.safetensors"}
    found, z, t = load_unet(out), noise(2, 2, 4, 6), torch.tensor([1.0, 7.0])
    same(found, unet)
    for ours, expected in zip(found(z, t), unet(z, t), strict=True):
        assert torch.equal(ours, expected)


def test_config_says_what_it_is(run, sources, tmp_path):
    for name, kind in (("vae", "AutoencoderKL"), ("unet", "MaskedUNet")):
        run("convert", sources / f"{name}.pt", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (config["format"], config["format_version"], config["class"]) == ("madad", 2, kind)


def test_json_tells_what_was_written(run, sources, unet, tmp_path):
    status, printed, _ = run("convert", sources / "unet.pt", tmp_path / "a", "--json")
    facts = json.loads(printed)
    assert status == 0
    assert facts["network"] == "MaskedUNet" and facts["size"] is None
    assert facts["parameters"] == sum(p.numel() for p in unet.parameters())
    assert facts["config"]["base_channels"] == 32 and facts["config"]["n_heads"] == N_HEADS
    assert facts["out"] == str(tmp_path / "a") and facts["source"] == str(sources / "unet.pt")
    assert facts["use"] == f"denoiser=madad.pretrained.load_unet('{tmp_path / 'a'}')"
    listed = run("convert", sources / "vae.pt", tmp_path / "b")[1].splitlines()
    assert "network: AutoencoderKL" in listed and "latent_factor: 2" in listed and "config:" in listed
    assert f"use: autoencoder=LatentAutoencoder(init='{tmp_path / 'b'}')" in listed


def test_image_channels(run, sources, autoencoder, tmp_path):
    assert run("convert", sources / "vae.pt", tmp_path / "grey", "--image-channels", 1)[0] == 0
    same(load_autoencoder(tmp_path / "grey"), to_image_channels(autoencoder, 1))


def test_heads_are_the_callers(run, unet, tmp_path):
    save_file(in_original_layout(unet, n_heads=2), tmp_path / "two.safetensors")
    assert run("convert", tmp_path / "two.safetensors", tmp_path / "out", "--n-heads", 2)[0] == 0
    found = load_unet(tmp_path / "out")
    assert found.config.n_heads == 2
    torch.testing.assert_close(found.state_dict(), unet.state_dict(), rtol=0, atol=0)


def test_a_part_of_a_saved_detector(run, saved, tmp_path):
    status, _, errors = run("convert", saved, tmp_path / "both")
    assert status == 2 and "either an autoencoder or a denoiser" in errors
    assert "autoencoder and denoiser" in errors and not (tmp_path / "both").exists()
    detector = MaskedDiffusionAnomalyDetector.load(saved)
    for part, load, network in (
        ("autoencoder", load_autoencoder, detector.autoencoder_.network_),
        ("denoiser", load_unet, detector.denoiser_),
    ):
        for source in (saved, saved / f"{part}.safetensors"):
            assert run("convert", source, tmp_path / part, "--part", part)[0] == 0
            same(load(tmp_path / part), network)


def test_a_converted_directory_can_be_converted_and_replaced(run, sources, autoencoder, tmp_path):
    out = tmp_path / "out"
    run("convert", sources / "unet.pt", out)
    assert run("convert", sources / "vae.pt", out)[0] == 0
    same(load_autoencoder(out), autoencoder)
    assert run("convert", out, out, "--image-channels", 1)[0] == 0
    same(load_autoencoder(out), to_image_channels(autoencoder, 1))


def test_a_detector_is_fitted_with_what_was_converted(run, sources, unet, tmp_path):
    run("convert", sources / "vae.pt", tmp_path / "vae")
    run("convert", sources / "unet.pt", tmp_path / "unet")
    images = np.random.default_rng(0).uniform(0.1, 1, (4, 16, 16)).astype(np.float32)
    start = LatentAutoencoder(init=tmp_path / "vae", intensity_range="data")
    detector = tiny_detector(autoencoder=start, denoiser=load_unet(tmp_path / "unet")).fit(images)
    assert detector.autoencoder_.config_.base_channels == 32
    assert detector.denoiser_.config == unet.config
    assert np.isfinite(detector.predict_maps(images)).all()


@pytest.mark.parametrize(
    ("source", "kind", "use"),
    [
        ("vae.pt", "AutoencoderKL", r"autoencoder=LatentAutoencoder\(init=path\)"),
        ("unet.pt", "MaskedUNet", r"denoiser=madad.pretrained.load_unet\(path\)"),
    ],
)
def test_a_converted_directory_is_no_detector(run, sources, tmp_path, source, kind, use):
    run("convert", sources / source, tmp_path / "out")
    message = f"out must hold a Masked.*, got a network alone, '{kind}'. Fit a detector with it: {use}"
    with pytest.raises(ValueError, match=message):
        MaskedDiffusionAnomalyDetector.load(tmp_path / "out")


def test_the_other_network_is_refused(run, sources, tmp_path):
    for source, load, missing in (
        ("vae", load_unet, "denoiser.safetensors"),
        ("unet", load_autoencoder, "autoencoder.safetensors"),
    ):
        run("convert", sources / f"{source}.pt", tmp_path / source)
        with pytest.raises(FileNotFoundError, match=f"source must hold {missing}, got .*{source}, a saved "):
            load(tmp_path / source)


ERRORS = {
    "no such file": (["nowhere.pt"], "source must name a weight file.*'.*nowhere.pt'"),
    "another part": (["vae.pt", "--part", "denoiser"], "vae.pt must hold .*missing"),
    "another part too": (["unet.pt", "--part", "autoencoder"], "source must hold a KL autoencoder.*unet.pt"),
    "channels of a U-Net": (["unet.pt", "--image-channels", 1], "--image-channels must .* only, got 1"),
    "heads of an autoencoder": (["vae.pt", "--n-heads", 2], "--n-heads must be .* a denoiser only, got 2"),
    "channels": (["vae.pt", "--image-channels", 2], "n must be 1 or 3 .* got 2"),
    "neither": (["other.safetensors"], r"source must hold either .*other.safetensors with neither \(\['a.w"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_go_to_stderr_and_nothing_is_written(run, sources, tmp_path, name):
    (source, *arguments), message = ERRORS[name]
    save_file({"a.weight": torch.zeros(1)}, sources / "other.safetensors")
    status, printed, errors = run("convert", sources / source, tmp_path / "out", *arguments)
    assert (status, printed) == (2, "")
    assert errors.startswith("madad: error: ") and re.search(message, errors), errors
    assert list(tmp_path.iterdir()) == []


def test_what_is_something_else_is_never_overwritten(run, sources, saved, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("precious")
    (tmp_path / "file").write_text("mine")
    weights = load_file(saved / "denoiser.safetensors")
    for out in (tmp_path / "notes", tmp_path / "file", saved):
        status, _, errors = run("convert", sources / "vae.pt", out)
        assert status == 2 and "path must be new, empty or " in errors and str(out) in errors
    assert (tmp_path / "notes" / "notes.txt").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "mine"
    assert load_file(saved / "denoiser.safetensors").keys() == weights.keys()
