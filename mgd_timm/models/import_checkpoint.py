"""Load public checkpoints: the only module that reads files which torch.save wrote.

Nothing in such a file is executed: torch's restricted unpickler builds tensors and plain containers and refuses the
rest.
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
from timm.models import get_pretrained_cfg, resolve_model_input_args
from torch import Tensor, nn

from mgd_timm.models.load import check_model_name, load_state_dict, read_safetensors
from mgd_timm.models.pretrained_cfg import describe_weights, read_channel_values
from mgd_timm.recipe.checks import check_statistics
from mgd_timm.recipe.options import plain_architecture

# Keys of the weights in a training script's checkpoint: averaged ones first, as in timm's own loader.
_WEIGHT_KEYS = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "model_state_dict",
    "model",
    "state_dict",
    "net",
)
# Prefixes of names, of what wraps a model: DataParallel, torch.compile, Lightning's modules, Transformers.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "timm_model.")
# Prefixes of names in public files (RepDistiller's, mdistiller's) that differ from ours, by architecture.
_PREFIXES = {
    "cifar_mobilenetv2": {"classifier.0.": "classifier."},
    "cifar_shufflev1": {"linear.": "fc."},
    "cifar_shufflev2": {"linear.": "fc."},
    "cifar_resnet50": {"linear.": "fc."},
}


def read_public_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name, on the CPU, from a safetensors file or a file of torch.save.

    A file of torch.save holds a dict of tensors, or has one under `model`, `state_dict`, `model_state_dict` or `net`,
    also one within another. A moving average beside it, under `state_dict_ema`, `ema_state_dict` or `model_ema`, is
    preferred, as in timm. The prefixes `module.` of DataParallel, `_orig_mod.` of torch.compile, `model.` of Lightning
    and `timm_model.` of Transformers are removed, in any order, if all names have one. Of a checkpoint of Lightning
    only the weights under `model.` are read, not those of losses or metrics.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty or corrupt, holds more than tensors and plain containers (which are not executed),
            or has no such dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise ValueError(f"{path} is empty: download it again.")
    # A safetensors file begins with the length of its header, which is JSON.
    content = read_safetensors(path) if head[8:] == b"{" else _read_torch(path)
    state = _find_weights(path, content)
    return _without_wrappers(state)


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers that all names have, and the counter of updates of torch's moving average."""
    state = {name: value for name, value in state.items() if name != "n_averaged"}
    while prefix := next((one for one in _WRAPPERS if state and all(name.startswith(one) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _read_torch(path: Path) -> Any:
    try:
        # timm's train.py writes its options beside the weights as a Namespace, whose values are restricted likewise.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about files that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a corrupt file raises a dozen kinds
        message = str(error)
        refused = re.search(r"GLOBAL ([\w.]+)", message)
        if type(error).__name__ == "UnpicklingError" and refused:
            raise ValueError(
                f"{path} holds more than tensors: {refused[1]}, which may run code. It is refused, and nothing of "
                "it was run. If you trust the file, write its weights alone: "
                "torch.save(model.state_dict(), FILE), or as safetensors."
            ) from error
        if "TorchScript" in message:
            raise ValueError(f"{path} is a TorchScript program, not weights: torch.save its state_dict().") from error
        first = message.splitlines()[0] if message else ""
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {first[:200]}). It is truncated, "
            "corrupt, or was not written by torch.save: download it again."
        ) from error


_DEEPEST = 8
"""Dictionaries in each other; one that holds itself would have no end."""


def _find_weights(path: Path, content: Any) -> dict[str, Tensor]:
    depth = 0
    while isinstance(content, Mapping) and not all(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in _WEIGHT_KEYS if isinstance(content.get(key), Mapping)), None)
        if inner is None or (depth := depth + 1) > _DEEPEST:
            break
        if "pytorch-lightning_version" in content:
            inner = {name: value for name, value in inner.items() if str(name).startswith("model.")} or inner
        content = inner
    if not isinstance(content, Mapping):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, expected tensors by name: torch.save(model.state_dict(), FILE)."
        )
    if not content:
        raise ValueError(f"{path} holds no tensors: expected those of torch.save(model.state_dict(), FILE).")
    for name, value in content.items():
        kind = f"of type {type(value).__name__}"
        dense = False
        if isinstance(value, Tensor):
            kind = f"a {value.layout} {value.dtype} tensor"
            dense = value.layout == torch.strided and not value.is_quantized and not value.is_complex()
        if not isinstance(name, str) or not dense:
            raise ValueError(
                f"{path}: {name!r} is {kind}, expected dense real tensors by name, in the file itself or under one of "
                f"{_WEIGHT_KEYS}."
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
    img_size: int | None = None,
) -> nn.Module:
    """Load a public checkpoint strictly (`load_state_dict`) into a timm model with a pretrained_cfg.

    Args:
        path: The file, as for `read_public_checkpoint`.
        architecture: timm's name. Weights that public files of a cifar_* network name differently are renamed.
        num_classes: Expected number of classes; by default not checked.
        in_chans: Channels of the image; by default those of the first convolution's weights.
        mean, std: Normalisation of the images that the weights were trained on, one value per channel of pixels in
            [0, 1]. By default the architecture's, which is CIFAR-100's for cifar_*.
        license: Licence of the weights.
        class_names: In the order of the classifier; by default numbers, which fit any data with this many classes.
        img_size: Side of the images in pixels; by default the architecture's. Position embeddings of another size are
            resampled by timm.

    Returns:
        The model, with `pretrained_cfg` set.

    Raises:
        ValueError: As for `read_public_checkpoint`; or the architecture is unknown, the weights do not fit it or are
            not finite, or values do not fit the weights.
    """
    path, architecture = Path(path), plain_architecture(architecture)
    check_model_name(architecture)
    public = read_public_checkpoint(path)
    renames = _PREFIXES.get(architecture.partition(".")[0], {})
    state = {_rename(name, renames): tensor for name, tensor in public.items()}
    if len(state) != len(public):
        raise ValueError(f"{path} holds a weight under both names of a pair in {sorted(renames.items())}: remove one.")
    default = get_pretrained_cfg(architecture)
    config: Mapping[str, Any] = default.to_dict() if default is not None else {}
    classes = _count_classes(path, state, config, num_classes)
    if in_chans is not None and in_chans < 1:
        raise ValueError(f"in_chans={in_chans}: expected 1 or more channels (--in-chans).")
    channels = in_chans or _count_channels(state, config)
    _check_finite(path, state)
    options: dict[str, Any] = {"in_chans": channels, **({"num_classes": classes} if classes is not None else {})}
    if img_size is None:
        model = _load_at_own_size(path, architecture, state, options)
    else:
        model = _load_at_size(path, architecture, state, options, img_size)
    count = int(getattr(model, "num_classes", 0))
    names = tuple(class_names) if class_names is not None else tuple(str(index) for index in range(count))
    if len(names) != count:
        raise ValueError(f"{len(names)} class names, but the classifier in {path} has {count} outputs: give {count}.")
    mean, std = _read_per_channel("mean", mean, config, channels), _read_per_channel("std", std, config, channels)
    size = (channels, *(config.get("input_size") or (3, 224, 224))[1:])
    if img_size is not None:
        size = (channels, img_size, img_size)
    describe_weights(model, input_size=size, mean=mean, std=std, class_names=names, license=license, tag="imported")
    return model


