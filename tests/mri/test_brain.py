import sys
import warnings

import nibabel as nib
import numpy as np
import pytest

from madad.mri import brain as brain_module
from madad.mri.brain import clean_mask, find_brain, is_stripped

AFFINE = np.diag([5.0, 5.0, 5.0, 1.0])
SHAPE = (40, 40, 40)


def ball(radius_mm, center=(20, 20, 20)):
    """Return where the distance to a voxel of a grid of 5 mm is below a radius; 70 mm make 1.4 litres."""
    offset = np.moveaxis(np.indices(SHAPE), 0, -1) - center
    return 5 * np.linalg.norm(offset, axis=-1) < radius_mm


def stripped_brain():
    return np.where(ball(70), np.random.default_rng(0).normal(100, 10, SHAPE), 0).astype(np.float32)


@pytest.fixture
def steps(monkeypatch):
    """Methods that find what the test says, and the list of those that were asked."""
    asked, found = [], {}

    def step(name):
        def find(values, affine):
            asked.append(name)
            if isinstance(found.get(name), Exception):
                raise found[name]
            return found.get(name, np.zeros(values.shape, dtype=bool))

        return find

    monkeypatch.setattr(brain_module, "_METHODS", {name: step(name) for name in brain_module._METHODS})
    return asked, found


def test_given_mask_is_returned_as_it_is_before_all_others(steps):
    asked, _ = steps
    given = np.zeros(SHAPE, dtype=np.uint8)
    given[2, 2, 2] = given[9, 9, 9] = 3
    brain, made_by = find_brain(stripped_brain(), AFFINE, brain_mask=given)
    assert made_by == "given"
    assert brain.dtype == bool
    np.testing.assert_array_equal(brain, given > 0)
    assert asked == []


@pytest.mark.parametrize("works", ["stripped", "deepbet", "template"])
def test_auto_takes_the_first_that_works(steps, works):
    asked, found = steps
    found[works] = ball(70)
    brain, made_by = find_brain(stripped_brain(), AFFINE)
    order = ["stripped", "deepbet", "template"]
    assert made_by == works
    assert asked == order[: order.index(works) + 1]
    np.testing.assert_array_equal(brain, ball(70))


def test_auto_does_without_deepbet_but_not_without_simpleitk(steps):
    asked, found = steps
    found |= {"deepbet": ImportError("no deepbet"), "template": ball(70)}
    assert find_brain(stripped_brain(), AFFINE)[1] == "template"
    with pytest.raises(ImportError, match="no deepbet"):
        find_brain(stripped_brain(), AFFINE, method="deepbet")
    found["template"] = ImportError("no SimpleITK")
    with pytest.raises(ImportError, match="no SimpleITK"):
        find_brain(stripped_brain(), AFFINE)


@pytest.mark.parametrize("radius_mm", [30, 95])
def test_mask_of_the_wrong_size_is_no_brain(steps, radius_mm):
    asked, found = steps
    found |= {"stripped": ball(radius_mm), "deepbet": ball(70)}
    assert find_brain(stripped_brain(), AFFINE)[1] == "deepbet"
    found["deepbet"] = ball(radius_mm)
    with pytest.raises(ValueError) as error:
        find_brain(stripped_brain(), AFFINE)
    litres = np.count_nonzero(ball(radius_mm)) * 125 / 1e6
    assert "values must show a brain of 0.3 to 2.5 litres" in str(error.value)
    assert f"{litres:.2f} by 'deepbet', 0.00 by 'template'" in str(error.value)


def test_any_mask_found_is_one_part_without_holes(steps):
    _, found = steps
    found["template"] = (ball(70) & ~ball(20)) | ball(8, center=(2, 2, 2))
    brain, _ = find_brain(stripped_brain(), AFFINE, method="template")
    np.testing.assert_array_equal(brain, ball(70))


def test_stripped_volume_is_its_own_mask():
    values = stripped_brain()
    values[20, 20, 20] = 0  # a hole
    values[1, 1, 1] = 100  # a speck
    brain, made_by = find_brain(values, AFFINE)
    assert made_by == "stripped"
    np.testing.assert_array_equal(brain, ball(70))


