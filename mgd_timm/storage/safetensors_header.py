"""Read and check the header of a safetensors file, for files that are mapped and hold checksums of their own rows."""

import json
from pathlib import Path
from typing import Any, NamedTuple

_MAX_BYTES = 2**16  # of a header; a flipped bit in its length may ask for 2^63


class TensorInfo(NamedTuple):
    """A tensor of the file: safetensors' name of its dtype, its shape, and its size in bytes."""

    dtype: str
    shape: list[int]
    num_bytes: int


class Header(NamedTuple):
    """Tensors by name, and the metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read a header, and check that it is as safetensors writes it and that the file has the length that it states.

    Raises:
        PermissionError: The user may not read the file.
        ValueError: The header was changed, or the file has another length. The message completes "it is corrupt (...)".
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length < _MAX_BYTES else b""
        content: dict[str, Any] = json.loads(text)
        unchanged = text.rstrip(b" ") == json.dumps(content, separators=(",", ":")).encode()
        metadata = content.pop("__metadata__", {})
        tensors = {
            name: TensorInfo(info["dtype"], info["shape"], info["data_offsets"][1] - info["data_offsets"][0])
            for name, info in content.items()
        }
        expected_size = 8 + length + sum(info.num_bytes for info in tensors.values())
        size = path.stat().st_size
    except PermissionError:  # the file is not corrupt, and must not be deleted
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    if not unchanged:
        raise ValueError("its header is not as it was written")
    if size != expected_size:
        raise ValueError(f"it has {size:,} bytes instead of {expected_size:,}")
    return Header(tensors, metadata)
