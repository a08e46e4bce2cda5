"""Check that timm rebuilds a model from what its export says, before it is trained."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from mgd_timm.export.merge import merge_weights
from mgd_timm.export.timm_folder import write_config
from mgd_timm.features.tap import model_name

_TOLERANCE = 1e-4
"""Of the largest logit: merging an adapter, or another memory format, changes logits by rounding only."""
_WAY_OUT = (
    "build it with timm.create_model and arguments that JSON can hold, and change its classifier by num_classes=C or "
    "reset_classifier(C) alone"
)


def check_rebuild(model: nn.Module, role: str) -> None:
    """Raise ValueError unless timm.create_model builds the same network from the model's config.json.

    Compared are names, shapes and types of the weights, eps of the layers, and logits of two images in eval mode.

    Args:
        model: With a `pretrained_cfg` that describes its weights.
        role: Of the model, for messages.
    """
    try:
        own = copy.deepcopy(merge_weights(model)).cpu().eval()
        _compare(own, _rebuild(own))
    except ValueError as error:
        raise ValueError(f"{role}: {model_name(model)} could not be loaded from its export: {error}") from error


def _rebuild(model: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        write_config(model, Path(folder))
        try:
            return timm.create_model(f"local-dir:{folder}", pretrained=False).eval()
        except Exception as error:  # an architecture may raise anything for its arguments
            raise ValueError(f"timm.create_model fails with its arguments ({error}): {_WAY_OUT}.") from error


def _compare(own: nn.Module, rebuilt: nn.Module) -> None:
    problems = _differences(own.state_dict(), rebuilt.state_dict())
    if problems:
        raise ValueError(f"timm.create_model builds another network ({'; '.join(problems)}): {_WAY_OUT}.")
    modules = dict(rebuilt.named_modules())
    for name, module in own.named_modules():
        given, expected = (getattr(one, "eps", None) for one in (module, modules.get(name)))
        if name in modules and given != expected:
            raise ValueError(
                f"eps of {name} is {given}, and timm.create_model builds it with {expected}: leave it as it was built, "
                "or give eps as an argument of timm.create_model, where the architecture takes it."
            )
    _unhide(own)
    rebuilt.load_state_dict(own.state_dict())
    size = rebuilt.pretrained_cfg["input_size"]  # type: ignore[index]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = own(images), rebuilt(images)
    bound = _TOLERANCE * float(theirs.abs().max().nan_to_num(posinf=0.0))
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=_TOLERANCE, atol=bound, equal_nan=True):
        raise ValueError(
            f"its logits are others than those of the network that timm.create_model builds{_other(own, modules)}: "
            f"{_WAY_OUT}."
        )


def _differences(own: Mapping[str, Tensor], rebuilt: Mapping[str, Tensor]) -> list[str]:
    """Return the first weights in which two state dicts differ, in words."""
    found = {
        "only the model has": [name for name in own if name not in rebuilt],
        "only timm's has": [name for name in rebuilt if name not in own],
    }
    common = [name for name in own if name in rebuilt]
    for attribute in ("shape", "dtype"):
        values = {name: [getattr(one[name], attribute) for one in (own, rebuilt)] for name in common}
        found[f"of another {attribute}"] = [
            f"{name} ({_text(one)}, not {_text(other)})" for name, (one, other) in values.items() if one != other
        ]
    return [f"{problem} {', '.join(names[:3])}" for problem, names in found.items() if names]


def _text(value: Any) -> str:
    return str(tuple(value) if isinstance(value, torch.Size) else value)


def _unhide(model: nn.Module) -> None:
    """Set weights to 0.1 that are zero or tiny, in place: residual gains, layer scales and classifiers that start so
    would hide what other layers compute."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() and float(parameter.detach().abs().max()) < 1e-3:
            parameter.data.fill_(0.1)


def _other(own: nn.Module, rebuilt: Mapping[str, nn.Module]) -> str:
    """Return the first module of another class, in words."""
    for name, module in own.named_modules():
        other = rebuilt.get(name)
        if type(other) is not type(module):
            expected = "nothing" if other is None else f"a {type(other).__name__}"
            return f" ({name or 'the model'} is a {type(module).__name__}, where timm has {expected})"
    return ""
