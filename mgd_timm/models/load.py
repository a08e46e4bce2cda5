"""Load trained models: a run's export, a folder that timm wrote, published weights, or a safetensors file."""

import json
from pathlib import Path

import timm
from safetensors.torch import load_file
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import Tensor, nn

from mgd_timm.features.tap import model_name
from mgd_timm.recipe.data import EMBEDDED
from mgd_timm.recipe.options import plain_model_name, unknown
from mgd_timm.storage.digests import sha256


def load_model(
    spec: str,
    checkpoint: str | None = None,
    *,
    in_chans: int = 3,
    classifier_required: bool = True,
    verify: bool = True,
) -> nn.Module:
    """Load a model with its weights and the classifier that it was trained with.

    Args:
        spec: A run folder, an exported folder (`local-dir:PATH`), "embedded", `hf-hub:ID`, a timm name with published
            weights, or an architecture of timm together with `checkpoint`.
        checkpoint: A safetensors file of the architecture's weights.
        in_chans: Channels that the weights of `checkpoint` take.
        classifier_required: Raise ValueError for a `checkpoint` without a classifier; if false, the model has none.
        verify: Raise ValueError for a folder whose weights are not those that its recipe.json has the digest of.

    Raises:
        ValueError: The name is unknown, there are no weights or two sources of them, the checkpoint does not fit, or
            weights have changed since they were exported.
    """
    spec = plain_model_name(spec)
    folder = find_weights_folder(spec)
    if folder is not None or spec.startswith("hf-hub:"):
        check_no_checkpoint(checkpoint, spec)
    if folder is not None:
        return _load_folder(folder, verify=verify)
    if spec.startswith("hf-hub:"):
        return _create_pretrained(spec)
    check_model_name(spec)
    if checkpoint is not None:
        return _load_checkpoint(spec, checkpoint, in_chans, classifier_required)
    if not timm.is_model_pretrained(spec):
        raise ValueError(
            f"teacher {spec!r} has no published weights: give --teacher-checkpoint FILE.safetensors, or as --teacher "
            "local-dir:PATH or a run folder of mgd-timm train."
        )
    return _create_pretrained(spec)


def check_model_name(name: str) -> None:
    """Raise ValueError, with the nearest names, unless timm knows an architecture and the tag in its name, if any."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        path = name.removeprefix("local-dir:").removeprefix("hf-hub:")
        if name == "embedded" or path != name or Path(path).exists():
            raise ValueError(
                f"unknown model {name!r}: expected an architecture of timm (mgd-timm list models). To start a student "
                "from your own weights, give --student-checkpoint FILE.safetensors."
            )
        if "/" in name:
            raise ValueError(f"unknown model {name!r}: there is no such folder, and timm has no such name.")
        raise unknown("model", name, timm.list_models())
    if tag and name not in get_arch_pretrained_cfgs(architecture):
        published = [full for full in timm.list_pretrained(f"{architecture}*") if full.split(".")[0] == architecture]
        if published:
            raise unknown("pretrained weights", name, published)
        raise ValueError(
            f"unknown pretrained weights {name!r}: none are published; the architecture alone is {architecture!r}."
        )


def check_no_checkpoint(checkpoint: str | None, spec: str) -> None:
    """Raise ValueError if a checkpoint is given for a teacher that has weights of its own."""
    if checkpoint is not None:
        raise ValueError(
            f"teacher_checkpoint={checkpoint!r}: the teacher {spec!r} has weights of its own. Leave one out, or give "
            "the name of an architecture together with the file."
        )


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file by name.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        return load_file(path)
    except Exception as error:  # safetensors and the file system raise several kinds
        raise ValueError(f"{path}: cannot be read as safetensors ({error}): download it again.") from error


def load_weights(model: nn.Module, name: str, path: str | Path) -> None:
    """Load a safetensors file into a model, strictly.

    Raises:
        ValueError: The file cannot be read, or as for `load_state_dict`.
    """
    load_state_dict(model, name, path, read_safetensors(path))


def load_state_dict(model: nn.Module, name: str, path: str | Path, state: dict[str, Tensor]) -> None:
    """Load weights strictly, except that BatchNorm's num_batches_tracked may be missing.

    Old files lack these counters, which are not used.

    Args:
        model: Loaded in place.
        name: Name of its architecture, for messages.
        path: Source of the weights, for messages.
        state: Weights by name.

    Raises:
        ValueError: Names, shapes or types differ from the model's.
    """
    expected = model.state_dict()
    state = {**{key: tensor for key, tensor in expected.items() if key.endswith("num_batches_tracked")}, **state}
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    common = [(key, expected[key], state[key]) for key in expected if key in state]
    shapes = [
        f"{key} {tuple(given.shape)} instead of {tuple(own.shape)}"
        for key, own, given in common
        if own.shape != given.shape
    ]
    types = [
        f"{key} {given.dtype} instead of {own.dtype}"
        for key, own, given in common
        if own.is_floating_point() != given.is_floating_point()
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "of another type": types}
    if any(problems.values()):
        details = ", ".join(f"{problem} {keys[:3]}" for problem, keys in problems.items() if keys)
        raise ValueError(
            f"{path} does not fit {name}: {details}. Every weight must be there, the classifier's too: name the "
            "architecture that the file was written from."
        )
    model.load_state_dict(state)


def _load_checkpoint(name: str, checkpoint: str, in_chans: int, classifier_required: bool) -> nn.Module:
    """Build an architecture with the number of classes of a safetensors file's classifier, and load the file."""
    config = get_pretrained_cfg(name)
    key = config.classifier if config is not None else None
    key = key[0] if isinstance(key, tuple | list) else key
    state = read_safetensors(checkpoint)
    weight = state.get(f"{key}.weight")
    if weight is None and classifier_required:
        raise ValueError(
            f"{checkpoint} holds no classifier ({key}.weight): a teacher with a random one teaches "
            "noise. Fit a classifier (mgd-timm train, or --fit-teacher-head probe), give weights that have one, or use "
            "the teacher without its logits (--teacher-classes none)."
        )
    model = timm.create_model(name, num_classes=0 if weight is None else weight.shape[0], in_chans=in_chans)
    load_state_dict(model, name, checkpoint, state)
    return model


