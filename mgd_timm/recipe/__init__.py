"""What a run is: frozen dataclasses of options."""

from mgd_timm.recipe.data import Data
from mgd_timm.recipe.recipe import Heads, Optim, Recipe

__all__ = ["Data", "Heads", "Optim", "Recipe"]
