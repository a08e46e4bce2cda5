"""Headers of safetensors files: what is read from them, and which changes are found."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mgd_timm.storage.safetensors_header import TensorInfo, read_header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors = {"rows": torch.zeros(3, 2, dtype=torch.float16), "digests": torch.arange(3)}
    save_file(tensors, tmp_path / "file.safetensors", metadata={"owner": "run"})
    return tmp_path / "file.safetensors"


def test_a_header_is_read_as_it_was_written(path: Path) -> None:
    header = read_header(path)
    assert header.tensors == {"rows": TensorInfo("F16", [3, 2], 12), "digests": TensorInfo("I64", [3], 24)}
    assert header.metadata == {"owner": "run"}


def test_a_change_of_any_byte_of_the_header_is_refused_or_shown(path: Path) -> None:
    content, header = path.read_bytes(), read_header(path)
    length = int.from_bytes(content[:8], "little")
    for index in range(8 + length):
        changed = bytearray(content)
        changed[index] ^= 1
        path.write_bytes(changed)
        try:
            assert read_header(path) != header, index
        except ValueError:
            continue


@pytest.mark.parametrize("change", [-1, 1])
def test_another_length_is_refused(path: Path, change: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] if change < 0 else content + b"x")
    with pytest.raises(ValueError, match=f"{len(content) + change} bytes instead of {len(content)}"):
        read_header(path)