def _load_at_own_size(path: Path, architecture: str, state: dict[str, Tensor], options: Mapping[str, Any]) -> nn.Module:
    try:
        model = timm.create_model(architecture, pretrained=False, **options)
    except Exception as error:  # an architecture may raise anything for numbers that it does not take
        raise ValueError(f"{architecture} cannot be built for {options}: {error}") from error
    try:
        load_state_dict(model, architecture, path, state)
    except ValueError as error:
        if "pos_embed (" not in str(error):
            raise
        raise ValueError(
            f"{error} Position embeddings of another number belong to another image size: give --img-size, to which "
            "they are resampled."
        ) from error
    return model


def _load_at_size(
    path: Path, architecture: str, state: dict[str, Tensor], options: Mapping[str, Any], img_size: int
) -> nn.Module:
    """Build and load a model at an image size as timm does for pretrained weights: with the architecture's own function
    that resamples position embeddings, which timm calls for weights that it fetches."""
    known = get_pretrained_cfg(architecture)
    size = (options["in_chans"], *(known.input_size if known is not None else (3, img_size, img_size))[1:])
    weights = {"state_dict": dict(state), "input_size": size, "custom_load": False, "label_offset": 0}
    if "num_classes" in options:
        weights["num_classes"] = options["num_classes"]
    try:
        arguments = resolve_model_input_args(architecture, {"img_size": (img_size, img_size)}, **options)
        return timm.create_model(**arguments, pretrained=True, pretrained_cfg_overlay=weights)
    except Exception as error:  # an architecture may raise anything for numbers that it does not take
        raise ValueError(f"{path} does not fit {architecture} for {img_size}x{img_size} images: {error}") from error


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    wrong = [name for name, value in state.items() if value.is_floating_point() and not value.float().isfinite().all()]
    if wrong:
        raise ValueError(
            f"{path}: {len(wrong)} of {len(state)} weights hold values that are not finite, such as {wrong[0]}: its "
            "training diverged, or the file is corrupt. Take an earlier checkpoint, or download it again."
        )


def _rename(name: str, renames: Mapping[str, str]) -> str:
    for public, ours in renames.items():
        if name.startswith(public):
            return ours + name.removeprefix(public)
    return name


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple | list) else value


def _count_classes(
    path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], expected: int | None
) -> int | None:
    """Return the number of outputs of the classifier in the file; None if it has no classifier."""
    weight = state.get(f"{_first(config.get('classifier'))}.weight")
    if weight is None or weight.ndim < 2:
        return None
    if expected not in (None, weight.shape[0]):
        raise ValueError(
            f"num_classes={expected}: the classifier in {path} has {weight.shape[0]} outputs: give that number or none."
        )
    return weight.shape[0]


def _count_channels(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    """Return the input channels of the first convolution in the file; 3 if it has none."""
    weight = state.get(f"{_first(config.get('first_conv'))}.weight")
    return weight.shape[1] if weight is not None and weight.ndim == 4 else 3


def _read_per_channel(
    name: str, given: Sequence[float] | None, config: Mapping[str, Any], channels: int
) -> tuple[float, ...]:
    values = tuple(float(value) for value in given) if given is not None else read_channel_values(config, name)
    if values is None or len(values) != channels:
        text = f"{name}={values}" + ("" if given is not None else ", the architecture's own")
        raise ValueError(
            f"{text}: expected one value for each of the {channels} channels that the weights take; give --{name}."
        )
    if not all(abs(value) < float("inf") and (value > 0 or name == "mean") for value in values):
        raise ValueError(
            f"{name}={values}: expected finite values{'' if name == 'mean' else ' above 0'}, of pixels in [0, 1]."
        )
    check_statistics(name, values)
    return values