def test_stripped_is_told_from_a_head():
    values = stripped_brain()
    assert is_stripped(values, AFFINE)
    assert not is_stripped(values + 1, AFFINE)  # no background of 0
    assert not is_stripped(values, 1.3 * AFFINE)  # 3.2 litres
    box = values[6:35, 6:35, 6:35]
    assert is_stripped(box, AFFINE)  # about half of a brain's bounding box is background
    assert not is_stripped(box[3:-3, 3:-3, 3:-3], AFFINE)
    shifted = np.where(ball(70), values - 90, 0)
    assert (shifted < 0).sum() > 0.1 * (shifted > 0).sum()
    assert not is_stripped(shifted, AFFINE)


def test_clean_mask_of_nothing_is_nothing():
    assert not clean_mask(np.zeros((3, 3, 3), dtype=bool)).any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "bet"}, ["method", "'bet'", "'deepbet'"]),
        ({"values": np.zeros(SHAPE)}, ["values", "brain", "0 everywhere"]),
        ({"values": np.full(SHAPE, np.nan)}, ["values", "finite", "64000 voxels"]),
        ({"values": np.zeros((4, 4))}, ["values", "(4, 4)"]),
        ({"affine": np.eye(3)}, ["affine", "(3, 3)"]),
        ({"brain_mask": np.ones((2, 2, 2))}, ["brain_mask", "(2, 2, 2)", "(40, 40, 40)"]),
        ({"brain_mask": np.zeros(SHAPE)}, ["brain_mask", "none"]),
        ({"brain_mask": ball(70), "method": "deepbet"}, ["method", "'auto'", "'deepbet'"]),
        ({"values": stripped_brain() + 1, "method": "stripped"}, ["values", "0.00 by 'stripped'"]),
    ],
)
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError) as error:
        find_brain(**({"values": stripped_brain(), "affine": AFFINE} | change))
    assert all(word in str(error.value) for word in words)


COMMANDS = {"hd-bet": ("hd-bet", "out_bet.nii.gz"), "synthstrip": ("mri_synthstrip", "mask.nii.gz")}


def plant_command(folder, monkeypatch, name, body):
    """Put a program on the PATH that runs `body` with the arguments as `argv`."""
    command, mask_name = COMMANDS[name]
    program = folder / command
    program.write_text(
        f"#!{sys.executable}\nimport sys\nimport nibabel as nib\nimport numpy as np\n"
        f"argv, mask_name = sys.argv[1:], {mask_name!r}\n{body}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.skipif(sys.platform == "win32", reason="plants a program by its first line")
@pytest.mark.parametrize("name", COMMANDS)
def test_command_gets_the_volume_and_returns_the_mask(tmp_path, monkeypatch, name):
    plant_command(
        tmp_path,
        monkeypatch,
        name,
        'image = nib.load(argv[argv.index("-i") + 1])\n'
        'assert "-m" not in argv or argv[argv.index("-m") + 1] == mask_name\n'
        'assert "-o" not in argv or argv[argv.index("-o") + 1] == mask_name.replace("_bet", "")\n'
        "mask = (image.get_fdata() > 50).astype(np.uint8)\n"
        "nib.save(nib.Nifti1Image(mask, image.affine), mask_name)",
    )
    off_center = ball(70, (18, 20, 22))
    for affine in (AFFINE, AFFINE @ np.diag([-1, 1, 1, 1])):
        brain, made_by = find_brain(np.where(off_center, 100.0, 1), affine, method=name)
        assert made_by == name
        np.testing.assert_array_equal(brain, off_center)


@pytest.mark.skipif(sys.platform == "win32", reason="plants a program by its first line")
@pytest.mark.parametrize("name", COMMANDS)
def test_command_that_is_missing_or_fails_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"method must .* got no '{COMMANDS[name][0]}'"):
        find_brain(stripped_brain(), AFFINE, method=name)
    saves = "nib.save(nib.Nifti1Image(np.ones({}, np.uint8), None), mask_name)"
    half = saves.format((40, 40, 40)) + '\nsys.exit("no weights here")'
    for body, words in (
        (half, "must end with a mask, got exit status 1: no weights here"),
        ("pass", "must end with a mask, got exit status 0"),
        (saves.format((2, 3, 4)), r"shape \(40, 40, 40\), got \(2, 3, 4\)"),
    ):
        plant_command(tmp_path, monkeypatch, name, body)
        with pytest.raises(ChildProcessError, match=words):
            find_brain(stripped_brain(), AFFINE, method=name)


