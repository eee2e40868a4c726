import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from madad import MaskedDiffusionAnomalyDetector
from madad.datasets import load_slices
from madad.nn import AUTOENCODER_SIZES, UNET_SIZES, AutoencoderKL, MaskedUNet
from madad.saving.saved_detector import save_network
from madad.testing import tiny_detector


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved detector of slices of 32 x 32 pixels."""
    images = np.random.default_rng(0).uniform(0.1, 1, (4, 32, 32)).astype(np.float32)
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny_detector().fit(images).save(path)
    return path


def facts_of(run, path):
    status, printed, errors = run("info", path, "--json")
    assert (status, errors) == (0, "")
    return json.loads(printed)


def test_info_tells_what_a_model_is(run, model):
    detector = MaskedDiffusionAnomalyDetector.load(model)
    status, printed, errors = run("info", model, "--json")
    assert (status, errors) == (0, "")
    facts = json.loads(printed)
    assert facts["slices"] == "1 x 32 x 32" and facts["preset"] == "tiny"
    assert facts["map_threshold"] == detector.map_threshold_ and facts["offset"] == detector.offset_
    assert facts["denoiser"]["parameters"] == sum(p.numel() for p in detector.denoiser_.parameters())
    assert facts["denoiser"]["step"] == detector.history_[-1]["step"]
    assert facts["autoencoder"]["l1"] == detector.autoencoder_.history_[-1]["l1"]
    listed = run("info", model)[1].splitlines()
    assert "slices: 1 x 32 x 32" in listed and "autoencoder:" in listed


def test_info_reports_the_quality_on_the_healthy_slices_of_a_file(run, model, write_slices, tmp_path):
    data = write_slices(tmp_path / "slices.npz")
    facts = json.loads(run("info", model, "--data", data, "--json")[1])
    quality = facts["quality"]
    assert quality["n_slices"] == 24  # every other slice has a lesion
    slices = load_slices(data, size=32)
    healthy = ~slices.lesion_masks.any(axis=(1, 2))
    autoencoder = MaskedDiffusionAnomalyDetector.load(model).autoencoder_
    report = autoencoder.score_report(slices.images[healthy], brain_mask=slices.brain_masks[healthy])
    assert quality == pytest.approx(report | {"n_slices": 24}, rel=1e-6)


def test_info_on_what_is_no_model(run, tmp_path):
    status, _, errors = run("info", tmp_path / "nothing")
    assert status == 2
    assert errors.startswith("madad: error: path must name a model directory") and "nothing" in errors


def test_data_are_for_saved_detectors_alone(run, tmp_path):
    save_network(AutoencoderKL(AUTOENCODER_SIZES["tiny"]), tmp_path / "out")
    status, _, errors = run("info", tmp_path / "out", "--data", tmp_path / "a.npz")
    assert status == 2 and "--data must be given for a saved detector only, got" in errors


def test_the_models_card_is_printed(run, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "card.json").write_text('{"trained_on": {"scans": 12}, "notes": ["a", "b"]}')
    card = facts_of(run, tmp_path / "model")["card"]
    assert card == {"trained_on": {"scans": 12}, "notes": ["a", "b"]}
    listed = run("info", tmp_path / "model")[1].splitlines()
    assert listed[listed.index("card:") + 1 :][:2] == ["  trained_on:", "    scans: 12"]
    (tmp_path / "model" / "card.json").unlink()
    assert "card" not in facts_of(run, tmp_path / "model")
    (tmp_path / "model" / "card.json").write_text("{")
    status, _, errors = run("info", tmp_path / "model")
    assert status == 2 and "card.json must be JSON, got a damaged file" in errors


# Networks


@pytest.mark.parametrize("size", AUTOENCODER_SIZES)
def test_a_converted_autoencoder(run, tmp_path, size):
    config = replace(AUTOENCODER_SIZES[size], image_channels=2)
    with torch.device("meta"):
        network = AutoencoderKL(config)
    network = network.to_empty(device="cpu")
    save_network(network, tmp_path / "out")
    facts = facts_of(run, tmp_path / "out")
    assert (facts["kind"], facts["network"], facts["size"]) == ("autoencoder", "AutoencoderKL", size)
    assert facts["parameters"] == sum(p.numel() for p in network.parameters())
    assert facts["tensors"] == len(network.state_dict())
    assert (facts["image_channels"], facts["latent_channels"]) == (2, config.latent_channels)
    assert facts["latent_factor"] == config.factor
    assert facts_of(run, tmp_path / "out" / "autoencoder.safetensors") == facts


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_a_converted_unet(run, tmp_path, size):
    network = MaskedUNet(replace(UNET_SIZES[size], latent_channels=7, dropout=0.25))
    save_network(network, tmp_path / "out")
    facts = facts_of(run, tmp_path / "out")
    assert (facts["kind"], facts["network"], facts["size"]) == ("denoiser", "MaskedUNet", size)
    assert facts["parameters"] == sum(p.numel() for p in network.parameters())
    assert facts["latent_channels"] == 7 and "latent_factor" not in facts
    assert f"size: {size}" in run("info", tmp_path / "out")[1].splitlines()


def test_another_shape_has_no_name(run, tmp_path):
    save_network(MaskedUNet(replace(UNET_SIZES["tiny"], base_channels=16)), tmp_path / "out")
    assert facts_of(run, tmp_path / "out")["size"] is None


def test_networks_in_a_saved_model(run, model):
    detector = MaskedDiffusionAnomalyDetector.load(model)
    for part, network in (("autoencoder", detector.autoencoder_.network_), ("denoiser", detector.denoiser_)):
        facts = facts_of(run, model / f"{part}.safetensors")
        assert (facts["kind"], facts["size"]) == (part, "tiny")
        assert facts["parameters"] == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("mad_ad_unet_ch32.safetensors", "denoiser"),
        ("compvis_kl_f8_ch32.safetensors", "autoencoder"),
        ("diffusers_kl_f8_ch32.safetensors", "autoencoder"),
    ],
)
def test_weights_of_others(run, reference_dir, file, kind):
    facts = facts_of(run, reference_dir / file)
    assert facts["kind"] == kind and facts["config"]["base_channels"] == 32
    assert facts["tensors"] == len(load_file(reference_dir / file))


@pytest.mark.parametrize("name", ["other.safetensors", "other.pt", "other.txt", "folder"])
def test_what_is_nothing_of_ours(run, tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file({"a.weight": torch.zeros(1)}, path)
    elif path.suffix:
        path.write_text("no weights")
    else:
        path.mkdir()
    status, printed, errors = run("info", path)
    assert (status, printed) == (2, "") and name in errors


# Scans


def ellipsoid(shape):
    """1 within an ellipsoid that fills about half of its box, 0 outside."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    return (sum(axis**2 for axis in axes) < 1).astype(np.float32)


