"""What every benchmark does: time in turn, name machine and code, keep result rows, write tables and pictures."""

import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mgd_timm.report.text import markdown as markdown
from mgd_timm.report.text import spread as spread
from mgd_timm.storage.versions import versions

RESULTS = Path(__file__).parent / "results"

# Okabe and Ito's palette: told apart with any colour vision.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#F0E442")


def gains(found: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """Differences between the values of the same seed."""
    return [found[seed] - base[seed] for seed in sorted(set(found) & set(base))]


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


def provenance() -> dict[str, Any]:
    """Machine, versions, commit and date: take it before a run, as code may be committed meanwhile."""
    date = datetime.now(UTC).date().isoformat()
    return {"machine": machine(), "threads": torch.get_num_threads(), "versions": versions(), "date": date}


def about(*rows: Mapping[str, Any]) -> str:
    """The provenance of results in words."""
    found = set()
    for row in rows:
        where, of = row["machine"], row["versions"]
        device = where["gpu"] or f"{where['cores']} cores of {where['cpu']}"
        commit = str(of.get("commit"))[:10]
        found.add(f"{device}; torch {of['torch']}, timm {of['timm']}; commit {commit}; {row['date']}")
    return "; ".join(sorted(found))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .json or .jsonl file, none where there is no file; a line cut off by an interruption does not count."""
    if not path.is_file():
        return []
    if path.suffix == ".json":
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        return rows
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a .jsonl file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.is_file() or path.read_text().endswith("\n") or not path.stat().st_size
    with path.open("a") as file:
        file.write(("" if whole else "\n") + "".join(json.dumps(row) + "\n" for row in rows))


def write_json(path: Path, body: Any) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=2) + "\n")


def has_row(path: Path, key: Mapping[str, Any]) -> bool:
    """Whether a file has a row with these values."""
    return any(all(row.get(name) == value for name, value in key.items()) for row in read_rows(path))


def time_in_turn(loops: Mapping[str, Callable[[], None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Time loops in turn.

    Args:
        loops: Each takes `steps` steps.
        rounds: Turns of each; the order is reversed from turn to turn.
        steps: Of a loop.

    Returns:
        Milliseconds per step of each loop, by turn.
    """
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name in list(loops)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            loops[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / steps * 1000)
    return times


def ratio(ours: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of the ratios of neighbouring turns, two or more."""
    ratios = [own / other for own, other in zip(ours, base, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {"median": median, "quartiles": [low, high], "n": len(ratios)}


def peak_memory() -> int:
    """Peak memory of this process in bytes: on a GPU what was allocated there, else resident."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_resident()


def peak_resident() -> int:
    """Peak resident memory of this process in bytes."""
    if sys.platform == "linux":  # not ru_maxrss, which counts what the parent held when it forked
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def last_line(*words: str) -> str:
    """The last line that a Python process prints, such as a measurement of itself."""
    done = subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().splitlines()[-1]
