import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from madad.pretrained.kl_autoencoders import (
    load_compvis_autoencoder,
    load_diffusers_autoencoder,
)
from madad.pretrained.loading import kind_of_weights, load_autoencoder
from madad.pretrained.original_unet import load_original_unet
from madad.pretrained.weight_files import read_weights


def test_weights_are_read_as_they_are_stored(tmp_path):
    weights = {"a": torch.arange(3, dtype=torch.float16), "b.c": torch.zeros(0, dtype=torch.int64)}
    save_file(weights, tmp_path / "a.safetensors")
    found = read_weights(tmp_path)
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in weights.items()
    }
    torch.testing.assert_close(found, weights, rtol=0, atol=0)


LOADERS = {
    "original": (load_original_unet, lambda f: f.original_unet_weights(), "out.2.bias", "z0_head.conv.bias"),
    "compvis": (
        load_compvis_autoencoder,
        lambda f: f.compvis_weights(),
        "decoder.norm_out.bias",
        "decoder.head.norm.bias",
    ),
    "diffusers": (
        load_diffusers_autoencoder,
        lambda f: f.in_diffusers_layout(f.compvis_weights()),
        "decoder.conv_norm_out.bias",
        "decoder.head.norm.bias",
    ),
}


all_loaders = pytest.mark.parametrize(("load", "make", "name", "ours"), LOADERS.values(), ids=list(LOADERS))


@all_loaders
def test_missing_unknown_and_misshapen_weights_are_all_listed(foreign, tmp_path, load, make, name, ours):
    weights = dict(make(foreign))
    weights["extra.weight"] = weights.pop(name)
    misshapen = next(key for key in weights if key.endswith(("norm1.bias", "out_layers.0.bias")))
    weights[misshapen] = torch.zeros(7)
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "a.safetensors")
    message = str(error.value)
    assert "a.safetensors must hold exactly the weights of" in message
    for part in (f"missing ['{ours}']", "unknown ['extra.weight']", "(7,) instead of"):
        assert part in message


@pytest.mark.parametrize("layout", ["compvis", "diffusers"])
def test_missing_and_unknown_weights_are_listed_whatever_the_layout(foreign, tmp_path, layout):
    _, make, name, ours = LOADERS[layout]
    weights = dict(make(foreign))
    weights["extra.weight"] = weights.pop(name)
    save_file(weights, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"missing \['{ours}'\], unknown \['extra.weight'\]"):
        load_autoencoder(tmp_path)


@all_loaders
def test_no_missing_name_is_an_unclear_error(foreign, tmp_path, load, make, name, ours):
    """Whichever single tensor is missing, also one that the shape is read from, the error is a ValueError."""
    weights = dict(make(foreign))
    for missing in (name for name in weights if name.endswith("weight")):
        save_file(
            {key: value for key, value in weights.items() if key != missing}, tmp_path / "a.safetensors"
        )
        with pytest.raises(ValueError, match=r"a\.safetensors must hold .*missing \["):
            load(tmp_path / "a.safetensors")


@all_loaders
def test_weights_of_another_kind_are_refused(foreign, tmp_path, load, make, name, ours):
    others = foreign.original_unet_weights() if load is not load_original_unet else foreign.compvis_weights()
    for tensors in ({"a.weight": torch.ones(1)}, others):
        save_file(dict(tensors), tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=r"a\.safetensors must hold .*missing \["):
            load(tmp_path / "a.safetensors")


