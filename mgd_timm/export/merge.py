"""Merge into a model's weights what an architecture of timm has no place for: adapters and parametrizations."""

import copy
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def merge_weights(model: nn.Module) -> nn.Module:
    """Return the model, or a copy where it has adapters of peft or parametrizations, with these merged.

    The copy computes the same in eval mode.

    Raises:
        ValueError: A weight is computed by a hook, which torch cannot copy.
    """
    _check_hooks(model)
    if not any(_is_adapter(module) or parametrize.is_parametrized(module) for module in model.modules()):
        return model
    model = copy.deepcopy(model).eval()  # spectral norm changes its vectors in training mode
    for name, module in list(model.named_modules()):
        if _is_adapter(module):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _without_adapter(module))
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _remove_parametrizations(module)
    return model


def _remove_parametrizations(module: nn.Module) -> None:
    """Make the values of parametrized weights its own, in place.

    torch's remove_parametrizations deletes from the class, which a copy has in common with the model.
    """
    names = list(cast(nn.ModuleDict, module.parametrizations))
    values = {name: nn.Parameter(getattr(module, name).detach().clone()) for name in names}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, value)


def _is_adapter(module: nn.Module) -> bool:
    """Return whether peft put the module in the place of a layer."""
    return hasattr(module, "unload_and_optionally_merge_module") or (
        hasattr(module, "get_base_layer") and hasattr(module, "merge")
    )


def _without_adapter(module: Any) -> nn.Module:
    """Return the layer with its adapters merged, as peft's merge_and_unload does."""
    if hasattr(module, "unload_and_optionally_merge_module"):
        return module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    module.merge(safe_merge=True)
    return module.get_base_layer()


_WAYS_OUT = {
    BasePruningMethod: "torch.nn.utils.prune.remove(module, NAME) makes the masked weights its own",
    WeightNorm: "torch.nn.utils.parametrizations.weight_norm is merged at export; remove_weight_norm undoes this one",
    SpectralNorm: "torch.nn.utils.parametrizations.spectral_norm is merged at export; remove_spectral_norm undoes this "
    "one",
}


def _check_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            for kind, way_out in _WAYS_OUT.items():
                if isinstance(hook, kind):
                    raise ValueError(
                        f"the weights of {name or type(module).__name__} are computed before each forward pass "
                        f"({type(hook).__name__}), which the export of a timm model cannot hold: {way_out}."
                    )
