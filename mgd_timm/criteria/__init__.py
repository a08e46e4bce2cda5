"""Distillation methods: one file each, and one explicit dict of them."""

from mgd_timm.criteria.ab import AB
from mgd_timm.criteria.afd import AFD
from mgd_timm.criteria.afds import AFDS
from mgd_timm.criteria.at import AT
from mgd_timm.criteria.base import Criterion, Objective, kl_divergence
from mgd_timm.criteria.catkd import CATKD
from mgd_timm.criteria.cc import CC
from mgd_timm.criteria.crd import CRD
from mgd_timm.criteria.cross_entropy import CrossEntropy
from mgd_timm.criteria.dist import DIST
from mgd_timm.criteria.dkd import DKD
from mgd_timm.criteria.dml import DML
from mgd_timm.criteria.fitnet import FitNet
from mgd_timm.criteria.fsp import FSP
from mgd_timm.criteria.ft import FT
from mgd_timm.criteria.kd import KD
from mgd_timm.criteria.kdsvd import KDSVD
from mgd_timm.criteria.masked_generative import MaskedGenerative
from mgd_timm.criteria.nst import NST
from mgd_timm.criteria.ofa import OFA
from mgd_timm.criteria.pkt import PKT
from mgd_timm.criteria.reviewkd import ReviewKD
from mgd_timm.criteria.rkd import RKD
from mgd_timm.criteria.selfkd import SelfKD
from mgd_timm.criteria.sp import SP
from mgd_timm.criteria.srrl import SRRL
from mgd_timm.criteria.standardisation import Standardised, standardise
from mgd_timm.criteria.vid import VID

CRITERIA: dict[str, type[Criterion]] = {
    "ce": CrossEntropy,
    "kd": KD,
    "fitnet": FitNet,
    "at": AT,
    "sp": SP,
    "cc": CC,
    "rkd": RKD,
    "pkt": PKT,
    "nst": NST,
    "kdsvd": KDSVD,
    "crd": CRD,
    "vid": VID,
    "ab": AB,
    "ft": FT,
    "fsp": FSP,
    "afds": AFDS,
    "afd": AFD,
    "reviewkd": ReviewKD,
    "masked_generative": MaskedGenerative,
    "dkd": DKD,
    "dist": DIST,
    "srrl": SRRL,
    "ofa": OFA,
    "catkd": CATKD,
    "dml": DML,
    "selfkd": SelfKD,
}

__all__ = ["CRITERIA", "Criterion", "Objective", "Standardised", "kl_divergence", "standardise"]