def write_scan(path, values, codes="RAS", spacing_mm=(1.0, 2.0, 3.0), dtype=np.float32):
    """A scan whose file has its axes in the order of `codes`, with `spacing_mm` along them."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for i, code in enumerate(codes):
        axis = next(n for n, pair in enumerate(("LR", "PA", "IS")) if code in pair)
        affine[axis, i] = spacing_mm[i] if code in "RAS" else -spacing_mm[i]
    nib.save(nib.Nifti1Image(values.astype(dtype), affine), path)
    return path


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_scan_is_told_along_the_axes_of_its_file(run, tmp_path, codes, suffix):
    values = 100 * ellipsoid((10, 12, 14))
    path = write_scan(tmp_path / f"a{suffix}", values, codes, dtype=np.int16)
    assert facts_of(run, path) == {
        "shape": [10, 12, 14],
        "spacing_mm": [1.0, 2.0, 3.0],
        "axis_codes": codes,
        "dtype": "int16",
        "intensity_min": 0.0,
        "intensity_max": 100.0,
        "not_finite": 0,
        "skull_stripped": True,
    }
    listed = run("info", path)[1].splitlines()
    assert "spacing_mm: [1.0, 2.0, 3.0]" in listed and f"axis_codes: {codes}" in listed


def test_a_scan_with_noise_in_the_air_and_nan(run, tmp_path):
    values = np.random.default_rng(0).uniform(1, 2, (8, 8, 8)).astype(np.float32)
    values[0, 0, :3] = np.nan, np.inf, -np.inf
    facts = facts_of(run, write_scan(tmp_path / "a.nii", values))
    assert facts["not_finite"] == 3 and not facts["skull_stripped"]
    assert facts["intensity_min"] == 0 and facts["intensity_max"] == values[np.isfinite(values)].max()


def test_scans_that_cannot_be_read(run, tmp_path):
    (tmp_path / "damaged.nii.gz").write_bytes(b"\x1f\x8b nothing")
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4, 2), np.float32), np.eye(4)), tmp_path / "series.nii")
    for name, message in (("damaged.nii.gz", "whole NIfTI file"), ("series.nii", "one volume, got a series")):
        status, printed, errors = run("info", tmp_path / name)
        assert (status, printed) == (2, "") and message in errors and name in errors
