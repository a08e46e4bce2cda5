"""KRNet's step of its own: its gradient against finite differences, and what an update does and leaves as it is."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from cases import BATCH, CLASSES
from forked import Ranks
from torch import Tensor

from mgd_timm import models  # noqa: F401  # registers cifar_*
from mgd_timm.criteria import KD, CrossEntropy, KRNet, Objective
from mgd_timm.distiller import Distiller, LiveTeachers, Teacher
from mgd_timm.distributed.collectives import leave
from mgd_timm.features import Batch, Features, FeatureTap, Pair
from mgd_timm.granularity import MAG, GranularityHeads
from mgd_timm.recipe.optim import Optim
from mgd_timm.training.step import Updater
from mgd_timm.training.update_plan import UpdatePlan

SIDE, COUNT = 16, 12


class Noise:
    """A Source of random images."""

    digest = "noise"
    ids = torch.arange(COUNT)
    labels = torch.arange(COUNT) % CLASSES
    images = torch.randn(COUNT, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))

    def batches(self, micro_batches, epoch, device):
        for ids in micro_batches:
            yield Batch(self.images[ids], ids % CLASSES, ids)


def tap(name: str, seed: int, **options) -> FeatureTap:
    torch.manual_seed(seed)
    return FeatureTap(timm.create_model(name, num_classes=CLASSES, **options), (1, 2), input_size=(3, SIDE, SIDE))


def build(student: str = "cifar_resnet8x05", method: str = "none", model=None, **options) -> tuple[Distiller, Teacher]:
    ours, theirs = tap(student, 0, **(model or {})), tap("cifar_wrn_16_1", 1)
    pair = Pair(ours.shapes(SIDE), theirs.shapes(SIDE))
    torch.manual_seed(2)
    terms = {"task": (0.5, CrossEntropy(pair)), "kd": (1.0, KD(pair)), "krnet": (100.0, KRNet(pair, **options))}
    objective = Objective(**terms)
    heads = GranularityHeads(theirs.embed_dim, CLASSES) if method == "mag" else None
    return Distiller(ours, MAG(pair, objective) if method == "mag" else objective), Teacher(theirs, heads)


def krnet_of(trainee: Distiller) -> KRNet:
    return next(module for module in trainee.modules() if isinstance(module, KRNet))


def updater_of(trainee: Distiller, teacher: Teacher, steps: int = 1) -> tuple[Updater, UpdatePlan]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    plan = UpdatePlan(Noise(), 0, "distil", BATCH // steps, BATCH, accelerator)
    optim = Optim(epochs=1, lr=0.05, clip_grad=5.0)
    return Updater(trainee.train(), optim, accelerator, plan, teach=LiveTeachers(teacher)), plan


def attention_of(trainee: Distiller) -> Tensor:
    return torch.cat([p.detach().flatten() for p in krnet_of(trainee).attention.parameters()])


def gradients(trainee: Distiller, teacher: Teacher, batch: Batch) -> dict[str, Tensor]:
    criterion, objective = krnet_of(trainee), trainee.objective

    def task(seen: Features, shown: Batch) -> Tensor:
        return objective.weigh("task", F.cross_entropy(seen.logits, shown.labels))

    trainee.train()
    found = criterion.attention_gradients(
        trainee.student, task, lambda loss: objective.weigh("krnet", loss), batch, teacher(batch.images)
    )
    return dict(zip(dict(criterion.attention.named_parameters()), found, strict=True))


def batch_of(count: int, dtype: torch.dtype = torch.float32) -> Batch:
    batch = next(Noise().batches([torch.arange(count)], 0, None))
    return batch._replace(images=batch.images.to(dtype))


def task_after_a_step(trainee: Distiller, teacher: Teacher, batch: Batch, rows: slice, others: slice) -> float:
    """By a real step of PyTorch's SGD on a copy of the student, in which attention is what the nets give."""
    trainee = copy.deepcopy(trainee).train()
    student, criterion, shown = trainee.student, krnet_of(trainee), Batch(*(part[rows] for part in batch))
    optimizer = torch.optim.SGD(student.parameters(), lr=criterion.inner_lr)
    seen, target = student(shown.images), teacher(shown.images)
    loss = 0.5 * F.cross_entropy(seen.logits, shown.labels) + 100 * criterion(seen, target, shown)
    loss.backward()
    optimizer.step()
    return 0.5 * F.cross_entropy(student(batch.images[others]).logits, batch.labels[others]).item()


