"""Check that the files of a student belong together, and to the teacher and heads that taught it."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import ModelCard, snapshot_download

from mgd_timm.hub.folder import FORMATS, PATTERNS, published_files
from mgd_timm.hub.origin import OWN, digest_rows
from mgd_timm.hub.student import accuracy_of, as_list, shared_recipe
from mgd_timm.models.load import find_weights_folder, load_model
from mgd_timm.pipeline.run_folder import is_run_folder, read_recipe
from mgd_timm.pipeline.torch_defaults import torch_defaults
from mgd_timm.recipe.options import as_dict, differences, expand_home
from mgd_timm.recipe.recipe import config_values, flatten, make_recipe
from mgd_timm.storage import checkpoint
from mgd_timm.storage.cache import cache_folder
from mgd_timm.storage.digests import module_digest, sha256, state_digest


@dataclass(frozen=True)
class Check:
    """A check and what it found.

    Args:
        name: What was checked.
        passed: None where it could not be checked.
        detail: What differs, or why it could not be checked; empty where all is well.
    """

    name: str
    passed: bool | None
    detail: str = ""

    def __str__(self) -> str:
        word = {True: "ok", False: "FAILED", None: "not checked"}[self.passed]
        return f"{word:>11}  {self.name}" + (f": {self.detail}" if self.detail else "")


class FailedError(Exception):
    """What a check found."""


class NotCheckedError(Exception):
    """Why something cannot be checked."""


@torch_defaults()
def verify(folder: str | PathLike[str], teacher: str | PathLike[str] | None = None) -> list[Check]:
    """Check that a student's files belong together: weights, card, recipe, and the digests of what taught it.

    Args:
        folder: Run folder, exported or published folder, or `hf-hub:user/name`.
        teacher: Its teacher (run folder, exported folder or name), to compare the weights.

    Returns:
        The checks in the order of the chain, each with `name`, `passed` (None where it could not be checked) and
        `detail`. Where files are missing or recipe.json cannot be read, the others are not checked.

    Raises:
        ValueError: There is no such folder, or it cannot be fetched.
    """
    place = _local_folder(expand_home(str(folder), "folder"))
    named = expand_home(str(teacher), "teacher") if teacher is not None else None
    return _verify_files(place, named)


def _verify_files(folder: Path, teacher: str | None) -> list[Check]:
    checks = [_check("files", lambda: _check_files(folder))]
    if checks[0].passed is False:
        return checks
    origin: dict[str, Any] = {}
    checks.append(_check("recipe.json can be read", lambda: origin.update(_read_json(folder / "recipe.json"))))
    if checks[-1].passed is False:
        return checks
    checks += [
        _check("teacher", lambda: _check_teacher(origin, teacher)),
        _check("granularity heads", lambda: _check_heads(folder, origin)),
        _check("model.safetensors is the file that was exported", lambda: _check_weights(folder, origin)),
        _check("config.json builds the network of the weights", lambda: _check_model(folder)),
        _check("recipe.json is that of the run", lambda: _check_run(folder, origin)),
    ]
    if (folder / FORMATS).is_file():
        checks.append(_check("exported files are those of formats.json", lambda: _check_formats(folder)))
    if OWN in origin or (folder / "README.md").is_file():
        checks += [
            _check("files are those that were published", lambda: _check_published(folder, origin)),
            _check("README.md has the digests of recipe.json", lambda: _check_card_digests(folder, origin)),
            _check("README.md has the results of recipe.json", lambda: _check_card_results(folder, origin)),
            _check("recipe.yaml has the options of recipe.json", lambda: _check_recipe_yaml(folder, origin)),
        ]
    return checks


def _check(name: str, action: Callable[[], str | None]) -> Check:
    try:
        return Check(name, True, action() or "")
    except NotCheckedError as reason:
        return Check(name, None, str(reason))
    except FailedError as failure:
        return Check(name, False, str(failure))
    except Exception as error:  # files may hold anything, and their readers raise anything
        return Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}")


def _local_folder(place: str) -> Path:
    if place.startswith("hf-hub:"):
        repo_id, _, revision = place.removeprefix("hf-hub:").partition("@")
        try:
            return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(PATTERNS)))
        except Exception as error:  # the hub's client raises a dozen kinds
            raise ValueError(f"{place} cannot be fetched ({type(error).__name__}: {error}).") from error
    path = Path(place.removeprefix("local-dir:"))
    if is_run_folder(path):
        if not (path / "export").is_dir():
            raise ValueError(
                f"{place} is a run that has not finished and has no export yet: continue it with --resume."
            )
        path = path / "export"
    if not path.is_dir():
        known = find_weights_folder(place) if place == "embedded" else None
        if known is None:
            raise ValueError(
                f"{place}: no such folder. Expected a run folder, an export, a published folder or hf-hub:ID."
            )
        return known
    return path


def _check_files(folder: Path) -> None:
    expected = {"config.json", "model.safetensors", "recipe.json"}
    found = {path.as_posix() for path in published_files(folder)}
    if "README.md" in found:
        expected |= {"README.md"}
    if missing := sorted(expected - found):
        raise FailedError(f"{', '.join(missing)} missing")


def _read_json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise FailedError("expected an object")
    return values


def _check_teacher(origin: dict[str, Any], teacher: str | None) -> str | None:
    known = as_list(origin.get("teacher_loaded_sha256", origin.get("teacher_sha256")))
    if not known:
        if teacher is not None:
            raise FailedError("recipe.json has no digest of a teacher")
        raise NotCheckedError("recipe.json names none")
    if teacher is None:
        raise NotCheckedError("give --teacher to compare its weights")
    found = module_digest(load_model(teacher))
    if found not in known:
        raise FailedError(f"{teacher} has the digest {_short(found)}, recipe.json has {', '.join(map(_short, known))}")
    return f"{teacher} is the one that taught" if len(known) == 1 else f"{teacher} is one of {len(known)}"


def _check_heads(folder: Path, origin: dict[str, Any]) -> str | None:
    known = as_list(origin.get("heads_sha256"))
    if not known:
        raise NotCheckedError("recipe.json names none")
    run = folder.absolute().parent
    if is_run_folder(run):
        names = ["heads"] if len(known) == 1 else [f"heads_{place}" for place in range(1, len(known) + 1)]
        states = [checkpoint.load_newest(run / name / "checkpoints", lambda _: None) for name in names]
        found = [_heads_digest(state, "trainee", "heads.") for state in states if state is not None]
        if len(found) == len(known):
            if found != known:
                raise FailedError(f"those in the run folder have {', '.join(map(_short, found))}")
            return "those in the run folder"
    cached = {_heads_digest(state, "heads", "") for state in _cached_heads()}
    if set(known) <= cached:
        return "those in the cache"
    raise NotCheckedError("neither the run folder nor the cache has them")


def _cached_heads() -> list[checkpoint.State]:
    folders = sorted((cache_folder() / "heads").glob("*"))
    states = [checkpoint.load_newest(folder, lambda _: None) for folder in folders]
    return [state for state in states if state is not None]


def _heads_digest(state: checkpoint.State, part: str, prefix: str) -> str:
    tensors = state.tensors.get(part, {})
    return state_digest({name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)})


def _check_weights(folder: Path, origin: dict[str, Any]) -> None:
    found, known = sha256(folder / "model.safetensors"), origin.get("model_sha256")
    if found != known:
        raise FailedError(f"its sha256 is {_short(found)}, recipe.json has {_short(str(known))}")


def _check_model(folder: Path) -> None:
    model = load_model(f"local-dir:{folder}", verify=False)
    wrong = [name for name, one in model.state_dict().items() if one.is_floating_point() and not one.isfinite().all()]
    if wrong:
        raise FailedError(f"weights that are not finite: {', '.join(wrong[:3])}")
    config = _read_json(folder / "config.json")
    names = config.get("label_names")
    if names is not None and len(names) != model.num_classes:
        raise FailedError(f"{len(names)} label_names for {model.num_classes} classes")
    with torch.no_grad():
        model.eval()(torch.zeros(1, *config["pretrained_cfg"]["input_size"]))


def _check_run(folder: Path, origin: dict[str, Any]) -> None:
    run = folder.absolute().parent
    if folder.name != "export" or not is_run_folder(run):
        raise NotCheckedError("the run folder is not at hand")
    theirs, ours = read_recipe(run), make_recipe(**flatten(origin["recipe"]))
    if changed := differences(as_dict(theirs, digest_only=True), as_dict(ours, digest_only=True)):
        raise FailedError(f"recipe.yaml differs in {'; '.join(changed[:3])}")
    summary = _read_json(run / "summary.json")
    summary.pop("versions", None)
    if summary != origin["metrics"]:
        raise FailedError("its metrics are not those of summary.json")


def _check_formats(folder: Path) -> None:
    rows = _read_json(folder / FORMATS)["files"]
    known = {row["file"]: row.get("sha256") for row in rows}
    known |= {row["file"][:-4] + ".bin": row["weights_sha256"] for row in rows if row.get("weights_sha256")}
    if not (folder / "README.md").is_file():  # of a published folder, ONNX alone
        kept = {row["file"] for row in rows if row.get("sha256") and row.get("kept", True)}
        if missing := sorted(name for name in kept if not (folder / name).is_file()):
            raise FailedError(f"missing: {', '.join(missing)}")
    changed = [name for name, digest in known.items() if digest and _is_changed(folder / name, digest)]
    unknown = sorted({path.as_posix() for path in published_files(folder) if path.suffix == ".onnx"} - set(known))
    if changed or unknown:
        raise FailedError(f"other files: {', '.join(changed + unknown)}")


def _is_changed(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) != digest  # other formats than ONNX are not published


def _check_published(folder: Path, origin: dict[str, Any]) -> None:
    known = origin[OWN]
    found = {path.as_posix() for path in published_files(folder)} - {"recipe.json"}
    problems = {
        "missing": sorted(set(known) - found),
        "not published": sorted(found - set(known)),
        "changed": sorted(name for name in found & set(known) if sha256(folder / name) != known[name]),
    }
    strange = [
        path.name for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5")
    ]
    problems["pickles or other weights"] = strange
    if any(problems.values()):
        raise FailedError("; ".join(f"{word}: {', '.join(names)}" for word, names in problems.items() if names))


def _check_card_digests(folder: Path, origin: dict[str, Any]) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    wrong = [name for name, value in digest_rows(origin) if f"| {name} | {value} |" not in text]
    if wrong:
        raise FailedError(f"other digests of {', '.join(wrong)}")
    if len(re.findall(r"`[0-9a-f]{64}`", text)) != len(digest_rows(origin)):
        raise FailedError("more digests than recipe.json has")


def _check_card_results(folder: Path, origin: dict[str, Any]) -> None:
    results = ModelCard.load(folder / "README.md").data.eval_results or []
    accuracy = accuracy_of(origin.get("metrics", {}), int(_read_json(folder / "config.json")["num_classes"]))
    known = [round(value, 3) for value in (accuracy.top1, accuracy.top5) if value is not None]
    found = [one.metric_value for one in results]
    if found != known:
        raise FailedError(f"{found} instead of {known}")


def _check_recipe_yaml(folder: Path, origin: dict[str, Any]) -> None:
    if "recipe" not in origin:
        raise NotCheckedError("recipe.json tells of no run")
    recipe = shared_recipe(origin["recipe"])
    if yaml.safe_load((folder / "recipe.yaml").read_bytes()) != config_values(recipe):
        raise FailedError("they differ")


def _short(digest: str) -> str:
    return f"{digest[:12]}..."
