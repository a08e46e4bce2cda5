"""Unwrap modules of torch.compile, DataParallel, DistributedDataParallel and peft, which are no timm models."""

from typing import Any, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrap(module: nn.Module) -> nn.Module:
    """Return the timm model that a module wraps, or the module itself.

    A model of peft keeps its adapters: they are modules of the model that peft wraps.
    """
    while True:
        if "_orig_mod" in module._modules:  # of torch.compile, whose class is not imported for this
            module = cast(nn.Module, module._orig_mod)
        elif isinstance(module, DataParallel | DistributedDataParallel):
            module = module.module
        elif hasattr(module, "peft_config") and hasattr(module, "get_base_model"):
            module = cast(Any, module).get_base_model()
        else:
            return module