@pytest.mark.parametrize(("count", "rows", "others"), [(6, slice(3), slice(3, 6)), (3, slice(3), slice(3))])
def test_the_gradient_is_that_of_a_real_step(count, rows, others):
    """In two directions of the attention nets' weights, by finite differences in float64."""
    trainee, teacher = (module.double() for module in build(groups=3, hidden=8))
    batch, found = batch_of(count, torch.float64), gradients(trainee, teacher, batch_of(count, torch.float64))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        along = {n: torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in found.items()}
        values = []
        for sign in (1, -1):
            moved = copy.deepcopy(trainee)
            with torch.no_grad():
                for name, p in krnet_of(moved).attention.named_parameters():
                    p += sign * 1e-6 * along[name]
            values.append(task_after_a_step(moved, teacher, batch, rows, others))
        expected = (values[0] - values[1]) / 2e-6
        assert sum((found[n] * along[n]).sum() for n in found).item() == pytest.approx(expected, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("student", ["cifar_resnet8x05", "vit_tiny_patch16_224"])
def test_every_weight_gets_a_gradient_and_first_order_agrees(student):
    """Also through a transformer's attention and, by equal random numbers, dropout."""
    sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "proj_drop_rate": 0.1}
    found = []
    for first_order in (False, True):
        trainee, teacher = build(student, model=sizes if "vit" in student else {}, first_order=first_order)
        before, shown = copy.deepcopy(trainee.state_dict()), batch_of(8)
        torch.manual_seed(0)
        gradient = gradients(trainee, teacher, shown)
        assert all(g.abs().max() > 0 for g in gradient.values())
        assert all(p.grad is None for p in trainee.parameters())
        torch.testing.assert_close(trainee.state_dict(), before, rtol=0, atol=0)  # buffers too
        found.append(torch.cat([g.flatten() for g in gradient.values()]))
    if "vit" in student:  # dropout differs between the two forms, but not between the two sides of a difference
        assert 0.2 < found[1].norm() / found[0].norm() < 5
    else:
        assert F.cosine_similarity(*found, dim=0) > 0.98
        assert found[1].norm() / found[0].norm() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("steps", [1, 2])