def test_missing_deepbet_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepbet", None)
    brain_module._deepbet.cache_clear()
    with pytest.raises(ImportError, match=r'deepbet.*pip install "madad\[deepbet\]"'):
        find_brain(stripped_brain(), AFFINE, method="deepbet")


def test_deepbet_that_sees_no_brain_is_no_crash(monkeypatch):
    pytest.importorskip("deepbet", reason="needs the extra deepbet")
    model = brain_module._deepbet()
    for error in (AssertionError("Not enough foreground"), ValueError("argmax of an empty sequence")):

        def run(image, error=error):
            raise error

        monkeypatch.setattr(model, "run", run)
        with pytest.raises(ValueError, match=r"0\.00 by 'deepbet'"):
            find_brain(stripped_brain(), AFFINE, method="deepbet")


def head_and_brain(template, affine, shape):
    """Return the template's brain under a dark skull and a bright scalp, and where the brain is."""
    from madad.mri.resampling import resample_mask, resample_to

    at_mm = nib.affines.apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1))
    radius = np.linalg.norm((at_mm - [0, -18, 8]) / [78, 98, 82], axis=-1)
    brain = resample_mask(template.brain_mask, template.affine, shape, affine)
    tissue = resample_to(template.values, template.affine, shape, affine) * brain * template.values.max()
    return tissue + 1.2 * ((radius > 1.08) & (radius < 1.2) & ~brain), brain


def test_template_finds_the_brain_in_an_oblique_left_handed_head():
    pytest.importorskip("SimpleITK", reason="needs the extra mri")
    pytest.importorskip("nilearn", reason="needs the extra mri")
    from madad.mri.registration import mni_template

    linear = nib.eulerangles.euler2mat(0.15, 0.1, -0.1) @ np.diag([-4.0, 3.0, 3.5])
    shape = (56, 84, 66)
    affine = nib.affines.from_matvec(linear, np.array([6, -25, 12]) - linear @ (np.array(shape) - 1) / 2)
    head, brain = head_and_brain(mni_template(), affine, shape)
    for values in (head, 100 * head + 300):  # neither unit nor zero matters
        found, made_by = find_brain(values, affine, method="template")
        assert made_by == "template"
        assert dice(found, brain) > 0.95


def dice(one, other):
    return 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))


def healthy_head(data_dir, subject):
    stem = data_dir / "volumes" / f"healthy_{subject}_T1_2mm"
    image, labels = nib.load(f"{stem}.nii.gz"), nib.load(f"{stem}_DLMUSE_labels.nii.gz")
    return image.get_fdata(dtype=np.float32), image.affine, np.asarray(labels.dataobj) > 0


@pytest.mark.parametrize("subject", ["IXI012-HH-1211", "IXI049-HH-1358", "IXI316-HH-1862"])
def test_template_reaches_the_labels_of_healthy_heads(data_dir, subject):
    pytest.importorskip("SimpleITK", reason="needs the extra mri")
    pytest.importorskip("nilearn", reason="needs the extra mri")
    values, affine, labels = healthy_head(data_dir, subject)
    brain, _ = find_brain(values, affine, method="template")
    assert dice(brain, labels) > 0.95


def test_auto_takes_deepbet_for_a_head_and_reaches_its_labels(data_dir):
    pytest.importorskip("deepbet", reason="needs the extra deepbet")
    values, affine, labels = healthy_head(data_dir, "IXI316-HH-1862")
    brain_module._deepbet.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        brain, made_by = find_brain(values, affine)
    assert made_by == "deepbet"
    assert dice(brain, labels) > 0.97
    mirrored, _ = find_brain(values[:, :, ::-1], affine @ np.diag([1, 1, -1, 1.0]), method="deepbet")
    assert dice(mirrored[:, :, ::-1], brain) > 0.97  # the orientation is read from the affine
