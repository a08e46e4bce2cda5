"""Files and folders that appear complete or not at all."""

from pathlib import Path

import pytest

from mgd_timm.storage.atomic_write import PARTIAL_PREFIX, remove_partial_writes, write_atomically, write_text_atomically


def test_an_interrupted_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    def write_half(draft: Path) -> None:
        draft.write_text("half")
        raise KeyboardInterrupt

    write_text_atomically(tmp_path / "file", "complete")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", write_half)
    assert (tmp_path / "file").read_text() == "complete"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_replaced_and_a_folder_is_not(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write_text_atomically(tmp_path / "new" / "file", text)
        assert (tmp_path / "new" / "file").read_text() == text

    def write_folder(draft: Path) -> None:
        draft.mkdir()
        (draft / "content").touch()

    write_atomically(tmp_path / "folder", write_folder)
    with pytest.raises(OSError, match="folder"):
        write_atomically(tmp_path / "folder", write_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]


def test_partial_writes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "file", "complete")
    partial = tmp_path / f"{PARTIAL_PREFIX}abc" / "00000002"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    remove_partial_writes(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