def test_batchnorm_moves_once_in_an_update_or_once_in_a_micro_batch(steps):
    trainee, teacher = build(interval=1)
    plain = copy.deepcopy(trainee)
    updater, plan = updater_of(trainee, teacher, steps)
    update = plan.updates(0)[0]
    updater.run(update, Noise().batches([m.ids for m in update], 0, "cpu"), 0)
    counts = {n: v for n, v in trainee.state_dict().items() if "num_batches_tracked" in n}
    assert any("adapters" in name for name in counts)
    assert all(count == steps for count in counts.values())
    assert not any(p.grad is not None and p.grad.any() for p in trainee.parameters())
    plain.train()
    for micro_batch in update:
        shown = next(Noise().batches([micro_batch.ids], 0, "cpu"))
        plain(shown, teacher(shown.images))
    for name, value in plain.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(trainee.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("method", ["none", "mag"])
def test_attention_learns_every_interval_and_the_rest_in_every_update(method):
    trainee, teacher = build(method=method, interval=2)
    updater, plan = updater_of(trainee, teacher)
    in_run = {id(p) for group in updater.bare_optimizer.param_groups for p in group["params"]}
    assert not in_run & {id(p) for p in krnet_of(trainee).attention.parameters()}
    assert in_run >= {id(p) for p in krnet_of(trainee).adapters.parameters()}
    moved = []
    for done, update in enumerate(plan.updates(0)):
        attention, adapter = attention_of(trainee), next(krnet_of(trainee).adapters.parameters()).detach().clone()
        updater.run(update, Noise().batches([update[0].ids], 0, "cpu"), done)
        moved.append(not torch.equal(attention_of(trainee), attention))
        assert not torch.equal(next(krnet_of(trainee).adapters.parameters()), adapter)
    assert moved == [True, False, True]


def test_attention_is_a_constant_for_the_student():
    trainee, teacher = build()
    criterion, shown = krnet_of(trainee), batch_of(4)
    seen, target = trainee.student(shown.images), teacher(shown.images)
    criterion(seen, target, shown).backward()
    assert all(p.grad is None for p in criterion.attention.parameters())
    assert any(p.grad is not None and p.grad.any() for p in criterion.adapters.parameters())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"groups": 1}, "groups=1: expected 2 or more"),
        ({"hidden": 0}, "hidden=0: expected 1 or more"),
        ({"interval": 0}, "interval=0: expected 1 or more"),
        ({"inner_lr": 0.0}, "inner_lr=0.0: expected a finite number above 0"),
        ({"meta_lr": float("inf")}, "meta_lr=inf: expected a finite number above 0"),
    ],
)
def test_options_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        build(**option)


def test_without_labels_there_is_nothing_to_learn_from():
    trainee, teacher = build()
    pair = Pair(trainee.student.shapes(SIDE), teacher.tap.shapes(SIDE))
    alone = Distiller(trainee.student, Objective(kd=(1.0, KD(pair)), krnet=(1.0, KRNet(pair))))
    with pytest.raises(ValueError, match="krnet learns from the labels' loss, which has no weight"):
        updater_of(alone, teacher)


def update_on_rank(folder: str) -> int:
    """Three updates of 5, 5 and 2 images, of which the last one leaves a second process nothing."""
    trainee, teacher = build(interval=1)
    accelerator = Accelerator(cpu=True)
    plan = UpdatePlan(Noise(), 0, "distil", 3, 5, accelerator)
    updater = Updater(trainee.train(), Optim(epochs=1, lr=0.05), accelerator, plan, teach=LiveTeachers(teacher))
    first, found = plan.updates(0)[0][0], {}
    shown = next(Noise().batches([first.ids], 0, "cpu"))
    gradient = gradients(trainee, teacher, shown)
    found["own"], found["count"] = torch.cat([g.flatten() for g in gradient.values()]), torch.tensor(first.count)
    for done, update in enumerate(plan.updates(0)):
        updater.run(update, Noise().batches([m.ids for m in update], 0, "cpu"), done)
        if not done:
            states = [updater.own_step.optimizer.state[p] for p in updater.own_step.parameters]
            found["mean"] = torch.cat([state["exp_avg"].flatten() for state in states]) * 10  # 1 - 0.9 of the first
    torch.save({**found, "attention": attention_of(trainee)}, f"{folder}/{accelerator.process_index}.pt")
    leave()
    return 0


@pytest.mark.slow
def test_two_processes_average_their_gradients_and_keep_the_nets_equal(tmp_path):
    ranks = Ranks([str(tmp_path)], tmp_path / "log", processes=2, target=update_on_rank)
    assert ranks.wait(200) == [0, 0], ranks.said()
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(one["attention"], two["attention"])
    assert not torch.equal(one["attention"], attention_of(build()[0]))
    assert torch.equal(one["mean"], two["mean"])
    assert (one["count"], two["count"]) == (3, 2)
    torch.testing.assert_close(one["mean"], 0.6 * one["own"] + 0.4 * two["own"], rtol=1e-4, atol=1e-9)
