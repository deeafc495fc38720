"""The recipes by name: from training rows to one linear map over all heads. Whatever is chosen is chosen inside."""

from __future__ import annotations

from collections.abc import Sequence

from lapwing_detector.token_statistics import TOKEN_STATISTICS
from lapwing_training.errors import InvalidOption
from lapwing_training.options import ATTENTION_SCORE, LAPLACIAN, require_features
from lapwing_training.recipes.lapwing import LapwingRecipe
from lapwing_training.recipes.linear_probe import LinearProbe
from lapwing_training.recipes.paper import PaperRecipe
from lapwing_training.recipes.recipe import Recipe
from lapwing_training.recipes.sink import SinkRecipe
from lapwing_training.statistics.selection import SELECTIONS

__all__ = [
    "DEFAULT_FEATURES",
    "RECIPES",
    "SELECTING",
    "LapwingRecipe",
    "LinearProbe",
    "PaperRecipe",
    "Recipe",
    "SinkRecipe",
    "make_recipe",
]

DEFAULT_FEATURES = {
    "lapwing": (ATTENTION_SCORE, LAPLACIAN),
    "paper": (LAPLACIAN,),
    "sink": ("sink_scores.v1",),
    "combined": (ATTENTION_SCORE, LAPLACIAN),
}
"""What each recipe reads unless it is told otherwise."""

RECIPES = tuple(DEFAULT_FEATURES)
SELECTING = ("lapwing", "combined")
"""Those that rank heads and read the first of them."""


def make_recipe(
    name: str,
    features: Sequence[str] | None,
    k: int | None,
    stored_k: int,
    selection: str = "fdr",
    heads: int | None = None,
) -> Recipe:
    """A recipe by its name.

    Args:
        name: one of `RECIPES`.
        features: ids; None: the recipe's own.
        k: values per head of a ranked feature; None: chosen inside (`sink`: the store's).
        stored_k: the store's.
        selection: how `lapwing` and `combined` rank heads.
        heads: how many it reads; None: chosen inside.

    Raises:
        InvalidOption: no such recipe, feature, selection or number.
    """
    if name not in RECIPES:
        raise InvalidOption(f"recipe is `{name}`; known recipes: {', '.join(RECIPES)}")
    named = DEFAULT_FEATURES[name] if features is None else tuple(features)
    require_features(named)
    if name not in SELECTING and (selection != "fdr" or heads is not None):
        raise InvalidOption(f"recipe `{name}` selects no heads by rank; leave out --selection and --heads")
    if name == "paper":
        return PaperRecipe(named, k)
    if name == "sink":
        return SinkRecipe(named, stored_k if k is None else k)
    if selection not in SELECTIONS:
        raise InvalidOption(f"selection is `{selection}`; known are {', '.join(SELECTIONS)}")
    if heads is not None and heads < 1:
        raise InvalidOption(f"heads is {heads}; it must be at least 1")
    if heads is not None and selection == "all":
        raise InvalidOption(f"heads is {heads}, but selection `all` reads every head; leave one of the two out")
    statistics = tuple(TOKEN_STATISTICS) if name == "combined" else ()
    return LapwingRecipe(named, k, selection, count=heads, statistics=statistics)
