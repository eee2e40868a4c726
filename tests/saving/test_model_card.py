import json

import nibabel as nib
import numpy as np
import pytest

from madad.mri import HealthyIntensities, VolumePreprocessor, VolumeSlicer, read_volume
from madad.saving.model_card import RESEARCH_ONLY, ModelCard, listing, preprocessing_of


@pytest.fixture
def volume():
    """A brain on an anisotropic left-handed grid."""
    values = np.zeros((24, 28, 20), np.float32)
    values[3:-4, 2:-5, 3:-3] = np.random.default_rng(0).uniform(0.2, 0.8, (17, 21, 14))
    return read_volume(nib.Nifti1Image(values, np.diag([-1.5, 1.2, 2.5, 1.0])))


@pytest.fixture
def card(volume):
    rng = np.random.default_rng(0)
    return ModelCard(
        contrasts=("T1", "FLAIR"),
        preprocessor=VolumePreprocessor(bias_field=True, target=0.3),
        slicer=VolumeSlicer("coronal", slice_mm=2.0, range_mm=(-3, 20.5)).fit([volume]),
        aggregation={"median_slices": 3, "smoothing_mm": 1.5},
        volume_threshold=0.25,
        volume_offset=-0.5,
        intensity_thresholds={"intensity, bright": 0.75},
        data={"subjects": 12, "site": {"scanner": "Guys"}},
        metrics={"cohort": {"madad": {"auprc": 0.123456789}}},
        healthy={
            name: HealthyIntensities(n, rng.random(9), rng.random((2, 3, 4)), rng.random((2, 3, 4)))
            for n, name in ((3, "T1"), (2, "FLAIR.2"))
        },
    )


def written(card):
    """What a file of it gives back."""
    content = json.loads(json.dumps(card.to_json(), allow_nan=False))
    return ModelCard.from_json(content, card.to_tensors())


def test_it_comes_back(card):
    back = written(card)
    assert back.to_json() == card.to_json()
    assert back.contrasts == ("T1", "FLAIR")
    assert back.preprocessor.get_params() == card.preprocessor.get_params()
    assert list(back.healthy) == list(card.healthy)
    for name, intensities in card.healthy.items():
        assert back.healthy[name].n == intensities.n
        for array, values in intensities.to_arrays().items():
            np.testing.assert_array_equal(back.healthy[name].to_arrays()[array], values)


def test_one_of_arrays_comes_back_empty():
    card = ModelCard()
    assert written(card) == card
    assert card.preprocessing == {} and card.to_tensors() == {}


@pytest.mark.parametrize(
    "slicer",
    [
        VolumeSlicer(),
        VolumeSlicer(spacing_mm=None),  # pixels are not square
        VolumeSlicer("sagittal", spacing_mm=2.0, slice_mm=3.0, range_mm=(-10.0, 8.0)),
        VolumeSlicer("coronal", shape=(48, 64)),
    ],
)
def test_the_slicer_cuts_the_same_slices(slicer, volume):
    slicer.fit([volume])
    back = written(ModelCard(slicer=slicer)).slicer
    for one, other in zip(back.slices_of(volume), slicer.slices_of(volume), strict=True):
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other
    assert (back.shape_, back.spacing_mm_) == (slicer.shape_, slicer.spacing_mm_)
    assert back.fit([volume]).shape_ == slicer.shape_


def test_preprocessing_is_what_makes_the_same_preprocessor(card):
    assert preprocessing_of(VolumePreprocessor(**card.preprocessing)) == card.preprocessing
    assert card.preprocessing["bias_field"] is True and card.preprocessing["target"] == 0.3


# For people


def test_people_read_all_of_it(card):
    text = card.to_markdown("my model", {"class": "Detector", "map_threshold": 0.4321})
    assert text.startswith("# my model\n")
    assert RESEARCH_ONLY in text and "research use only" in text
    sections = dict(part.split("\n", 1) for part in text.split("## ")[1:])
    assert "- map_threshold: 0.4321" in sections["Model"]
    assert "- contrasts: T1, FLAIR" in sections["Data"] and "  - scanner: Guys" in sections["Data"]
    assert "- bias_field: True" in sections["Preprocessing"]
    assert "- plane: coronal" in sections["Slices"]
    assert "- threshold: 0.25" in sections["Volumes"] and "- median_slices: 3" in sections["Volumes"]
    assert "    - auprc: 0.123457" in sections["Metrics"]
    assert "Not known" not in text


def test_people_read_what_is_not_known():
    text = ModelCard().to_markdown("arrays", {})
    sections = dict(part.split("\n", 1) for part in text.split("## ")[1:])
    for name in ("Data", "Preprocessing", "Slices"):
        assert sections[name].strip().startswith("Not known: arrays were given to `fit`")
    assert "Calibrated for single slices." in sections["Volumes"]
    assert "None measured" in sections["Metrics"] and RESEARCH_ONLY in sections["Use"]


# What is damaged


@pytest.mark.parametrize("name", ModelCard().to_json())
def test_without_a_part_it_is_refused(name, card):
    content = card.to_json()
    del content[name]
    if name in ("version", "use"):  # for people
        assert ModelCard.from_json(content).contrasts == ("T1", "FLAIR")
        return
    with pytest.raises(ValueError, match=rf"card\.json must hold what was written .*KeyError: '{name}'"):
        ModelCard.from_json(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("contrasts", None),
        ("preprocessing", {"no_such_step": True}),
        ("preprocessing", [1]),
        ("slices", {}),
        (
            "slices",
            {"plane": "axial", "spacing_mm": 1, "slice_mm": None, "range_mm": None, "shape": [16, 16]},
        ),
        ("slices", "axial"),
        ("aggregation", 3),
        ("volume_threshold", "high"),
        ("volume_offset", []),
        ("data", "many"),
    ],
)
def test_parts_of_another_kind_are_refused(name, value, card):
    with pytest.raises(ValueError, match=r"card\.json must hold what .*, got parts .*Save the model again"):
        ModelCard.from_json(card.to_json() | {name: value})


def test_healthy_intensities_must_be_whole(card):
    tensors = card.to_tensors()
    del tensors["T1.deciles"]
    with pytest.raises(ValueError, match=r"card\.json must hold .*KeyError: 'deciles'"):
        ModelCard.from_json(card.to_json(), tensors)


def test_facts_are_listed_below_their_names():
    facts = {"size": "tiny", "share": 1 / 3, "n": 7, "config": {"widths": (1, 2), "of": {"x": None}}}
    expected = [
        "size: tiny",
        "share: 0.333333",
        "n: 7",
        "config:",
        "  widths: (1, 2)",
        "  of:",
        "    x: None",
    ]
    assert listing(facts).split("\n") == expected
    marked = [line[: len(line) - len(line.lstrip())] + "- " + line.lstrip() for line in expected]
    assert listing(facts, bullet="- ").split("\n") == marked
