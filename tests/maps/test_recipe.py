import math
from dataclasses import fields

import pytest

from madad.maps import MapRecipe
from madad.presets import PRESETS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("anomaly_map", "wavelet"),
        ("anomaly_map", None),
        ("reference", "atlas"),
        ("map_difference", "cubed"),
        ("smoothing", "median"),
        ("gamma", 0),
        ("gamma", math.nan),
        ("gamma", None),
        ("smoothing_px", -1),
        ("smoothing_px", math.inf),
        ("smoothing_px", "x"),
    ],
)
def test_wrong_parameters_are_refused_where_the_recipe_is_made(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be") as caught:
        MapRecipe(**{name: value})
    assert f"got {value!r}" in str(caught.value)


def test_what_a_map_needs_is_decoded_and_no_more():
    recipes = {
        MapRecipe("image", "reconstruction"): ("changed", False),
        MapRecipe("image", "input"): ("restored", False),
        MapRecipe("latent", "input"): ("nothing", False),
        MapRecipe("mask", "reconstruction"): ("nothing", True),
    }
    assert all((recipe.decode, recipe.needs_probability) == needs for recipe, needs in recipes.items())


def test_parameters_of_the_image_map_have_no_effect_on_the_others():
    assert MapRecipe("image").without_effect == ()
    assert MapRecipe("mask").without_effect == ("reference", "map_difference", "gamma")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_recipe(preset):
    MapRecipe(**{field.name: PRESETS[preset][field.name] for field in fields(MapRecipe)})
