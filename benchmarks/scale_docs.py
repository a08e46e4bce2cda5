"""The tables of docs/scaling.md from benchmarks/results/scale.json; `benchmarks/scale.py --markdown` predicts and
writes them."""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scale
import scale_check
import scale_memory
import scale_several
from readme import about
from report import markdown
from scale_counts import Case
from tqdm import tqdm

from mgd_timm.teachers.outputs.layout import Layout

DOCS = Path(__file__).parents[1] / "docs" / "scaling.md"
SMALL = 1_281_167
"""Training images of ImageNet-1k (ILSVRC 2012)."""
LARGE, CLASSES = 14_197_122, 21_841
"""Images and classes of the whole ImageNet-21k, release fall11."""
PLANS = (
    scale.Plan(Case("resnet34", "resnet18", 224, 256, True), 8, SMALL, 100),
    scale.Plan(Case("resnet50", "mobilenetv1_100", 224, 256, True), 8, SMALL, 100),
    scale.Plan(Case("regnety_160", "deit_tiny_patch16_224", 224, 128, True, opt="adamw"), 8, SMALL, 300),
    scale.Plan(
        Case("vit_large_patch16_224", "vit_small_patch16_224", 224, 64, True, CLASSES, "adamw"),
        64,
        LARGE,
        90,
        top_k=32,
        ema=True,
    ),
)
PUBLISHED = (Case("resnet50", "resnet50", 224, 256, True, method="none", stored=True), "a100", 2470.0)
"""ResNet-50 alone on one A100: images/s that NVIDIA publishes (DeepLearningExamples, resnet50v1.5, mixed precision,
21.03)."""


def predicted() -> dict[str, Any]:
    """Every plan on every known device, and the published figure beside ours."""
    rows = []
    case, name, rate = PUBLISHED
    with tqdm(total=len(PLANS) + 1, desc="predict", unit="pair") as bar:
        for plan in PLANS:
            counts = scale.count(plan.case, gpu=True)
            rows += [scale.predict(plan, counts, device, scale.loader_rate()) for device in scale.DEVICES.values()]
            bar.update()
        seconds = scale.step_seconds(
            scale.count(case, gpu=True), scale.DEVICES[name], scale.Plan(case), scale.UTILISATION[1]
        )
        bar.update()
    ours = case.batch_size / seconds["step"]
    return {"rows": rows, "published": {"images_per_second": rate, "predicted": ours}, **scale.provenance()}


def pair_of(row: dict[str, Any]) -> str:
    return f"{row['case']['teacher']} -> {row['case']['student']}"


