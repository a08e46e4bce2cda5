"""The optimizer's groups, learning rates and the moving average against timm's own."""

from dataclasses import replace

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import mgd_timm.models  # noqa: F401  # registers cifar_*
from mgd_timm.criteria import CRITERIA, Objective
from mgd_timm.distiller import Distiller, MutualLearning
from mgd_timm.features import FeatureTap, Pair
from mgd_timm.granularity import MAG
from mgd_timm.recipe.optim import Optim
from mgd_timm.training.optimizer import SCHEDULES, build_optimizer, build_schedule

FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"depth": 2, "img_size": 32}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {"depth": 2, "img_size": 32}),
    "swin": ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1), "embed_dim": 24, "img_size": 64}),
    "beit": ("beit_base_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 2, "img_size": 32}),
    "eva": ("eva02_tiny_patch14_224", {"depth": 2, "img_size": 28}),
    "hiera": ("hiera_tiny_224", {"embed_dim": 24}),
    "crossvit": ("crossvit_tiny_240", {}),
    "levit": ("levit_128s", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "resnet": ("cifar_resnet8x05", {}),
}
OPTIM = Optim(opt="adamw", lr=1e-3, weight_decay=0.05)


def decay_by_name(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, float]:
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def part(decays: dict[str, float], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): decay for name, decay in decays.items() if name.startswith(prefix)}


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_weight_decay_is_grouped_as_timm_groups_the_bare_student(family, filtered):
    name, options = FAMILIES[family]
    model, size = timm.create_model(name, num_classes=4, **options), options.get("img_size")
    expected = decay_by_name(create_optimizer_v2(model, "adamw", weight_decay=0.05, filter_bias_and_bn=filtered), model)
    assert filtered is False or {0.0, 0.05} == set(expected.values())
    tap = FeatureTap(model, "last", input_size=(3, size, size) if size else None)
    shapes = tap.shapes(tap.input_size[1:])
    pair = Pair(shapes, shapes)
    distiller = Distiller(tap, MAG(pair, Objective(ce=(1.0, CRITERIA["ce"](pair)))))
    wrapped = nn.ModuleDict({"one": distiller})
    for trainee, prefix in ((distiller, "student.model."), (tap, "model."), (wrapped, "one.student.model.")):
        decays = decay_by_name(build_optimizer(trainee, replace(OPTIM, filter_bias_and_bn=filtered)), trainee)
        assert part(decays, prefix) == expected


def test_a_peer_is_grouped_as_well_and_criteria_by_their_dimensions():
    taps = [
        FeatureTap(timm.create_model(name, num_classes=4, **options), "last", input_size=(3, 32, 32))
        for name, options in (FAMILIES["vit"], FAMILIES["deit_distilled"])
    ]
    pair = Pair(taps[0].shapes(32), taps[1].shapes(32))
    objectives = [MAG(pair, Objective(fitnet=(1.0, CRITERIA["fitnet"](pair)))) for _ in taps]
    trainee = MutualLearning(*taps, *objectives)
    decays = decay_by_name(build_optimizer(trainee, replace(OPTIM, filter_bias_and_bn=True)), trainee)
    for role, tap in zip(("student", "peer"), taps, strict=True):
        assert decays[f"{role}.model.pos_embed"] == decays[f"{role}.model.cls_token"] == 0
        expected = decay_by_name(create_optimizer_v2(tap.model, "adamw", weight_decay=0.05), tap.model)
        assert part(decays, f"{role}.model.") == expected
    assert decays["peer.model.dist_token"] == 0
    others = {name: parameter for name, parameter in trainee.named_parameters() if "objective." in name}
    assert {decays[name] for name in others} == {0.0, 0.05}
    for name, parameter in others.items():
        assert (decays[name] == 0) is (parameter.ndim == 1)


def rates(optim: Optim, updates_per_epoch: int = 10) -> list[float]:
    """The learning rate of every update."""
    optimizer = build_optimizer(nn.Linear(2, 2), optim)
    schedule, found = build_schedule(optimizer, optim, updates_per_epoch), []
    for update in range(optim.epochs * updates_per_epoch):
        schedule.step_update(update)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("sched", [name for name in SCHEDULES if name not in ("step", "constant")])
def test_every_schedule_that_decays_falls_by_default(sched):
    """At the end of the default number of epochs; the last update is one before the end."""
    found = rates(Optim(sched=sched, lr=1.0, warmup_epochs=1, min_lr=0.01))
    assert max(found) == pytest.approx(1, abs=0.1)
    assert found[-1] < 0.16  # wsd falls as 1 - sqrt(share)


@pytest.mark.parametrize("power", [1.0, 0.5, 2.0])
def test_poly_is_torchs(power):
    """PolynomialLR's default power is 1, and so is ours; the factor of a decay is not read."""
    options = {} if power == 1 else {"poly_power": power}
    found = rates(Optim(sched="poly", lr=0.4, epochs=3, decay_rate=0.3, **options))
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.4)
    reference = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=30, power=power)
    for rate in found:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        reference.step()
    assert optimizer.param_groups[0]["lr"] == 0


def falls(found: list[float]) -> list[int]:
    return [update for update in range(1, len(found)) if found[update] < found[update - 1]]


@pytest.mark.parametrize("epochs", [1, 20, 240])
def test_default_milestones_are_the_papers_shares_of_any_length(epochs):
    found = rates(Optim(sched="multistep", epochs=epochs), 80)
    assert falls(found) == [share * epochs - 1 for share in (50, 60, 70)]  # timm's falls one update before
    assert found[-1] == pytest.approx(0.05e-3)


def test_given_milestones_move_with_the_length():
    whole = Optim(sched="multistep", epochs=24, decay_milestones=(12, 18), decay_epochs=8.0, warmup_epochs=5)
    assert falls(rates(whole)[50:]) == [69, 129]
    third = whole.with_epochs(8)
    assert (third.milestones, third.warmup_epochs) == ((4.0, 6.0), 5)
    assert falls(rates(replace(third, warmup_epochs=0))) == [39, 59]
    assert falls(rates(replace(third, warmup_epochs=0, sched="step"))) == [27, 54]  # 8/3 epochs each, rounded up
    assert whole.with_epochs(1).milestones == (0.5, 0.75)
    assert whole.with_epochs(24) == whole
