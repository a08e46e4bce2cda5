"""An optimizer's state by parameter name: tensors for safetensors, the rest for JSON."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mgd_timm.distributed.sharding import shard_like


def _names(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """Return the names of the optimizer's parameters, in the order of its state's indices."""
    by_id = {id(parameter): name for name, parameter in module.named_parameters()}
    return [by_id[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def optimizer_state(optimizer: Optimizer, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return state tensors by name, and JSON values with a reference where each tensor stands.

    Raises:
        ValueError: The optimizer keeps something that is neither a tensor nor a plain value.
    """
    state, names = optimizer.state_dict(), _names(optimizer, module)
    tensors: dict[str, Tensor] = {}
    by_name = {names[index]: entries for index, entries in state["state"].items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    try:
        values = {"state": _pack(by_name, "", tensors), "groups": _pack(groups, "group", tensors), "names": names}
    except TypeError as error:
        raise ValueError(
            f"optimizer {type(optimizer).__name__} keeps {error}, which a checkpoint cannot hold: choose another "
            "optimizer."
        ) from None
    return tensors, values


def load_optimizer_state(
    optimizer: Optimizer, module: nn.Module, tensors: Mapping[str, Tensor], values: dict[str, Any]
) -> None:
    """Load what `optimizer_state` returned into an optimizer built from the same recipe."""
    names = _names(optimizer, module)
    assert names == values["names"], "an optimizer of another module"
    own = dict(module.named_parameters())
    state = {
        names.index(name): {key: shard_like(v, own[name]) if isinstance(v, Tensor) else v for key, v in entries.items()}
        for name, entries in _unpack(values["state"], tensors).items()
    }
    groups = _unpack(values["groups"], tensors)
    for group, now in zip(groups, optimizer.state_dict()["param_groups"], strict=True):
        # A parameter's kind and device decide these, not the checkpoint: fused where DDP wrote it, not under FSDP.
        group |= {key: now[key] for key in ("params", "fused", "foreach") if key in now}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            # A fused optimizer goes through memory, not through indices: channels-last weights need channels-last
            # momentum.
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return a tree of JSON values, with its tensors moved to `tensors`."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple | list):
        items = [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    raise TypeError(f"a {type(value).__name__} at {path}")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    (kind, inner), *_ = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dtype":
        return getattr(torch, inner)
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in inner)
    return {key: _unpack(item, tensors) for key, item in inner}
