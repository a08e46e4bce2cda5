"""The index of a tar file: where each image starts, and the texts of the label files. It is cached."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from mgd_timm.data.decode import DataError
from mgd_timm.data.image_formats import NOT_AN_IMAGE, is_image_format, readable_endings, why_not_read
from mgd_timm.data.readers.rows import file_state
from mgd_timm.data.readers.scan import HIDDEN_FILE, LEFT_BEHIND, RESOURCE_FILE, is_left_behind
from mgd_timm.storage.cache import cache_entry
from mgd_timm.storage.checkpoint import State
from mgd_timm.storage.lock import load_or_create

LABELS = (".cls", ".json", ".txt")
"""Endings of webdataset's label files; the first one that an image has is its label."""
_AFTER_END = 1 << 20
"""Bytes after the end of a tar that are looked at; tar pads it with 10 kB of zeros."""


class _Member(NamedTuple):
    """A file in a tar: its name, its offset and size in bytes, and why it is not used, "" if it is."""

    name: str
    offset: int
    size: int
    why: str


def load_index(path: Path, log: Any) -> State:
    """Load the index of a tar from the cache, by the tar's path, size, times and inode, or create it.

    Returns:
        "offsets" and "sizes" of the images. Of each image the name and the label, which is the suffix and the text of
        its label file (".cls 3"), "" without one; "others", for each reason the first file that is not used and their
        number; and "lost", name and reason of the first file of each folder that may be an image and cannot be used.

    Raises:
        DataError: The file is not a tar, or compressed or truncated.
    """
    folder = cache_entry("tars", f"{file_state(path)}:{sorted(readable_endings())}:4")
    return load_or_create(folder, f"index of {path}", lambda: _create(path), log)


def read_part(path: Path, offset: int, size: int) -> bytes:
    """Return a part of a file."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def sample_key(name: str) -> tuple[str, str]:
    """Return webdataset's key of a member, its name up to the first dot, and the rest of the name in lower case."""
    folder, _, file = name.rpartition("/")
    key, dot, rest = file.partition(".")
    return f"{folder}/{key}", f"{dot}{rest}".lower()


def _create(path: Path) -> State:
    named: dict[str, _Member] = {}
    others: dict[str, tuple[str, int]] = {}
    lost: dict[str, tuple[str, str]] = {}

    def leave_out(name: str, why: str) -> None:
        first, count = others.get(why, (name, 0))
        others[why] = first, count + 1
        if not why.startswith((NOT_AN_IMAGE, LEFT_BEHIND, RESOURCE_FILE, HIDDEN_FILE, _REPLACED)):
            lost.setdefault(name.rpartition("/")[0], (name, why))

    for member in _members(path):
        if member.name in named:
            leave_out(member.name, _REPLACED)
        named[member.name] = member
    images: list[_Member] = []
    labels: dict[str, tuple[int, str]] = {}
    unused: list[str] = []
    for member in named.values():
        key, suffix = sample_key(member.name)
        ending = PurePosixPath(member.name).suffix.lower()
        why = member.why or why_not_read(ending)
        if why is None:
            images.append(member)
        elif suffix in LABELS and not member.why:
            rank = LABELS.index(suffix)
            unused += [f"{key}{LABELS[labels[key][0]]}"] if key in labels and rank < labels[key][0] else []
            if key in labels and rank > labels[key][0]:
                unused.append(member.name)
            else:
                labels[key] = rank, f"{suffix} {_label_text(path, member, suffix)}"
        elif ending == ".cls" and not member.why:
            raise DataError(
                f"{path}: {member.name} is the label of no image, as webdataset's keys end at the first dot: rename "
                "the files, without dots before the ending."
            )
        else:
            leave_out(member.name, why)
    keys = [sample_key(member.name)[0] for member in images]
    unused += [f"{key}{LABELS[rank]}" for key, (rank, _) in labels.items() if key not in set(keys)]
    for name in unused:
        leave_out(name.lstrip("/"), f"{NOT_AN_IMAGE} ({PurePosixPath(name).suffix})")
    tensors = {
        "offsets": torch.tensor([member.offset for member in images], dtype=torch.int64),
        "sizes": torch.tensor([member.size for member in images], dtype=torch.int64),
    }
    values = {
        "names": [member.name for member in images],
        "labels": [labels.get(key, (0, ""))[1] for key in keys],
        "others": others,
        "lost": list(lost.values()),
    }
    return State({"index": tensors}, values)


def _label_text(path: Path, member: _Member, suffix: str) -> str:
    text = read_part(path, member.offset, member.size).decode(errors="replace")
    if suffix != ".json":
        return text.strip().partition("\n")[0]
    try:
        return json.dumps(json.loads(text))
    except ValueError as error:
        raise DataError(f"{path}: {member.name} is not JSON ({error}): write it again.") from error


_REPLACED = "replaced by a later file of the same name"


def _members(path: Path) -> Iterator[_Member]:
    """Yield every file. The files of a tar in a tar get its name as their folder."""
    try:
        with tarfile.open(path, "r:") as outer:
            for member, offset in _files(outer):
                if not member.name.endswith(".tar"):
                    yield _Member(member.name, offset, member.size, _why_not_used(member))
                    continue
                content = outer.extractfile(member)
                assert content is not None
                with tarfile.open(fileobj=content, mode="r:") as inner:
                    for one, inner_offset in _files(inner):
                        name = f"{PurePosixPath(member.name).stem}/{one.name}"
                        yield _Member(name, offset + inner_offset, one.size, _why_not_used(one))
            end = outer.offset
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as a tar ({error}): expected a complete tar without compression, as a compressed "
            "one cannot be read from the middle."
        ) from error
    rest = read_part(path, end, _AFTER_END)
    if any(rest):
        raise DataError(f"{path}: more follows after its end, such as another tar: write it again as one.")
    if not rest:
        raise DataError(f"{path}: it has no end, as it was truncated or not closed: copy or write it again.")


def _files(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield the files and links of a tar, and where the content of each starts: of a hard link, that of its file."""
    seen: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        target = seen.get(member.linkname) if member.islnk() else None
        if target is not None:
            member.size, member.type, member.offset_data = target.size, target.type, target.offset_data
        if member.isreg() or member.issym() or member.islnk():
            seen[member.name] = member
            yield member, member.offset_data


def _why_not_used(member: tarfile.TarInfo) -> str:
    *folders, name = member.name.split("/")
    if any(map(is_left_behind, folders)):
        return LEFT_BEHIND
    if name.startswith("._"):
        return RESOURCE_FILE
    ending = PurePosixPath(name).suffix.lower()
    if name.startswith(".") and not ending:
        return HIDDEN_FILE
    if not member.isreg():
        return "a link in a tar" if is_image_format(ending) else why_not_read(ending) or ""
    return "a sparse file in a tar" if member.issparse() else ""
