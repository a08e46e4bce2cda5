"""The contract between networks and criteria: any timm model as `Features` of a `Batch`."""

from mgd_timm.features.contract import Batch, Defaults, Features, Pair, Shapes
from mgd_timm.features.maps import choose_maps, resolve_indices
from mgd_timm.features.rotations import extract_with_rotations
from mgd_timm.features.tap import FeatureTap, match_number_of_maps

__all__ = [
    "Batch",
    "Defaults",
    "FeatureTap",
    "Features",
    "Pair",
    "Shapes",
    "choose_maps",
    "extract_with_rotations",
    "match_number_of_maps",
    "resolve_indices",
]
