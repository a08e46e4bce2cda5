"""Fits under DDP and under FSDP2, for test_sharding.py: run by two processes, which leave what they found in a JSON
file."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import mgd_timm.models  # noqa: F401  # registers cifar_* in timm
from mgd_timm.criteria import CRITERIA, EntropyWeight, Objective, Weighted
from mgd_timm.distiller import Distiller, LiveTeachers, Teacher, shard_teacher
from mgd_timm.distributed.collectives import leave
from mgd_timm.distributed.sharding import Sharded, fsdp_units
from mgd_timm.features import Batch, FeatureTap, Pair
from mgd_timm.granularity import MAS, GranularityHeads
from mgd_timm.recipe.optim import Optim
from mgd_timm.training.evaluation import evaluate_taps
from mgd_timm.training.loop import fit
from mgd_timm.training.options import FitOptions


class Noise:
    """A Source of random images."""

    digest = "noise"

    def __init__(self, count: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 3, size, size, generator=generator)
        self.labels = torch.randint(0, 10, (count,), generator=generator)
        self.ids = torch.arange(count)

    def batches(self, micro_batches, epoch, device):
        for ids in micro_batches:
            yield Batch(self.images[ids], self.labels[ids], ids)


def build(student: str, size: int) -> tuple[Distiller, Teacher]:
    """The same networks on every call: MAS around labels, KD and AT, with weighted samples."""
    torch.manual_seed(1)
    options = {"img_size": size} if "vit" in student else {}
    tap = FeatureTap(timm.create_model(student, num_classes=10, **options), (0, 1), input_size=(3, size, size))
    theirs = FeatureTap(timm.create_model("test_resnet", num_classes=10).eval(), (0, 1), input_size=(3, size, size))
    teacher = Teacher(theirs, GranularityHeads(theirs.embed_dim, 10))
    pair = Pair(tap.shapes(size), theirs.shapes(size), 32)
    criteria = {name: (1.0, CRITERIA[name](pair)) for name in ("ce", "at")}
    criteria["kd"] = (1.0, Weighted(CRITERIA["kd"](pair), EntropyWeight()))
    return Distiller(tap, MAS(pair, Objective(**criteria), sample_weight=EntropyWeight())), teacher


def accelerator(sharded: bool, steps: int = 1, precision: str | None = None) -> Accelerator:
    os.environ.update(ACCELERATE_USE_FSDP=str(sharded).lower(), FSDP_VERSION="2")
    AcceleratorState._reset_state(reset_partial_state=False)
    return Accelerator(gradient_accumulation_steps=steps, mixed_precision=precision)


def distil(
    student: str,
    optim: Optim,
    *,
    sharded: bool,
    teacher: bool = False,
    precision: str | None = None,
    resume: str | None = None,
) -> dict[str, Any]:
    """Two epochs of 32 images at a global batch of 16; gives losses and metrics, learning rates and weights."""
    size, per_step = 32, 8 // (optim.grad_accum_steps or 1)
    here = accelerator(sharded, optim.grad_accum_steps or 1, precision)
    trainee, frozen = build(student, size)
    if teacher:
        frozen = shard_teacher(frozen, here)
    held = Noise(13, size)  # 7 and 6 images: more batches on one process than on the other
    folder = Path(sys.argv[1], resume or f"{student}-{precision}-{sharded}")
    if here.is_main_process and resume is None:
        folder.mkdir()

    def watch(averaged: nn.Module | None) -> dict[str, float]:
        taps: dict[str, nn.Module] = {"student": trainee.student}
        if averaged is not None:
            taps["averaged"] = averaged
        found = evaluate_taps(taps, held, here, 2)
        return {f"{role}_{name}": row[name] for role, row in found.items() for name in row}

    fitted = fit(
        trainee,
        Noise(32, size),
        optim,
        here,
        seed=3,
        batch_size=per_step,
        teach=LiveTeachers(frozen),
        evaluate=watch,
        averaged=trainee.student,
        options=FitOptions(folder=folder, quiet=True, resume=resume is not None),
    )
    weights = {name: tensor.double() for name, tensor in trainee.state_dict().items()}
    if fitted.averaged is not None:
        weights |= {f"averaged.{name}": tensor.double() for name, tensor in fitted.averaged.state_dict().items()}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    said = {f"{name} {row['epoch']}": value for row in rows for name, value in (row["train"] | row["eval"]).items()}
    plain = not any(isinstance(part, FSDPModule) for part in trainee.modules())
    return {"said": said, "rates": [row["lr"] for row in rows], "weights": weights, "plain": plain}


def compare(student: str, optim: Optim, **options: Any) -> dict[str, Any]:
    """DDP's and FSDP2's losses and metrics, and the distance of all weights and statistics from DDP's, relative to
    their norm."""
    precision = options.get("precision")
    one = distil(student, optim, sharded=False, precision=precision)
    two = distil(student, optim, sharded=True, **options)
    return measure(one, two)


def crossed(student: str, optim: Optim) -> dict[str, Any]:
    """The second epoch of what DDP began under FSDP2, and of what FSDP2 began under DDP."""
    rows = []
    for sharded in (True, False):
        folder = f"{student}-None-{not sharded}"
        if torch.distributed.get_rank() == 0:
            shutil.rmtree(max((Path(sys.argv[1]) / folder / "checkpoints").iterdir()))
        torch.distributed.barrier()
        rows.append(distil(student, optim, sharded=sharded, resume=folder))
    return measure(rows[1], rows[0])


def measure(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """How far apart DDP's run and FSDP2's are."""
    assert one["weights"].keys() == two["weights"].keys()
    gaps = [(two["weights"][name] - value).norm() for name, value in one["weights"].items()]
    norm = torch.stack([value.norm() for value in one["weights"].values()]).norm()
    far = float(torch.stack(gaps).norm() / norm)
    return {
        "ddp": one["said"],
        "fsdp": two["said"],
        "rates": [one["rates"], two["rates"]],
        "far": far,
        "plain": two["plain"],
    }


def portion() -> dict[str, Any]:
    """What a process holds of a trainee and of a teacher that are cut up."""
    here = accelerator(True)
    trainee, teacher = build("test_vit", 32)
    total = sum(parameter.numel() for parameter in trainee.parameters())
    frozen = sum(parameter.numel() for parameter in teacher.parameters())
    names = fsdp_units(trainee.student)
    before = [parameter.clone() for parameter in trainee.parameters()]
    parallel = Sharded(trainee, here)
    theirs = shard_teacher(teacher, here)
    released = sum(parameter.numel() for parameter in trainee.parameters())
    with parallel.full_parameters():
        same = all(torch.equal(one, two) for one, two in zip(before, trainee.parameters(), strict=True))
    return {
        "total": total,
        "local": held(parallel.trainee),
        "teacher_total": frozen,
        "teacher_local": held(theirs),
        "released": released,
        "same": same,
        "units": names,
    }


def held(module: nn.Module) -> int:
    parts = list(module.parameters())
    assert all(isinstance(part, DTensor) for part in parts)
    return sum(part.to_local().numel() for part in parts)


def main() -> None:
    sgd = Optim(
        epochs=2, lr=0.02, clip_grad=0.5, grad_accum_steps=2, model_ema=True, model_ema_decay=0.5, warmup_epochs=1
    )
    adamw = Optim(epochs=2, opt="adamw", lr=1e-3)
    found = {
        "resnet": compare("test_resnet", sgd),
        "crossed": crossed("test_resnet", sgd),
        "vit": compare("test_vit", adamw, teacher=True),
        "bf16": compare("test_resnet", Optim(epochs=2, lr=0.02), precision="bf16"),
        "portion": portion(),
    }
    rank = torch.distributed.get_rank()
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(found))
    leave()


if __name__ == "__main__":
    main()
