"""Multi-Granularity Distillation for timm: any timm model teaches any timm model.

Names load on first use, so that importing the package alone is instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mgd_timm._version import __version__

if TYPE_CHECKING:
    from mgd_timm.api import distill, evaluate, export_formats, export_model, inspect_data, train
    from mgd_timm.criteria import CRITERIA, Criterion, Objective, kl_divergence
    from mgd_timm.distiller import Distiller, MutualLearning, Teacher
    from mgd_timm.features import Batch, Features, FeatureTap, Pair, Shapes
    from mgd_timm.granularity import MAG, MAS, GranularityHeads, HeadFitting
    from mgd_timm.pipeline.export_files import AccuracyDropError
    from mgd_timm.pipeline.measure_files import FileResult
    from mgd_timm.recipe import Data, Heads, Optim, Recipe
    from mgd_timm.recipe.granularity import Granularity
    from mgd_timm.task import MultiGranularityTask

_HOMES = {
    "mgd_timm.api": ("distill", "evaluate", "export_formats", "export_model", "inspect_data", "train"),
    "mgd_timm.criteria": ("CRITERIA", "Criterion", "Objective", "kl_divergence"),
    "mgd_timm.distiller": ("Distiller", "MutualLearning", "Teacher"),
    "mgd_timm.features": ("Batch", "FeatureTap", "Features", "Pair", "Shapes"),
    "mgd_timm.granularity": ("MAG", "MAS", "GranularityHeads", "HeadFitting"),
    "mgd_timm.pipeline.export_files": ("AccuracyDropError",),
    "mgd_timm.pipeline.measure_files": ("FileResult",),
    "mgd_timm.recipe": ("Data", "Heads", "Optim", "Recipe"),
    "mgd_timm.recipe.granularity": ("Granularity",),
    "mgd_timm.task": ("MultiGranularityTask",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CRITERIA",
    "MAG",
    "MAS",
    "AccuracyDropError",
    "Batch",
    "Criterion",
    "Data",
    "Distiller",
    "FeatureTap",
    "Features",
    "FileResult",
    "Granularity",
    "GranularityHeads",
    "HeadFitting",
    "Heads",
    "MultiGranularityTask",
    "MutualLearning",
    "Objective",
    "Optim",
    "Pair",
    "Recipe",
    "Shapes",
    "Teacher",
    "__version__",
    "distill",
    "evaluate",
    "export_formats",
    "export_model",
    "inspect_data",
    "kl_divergence",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mgd_timm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
