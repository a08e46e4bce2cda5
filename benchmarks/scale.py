"""Step time, memory, loader and store of a distillation, predicted for a pair, batch, precision and number of GPUs.

    python benchmarks/scale.py --teacher resnet34 --student resnet18 --img-size 224 --batch-size 256 --amp --gpus 8
    python benchmarks/scale.py --teacher vit_large_patch16_224 --student vit_small_patch16_224 --img-size 224
    --batch-size 64 \
        --amp --gpus 64 --classes 21841 --images 14197122 --opt adamw --teacher-store --top-k 64
    python benchmarks/scale.py --device 9e14+3e12 ...     another device: half-precision FLOP/s + bytes/s
    python benchmarks/scale.py --device cpu ...           one thread of the machine that --check ran on
    python benchmarks/scale.py --check                    predicts what this machine can measure, and measures it
    python benchmarks/scale.py --check memory several     memory alone: other programs do not disturb it, as they do
    times python benchmarks/scale.py --markdown                 the tables of docs/scaling.md, predicted anew

The step is counted operation by operation on tensors without numbers (benchmarks/scale_counts.py). On a GPU an
operation takes the longer of its FLOPs at a share of the peak rate and its bytes at a share of the bandwidth, and the
step the longer of all operations and all kernel launches. On a CPU the rates are measured ones
(benchmarks/scale_check.py), and the bytes are held against what torch's allocator hands out
(benchmarks/scale_memory.py). No GPU has confirmed any of this yet. Writes benchmarks/results/scale.json.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import scale_check
import scale_memory
import scale_several
from report import machine
from scale_counts import PHASES, Case, Counts, Op, as_values, count

from mgd_timm.recipe.heads import Heads
from mgd_timm.storage.versions import versions
from mgd_timm.teachers.outputs.layout import Layout

RESULTS = Path(__file__).parent / "results" / "scale.json"
CHECKS = ("time", "memory", "several")
UTILISATION = (0.3, 0.4, 0.5)
"""Assumed share of the peak FLOP/s that matrix products and convolutions reach: low, expected, high."""
STREAMING = 0.8
"""Assumed share of the memory bandwidth that the other operations reach."""
LAUNCH = 8e-6
"""Assumed seconds of Python and driver per operation; they pass beside the GPU's own work."""
LINK = {"node": 200e9, "network": 40e9}
"""Assumed bytes/s per GPU of an all-reduce: over NVLink, and over one 400 Gbit/s adapter per GPU."""
NODE = 8
RESERVE = (1e9, 1.1)
"""Assumed memory beside tensors: the context and libraries' workspaces in bytes, and the allocator's fragments as a
factor."""
BUCKET = 25 * 2**20
"""DDP's bucket: the last one is sent after the backward."""


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet.

    Args:
        name: Its name.
        half, full: Peak FLOP/s of dense products in bfloat16 and in float32 without TF32.
        bandwidth: Bytes/s of its memory.
        memory: Bytes.
    """

    name: str
    half: float
    full: float
    bandwidth: float
    memory: float


# NVIDIA's data sheets of the H200 SXM and the A100 SXM 80GB, without sparsity.
DEVICES = {"h200": Device("H200", 989e12, 67e12, 4.8e12, 141e9), "a100": Device("A100", 312e12, 19.5e12, 2.0e12, 80e9)}


def device_of(word: str) -> Device:
    """A known device, or one of FLOPS+BANDWIDTH.

    Raises:
        ValueError: Neither of these.
    """
    if word in DEVICES:
        return DEVICES[word]
    number = r"(\d+\.?\d*(?:e\+?\d+)?)"
    rates = re.fullmatch(rf"{number}\+{number}", word)
    if rates is None or min(map(float, rates.groups())) <= 0:
        raise ValueError(
            f"--device {word!r}: expected {', '.join(DEVICES)}, cpu, or FLOP/s+bytes/s such as 9.9e14+4.8e12."
        )
    half, bandwidth = map(float, rates.groups())
    return Device(word, half, half / 16, bandwidth, float("inf"))


@dataclass(frozen=True)
class Plan:
    """A run around a step.

    Args:
        case: The step.
        gpus: Processes, one for each GPU.
        images, epochs: Of the training set, and how often it is seen.
        views, top_k: Of a teacher store.
        cores: CPU cores for each GPU that load images.
        ema: An average of the student's weights is kept.
        fsdp: The student is sharded over all GPUs, instead of copied to each (DDP).
    """

    case: Case
    gpus: int = 1
    images: int = 1_281_167
    epochs: int = 100
    views: int = 10
    top_k: int = 0
    cores: int = 16
    ema: bool = False
    fsdp: bool = False

    def __post_init__(self) -> None:
        for name in ("gpus", "images", "epochs", "views", "cores"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more.")


def busy(ops: Sequence[Op], device: Device, utilisation: float) -> float:
    """Seconds that the operations keep a device busy."""
    total = 0.0
    for op in ops:
        compute = op.flops / ((device.half if op.half else device.full) * utilisation)
        total += max(compute, op.bytes / (device.bandwidth * STREAMING))
    return total


def communication(counts: Counts, plan: Plan) -> float:
    """Seconds of a step's exchange between GPUs: gradients all-reduced (DDP), or weights gathered twice and gradients
    scattered."""
    if plan.gpus == 1:
        return 0.0
    link = LINK["node" if plan.gpus <= NODE else "network"]
    return float((3 if plan.fsdp else 2) * (plan.gpus - 1) / plan.gpus * counts.trained / link)


def step_seconds(counts: Counts, device: Device, plan: Plan, utilisation: float) -> dict[str, float]:
    """Seconds of a step and of its parts; each phase takes the longer of the GPU's work and the launching of its
    kernels."""
    parts = {}
    for phase in PHASES:
        ops = [op for op in counts.ops if op.phase == phase]
        parts[phase] = max(busy(ops, device, utilisation), len(ops) * LAUNCH)
    exchange = communication(counts, plan)
    # The exchange goes on beside the backward, but for what the last gradients need.
    last = exchange * min(1.0, BUCKET / max(counts.trained, 1))
    parts["exchange"] = max(exchange - parts["backward"], last)
    return {**parts, "step": sum(parts.values()), "launching": len(counts.ops) * LAUNCH}


def memory(counts: Counts, plan: Plan) -> dict[str, float]:
    """Bytes per GPU, by part and in all.

    DDP copies the gradients into buckets. FSDP keeps a share of weights and optimizer state; what it gathers is, in the
    backward, all that is needed for the whole step, the part in use, and the next one twice: as it arrives and as it is
    laid out.
    """
    share = 1 / plan.gpus if plan.fsdp else 1.0
    sharded = counts.trained + counts.optimizer
    parts = {
        "tensors": counts.peak - sharded * (1 - share),
        "buckets": counts.rest + 3 * counts.unit if plan.fsdp else counts.trained if plan.gpus > 1 else 0.0,
        "average": counts.student_state * share if plan.ema else 0.0,
    }
    return {**parts, "total": sum(parts.values()) * RESERVE[1] + RESERVE[0]}


def held_by_tensors(case: Case, fsdp: bool, ema: bool) -> float:
    """Bytes of each of a few processes, without the reserve."""
    parts = memory(count(case), Plan(case, scale_several.PROCESSES, fsdp=fsdp, ema=ema))
    return parts["tensors"] + parts["buckets"] + parts["average"]


def predict(plan: Plan, counts: Counts, device: Device, loader: float | None) -> dict[str, Any]:
    """All that is predicted of a plan.

    Args:
        plan: The run.
        counts: Its step.
        device: Where.
        loader: Images per second that a core of the loader's makes; None where that was not measured.
    """
    case, batch = plan.case, plan.case.batch_size * plan.gpus
    seconds, steps = step_seconds(counts, device, plan, UTILISATION[1]), plan.images / batch
    hours = [plan.epochs * steps * step_seconds(counts, device, plan, u)["step"] / 3600 for u in reversed(UTILISATION)]
    rate = plan.case.batch_size / seconds["step"]
    layout, heads = Layout(counts.embed_dim, case.classes, plan.top_k), Heads()
    looking = steps * seconds["teacher"] / 3600
    return {
        "case": as_values(case),
        "device": device.name,
        "plan": {
            name: getattr(plan, name) for name in ("gpus", "images", "epochs", "views", "top_k", "cores", "ema", "fsdp")
        },
        "macs": {phase: counts.macs(phase) / case.batch_size for phase in PHASES[:-1]},
        "parameters": {name: getattr(counts, name) for name in ("teacher", "student", "beside")},
        "bytes": {name: getattr(counts, name) for name in ("saved", "trained", "optimizer", "student_state", "peak")},
        "memory": memory(counts, plan),
        "seconds": seconds,
        "hours": hours,
        "loader_hours": plan.epochs * plan.images / (plan.gpus * plan.cores * loader * 3600) if loader else None,
        "images_per_second": rate,
        "loader_cores": rate / loader if loader else None,
        "teacher_share": seconds["teacher"] / seconds["step"],
        "store_bytes": plan.views * layout.size(plan.images),
        "store_row": layout.size(1),
        "looking_hours": looking,
        "heads": {
            "hours": heads.heads_augmentations * looking,
            "process_bytes": 4
            * heads.heads_augmentations
            * plan.images
            * (counts.embed_dim + case.classes),  # float32, see stored.py
        },
        "checkpoint_bytes": counts.trained + counts.optimizer + (counts.student_state if plan.ema else 0),
    }


def amount(value: float) -> str:
    """Bytes for a reader."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


