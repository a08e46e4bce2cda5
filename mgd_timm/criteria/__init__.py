"""Distillation methods: one file each, and one explicit dict of them."""

from mgd_timm.criteria.at import AT
from mgd_timm.criteria.base import Criterion, Objective, kl_divergence
from mgd_timm.criteria.cross_entropy import CrossEntropy
from mgd_timm.criteria.fitnet import FitNet
from mgd_timm.criteria.kd import KD

CRITERIA: dict[str, type[Criterion]] = {
    "ce": CrossEntropy,
    "kd": KD,
    "fitnet": FitNet,
    "at": AT,
}

__all__ = ["AT", "CRITERIA", "KD", "Criterion", "CrossEntropy", "FitNet", "Objective", "kl_divergence"]