def find_weights_folder(spec: str) -> Path | None:
    """Return the folder of an exported model that `spec` names; None if it names no folder.

    Raises:
        ValueError: A folder without an export.
    """
    if spec == "embedded":
        return EMBEDDED / "teacher"
    path = Path(spec.removeprefix("local-dir:"))
    for folder in (path / "export", path):
        if (folder / "config.json").is_file():
            return folder
    if (path / "recipe.yaml").is_file():
        raise ValueError(f"{path} is a run that has not finished and has no export yet. Continue it with --resume.")
    if spec.startswith("local-dir:") or path.is_dir():
        raise ValueError(
            f"{path}: no export in it (config.json and model.safetensors): write one with mgd-timm export."
        )
    return None


def _load_folder(folder: Path, *, verify: bool) -> nn.Module:
    """Load a folder that timm wrote, strictly: a classifier that the file lacks must not stay random."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(
            f"{folder}: no model.safetensors beside config.json: convert other files with mgd-timm import."
        )
    _check_config(folder / "config.json")
    if verify:
        _check_digest(folder / "recipe.json", weights)
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except Exception as error:  # an architecture may raise anything for arguments that a file names
        raise ValueError(f"{folder}: its config.json does not describe a timm model ({error}).") from error
    load_weights(model, model_name(model), weights)
    return model


def _check_digest(recipe: Path, weights: Path) -> None:
    """Raise ValueError if weights are not those whose digest was written beside them; other folders have none."""
    try:
        written = json.loads(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{recipe}: not JSON ({error}): export the model again, or give --no-verify.") from error
    expected = written.get("model_sha256") if isinstance(written, dict) else None
    if expected is not None and sha256(weights) != expected:
        raise ValueError(
            f"{weights} is not the file that was exported: its sha256 is {sha256(weights)[:12]}..., and recipe.json "
            f"has {str(expected)[:12]}... Copy or export it again, or give --no-verify (in Python verify=False) to "
            "load it as it is."
        )


# Arguments of timm's factory, not of an architecture: they name files, or wrap the model.
_FACTORY_ARGUMENTS = {
    "features_only",
    "feature_cfg",
    "checkpoint_path",
    "cache_dir",
    "kwargs_filter",
    "scriptable",
    "exportable",
    "no_jit",
}


def _check_config(path: Path) -> None:
    """Raise ValueError for a malformed config.json, or model_args that are not the architecture's: it is untrusted."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}): write it again with mgd-timm export.") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError(f"{path}: expected an object with an 'architecture': write it again with mgd-timm export.")
    for key, kind in {"architecture": str, "pretrained_cfg": dict, "model_args": dict}.items():
        if key in config and not isinstance(config[key], kind):
            expected = "a name" if kind is str else "an object"
            raise ValueError(
                f"{path}: {key!r} is {config[key]!r}, expected {expected}: write it again with mgd-timm export."
            )
    for key in config.get("model_args", {}):
        if key in _FACTORY_ARGUMENTS or key.startswith("pretrained"):
            raise ValueError(f"{path}: model_args has {key!r}, which is no argument of an architecture: remove it.")


def _create_pretrained(name: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises a dozen kinds
        raise ValueError(
            f"the weights of {name!r} cannot be fetched ({type(error).__name__}: {error}). Offline, give "
            "local-dir:PATH or a file."
        ) from error
