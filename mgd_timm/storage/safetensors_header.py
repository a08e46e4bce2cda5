"""Headers of safetensors files, checked byte for byte: for files that are mapped and whose numbers have digests of
their own."""

import json
from pathlib import Path
from typing import Any

_LONGEST = 2**16  # bytes of a header; a flipped bit in its length may ask for 2^63


def checked_header(path: Path) -> tuple[dict[str, tuple[str, list[int], int]], dict[str, str]]:
    """Type, shape and bytes of each tensor, and the metadata, of a file as safetensors wrote it and of the length that
    it names.

    Raises:
        PermissionError: This user may not read it.
        ValueError: The header was changed or the file has another length, in words that go into "it is damaged (...)".
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length < _LONGEST else b""
        header: dict[str, Any] = json.loads(text)
        # As safetensors writes it, so that no byte of it may differ.
        same = text.rstrip(b" ") == json.dumps(header, separators=(",", ":")).encode()
        metadata = header.pop("__metadata__", {})
        parts = {
            name: (part["dtype"], part["shape"], part["data_offsets"][1] - part["data_offsets"][0])
            for name, part in header.items()
        }
        whole = 8 + length + sum(span for *_, span in parts.values())
        size = path.stat().st_size
    except PermissionError:  # no damage: nobody is to be told to delete it
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"its header cannot be read: {error}") from error
    if not same:
        raise ValueError("its header is not as it was written")
    if size != whole:
        raise ValueError(f"it has {size:,} bytes instead of {whole:,}")
    return parts, metadata
