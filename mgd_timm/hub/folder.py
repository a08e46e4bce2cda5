"""The folder of a published student: timm's layout, with the card and the recipe beside it."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from mgd_timm.hub.card import write_card
from mgd_timm.hub.compression import compression_rows
from mgd_timm.hub.origin import OWN
from mgd_timm.hub.student import Student, without_absolute_paths
from mgd_timm.recipe.recipe import config_values
from mgd_timm.storage.atomic_write import write_atomically
from mgd_timm.storage.digests import sha256

FORMATS = "formats.json"
"""Where mgd-timm export --to leaves what it measured of each file."""

PATTERNS = ("README.md", "config.json", "model.safetensors", "recipe.json", "recipe.yaml", FORMATS, "onnx/*.onnx")
"""All that is published: a file of another name is never uploaded."""


def published_files(folder: Path) -> list[Path]:
    """Return the files of a folder that are published, relative to it, in order."""
    return sorted(path.relative_to(folder) for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file())


def write_folder(
    target: Path, student: Student, repo_id: str, license: str, compare: Sequence[str], log: Callable[[str], None]
) -> None:
    """Write the folder of a published student, atomically. An earlier one is replaced.

    Args:
        target: The folder.
        student: To publish.
        repo_id: user/name.
        license: Identifier of the licence.
        compare: Run folders for the compression table.
        log: Logs one line.

    Raises:
        ValueError: As `compression_rows`.
        FileExistsError: The folder has files that are not those of a published student.
        OSError: The folder could not be written.
    """
    target = target.resolve()
    check_replaceable(target)
    rows = compression_rows(student, compare, log)
    formats = read_formats(student.folder)

    def write(draft: Path) -> None:
        draft.mkdir()
        for path in published_files(student.folder):
            (draft / path).parent.mkdir(exist_ok=True)
            if path.as_posix() == FORMATS:
                _write_json(draft / path, without_absolute_paths(json.loads((student.folder / path).read_bytes())))
            else:
                shutil.copyfile(student.folder / path, draft / path)
        config = without_absolute_paths(student.config)
        config["pretrained_cfg"]["license"] = license
        _write_json(draft / "config.json", config)
        (draft / "recipe.yaml").unlink(missing_ok=True)
        if student.recipe is not None:
            text = yaml.safe_dump(config_values(student.recipe), sort_keys=False, allow_unicode=True)
            (draft / "recipe.yaml").write_text(text, encoding="utf-8")
        card = write_card(student, repo_id, license, rows, formats)
        (draft / "README.md").write_text(card, encoding="utf-8", newline="")
        (draft / "recipe.json").unlink()
        files = {path.as_posix(): sha256(draft / path) for path in published_files(draft)}
        origin = {name: value for name, value in student.origin.items() if name != OWN}
        _write_json(draft / "recipe.json", {**origin, OWN: files})

    new = target.with_name(f".new-{target.name}")
    shutil.rmtree(new, ignore_errors=True)  # left by a call that was killed
    write_atomically(new, write)
    shutil.rmtree(target, ignore_errors=True)
    new.rename(target)


def check_replaceable(target: Path) -> None:
    """Raise FileExistsError unless a folder is missing, empty, or a published student that may be written again."""
    target = target.resolve()
    if target == Path.cwd():
        raise FileExistsError("--output names the current folder: choose another one in it, such as hub/name.")
    if not target.exists():
        return
    allowed = {target / path for path in published_files(target)} if target.is_dir() else set()
    others = (
        [path for path in target.rglob("*") if path.is_file() and path not in allowed] if target.is_dir() else [target]
    )
    if others or (allowed and not (target / "README.md").is_file()):
        raise FileExistsError(
            f"--output {target} exists and is no published folder ({(others or sorted(allowed))[0].name} is in it): "
            "choose another --output."
        )


def read_formats(folder: Path) -> list[dict[str, Any]]:
    """Return what mgd-timm export measured of PyTorch and of each ONNX file in a folder; empty without such files."""
    path, published = folder / FORMATS, {file.as_posix() for file in published_files(folder)}
    if not path.is_file():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["files"]
        found = [row for row in rows if row["file"] == "PyTorch" or row["file"] in published]
        for row in found:
            numbers = [row[name] for name in ("top1", "drop", "agreement", "megabytes")]
            for number in [*numbers, *(row["latency"][size] for size in found[0]["latency"])]:
                float(number)  # the card prints them
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error!r}): export the formats again.") from error
    return found if len(found) > 1 else []


def _write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