def by_pair(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each pair, in the order of the devices."""
    names = list(dict.fromkeys(pair_of(row) for row in rows))
    return [[row for row in rows if pair_of(row) == name] for name in names]


def runs(found: dict[str, Any]) -> str:
    cells = []
    for rows in by_pair(found["rows"]):
        first = rows[0]
        plan, case = first["plan"], first["case"]
        cells.append(
            [
                pair_of(first),
                f"{plan['gpus']}",
                f"{case['batch_size']} x {plan['gpus']} = {case['batch_size'] * plan['gpus']:,}",
                f"{plan['epochs']}",
                " / ".join(f"{1000 * row['seconds']['step']:.0f}" for row in rows),
                " / ".join(f"{row['hours'][1]:.1f} ({row['hours'][0]:.1f} to {row['hours'][2]:.1f})" for row in rows),
                f"{first['loader_hours']:.0f}" if first["loader_hours"] else "",
                " / ".join(f"{row['loader_cores']:.0f}" for row in rows if row["loader_cores"]),
            ]
        )
    devices = " / ".join(dict.fromkeys(row["device"] for row in found["rows"]))
    header = ["pair", "GPUs", "global batch", "epochs", f"step, ms: {devices}", f"GPU hours on the clock: {devices}"]
    return markdown([*header, "hours of a loader with 16 cores per GPU", f"cores per GPU to keep up: {devices}"], cells)


def sizes(found: dict[str, Any]) -> str:
    cells = []
    for first, *_ in by_pair(found["rows"]):
        macs, held, heads = first["macs"], first["memory"], first["heads"]
        cells.append(
            [
                pair_of(first),
                f"{macs['teacher'] / 1e9:.1f} / {(macs['forward'] + macs['backward']) / 1e9:.1f} G",
                f"{first['parameters']['teacher'] / 1e6:.0f} / {first['parameters']['student'] / 1e6:.1f} M",
                scale.amount(held["total"]),
                scale.amount(first["bytes"]["saved"]),
                scale.amount(first["checkpoint_bytes"]),
                f"{first['teacher_share']:.0%}",
                f"{60 * heads['hours']:.0f} min",
                scale.amount(heads["process_bytes"]),
            ]
        )
    header = [
        "pair",
        "MACs per image: teacher / student, both ways",
        "parameters",
        "memory per GPU",
        "of it kept for the backward",
    ]
    header += ["checkpoint", "teacher's share of a step", "heads: looking at 4 views", "heads: memory of each process"]
    return markdown(header, cells)


def stores(_: dict[str, Any]) -> str:
    """Sizes by the store's own arithmetic."""
    cells = []
    kinds = (
        ("1k, resnet34", SMALL, 1000, 512),
        ("1k, regnety_160", SMALL, 1000, 3024),
        ("21k, vit_large", LARGE, CLASSES, 1024),
    )
    for words, images, classes, width in kinds:
        for top_k in (0, 64, 32, 16):
            layout = Layout(width, classes, top_k)
            row = [words, f"top {top_k}" if top_k else f"all {classes:,}", f"{layout.size(1):,}"]
            cells.append([*row, *(scale.amount(views * layout.size(images)) for views in (1, 10, 90))])
    return markdown(["images, teacher", "logits", "bytes per row", "1 view", "10 views", "90 views"], cells)


def assumptions(_: dict[str, Any]) -> str:
    cells = [
        [d.name, f"{d.half / 1e12:.0f}", f"{d.full / 1e12:g}", f"{d.bandwidth / 1e12:g}", f"{d.memory / 1e9:.0f}"]
        for d in scale.DEVICES.values()
    ]
    low, expected, high = scale.UTILISATION
    node, network = (speed / 1e9 for speed in scale.LINK.values())
    table = markdown(["data sheet", "bf16 TFLOP/s, dense", "fp32 TFLOP/s", "TB/s", "GB"], cells)
    return (
        f"{table}\n\nAssumed, not measured: products and convolutions reach {expected:.0%} of the peak ({low:.0%} to "
        f"{high:.0%} "
        f"in the ranges), the rest {scale.STREAMING:.0%} of the bandwidth; {scale.LAUNCH * 1e6:.0f} µs of Python per "
        f"operation, beside the GPU's work; an all-reduce moves {node:.0f} GB/s per GPU inside a machine of "
        f"{scale.NODE} and "
        f"{network:.0f} GB/s between machines, beside the backward but for the last 25 MiB; "
        f"{scale.RESERVE[0] / 1e9:.0f} GB of "
        f"context and {scale.RESERVE[1] - 1:.0%} of fragments beside the tensors."
    )


def published(found: dict[str, Any]) -> str:
    known = found["published"]
    return (
        "The one public figure that it can be held against: ResNet-50 alone on one A100 in mixed precision, "
        f"{known['images_per_second']:,.0f} images/s as NVIDIA publishes it (DeepLearningExamples, `resnet50v1.5`), "
        f"{known['predicted']:,.0f} predicted here, {known['predicted'] / known['images_per_second']:.2f} of it."
    )


def checked(_: dict[str, Any]) -> str:
    found = scale.known().get("check")
    if found is None:
        return (
            "Not measured yet: `benchmarks/scale.py --check time` does, and `benchmarks/scale.py --markdown` writes "
            "it here."
        )
    loader = found["loader"]
    size = found["cycle"][0]["img_size"]
    return (
        f"{scale_check.summary(found)}\n\n"
        "Ratios are predicted / measured. Processor seconds of one thread, as other programs used the machine: "
        f"n={found['rounds']} turns with a step of known time, the ratio corrected for its pace; noisy. Rates from "
        f"{', '.join(row['pair'] for row in found['cycle'])} at {size} px. The loader, one core: {loader['plain']:.0f} "
        f"images/s "
        f"with crop and flip, {loader['randaugment']:.0f} with RandAugment, JPEGs of 500 x 375 px and "
        f"{loader['jpeg_bytes'] / 1000:.0f} kB. `benchmarks/scale.py --check time`; {about(found)}."
    )


def remembered(_: dict[str, Any]) -> str:
    found = scale.known().get("memory")
    if found is None:
        return (
            "Not measured yet: `benchmarks/scale.py --check memory` does, and `benchmarks/scale.py --markdown` writes "
            "it here."
        )
    base = statistics.median(row["process"]["base"] for row in found["rows"]) / 2**20
    return (
        f"{scale_memory.summary(found)}\n\n"
        "Ratios are predicted / measured, in bytes that torch's allocator has handed out, weights and all; the rest "
        "is workspace that convolutions and products ask for while they run. A process is counted beyond the "
        f"{base:.0f} MiB of torch and the package, with freed memory kept as a run keeps it. Libraries: code, compiled "
        f"kernels and "
        "objects, with every block given back when it is freed; holes: what keeping them adds. "
        f"`benchmarks/scale.py --check memory`; {about(found)}."
    )


def several(_: dict[str, Any]) -> str:
    found = scale.known().get("several")
    if found is None:
        return (
            "Not measured yet: `benchmarks/scale.py --check several` does, and `benchmarks/scale.py --markdown` "
            "writes it here."
        )
    return (
        f"{scale_several.summary(found)}\n\nThe first of {scale_several.PROCESSES} processes over gloo, in bytes of "
        f"torch's "
        f"allocator; the least of {scale_several.STEPS} steps. FSDP2's differs between runs by a few gathered parts. "
        f"`benchmarks/scale.py --check several`; {about(found)}."
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "runs": runs,
    "sizes": sizes,
    "stores": stores,
    "assumptions": assumptions,
    "published": published,
    "checked": checked,
    "memory": remembered,
    "several": several,
}


def filled(text: str) -> str:
    """The document with its tables as the results have them."""
    found = scale.known()["plans"]
    for name, make in TABLES.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, make=make: f"{m[1]}{make(found)}\n{m[2]}",
            text,
            flags=re.S,
        )
    return text


def write() -> None:
    """Predict the plans anew and write them into the results and the document."""
    scale.keep("plans", predicted())
    DOCS.write_text(filled(DOCS.read_text()))