def said(found: dict[str, Any]) -> str:
    """A prediction in words."""
    case, plan, seconds, bytes_ = found["case"], found["plan"], found["seconds"], found["bytes"]
    macs, parameters, held = found["macs"], found["parameters"], found["memory"]
    (low, expected, high), loaded = found["hours"], found["loader_cores"] is not None
    parts = ", ".join(f"{name} {1000 * seconds[name]:.1f}" for name in (*PHASES, "exchange"))
    cores = (
        f"{found['loader_cores']:.0f} cores for each; with {plan['cores']} the images alone take "
        f"{found['loader_hours']:.1f} h"
        if loaded
        else "cores not measured (--check)"
    )
    mode = "FSDP" if plan["fsdp"] else "DDP" if plan["gpus"] > 1 else "one process"
    kept = f"top {plan['top_k']}" if plan["top_k"] else "all"
    precision = "bf16" if case["amp"] else "fp32"
    share = "read from a store" if case["stored"] else f"{found['teacher_share']:.0%} of the step, which a store saves"
    lines = [
        f"{case['teacher']} -> {case['student']} at {case['img_size']} px, {case['classes']:,} classes, "
        f"{case['batch_size']} images on each of {plan['gpus']} {found['device']}, {precision}, {mode}. PREDICTED, "
        "not measured on a GPU.",
        f"MACs per image: teacher {macs['teacher'] / 1e9:.2f} G, its heads {macs['heads'] / 1e9:.3f} G, student's "
        f"forward {macs['forward'] / 1e9:.2f} G, backward {macs['backward'] / 1e9:.2f} G",
        f"parameters: teacher with heads {parameters['teacher'] / 1e6:.1f} M, student "
        f"{parameters['student'] / 1e6:.1f} M, its encoders and adapters {parameters['beside'] / 1e6:.2f} M",
        f"step: {1000 * seconds['step']:.1f} ms ({parts}); launching kernels takes {1000 * seconds['launching']:.1f} "
        "ms of Python",
        f"memory per GPU: {amount(held['total'])}, of which tensors {amount(held['tensors'])} (kept for the backward "
        f"{amount(bytes_['saved'])}, optimizer {amount(bytes_['optimizer'])}), buckets {amount(held['buckets'])}, "
        f"average {amount(held['average'])}",
        f"time: {low:.1f} to {high:.1f} h for {plan['epochs']} epochs of {plan['images']:,} images "
        f"({UTILISATION[2]:.0%} to {UTILISATION[0]:.0%} of peak; expected {expected:.1f} h, "
        f"{expected / plan['epochs'] * 60:.1f} min an epoch)",
        f"loader: {found['images_per_second']:,.0f} images/s per GPU, {cores}",
        f"teacher: {share}",
        f"store: {plan['views']} views x {plan['images']:,} images, {kept} of {case['classes']:,} logits = "
        f"{amount(found['store_bytes'])}, written in {60 * plan['views'] * found['looking_hours']:.1f} min",
        f"heads: {60 * found['heads']['hours']:.1f} min of looking at {Heads().heads_augmentations} augmentations, "
        f"{amount(found['heads']['process_bytes'])} of memory in each process; with --heads-protocol live none of it, "
        "and a look at every image in each of --heads-epochs",
        f"checkpoint: {amount(found['checkpoint_bytes'])}",
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="resnet34")
    parser.add_argument("--student", default="resnet18")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=256, help="images per GPU and step")
    parser.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--device", default="h200", help="h200, a100, cpu, or FLOP/s+bytes/s")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--opt", default="momentum")
    parser.add_argument("--method", choices=("none", "mag", "mas"), default="mas")
    parser.add_argument("--criterion", nargs="+", default=["kd"])
    parser.add_argument("--images", type=int, default=1_281_167, help="training images; default: ImageNet-1k's")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument(
        "--teacher-store", action="store_true", help="the step reads the teacher's outputs from a store"
    )
    parser.add_argument("--views", type=int, default=10, help="views in the store")
    parser.add_argument("--top-k", type=int, default=0, help="logits kept in the store; 0: all")
    parser.add_argument("--cores", type=int, default=16, help="CPU cores for each GPU that load images")
    parser.add_argument("--model-ema", action="store_true")
    parser.add_argument("--fsdp", action="store_true", help="the student sharded over all GPUs")
    parser.add_argument("--json", action="store_true", help="the prediction as JSON")
    parser.add_argument(
        "--check", nargs="*", choices=CHECKS, help="measure on this machine what is predicted for it; default: all"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each measured step")
    parser.add_argument("--markdown", action="store_true", help="write the tables of docs/scaling.md")
    return parser.parse_args(arguments)


def known() -> dict[str, Any]:
    """What benchmarks/results/scale.json holds."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def keep(part: str, values: Any) -> None:
    """Put a part into benchmarks/results/scale.json."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**known(), part: values}, indent=1) + "\n")


def provenance() -> dict[str, Any]:
    """Where and from what something was measured or predicted."""
    return {"machine": machine(), "versions": versions(), "date": datetime.now(UTC).date().isoformat()}


def loader_rate() -> float | None:
    """Images per second and core with RandAugment, as --check measured it."""
    found = known().get("check", {}).get("loader", {}).get("randaugment")
    return float(found) if found else None


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.check is not None:
        for part in args.check or CHECKS:
            if part == "time":
                keep("check", {**scale_check.check(args.rounds), **provenance()})
                print(scale_check.summary(known()["check"]))
            elif part == "memory":
                keep("memory", {**scale_memory.check(), **provenance()})
                print(scale_memory.summary(known()["memory"]))
            else:
                keep("several", {**scale_several.check(held_by_tensors), **provenance()})
                print(scale_several.summary(known()["several"]))
        return
    if args.markdown:
        import scale_docs

        scale_docs.write()
        return
    case = Case(
        args.teacher,
        args.student,
        args.img_size,
        args.batch_size,
        args.amp,
        args.classes,
        args.opt,
        args.method,
        tuple(args.criterion),
        args.teacher_store,
    )
    if args.device == "cpu":
        rates = known().get("check", {}).get("rates")
        if rates is None:
            raise SystemExit("--device cpu needs rates that were measured: run benchmarks/scale.py --check first.")
        counts = count(case)
        seconds = scale_check.predicted_seconds(counts.ops, case.amp, rates)
        held = known().get("memory")
        beyond = (
            f"; a process took {scale_memory.errors(held['rows'], 'process')['median']:.0%} more in the median"
            if held
            else ""
        )
        print(
            f"step: {seconds:.2f} s of one thread; tensors: {amount(counts.peak)}, beside what torch itself "
            f"takes{beyond}"
        )
        return
    plan = Plan(
        case, args.gpus, args.images, args.epochs, args.views, args.top_k, args.cores, args.model_ema, args.fsdp
    )
    found = predict(plan, count(case, gpu=True), device_of(args.device), loader_rate())
    print(json.dumps(found, indent=1) if args.json else said(found))


if __name__ == "__main__":
    main()