@all_loaders
def test_paths(foreign, tmp_path, load, make, name, ours):
    with pytest.raises(FileNotFoundError, match="path must name a weight file or a directory .*nowhere.pt"):
        load(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match=r"path must name a directory with one weight file, .*\[\]"):
        load(tmp_path)
    (tmp_path / "readme.txt").write_text("no weights")
    save_file(dict(make(foreign)), tmp_path / "one.safetensors")
    from_directory, from_file = load(str(tmp_path)), load(tmp_path / "one.safetensors")
    torch.testing.assert_close(from_directory.state_dict(), from_file.state_dict(), rtol=0, atol=0)
    torch.save(dict(make(foreign)), tmp_path / "two.pt")
    with pytest.raises(FileNotFoundError, match=r"got .*\['one.safetensors', 'two.pt'\]. Name the file"):
        load(tmp_path)
    for damaged in ("one.safetensors", "two.pt"):
        content = (tmp_path / damaged).read_bytes()
        (tmp_path / damaged).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"{damaged} must be .*Download it again"):
            load(tmp_path / damaged)


@pytest.mark.parametrize("source", ["nowhere", "no/where/at_all", "weights/nowhere.ckpt", "./a/b", "a/b c"])
def test_sources_that_are_neither_path_nor_repository(source):
    with pytest.raises(
        FileNotFoundError, match=f"source must name a weight file.*'{source}'. Check the path"
    ):
        load_autoencoder(source)


def test_sources_of_other_types():
    with pytest.raises(TypeError, match="source must be a path or the name of a hub repository, got 3"):
        load_autoencoder(3)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A huggingface_hub without a network; what was asked of it is in its `calls`."""
    fake = types.ModuleType("huggingface_hub")
    fake.calls, fake.snapshot = [], tmp_path / "snapshot"
    fake.snapshot.mkdir()

    def snapshot_download(repo_id, **options):
        fake.calls.append((repo_id, options))
        return str(fake.snapshot)

    fake.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.mark.parametrize("revision", [None, "v1.0", "refs/pr/3"])
def test_repositories_are_downloaded(foreign, hub, tmp_path, revision):
    weights = foreign.compvis_weights()
    foreign.write_pipeline(weights, hub.snapshot)
    source = "some-body/kl_f8.mse" + (f"@{revision}" if revision else "")
    foreign.check_autoencoder(load_autoencoder(source, hub_cache=tmp_path), weights)
    ((repo_id, options),) = hub.calls
    assert repo_id == "some-body/kl_f8.mse"
    assert options["revision"] == revision and options["cache_dir"] == tmp_path
    patterns = options["allow_patterns"]
    assert {"config.json", "vae/diffusion_pytorch_model.safetensors"} <= set(patterns)
    assert all(
        pattern.endswith(("config.json", ".safetensors")) and "*" not in pattern for pattern in patterns
    )


def test_the_kind_of_a_repositorys_weights(foreign, hub, tmp_path):
    foreign.write_pipeline(foreign.compvis_weights(), hub.snapshot)
    assert kind_of_weights("some-body/kl_f8", hub_cache=tmp_path) == "autoencoder"
    assert hub.calls[0][1]["cache_dir"] == tmp_path


def test_existing_paths_come_before_repositories(foreign, hub, tmp_path):
    weights = foreign.compvis_weights()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    save_file(weights, tmp_path / "owner" / "name" / "a.safetensors")
    foreign.check_autoencoder(load_autoencoder("owner/name"), weights)
    assert hub.calls == []


@pytest.mark.parametrize(
    "error", [FileNotFoundError("no snapshot"), ConnectionError("off"), Exception("x" * 999)]
)
def test_what_the_hub_does_not_give_is_an_oserror(hub, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(OSError, match="source must be an existing path or .*'owner/name@v1'") as raised:
        load_autoencoder("owner/name@v1")
    message = str(raised.value)
    assert type(error).__name__ in message and len(message) < 700
    assert "HF_HOME" in message and "download it elsewhere and pass the directory" in message


def test_repositories_without_weights_that_are_read(hub):
    (hub.snapshot / "config.json").write_text("{}")
    with pytest.raises(
        OSError, match="source must be a repository with one of .*'owner/name' without. Download"
    ):
        load_autoencoder("owner/name")


def test_missing_huggingface_hub_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"source must .*'owner/name'.*pip install \"madad\[hub\]\""):
        load_autoencoder("owner/name")
