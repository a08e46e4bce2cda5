"""`mgd-timm data` in a process of its own: one JSON object, or one line and exit code 1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import FOREIGN, put, table, tree

pytestmark = pytest.mark.slow


def ask(*words: object, **env: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "mgd_timm", "data", *map(str, words)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **env}, timeout=120, check=False)
    return done.returncode, done.stdout.decode(errors="surrogateescape"), done.stderr.decode(errors="replace")


def test_one_object(tmp_path: Path) -> None:
    tree(tmp_path, {"train/cat": 3, "train/dog": 2, "test/cat": 1})
    put(tmp_path / "train/cat/x.json", "{}")
    code, out, _ = ask("--data-dir", tmp_path, "--json")
    assert (code, len(out.splitlines())) == (0, 1)
    seen = json.loads(out)
    assert seen["train"] == {"split": "train", "images": 5, "per_class": {"cat": 3, "dog": 2}}
    assert seen["eval"] == {"split": "test", "images": 1, "per_class": {"cat": 1, "dog": 0}}
    assert (seen["classes"], seen["image_column"], seen["label_column"]) == (["cat", "dog"], None, None)
    assert (seen["path"], seen["ignored_count"]) == ("memory", 1)
    assert seen["ignored"] == [{"path": "train/cat/x.json", "why": "not an image (.json)"}]


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
def test_names_in_every_locale(tmp_path: Path, locale: str) -> None:
    names = ["café", "🐱", os.fsdecode(b"caf\xe9"), "two\nlines"]
    tree(tmp_path, {f"train/{name}": 1 for name in names})
    for flags in (["--json"], []):
        code, out, err = ask("--data-dir", tmp_path, *flags, LC_ALL=locale, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        assert code == 0, err
        if flags:
            assert json.loads(out)["train"]["per_class"] == dict.fromkeys(names, 1)


def test_a_refusal_is_one_line(tmp_path: Path) -> None:
    place = tmp_path / "a\nb"
    table(place / "train.parquet", ["cat", "dog"] * 2, label="kind", sex=["f", "f", "m", "m"])
    for words in (
        ["--data-dir", place],
        ["--data-dir", place, "--target-key", "se\nx"],
        ["--data-dir", tmp_path / "none"],
    ):
        code, out, err = ask(*words, "--json")
        assert (code, out, len(err.strip().splitlines())) == (1, "", 1), err
        assert err.startswith("mgd-timm: error: ")
        assert not FOREIGN.search(err)
