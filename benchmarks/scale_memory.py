"""The memory that benchmarks/scale.py predicts for a step, beside what real steps take on this machine.

Two questions, answered apart. What tensors take at the peak is the prediction's own claim, and holds on any device:
torch's allocator reports every block that it hands out and takes back, also those that a kernel asks for and returns.
What a CPU process takes beyond them belongs to the C library and to oneDNN: the resident memory of a process of its
own, once as a run sets its allocator, once with every block given back to the system when it is freed. The second
leaves no holes. So the difference of the two is holes, and the rest is what libraries hold: code, kernels compiled for
a shape, objects that are no tensors.
"""

import ctypes
import gc
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report import markdown
from scale_counts import Case, Step, count
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from mgd_timm.distributed.allocator import keep_freed_memory

CHECKED = (
    ("resnet18", "vit_tiny_patch16_224", 224, 4),
    ("resnet34", "resnet18", 96, 16),
    ("resnet50", "mobilenetv1_100", 128, 8),
    ("regnety_008", "deit_tiny_patch16_224", 128, 8),
    ("vit_small_patch16_224", "mobilenetv3_large_100", 128, 4),
    ("convnext_atto", "resnet26", 128, 8),
    ("efficientnet_b0", "levit_128s", 224, 8),
    ("cifar_resnet32x4", "cifar_resnet8x4", 32, 16),
)
TINY = Case("cifar_resnet8x05", "cifar_resnet8x05", 32, 2, classes=10)
_M_MMAP_THRESHOLD = -3  # mallopt's number in glibc's malloc.h


def real(case: Case) -> Step:
    """The step on real tensors."""
    torch.manual_seed(0)
    step = Step(case)
    step.place()
    return step


def allocated(run: Callable[[], Any], at: str | None = None) -> tuple[int, int]:
    """Bytes that a call leaves allocated, and the most above its start, as torch's CPU allocator reports them; the most
    at events of the name `at` alone, where one is given."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:  # or 2.10 warns
        kept = run()  # until the end of the profile
    assert profiler.profiler is not None
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
        if event.name() == (at or "[memory]"):
            peak = max(peak, now)
    del kept
    return now, peak


def live_bytes(case: Case) -> tuple[int, int]:
    """Bytes of all that is there before a step, and at its peak."""
    steps: list[Step] = []

    def build() -> None:
        steps.append(real(case))
        steps[0].run()  # makes the optimizer's state
        gc.collect()

    state, _ = allocated(build)
    _, peak = allocated(steps[0].run)
    return state, state + peak


def process_bytes(case: Case, mapped: bool) -> tuple[int, int]:
    """Resident memory of a process of its own: after steps too small to count, and by how much three steps' peak is
    above that.

    Args:
        case: The steps.
        mapped: Every block is given back to the system when it is freed, instead of kept as in a run.

    Raises:
        RuntimeError: Not on Linux with glibc.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scale_memory"])  # the libraries are loaded once
    with context.Pool(1) as pool:
        return pool.apply(_own, (case, mapped))


def _own(case: Case, mapped: bool) -> tuple[int, int]:
    """The same of this process."""
    torch.set_num_threads(1)
    set_up = ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16) if mapped else keep_freed_memory()
    if not set_up:
        raise RuntimeError("memory of processes is measured on Linux with glibc alone: --check time measures the rest.")
    step = real(replace(TINY, amp=case.amp))
    for _ in range(3):
        step.run()
    del step
    gc.collect()
    base = _status("VmRSS")
    step = real(case)
    gc.collect()
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the peak starts anew: building holds the teacher twice while it is folded
    for _ in range(3):
        step.run()
    return base, _status("VmHWM") - base


def _status(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def check(checked: Sequence[tuple[str, str, int, int]] = CHECKED) -> dict[str, Any]:
    """Predict and measure: a row for each pair in each precision."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for amp in (False, True):
        for names in tqdm(checked, desc="memory", unit="pair"):
            case = Case(*names, amp)
            counts = count(case)
            state, peak = live_bytes(case)
            base, kept = process_bytes(case, mapped=False)
            _, mapped = process_bytes(case, mapped=True)
            rows.append(
                {
                    **case.words,
                    "state": {"predicted": counts.state, "measured": state},
                    "peak": {"predicted": counts.peak, "measured": peak, "ratio": counts.peak / peak},
                    "process": {"base": base, "kept": kept, "mapped": mapped, "ratio": counts.peak / kept},
                }
            )
    torch.set_num_threads(threads)
    return {"rows": rows}


def summary(found: dict[str, Any]) -> str:
    """The rows and the errors, as a table."""
    cells, rows = [], found["rows"]
    for row in rows:
        peak, process = row["peak"], row["process"]
        parts = (peak["predicted"], peak["measured"], process["kept"], process["mapped"] - peak["measured"])
        predicted, measured, kept, libraries = (f"{part / 2**20:.0f}" for part in parts)
        holes = f"{(process['kept'] - process['mapped']) / 2**20:.0f}"
        setting = f"{row['img_size']} px, {row['batch_size']}, {row['precision']}"
        cells.append([row["pair"], setting, predicted, measured, f"{peak['ratio']:.3f}", kept, libraries, holes])
    header = [
        "pair",
        "size, batch",
        "predicted MiB",
        "measured MiB",
        "ratio",
        "process MiB",
        "of it libraries",
        "of it holes",
    ]
    off, beyond = errors(rows, "peak"), errors(rows, "process")
    exact = sum(row["state"]["predicted"] == row["state"]["measured"] for row in rows)
    return (
        f"{markdown(header, cells)}\n\nTensors at the peak are off by {off['median']:.1%} in the median and "
        f"{off['worst']:.1%} at "
        f"worst; weights, optimizer and batch are exact to the byte in {exact} of {len(rows)}. A CPU process takes "
        f"{beyond['median']:.0%} more than the prediction in the median and {beyond['worst']:.0%} at worst."
    )


def errors(rows: Sequence[dict[str, Any]], part: str) -> dict[str, float]:
    """How far predicted / measured is from 1: median and worst."""
    off = [max(row[part]["ratio"], 1 / row[part]["ratio"]) - 1 for row in rows]
    return {"median": statistics.median(off), "worst": max(off)}
