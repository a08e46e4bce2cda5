"""An optimizer and its schedule."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mgd_timm.distiller import EvolutionaryLearning
from mgd_timm.features import FeatureTap
from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.options import unknown

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")


def check_names(optim: Optim) -> None:
    """Raise ValueError with the nearest names unless timm has the optimizer, and the scheduler goes by updates."""
    known = [str(name) for name in list_optimizers()]
    if optim.opt.lower() not in known:
        raise unknown("optimizer", optim.opt, known)
    if optim.sched not in SCHEDULES:
        raise unknown("scheduler", optim.sched, SCHEDULES)


def build_optimizer(module: nn.Module, optim: Optim, *, scaled: bool = False) -> Optimizer:
    """Return timm's optimizer over a module's parameters that require a gradient; torch's fused one where torch has it.

    Args:
        module: Has the parameters. Those that a timm model in it exempts from weight decay are not decayed.
        optim: Name, learning rate, momentum and weight decay.
        scaled: A loss scaler (fp16) is used with it. Then nothing is fused: after an overflow in the first update,
            torch's fused SGD takes memory that nothing was written to as its momentum.

    Raises:
        ValueError: No optimizer of that name.
    """
    check_names(optim)
    kind = get_optimizer_info(optim.opt.lower()).opt_class
    devices = {parameter.device.type for parameter in module.parameters()}
    known = not scaled and kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW) and devices <= {"cpu", "cuda"}
    fused: dict[str, Any] = {"fused": True} if known else {}
    if known and kind is torch.optim.SGD and any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        fused = {"foreach": True}  # torch has no fused SGD for parameters that are sharded
    # timm asks only the module that it is given for `no_weight_decay()`, and its models lie deeper in ours.
    exempt = {
        f"{path}.{name}" if path else name
        for path, tap in module.named_modules()
        if isinstance(tap, FeatureTap)
        for name in tap.no_weight_decay()
    }
    groups = param_groups_weight_decay(
        module, optim.weight_decay, weight_decay_exclude_1d=optim.filter_bias_and_bn, no_weight_decay_list=exempt
    )
    groups = _split_by_lr_scale(groups, module)
    return create_optimizer_v2(groups, opt=optim.opt, lr=optim.lr, momentum=optim.momentum, **fused)


def _split_by_lr_scale(groups: list[dict[str, Any]], module: nn.Module) -> list[dict[str, Any]]:
    """Return parameter groups with timm's "lr_scale" where a network has a learning rate of its own; these are last."""
    taps = [tap for tap in module.modules() if isinstance(tap, FeatureTap) and tap.lr_scale != 1]
    scales = {id(parameter): tap.lr_scale for tap in taps for parameter in tap.parameters()}
    for pair in (one for one in module.modules() if isinstance(one, EvolutionaryLearning)):
        if pair.peer.lr_scale != 1:
            scales |= {id(parameter): pair.peer.lr_scale for parameter in pair.peer_parameters()}
    split: list[dict[str, Any]] = []
    for scale in (None, *sorted(set(scales.values()))):
        for group in groups:
            parameters = [parameter for parameter in group["params"] if scales.get(id(parameter)) == scale]
            if parameters:
                split.append({**group, "params": parameters, **({} if scale is None else {"lr_scale": scale})})
    return split


def build_schedule(optimizer: Optimizer, optim: Optim, updates_per_epoch: int) -> Scheduler:
    """Return timm's scheduler, a pure function of the number of updates done.

    Raises:
        ValueError: No scheduler of that name that goes by updates.
    """
    check_names(optim)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=optim.sched,
        num_epochs=optim.epochs,
        decay_epochs=optim.decay_epochs if optim.sched == "step" else None,
        decay_milestones=list[Any](optim.milestones),
        decay_rate=optim.poly_power if optim.sched == "poly" else optim.decay_rate,  # timm: one argument for both
        min_lr=optim.min_lr,
        warmup_lr=optim.warmup_lr,
        warmup_epochs=optim.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    assert schedule is not None
    return schedule
