"""Public checkpoints as exported folders: an explicit step, and the only place where a file that torch.save wrote is
read.

Nothing in the file is executed: torch's restricted unpickler builds tensors and plain containers and refuses the rest.
"""

import argparse
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from mgd_timm.models.load import check_model_name, load_state_dict
from mgd_timm.models.pretrained_cfg import describe_weights, read_channel_values

# Where weights stand in a training script's checkpoint, in this order: averaged ones first, as timm's own loader takes
# them.
_PLACES = ("state_dict_ema", "model_ema", "model", "state_dict", "net")
# Beginnings of names in public files (RepDistiller's, mdistiller's), and ours where they differ.
_RENAMES = {
    "cifar_mobilenetv2": {"classifier.0.": "classifier."},
    "cifar_shufflev1": {"linear.": "fc."},
    "cifar_shufflev2": {"linear.": "fc."},
    "cifar_resnet50": {"linear.": "fc."},
}


def read_public_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU: of a safetensors file, or of one that torch.save wrote.

    The latter holds a dict of tensors, or one under the key `model`, `state_dict` or `net`; a moving average beside it,
    under `state_dict_ema` or `model_ema`, is taken in its place, as timm does. A prefix `module.` that all names have
    (DataParallel's) is dropped.

    Raises:
        FileNotFoundError: No such file.
        ValueError: An empty or damaged file, one that holds more than tensors and plain containers (which is not
            executed), or one without such a dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise ValueError(f"{path} is empty: fetch it again.")
    # A safetensors file begins with the length of its header, which is JSON.
    content = _read_safetensors(path) if head[8:] == b"{" else _read_torch(path)
    state = _weights(path, content)
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except Exception as error:  # safetensors and the file system raise several kinds
        raise ValueError(f"{path}: cannot be read as safetensors ({error}): fetch it again.") from error


def _read_torch(path: Path) -> Any:
    try:
        # timm's train.py writes its options beside the weights: a plain container of values, which are checked as all
        # else is.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of what is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises a dozen kinds
        said = str(error)
        found = re.search(r"GLOBAL ([\w.]+)", said)
        if type(error).__name__ == "UnpicklingError" and found:
            raise ValueError(
                f"{path} holds more than tensors: {found[1]}, and loading that may run code. It is refused, and "
                "nothing of it was run. Where you trust the file, write its weights alone: "
                "torch.save(model.state_dict(), FILE), or as safetensors."
            ) from error
        if "TorchScript" in said:
            raise ValueError(f"{path} is a TorchScript program, not weights: torch.save its state_dict().") from error
        first = said.splitlines()[0] if said else ""
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {first[:200]}). It is cut off, damaged, "
            "or was not written by torch.save: fetch it again."
        ) from error


def _weights(path: Path, content: Any) -> dict[str, Tensor]:
    """The dict of tensors in what a file held."""
    if isinstance(content, Mapping) and not all(isinstance(value, Tensor) for value in content.values()):
        content = next((content[key] for key in _PLACES if isinstance(content.get(key), Mapping)), content)
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, expected tensors by name: torch.save(model.state_dict(), FILE)."
        )
    if not content:
        raise ValueError(f"{path} holds no tensors.")
    for name, value in content.items():
        plain = (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and not value.is_quantized
            and not value.is_complex()
        )
        if not isinstance(name, str) or not plain:
            what = (
                f"a {value.layout} {value.dtype} tensor"
                if isinstance(value, Tensor)
                else f"of type {type(value).__name__}"
            )
            raise ValueError(
                f"{path}: {name!r} is {what}, expected dense real tensors by name, in the file itself or under one of "
                f"{_PLACES}."
            )
    return {name: value.detach() for name, value in content.items()}


