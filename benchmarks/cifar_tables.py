"""The arms of benchmarks/cifar.py, and the tables and the picture of its rows."""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from report import RESULTS, about, gains, markdown, read_rows, spread

from mgd_timm.recipe import presets

FILE = RESULTS / "cifar.jsonl"
PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text())
# Hosts without a fitting stage, class activation maps or a peer, which a pass does not know.
TITLES = {
    "kd": "KD",
    "fitnet": "FitNet",
    "at": "AT",
    "sp": "SP",
    "vid": "VID",
    "rkd": "RKD",
    "crd": "CRD",
    "afd": "AFD",
}
ALIKE = ("pair", "teacher", "teacher_sha256", "student", "data_sha256", "epochs", "precision")
"""What rows of one table have in common."""


def arms(hosts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Options of every arm; the weights beside them are the presets of the authors' scripts."""
    found: dict[str, dict[str, Any]] = {"alone": {"teacher": None, "method": "none"}}
    for host in hosts:
        title = TITLES[host]
        if host == "kd":
            found["KD"] = {"criterion": ("kd",), "method": "none"}
        else:
            found[title] = {"criterion": (host,), "method": "none"}
            found[f"{title}+KD"] = {"criterion": (host,), "method": "none", "kd_weight": 1.0}
        for method in ("mag", "mas"):
            found[f"{method.upper()}+{title}"] = {"criterion": (host,), "method": method}
    return found


ORDER = list(arms(TITLES))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean and spread by arm, gains paired by seed, and the literature's figures where the pair is the paper's own."""
    out = []
    for alike in dict.fromkeys(tuple(row[key] for key in ALIKE) for row in rows):
        chosen = [row for row in rows if tuple(row[key] for key in ALIKE) == alike]
        name, teacher, student, epochs = (chosen[0][key] for key in ("pair", "teacher", "student", "epochs"))
        last, best = dict[str, dict[int, float]](), dict[str, list[float]]()
        for row in chosen:
            last.setdefault(row["arm"], {})[row["seed"]] = row["last"]
            best.setdefault(row["arm"], []).append(row["best"])
        cells = []
        for arm in sorted(last, key=ORDER.index):
            own_pair = (teacher, student) == presets.PAIRS.get(name)  # figures of the paper's networks only
            paper, other = (
                PUBLISHED[key]["top1"].get(arm, {}).get(name) if own_pair else None for key in ("paper", "repdistiller")
            )
            bases = [last.get(base, {}) if base != arm else {} for base in ("alone", control(arm))]
            gained = [spread(gains(last[arm], base), "+") for base in bases]
            figures = [f"{paper:.2f}" if paper else "", f"{other:.2f}" if other else ""]
            top1 = list(last[arm].values())
            cells.append([arm, spread(top1), spread(best[arm]), *gained, str(len(top1)), *figures])
        tops = sorted({r["teacher_top1"] for r in chosen})
        title = f"{teacher} ({', '.join(f'{t:.2f}' for t in tops)} %) -> {student}, {epochs} epochs"
        header = ["arm", "last top-1 %", "best top-1 %", "over alone", "over its control", "seeds"]
        header += ["paper", "RepDistiller"]
        out.append(f"{title}\n\n{markdown(header, cells)}")
    return "\n\n".join(out)


def noise_table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean and spread of top-1 under noise by arm, of the same students as in `table`."""
    out = []
    for alike in dict.fromkeys(tuple(row[key] for key in ALIKE) for row in rows if row.get("noise")):
        chosen = [row for row in rows if tuple(row[key] for key in ALIKE) == alike and row.get("noise")]
        sigmas = sorted({sigma for row in chosen for sigma in row["noise"]}, key=float)
        by_arm: dict[str, list[dict[str, float]]] = {}
        for row in chosen:
            by_arm.setdefault(row["arm"], []).append({"0": row["last"], **row["noise"]})
        cells = [
            [arm, *(spread([found[sigma] for found in by_arm[arm] if sigma in found]) for sigma in ["0", *sigmas])]
            for arm in sorted(by_arm, key=ORDER.index)
        ]
        title = f"{chosen[0]['teacher']} -> {chosen[0]['student']}, top-1 % under Gaussian noise of standard deviation"
        out.append(f"{title}\n\n{markdown(['arm', '0', *sigmas], cells)}")
    return "\n\n".join(out)


def section() -> str:
    """The tables of docs/results.md."""
    rows = read_rows(FILE)
    first = rows[0]
    command = first.get("command", "benchmarks/cifar.py")  # rows before 2026-11-30 do not hold theirs
    seconds = [seconds for *_, seconds in {(row["pair"], row["seed"], row["pass_seconds"]) for row in rows}]
    return (
        f"{table(rows)}\n\n{noise_table(rows)}\n\n"
        f"CIFAR-100, {first['n_test']:,} test images; mean ± standard deviation over seeds, gains are differences of "
        f"the same seed, a control is the same host with KD. `{command}`: {len(rows)} students in "
        f"{sum(seconds) / 3600:.1f} hours of passes, {first['threads']} thread each, {first['precision']}; "
        f"{about(first)}."
    )


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Every student a dot and every arm's mean a line, as a PNG: how large the effects are beside the spread of
    seeds."""
    from matplotlib.figure import Figure

    colours = {"MAG": "#E69F00", "MAS": "#D55E00", "KD": "#0072B2", "": "#000000"}
    groups = list(dict.fromkeys(tuple(row[key] for key in ALIKE) for row in rows))
    figure: Any = Figure(figsize=(8, 0.6 + 3.6 * len(groups)), layout="constrained")
    for axis, alike in zip(figure.subplots(len(groups), squeeze=False)[:, 0], groups, strict=True):
        chosen = [row for row in rows if tuple(row[key] for key in ALIKE) == alike]
        names = sorted({row["arm"] for row in chosen}, key=ORDER.index)
        for place, arm in enumerate(names):
            values = [row["last"] for row in chosen if row["arm"] == arm]
            kind = arm[:3] if arm[:3] in colours else "KD" if arm.endswith("KD") else ""
            axis.plot(values, [place] * len(values), "o", color=colours[kind], markersize=5, alpha=0.7)
            axis.plot([statistics.fmean(values)] * 2, [place - 0.3, place + 0.3], color=colours[kind], linewidth=2)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        first = chosen[0]
        axis.set_title(
            f"{first['teacher']} ({first['teacher_top1']:.1f} %) teaches {first['student']}, {first['epochs']} epochs"
        )
        axis.set_xlabel("top-1 (%) on test images after the last epoch; a dot is a seed, a line the mean")
        axis.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def control(arm: str) -> str:
    """The arm that differs from this one by MAG or MAS alone: the host with KD."""
    host = arm.partition("+")[2]
    if not arm.startswith(("MAG", "MAS")):
        return ""
    return host if host == "KD" else f"{host}+KD"
