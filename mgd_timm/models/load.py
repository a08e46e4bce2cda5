"""FIXME: one line."""

import json
from pathlib import Path

import timm
from safetensors.torch import load_file
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import Tensor, nn

from mgd_timm.recipe.data import EMBEDDED
from mgd_timm.recipe.options import unknown


def check_model_name(name: str) -> None:
    """Raise ValueError with the nearest names unless timm knows the architecture, and the tag where there is one."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        place = name.removeprefix("local-dir:").removeprefix("hf-hub:")
        if name == "embedded" or place != name or Path(place).exists():
            raise ValueError(
                f"unknown model {name!r}: an architecture of timm is expected (mgd-timm list models); a student "
                "starts from weights of its own by --student-checkpoint FILE.safetensors."
            )
        if "/" in name:
            raise ValueError(f"unknown model {name!r}: there is no such folder, and timm has no such name.")
        raise unknown("model", name, timm.list_models())
    if tag and name not in get_arch_pretrained_cfgs(architecture):
        known = [found for found in timm.list_pretrained(f"{architecture}*") if found.split(".")[0] == architecture]
        if known:
            raise unknown("pretrained weights", name, known)
        raise ValueError(
            f"unknown pretrained weights {name!r}: none are published; the architecture alone is {architecture!r}."
        )


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        return load_file(path)
    except Exception as error:  # safetensors and the file system raise several kinds
        raise ValueError(f"{path}: cannot be read as safetensors ({error}).") from error


def load_weights(model: nn.Module, name: str, path: str) -> None:
    """Load a safetensors file strictly.

    Raises:
        ValueError: The file is not readable, or its keys or shapes differ; the first ones are named.
    """
    load_state_dict(model, name, path, read_safetensors(path))


def load_state_dict(model: nn.Module, name: str, origin: str | Path, state: dict[str, Tensor]) -> None:
    """Load weights strictly; only BatchNorm's counters of batches may be missing, which old files lack and nothing here
    reads.

    Raises:
        ValueError: Other names, shapes or kinds of numbers than the model's; the first ones are given.
    """
    expected = model.state_dict()
    state = {**{key: tensor for key, tensor in expected.items() if key.endswith("num_batches_tracked")}, **state}
    lacking, foreign = (
        [key for key in one if key not in other] for one, other in ((expected, state), (state, expected))
    )
    both = [key for key in expected if key in state]
    unlike = [key for key in both if expected[key].shape != state[key].shape]
    kinds = [key for key in both if expected[key].is_floating_point() != state[key].is_floating_point()]
    if lacking or foreign or unlike or kinds:
        shapes = [f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}" for key in unlike[:3]]
        types = [f"{key} {state[key].dtype} instead of {expected[key].dtype}" for key in kinds[:3]]
        parts = {"missing": lacking[:3], "foreign": foreign[:3], "of another shape": shapes, "of another type": types}
        said = ", ".join(f"{word} {values}" for word, values in parts.items() if values)
        raise ValueError(
            f"{origin} does not fit {name}: {said}. Every weight must be there, the classifier's too: name the "
            "architecture that the file was written from."
        )
    model.load_state_dict(state)


def load_model(
    spec: str, checkpoint: str | None = None, *, in_chans: int = 3, classifier_required: bool = True
) -> nn.Module:
    """A model with its weights and the classifier that it was trained with: timm is never asked for another one.

    Args:
        spec: A run folder, an exported folder (`local-dir:PATH`), "embedded", `hf-hub:ID`, a timm name with published
            weights, or an architecture of timm beside `checkpoint`.
        checkpoint: A safetensors file of the architecture's weights.
        in_chans: Channels that the weights of `checkpoint` take.
        classifier_required: Refuse a `checkpoint` that lacks the classifier; otherwise the model has none either.

    Raises:
        ValueError: Unknown name, no weights, weights given twice, or a checkpoint that does not fit.
    """
    folder = _find_weights_folder(spec)
    if folder is not None or spec.startswith("hf-hub:"):
        check_no_checkpoint(checkpoint, spec)
    if folder is not None:
        return _load_folder(folder)
    if spec.startswith("hf-hub:"):
        return _create_pretrained(spec)
    check_model_name(spec)
    if checkpoint is None:
        if not timm.is_model_pretrained(spec):
            raise ValueError(
                f"teacher {spec!r} has no published weights: give --teacher-checkpoint FILE.safetensors, "
                "local-dir:PATH or a run folder; mgd-timm train makes one."
            )
        return _create_pretrained(spec)
    return _load_checkpoint(spec, checkpoint, in_chans, classifier_required)


def _load_checkpoint(name: str, checkpoint: str, in_chans: int, classifier_required: bool) -> nn.Module:
    """An architecture with as many classes as the classifier in a safetensors file has."""
    config = get_pretrained_cfg(name)
    key = config.classifier if config is not None else None
    key = key[0] if isinstance(key, tuple | list) else key
    weight = read_safetensors(checkpoint).get(f"{key}.weight")
    if weight is None and classifier_required:
        raise ValueError(
            f"{checkpoint} holds no classifier ({key}.weight): a teacher with a random one teaches "
            "noise. Train its classifier first (mgd-timm train; --fit-teacher-head probe), give weights that have "
            "one, or let it teach without logits (--teacher-classes none)."
        )
    model = timm.create_model(name, num_classes=0 if weight is None else weight.shape[0], in_chans=in_chans)
    load_weights(model, name, checkpoint)
    return model


def check_no_checkpoint(checkpoint: str | None, spec: str) -> None:
    """Raise ValueError for a checkpoint beside a teacher that has its own weights, of which one would be ignored."""
    if checkpoint is not None:
        raise ValueError(
            f"teacher_checkpoint={checkpoint!r}: the teacher {spec!r} has weights of its own. Leave one out, or name "
            "its architecture beside the file."
        )


def _find_weights_folder(spec: str) -> Path | None:
    if spec == "embedded":
        return EMBEDDED / "teacher"
    path = Path(spec.removeprefix("local-dir:"))
    for folder in (path / "export", path):
        if (folder / "config.json").is_file():
            return folder
    if (path / "recipe.yaml").is_file():
        raise ValueError(f"{path} is a run that has not finished: it holds no export yet. Continue it with --resume.")
    if spec.startswith("local-dir:") or path.is_dir():
        raise ValueError(f"{path}: no export in it (config.json and model.safetensors); mgd-timm export writes one.")
    return None


def _load_folder(folder: Path) -> nn.Module:
    """A model from a folder that timm wrote, strictly: a classifier that the file lacks must not stay random."""
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(
            f"{folder}: no model.safetensors beside config.json; mgd-timm import writes a folder with one from "
            "another file."
        )
    _check_config(folder / "config.json")
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except Exception as error:  # an architecture may raise anything at arguments from outside
        raise ValueError(f"{folder}: its config.json does not describe a timm model ({error}).") from error
    load_weights(model, str(getattr(model, "pretrained_cfg", {}).get("architecture")), str(weights))
    return model


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
    """Refuse a config.json that is not one, or whose model_args reach past the architecture: it may come from
    anywhere."""
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}): write it anew with mgd-timm export.") from error
    kinds = {"architecture": str, "pretrained_cfg": dict, "model_args": dict}
    if not isinstance(config, dict) or "architecture" not in config:
        raise ValueError(
            f"{path}: expected an object with the name of an 'architecture': write it anew with mgd-timm export."
        )
    for key, kind in kinds.items():
        if key in config and not isinstance(config[key], kind):
            expected = "a name" if kind is str else "an object"
            raise ValueError(
                f"{path}: {key!r} is {config[key]!r}, expected {expected}: write it anew with mgd-timm export."
            )
    for key in config.get("model_args", {}):
        if key in _FACTORY_ARGUMENTS or key.startswith("pretrained"):
            raise ValueError(f"{path}: model_args has {key!r}, which is no argument of an architecture: remove it.")


def _create_pretrained(name: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub's client raises a dozen kinds
        raise ValueError(
            f"the weights of {name!r} cannot be had ({type(error).__name__}: {error}). Offline, give local-dir:PATH "
            "or a file."
        ) from error
