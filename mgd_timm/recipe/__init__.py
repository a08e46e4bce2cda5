"""What a run is: frozen dataclasses of options. `recipe.py` holds the recipe, the other modules its parts."""

from mgd_timm.recipe.data import Data
from mgd_timm.recipe.heads import Heads
from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.recipe import Recipe

__all__ = ["Data", "Heads", "Optim", "Recipe"]
