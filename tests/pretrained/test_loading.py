"""Whatever autoencoder or U-Net it is, others' or our own."""

import os
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from madad.pretrained.kl_autoencoders import (
    to_image_channels,
)
from madad.pretrained.loading import is_saved, kind_of_weights, load_autoencoder, load_unet
from madad.pretrained.original_unet import load_original_unet
from madad.testing import tiny_detector


class Hostile:
    """Calls `os.system` when unpickled the usual way."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def save_whole_module(foreign, weights, path, monkeypatch):
    """A whole module, as the original repository publishes it; its class is nowhere to be imported from."""
    gone = types.ModuleType("gone_package")
    gone.AutoencoderKL = type("AutoencoderKL", (nn.Module,), {"__module__": "gone_package"})
    module = foreign.module_of(weights | {"loss.logvar": torch.ones(1)})
    module.loss.register_buffer("shift", torch.ones(1))
    module.attack = Hostile(f"touch {path.parent / 'marker'}")
    module.__class__ = gone.AutoencoderKL
    monkeypatch.setitem(sys.modules, "gone_package", gone)
    torch.save(module, path)
    monkeypatch.delitem(sys.modules, "gone_package")
    return path


def in_latent_diffusion(foreign, weights):
    """A checkpoint with the other networks of a pipeline, one of which is an autoencoder too."""
    other = foreign.compvis_weights(base=64)
    state = {f"first_stage_model.{name}": value for name, value in weights.items()}
    state |= {f"cond_stage_model.{name}": value for name, value in other.items()}
    state |= {"model.diffusion_model.out.weight": torch.ones(1), "model_ema.decay": torch.ones(1)}
    return {"global_step": 3, "state_dict": state}


LAYOUTS = {
    "compvis": lambda f, w, d, _: save_file(w, d / "a.safetensors"),
    "compvis checkpoint": lambda f, w, d, _: torch.save({"epoch": 3, "state_dict": dict(w)}, d / "a.ckpt"),
    "compvis ema": lambda f, w, d, _: save_file(
        f.wrapped("", w, ["model_ema.decay", "loss.a"]), d / "a.safetensors"
    ),
    "compvis distributed": lambda f, w, d, _: torch.save(f.wrapped("module.", w), d / "a.pt"),
    "compvis module": lambda f, w, d, patch: save_whole_module(f, w, d / "a.pt", patch),
    "latent diffusion": lambda f, w, d, _: torch.save(in_latent_diffusion(f, w), d / "a.ckpt"),
    "diffusers": lambda f, w, d, _: save_file(f.in_diffusers_layout(w), d / "a.safetensors"),
    "diffusers module": lambda f, w, d, patch: save_whole_module(
        f, f.in_diffusers_layout(w), d / "a.pt", patch
    ),
    "diffusers pipeline": lambda f, w, d, _: f.write_pipeline(w, d),
}


@pytest.mark.parametrize("write", LAYOUTS.values(), ids=list(LAYOUTS))
def test_layout_is_found_out(foreign, tmp_path, monkeypatch, write):
    weights, state = foreign.compvis_weights(), torch.get_rng_state()
    write(foreign, weights, tmp_path, monkeypatch)
    foreign.check_autoencoder(load_autoencoder(tmp_path), weights)
    if len(files := [path for path in tmp_path.iterdir() if path.is_file()]) == 1 and files[0].stem == "a":
        foreign.check_autoencoder(load_autoencoder(str(files[0])), weights)
    assert not (tmp_path / "marker").exists()
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_becomes_single(foreign, tmp_path):
    weights = foreign.compvis_weights()
    for name, value in weights.items():
        weights[name] = value.half()
    save_file(weights, tmp_path / "a.safetensors")
    network = load_autoencoder(tmp_path)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}
    assert torch.equal(network.quant.weight, weights["quant_conv.weight"].float())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    images = np.random.default_rng(0).uniform(0.1, 1, (4, 16, 16)).astype(np.float32)
    detector = tiny_detector(random_state=0).fit(images)
    path = tmp_path_factory.mktemp("saved") / "model"
    detector.save(path)
    return detector, path


def test_autoencoder_of_a_saved_detector(saved):
    detector, path = saved
    for source in (path, path / "autoencoder.safetensors"):
        network = load_autoencoder(source)
        assert network.config == detector.autoencoder_.config_ and not network.training
        torch.testing.assert_close(
            network.state_dict(), detector.autoencoder_.network_.state_dict(), rtol=0, atol=0
        )
    with pytest.raises(ValueError, match="source must hold a KL autoencoder.*denoiser.safetensors with"):
        load_autoencoder(path / "denoiser.safetensors")


def test_unet_of_a_saved_detector(saved):
    detector, path = saved
    for source in (path, str(path), path / "denoiser.safetensors"):
        network = load_unet(source)
        assert network.config == detector.denoiser_.config and not network.training
        torch.testing.assert_close(network.state_dict(), detector.denoiser_.state_dict(), rtol=0, atol=0)
    assert load_unet(path, n_heads=detector.denoiser_.config.n_heads).config == detector.denoiser_.config
    with pytest.raises(ValueError, match="n_heads must be the saved network's 2, got 8. Leave it out"):
        load_unet(path, n_heads=8)


@pytest.mark.parametrize("n_heads", [None, 2])
def test_unets_of_others_are_read_by_the_same_function(foreign, tmp_path, n_heads):
    save_file(foreign.original_unet_weights(), tmp_path / "a.safetensors")
    found, expected = (
        load(tmp_path / "a.safetensors", n_heads=n_heads) for load in (load_unet, load_original_unet)
    )
    assert found.config == expected.config
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match="path must name a weight file or a directory .*nowhere"):
        load_unet(tmp_path / "nowhere")


def test_a_saved_directory_without_the_network_that_is_wanted(saved, tmp_path):
    (tmp_path / "config.json").write_text('{"format": "madad", "format_version": 2, "class": "Some"}')
    for load, name in ((load_autoencoder, "autoencoder"), (load_unet, "denoiser")):
        message = (
            rf"source must hold {name}.safetensors, got .*, a saved Some with \['config.json'\]. Check which"
        )
        with pytest.raises(FileNotFoundError, match=message):
            load(tmp_path)


def test_what_madad_saved_is_told_from_what_it_did_not(saved, tmp_path):
    assert is_saved(saved[1]) and is_saved(str(saved[1]))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "nowhere"):
        assert not is_saved(path)


KINDS = {
    "original": ("denoiser", lambda f: f.original_unet_weights()),
    "distributed": (
        "denoiser",
        lambda f: {f"module.{k}": v for k, v in f.original_unet_weights().items()},
    ),
    "compvis": ("autoencoder", lambda f: f.compvis_weights()),
    "diffusers": ("autoencoder", lambda f: f.in_diffusers_layout(f.compvis_weights())),
    "latent diffusion": (
        "autoencoder",
        lambda f: f.wrapped(
            "first_stage_model.", f.compvis_weights(), ["model.diffusion_model.input_blocks.0.0.weight"]
        ),
    ),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_kinds_are_told_by_the_names_of_the_weights(foreign, tmp_path, name, suffix):
    kind, make = KINDS[name]
    weights = make(foreign)
    path = tmp_path / f"a{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(dict(weights), path)
    assert kind_of_weights(path) == kind_of_weights(str(tmp_path)) == kind


def test_kinds_of_saved_networks(saved, tmp_path):
    _, path = saved
    for kind in ("autoencoder", "denoiser"):
        assert kind_of_weights(path / f"{kind}.safetensors") == kind
        folder = tmp_path / kind
        folder.mkdir()
        for name in ("config.json", f"{kind}.safetensors"):
            (folder / name).symlink_to(path / name)
        assert kind_of_weights(folder) == kind
    message = r"source must hold either .*model with autoencoder and denoiser \(\[.*'config.json'.*Say which"
    with pytest.raises(ValueError, match=message):
        kind_of_weights(path)


def test_weights_of_no_kind(tmp_path):
    save_file({"b.weight": torch.zeros(1), "a.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"with neither \(\['a.weight', 'b.weight'\]\)"):
        kind_of_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="source must name a weight file.*'nowhere'"):
        kind_of_weights("nowhere")


OURS = '{"format": "madad", "format_version": 2%s}'


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json must be JSON, got a damaged file"),
        ("[]", "config.json must hold a JSON object, got list"),
        ('{"format": "madad"}', "format_version must be at most 2, got None.*config.json.*Upgrade madad"),
        (
            '{"format": "madad", "format_version": 3}',
            "format_version must be at most 2, got 3.*Upgrade madad",
        ),
        (OURS % "", "config.json must describe the autoencoder beside it.*KeyError"),
        (
            OURS
            % ', "autoencoder": {"network": {"__class__": "AutoencoderConfig", "fields": {"n_heads": 3}}}',
            "config.json must describe the autoencoder beside it.*n_heads.*Upgrade madad",
        ),
        (
            OURS % ', "autoencoder": {"network": {"__class__": "UNetConfig", "fields": {}}}',
            "config.json must describe the autoencoder beside it.*UNetConfig.*Upgrade madad",
        ),
        (
            OURS % ', "autoencoder": {"network": {"__class__": "Path", "fields": {}}}',
            "config.json must describe the autoencoder beside it.*Path instead of AutoencoderConfig",
        ),
        (
            OURS % ', "autoencoder": {"network": {"__class__": "AutoencoderConfig", "fields": '
            '{"base_channels": 32}}}',
            r"must hold exactly the weights of AutoencoderKL.*missing \['decoder",
        ),
    ],
)
def test_damaged_saved_detector(saved, tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "autoencoder.safetensors").symlink_to(saved[1] / "autoencoder.safetensors")
    with pytest.raises(ValueError, match=message):
        load_autoencoder(tmp_path)


def test_unknown_layout_says_what_was_looked_for_and_what_was_found(foreign, tmp_path):
    for weights, found in (
        (foreign.original_unet_weights(), r"\['input_blocks.0.0.bias', .*'\] and \d+ names more"),
        (foreign.wrapped("a.", {}, ["b.weight"]), r"\['b.weight'\] and 0 names more"),
    ):
        save_file(weights, tmp_path / "a.safetensors")
        message = r"source must .*encoder.down.0.block.0.\*.*encoder.down_blocks.0.resnets.0.\*.*madad saved"
        with pytest.raises(ValueError, match=message + ".*a.safetensors with " + found):
            load_autoencoder(tmp_path / "a.safetensors")


def test_published_weights_can_be_converted_when_they_are_loaded(foreign, tmp_path):
    save_file(foreign.compvis_weights(image_channels=3), tmp_path / "a.safetensors")
    found = load_autoencoder(tmp_path, image_channels=1)
    expected = to_image_channels(load_autoencoder(tmp_path), 1)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
