"""What a store of teacher outputs looks like on the disk: its rows, its shards and its index, and how damage is
found."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgd_timm.features import Features
from mgd_timm.recipe.options import digest

INDEX = "store.json"
FORMAT = 1
SHARD_BYTES, SHARD_ROWS = 2**27, 32768  # a shard is a process's share of the work, and what an interruption loses
KEY = "mgd_timm"
DTYPES = {torch.float16: "F16", torch.float32: "F32", torch.int16: "I16", torch.int32: "I32"}


class StoreError(ValueError):
    """A store that cannot be used: of other outputs, or a corrupt one; it says what to do."""


@dataclass(frozen=True)
class Layout:
    """What a row holds: the embedding in float16, and all logits in float16 or the `top_k` largest with their classes.

    With `top_k`, the other classes share one logit, rest = log(sum of their exp(logit) / their number), in float32: at
    T=1 each kept class and the sum of the others have the probabilities that they had, but for rounding. At T > 1 the
    sum of the others is larger than it was (equal logits are spread least), the more the fewer are kept.

    Args:
        embed_dim: Width of the embedding.
        num_classes: Number of logits.
        top_k: Logits kept, fewer than there are; 0 keeps all.

    Raises:
        ValueError: top_k out of range.
    """

    embed_dim: int
    num_classes: int
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.top_k < self.num_classes:
            raise ValueError(
                f"teacher_top_k={self.top_k}: expected 1 to {self.num_classes - 1}, fewer than the {self.num_classes} "
                "classes, or 0 for all logits."
            )

    def parts(self, rows: int) -> dict[str, tuple[torch.dtype, list[int]]]:
        """Type and shape of each tensor of `rows` rows."""
        parts: dict[str, tuple[torch.dtype, list[int]]] = {"embedding": (torch.float16, [rows, self.embed_dim])}
        if not self.top_k:
            return parts | {"logits": (torch.float16, [rows, self.num_classes])}
        kind = torch.int16 if self.num_classes <= 2**15 else torch.int32
        kept = [rows, self.top_k]
        return parts | {"values": (torch.float16, kept), "classes": (kind, kept), "rest": (torch.float32, [rows])}

    def size(self, rows: int) -> int:
        """Bytes of `rows` rows."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.parts(rows).values())

    def pack(self, shown: Features) -> dict[str, Tensor]:
        """The rows of a batch, on the CPU.

        Raises:
            StoreError: A number that is not finite, or beyond float16's range.
        """
        embedding, logits = shown.embedding.float().cpu(), shown.logits.float().cpu()
        parts = {"embedding": _half("embedding", embedding)}
        if not self.top_k:
            return parts | {"logits": _half("logits", logits)}
        values, classes = logits.topk(self.top_k)
        rest = logits.scatter(1, classes, -torch.inf).logsumexp(1) - math.log(self.num_classes - self.top_k)
        return parts | {
            "values": _half("logits", values),
            "classes": classes.to(self.parts(0)["classes"][0]),
            "rest": rest,
        }

    def unpack(self, parts: dict[str, Tensor]) -> Features:
        """Features in float32 from rows, on their device."""
        if not self.top_k:
            return Features(parts["logits"].float(), parts["embedding"].float())
        logits = parts["rest"][:, None].repeat(1, self.num_classes)
        logits.scatter_(1, parts["classes"].long(), parts["values"].float())
        return Features(logits, parts["embedding"].float())

    def words(self) -> str:
        """What a row holds, for the user."""
        kept = f"{self.num_classes}" if not self.top_k else f"{self.top_k} of {self.num_classes} logits"
        return f"({self.embed_dim} + {kept}) fp16"


def _half(name: str, values: Tensor) -> Tensor:
    half = values.half()
    if not half.isfinite().all():
        raise StoreError(
            f"the teacher's {name} reach {values.abs().max():.4g}, and a store holds fp16, up to 65,504: leave "
            "--teacher-store out for this teacher."
        )
    return half


def listed(values: dict[str, Any]) -> str:
    """The text of an index: the values and their digest."""
    return json.dumps({**values, "sha256": digest(values)}, indent=2) + "\n"


def read_index(path: Path) -> dict[str, Any]:
    """The fingerprint in store.json.

    Raises:
        StoreError: It cannot be read, or does not match its digest.
    """
    way_out = "delete this file, and the next run with the teacher and the flags of the first one writes it anew"
    try:
        text = path.read_text()
        values = json.loads(text)
        fingerprint, same = (
            dict(values["fingerprint"]),
            text == listed({name: values[name] for name in values if name != "sha256"}),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read ({type(error).__name__}: {error}): {way_out}.") from error
    if not same:
        raise StoreError(f"{path} does not match its sha256: {way_out}.")
    return fingerprint


def corrupt_shard_error(path: Path, why: str) -> StoreError:
    """The error for a corrupt shard."""
    return StoreError(
        f"{path} is corrupt ({why}): delete this file and start again, a run that had begun with --resume; then it is "
        "written anew."
    )


def payload(tensors: dict[str, Tensor]) -> str:
    """sha256 of all numbers, in the order of their names."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(tensors[name].numpy().data)
    return whole.hexdigest()


def in_bytes(count: int) -> str:
    """A size, for the user."""
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.0f} MB"
        if count >= 1e7
        else f"{count / 1e6:.2f} MB"
    )