def load_public_checkpoint(
    path: str | os.PathLike[str],
    architecture: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    license: str = "other",
    class_names: Sequence[str] | None = None,
) -> nn.Module:
    """A timm model with the weights of a public checkpoint, described so that it teaches and exports as a student does.

    Every weight must be there and fit. Only BatchNorm's counters of batches may be missing: old files have none, and
    nothing that is computed here depends on them.

    Args:
        path: The file, as `read_public_checkpoint` takes it.
        architecture: timm's name, cifar_* among them. What public files of a cifar_* family name otherwise is renamed.
        num_classes: What the classifier must have; by default what it has.
        in_chans: Channels of the image; by default those of the first convolution's weights.
        mean, std: Of the images that the weights were trained on, one value per channel of pixels in [0, 1]. By default
            the architecture's: of CIFAR-100 for cifar_*.
        license: Of the weights.
        class_names: In the order of the classifier; by default numbers, which fit any data of as many classes.

    Raises:
        ValueError: As for `read_public_checkpoint`; an unknown architecture, weights of another one (the first names
            and shapes that differ are given), or values that do not fit the weights.
    """
    path = Path(path)
    check_model_name(architecture)
    public = read_public_checkpoint(path)
    renames = _RENAMES.get(architecture.partition(".")[0], {})
    state = {_renamed(name, renames): tensor for name, tensor in public.items()}
    if len(state) != len(public):
        raise ValueError(
            f"{path} holds a parameter under its public name and under ours as well, of {sorted(renames.items())}."
        )
    found = get_pretrained_cfg(architecture)
    config: Mapping[str, Any] = found.to_dict() if found is not None else {}
    classes = _classes(path, state, config, num_classes)
    channels = in_chans or _channels(state, config)
    options: dict[str, Any] = {"in_chans": channels, **({"num_classes": classes} if classes is not None else {})}
    try:
        model = timm.create_model(architecture, pretrained=False, **options)
    except Exception as error:  # an architecture may raise anything at numbers that it does not take
        raise ValueError(f"{architecture} cannot be built for {options}: {error}") from error
    load_state_dict(model, architecture, path, state)
    count = int(getattr(model, "num_classes", 0))
    names = tuple(class_names) if class_names is not None else tuple(str(index) for index in range(count))
    if len(names) != count:
        raise ValueError(f"{len(names)} class names were given, the classifier in {path} has {count} outputs.")
    mean, std = _per_channel("mean", mean, config, channels), _per_channel("std", std, config, channels)
    size = (channels, *(config.get("input_size") or (3, 224, 224))[1:])
    describe_weights(model, input_size=size, mean=mean, std=std, class_names=names, license=license, tag="imported")
    return model


def _renamed(name: str, renames: Mapping[str, str]) -> str:
    for public, ours in renames.items():
        if name.startswith(public):
            return ours + name.removeprefix(public)
    return name


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) else value


def _classes(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], asked: int | None) -> int | None:
    """Outputs of the classifier in the file; None where there is none of this architecture's."""
    weight = state.get(f"{_first(config.get('classifier'))}.weight")
    if weight is None or weight.ndim < 2:
        return None
    if asked not in (None, weight.shape[0]):
        raise ValueError(f"num_classes={asked}: the classifier in {path} has {weight.shape[0]} outputs.")
    return weight.shape[0]


def _channels(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    """Input channels of the first convolution in the file; 3 where there is none to tell."""
    weight = state.get(f"{_first(config.get('first_conv'))}.weight")
    return weight.shape[1] if weight is not None and weight.ndim == 4 else 3


def _per_channel(
    name: str, given: Sequence[float] | None, config: Mapping[str, Any], channels: int
) -> tuple[float, ...]:
    values = tuple(float(value) for value in given) if given is not None else read_channel_values(config, name)
    if values is None or len(values) != channels:
        have = f"{name}={values}" + ("" if given is not None else ", the architecture's own")
        raise ValueError(
            f"{have}: expected one value for each of the {channels} channels that the weights take; give --{name}."
        )
    if not all(abs(value) < float("inf") and (value > 0 or name == "mean") for value in values):
        raise ValueError(
            f"{name}={values}: expected finite values{'' if name == 'mean' else ' above 0'}, of pixels in [0, 1]."
        )
    return values
