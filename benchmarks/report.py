"""Tables and pictures of runs: what a model costs, how runs compare, how they went."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Okabe and Ito's palette: told apart with any colour vision.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#F0E442")


def macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image (channels, height, width), counted on meta tensors."""
    ghost = deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(torch.empty(1, *input_size, device="meta"))
    return int(counter.get_total_flops()) // 2


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, padded so that it reads well as plain text too; the first column is left-aligned, the others
    right-aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def draw_curves(
    runs: Mapping[str, Sequence[Path]], path: Path, *, title: str, level: tuple[str, float] | None = None
) -> None:
    """Accuracy on held-out images and on training images by epoch, as a PNG.

    Args:
        runs: Run folders by name, several (seeds) of a name are drawn as their mean with the range behind it.
        path: The picture.
        title: Its title.
        level: Name and top-1 of a horizontal line, such as the teacher's.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'mgd-timm[plot]'") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    figure.suptitle(title)
    for axis, part, name in zip(axes, ("eval", "train"), ("held-out images", "training images"), strict=True):
        for colour, (label, folders) in zip(_COLOURS, runs.items(), strict=False):
            curves = torch.tensor(
                [[row[part]["top1"] for row in read_metrics(folder)] for folder in folders], dtype=torch.float64
            )
            epochs = list(range(1, curves.shape[1] + 1))
            final = f"  {curves[:, -1].mean():.2f} %" if part == "eval" else ""
            axis.plot(epochs, curves.mean(0).tolist(), color=colour, marker="o", markersize=3, label=label + final)
            if len(folders) > 1:
                low, high = curves.min(0).values.tolist(), curves.max(0).values.tolist()
                axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        if level is not None and part == "eval":
            axis.axhline(level[1], color="grey", linestyle="--", linewidth=1, label=f"{level[0]}  {level[1]:.2f} %")
        axis.set(xlabel="epoch", ylabel="top-1 (%)", title=name)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def machine() -> dict[str, Any]:
    """What a measurement ran on: processor, cores, memory, accelerator, system."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = lines[0] if lines else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "gpu": gpu,
        "system": platform.platform(),
    }
