"""The files of a store of teacher outputs: rows, shards and index, and how a corrupt one is found."""

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
    """A store that cannot be used, because it holds other outputs or is corrupt."""


@dataclass(frozen=True)
class Layout:
    """What a row holds: the embedding in float16, and all logits in float16 or the `top_k` largest with their classes.

    With `top_k`, the other classes share one logit, rest = log(sum of their exp(logit) / their number), in float32. At
    T=1 each kept class and the sum of the others keep their probabilities, but for rounding. At T > 1 the sum of the
    others gets larger, the more so the fewer logits are kept.

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
        """Return type and shape of each tensor of `rows` rows."""
        parts: dict[str, tuple[torch.dtype, list[int]]] = {"embedding": (torch.float16, [rows, self.embed_dim])}
        if not self.top_k:
            return parts | {"logits": (torch.float16, [rows, self.num_classes])}
        kind = torch.int16 if self.num_classes <= 2**15 else torch.int32
        kept = [rows, self.top_k]
        return parts | {"values": (torch.float16, kept), "classes": (kind, kept), "rest": (torch.float32, [rows])}

    def size(self, rows: int) -> int:
        """Return the bytes of `rows` rows."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.parts(rows).values())

    def pack(self, features: Features) -> dict[str, Tensor]:
        """Return the rows of a batch, on the CPU. Raise StoreError for numbers that float16 cannot hold."""
        embedding, logits = features.embedding.float().cpu(), features.logits.float().cpu()
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
        """Return the features of rows, in float32 on the rows' device."""
        if not self.top_k:
            return Features(parts["logits"].float(), parts["embedding"].float())
        logits = parts["rest"][:, None].repeat(1, self.num_classes)
        logits.scatter_(1, parts["classes"].long(), parts["values"].float())
        return Features(logits, parts["embedding"].float())

    def describe(self) -> str:
        """Return what a row holds, for the log."""
        kept = f"{self.num_classes}" if not self.top_k else f"{self.top_k} of {self.num_classes} logits"
        return f"({self.embed_dim} + {kept}) fp16"


def _half(name: str, values: Tensor) -> Tensor:
    half = values.half()
    if not half.isfinite().all():
        raise StoreError(
            f"the largest of the teacher's {name} is {values.abs().max():.4g}, and a store holds fp16, which ends at "
            "65,504: leave --teacher-store out for this teacher."
        )
    return half


def index_text(values: dict[str, Any]) -> str:
    """Return the text of an index: the values and their digest."""
    return json.dumps({**values, "sha256": digest(values)}, indent=2) + "\n"


def read_index(path: Path) -> dict[str, Any]:
    """Return the fingerprint in store.json. Raise StoreError for a file that does not match its digest."""
    way_out = "delete this file; the next run with the same teacher and flags writes it again"
    try:
        text = path.read_text()
        values = json.loads(text)
        fingerprint = dict(values["fingerprint"])
        same = text == index_text({name: values[name] for name in values if name != "sha256"})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read ({type(error).__name__}: {error}): {way_out}.") from error
    if not same:
        raise StoreError(f"{path} does not match its sha256: {way_out}.")
    return fingerprint


def corrupt_shard_error(path: Path, why: str) -> StoreError:
    """Return the error for a corrupt shard."""
    return StoreError(
        f"{path} is corrupt ({why}): delete this file and start again, with --resume if the run had begun; the file is "
        "then written again."
    )


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of all numbers, in the order of the tensors' names."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(tensors[name].numpy().data)
    return whole.hexdigest()


def format_bytes(count: int) -> str:
    """Return a size for the log."""
    return (
        f"{count / 1e9:.2f} GB"
        if count >= 1e9
        else f"{count / 1e6:.0f} MB"
        if count >= 1e7
        else f"{count / 1e6:.2f} MB"
    )
