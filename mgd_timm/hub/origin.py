"""The digests that a card shows and recipe.json holds: teacher -> heads -> student."""

from typing import Any

from mgd_timm.hub.markdown import pairs
from mgd_timm.hub.student import as_list
from mgd_timm.recipe.options import digest

_NAMES = {
    "data_sha256": "training images and labels",
    "evaluation_sha256": "evaluation images and labels",
    "teacher_loaded_sha256": "teacher, as it was loaded",
    "teacher_sha256": "teacher, as it taught",
    "heads_sha256": "granularity heads",
    "initial_sha256": "student before training",
    "model_sha256": "model.safetensors",
}
"""Digests of recipe.json, in the order of the chain."""

OWN = "files_sha256"
"""Key of recipe.json with the digests of the files beside it, which are written after the card."""


def origin_digest(origin: dict[str, Any]) -> str:
    """Return the digest of what recipe.json says, without the digests of the files beside it."""
    return digest({name: value for name, value in origin.items() if name != OWN})


def digest_rows(origin: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the digests of a card by name, in the order of the chain."""
    rows = []
    for key, name in _NAMES.items():
        values = as_list(origin.get(key))
        rows += [
            (name if len(values) == 1 else f"{name} ({place})", f"`{value}`") for place, value in enumerate(values, 1)
        ]
    return [*rows, ("recipe.json", f"`{origin_digest(origin)}`")]


def digest_table(origin: dict[str, Any]) -> str:
    """Return the table of a card's digests."""
    return pairs(digest_rows(origin), head=("what", "sha256"))
