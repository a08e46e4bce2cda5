"""Write the tables of README.md and docs/results.md from benchmarks/results/: `python benchmarks/readme.py`.

With --check, fail if they differ.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import any_timm as sweep
import cifar as grid
import criteria as methods
import hosts as each
import imagenette as nette
from report import markdown

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "results.md")


def about(row: dict[str, Any]) -> str:
    machine, versions = row["machine"], row["versions"]
    device = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    commit = str(versions.get("commit"))[:10]
    return f"{device}; torch {versions['torch']}, timm {versions['timm']}; commit {commit}; {row['date']}"


def demo() -> str:
    row = json.loads((HERE / "results" / "demo.json").read_text())
    heads = row["heads"]
    means = {name: sum(h[name] for h in heads) / len(heads) for name in ("abstract", "detailed", "top1")}
    seeds = len(row["seeds"])
    return (
        f"{row['table']}\n\n"
        f"Fashion-MNIST, {row['n_test']:,} test images, accuracy after the last of {row['budget']['epochs']} epochs; "
        f"mean ± "
        f"standard deviation over {seeds} seeds, gains are of means. The teacher saw 60,000 images, the students "
        f"10,000. "
        f"Heads, mean top-1: abstract {means['abstract']:.2f}, detailed {means['detailed']:.2f}, "
        f"stable logits {means['top1']:.2f} %. `{row['what']} --seeds {seeds}`; {about(row)}."
    )


def step() -> str:
    rows = json.loads((HERE / "results" / "step.json").read_text())
    cells = []
    for row in rows:
        ratio, (low, high) = row["ratio"]["median"], row["ratio"]["quartiles"]
        extra = [name for name in ("compile", "stored") if row[name]]
        cells.append(
            [
                row["pair"].replace("cifar_", ""),
                row["against"],
                ", ".join([{"float32": "fp32", "bfloat16": "bf16"}[row["precision"]], *extra]),
                f"{row['other_ms']:.1f}",
                f"{row['ours_ms']:.1f}",
                f"{ratio:.3f} ({low:.3f} to {high:.3f})",
                f"{1 / ratio:.2f}",
                " / ".join(f"{row['peak_bytes'][name] / 2**20:.0f}" for name in ("ours", "other")),
            ]
        )
    header = [
        "pair",
        "against",
        "ours",
        "its ms",
        "our ms",
        "ours / it (quartiles)",
        "it / ours",
        "peak MiB, ours / it",
    ]
    where = sorted({about(row) for row in rows})
    rounds = sorted({row["ratio"]["n"] for row in rows})
    return (
        f"{markdown(header, cells)}\n\nMAS+KD by `benchmarks/step.py`, batches of 64, each in turn with the other, "
        f"n={' or '.join(map(str, rounds))} runs of each: {'; '.join(where)}."
    )


def shortcuts() -> str:
    row = json.loads((HERE / "results" / "shortcuts.json").read_text())
    mean, std = row["difference"]["mean"], row["difference"]["std"]
    return (
        f"{row['table']}\n\nfast - plain, same seed: {mean:+.2f} ± {std:.2f} points over {len(row['seeds'])} seeds. "
        f"`{row['what']}`; {about(row)}."
    )


def cifar() -> str:
    rows = grid.known_rows(HERE / "results" / "cifar.jsonl")
    first = rows[0]
    seconds = [seconds for *_, seconds in {(row["pair"], row["seed"], row["pass_seconds"]) for row in rows}]
    return (
        f"{grid.table(rows)}\n\n{grid.noise_table(rows)}\n\n"
        f"CIFAR-100, {first['n_test']:,} test images; mean ± standard deviation over seeds, gains are differences of "
        f"the same "
        f"seed, a control is the same host with KD. `benchmarks/cifar.py`: {len(rows)} students in "
        f"{sum(seconds) / 3600:.1f} hours "
        f"of passes, {first['threads']} thread each, {first['precision']}; {about(first)}."
    )


def public() -> str:
    rows = json.loads((HERE / "results" / "public.json").read_text())
    cells = [
        [row["model"], row["data"], f"{row['published']:.2f}", f"{row['top1']:.2f}", row["precision"]] for row in rows
    ]
    return (
        f"{markdown(['public checkpoint', 'test images of', 'published top-1 %', 'here', 'precision'], cells)}\n\n"
        f"`benchmarks/public.py`; {about(rows[0])}."
    )


def criteria() -> str:
    rows = json.loads((HERE / "results" / "criteria.json").read_text())
    measured = [row for row in rows if "refused" not in row]
    refused = "".join(
        f" Refused for `{row['pair']}`: {row['criterion']} ({row['refused'].split(':')[0]})."
        for row in rows
        if "refused" in row
    )
    sizes = sorted({(row["ratio"]["n"], row["ratio"]["steps"]) for row in measured})
    turns = " or ".join(f"{n} turns of {steps} steps" for n, steps in sizes)
    return (
        f"{methods.table(rows)}\n\nStep time (median, quartiles) and peak memory of a process, over those of the task "
        f"with KD "
        f"alone; a dash: no aim is set. fp32, batches of 64, each criterion in turn with KD, n={turns}.{refused} "
        f"`benchmarks/criteria.py`; {'; '.join(sorted({about(row) for row in measured}))}."
    )


def hosts() -> str:
    rows = each.known_rows(HERE / "results" / "hosts.jsonl")
    seeds, epochs = sorted({row["seed"] for row in rows}), sorted({row["epochs"] for row in rows})
    return (
        f"{each.table(rows)}\n\nFashion-MNIST, {int(rows[0]['n_test']):,} test images, cifar_resnet8x05 after "
        f"{epochs[0]} epochs "
        f"from the embedded ResNet-20; mean ± standard deviation over {len(seeds)} seeds, without those that diverged. "
        f"`benchmarks/hosts.py`; {'; '.join(sorted({about(row) for row in rows}))}."
    )


def allocator() -> str:
    row = json.loads((HERE / "results" / "allocator.json").read_text())
    given, kept = row["given back"], row["kept"]
    return (
        f"On a CPU with glibc a run keeps the memory that its tensors free. A step of {row['what']}, takes "
        f"{kept['seconds']:.2f} s of processor time for {given['seconds']:.2f} s, of which {given['system']:.2f} s "
        f"were the system's ({row['ratio_seconds']:.2f}), and {kept['peak_mib']:,.0f} MiB at the peak for "
        f"{given['peak_mib']:,.0f} ({row['ratio_peak_mib']:.2f}); medians of n={row['n']} turns. "
        f"`benchmarks/allocator.py`; {about(row)}."
    )


def imagenette() -> str:
    rows = each.known_rows(HERE / "results" / "imagenette.jsonl")
    first = rows[0]
    return (
        f"{nette.table(rows)}\n\nTop-1 after the last of {first['epochs']} epochs on {int(first['n_test']):,} images "
        f"of "
        f"{first['img_size']} px; mean ± standard deviation over the seeds, gains seed by seed. Student "
        f"{first['student']}, "
        f"{first['parameters']:,} parameters; teacher {first['teacher']}, {first['teacher_top1']:.2f} % among the ten "
        f"classes; the "
        f"schedule was not tuned and is short. `benchmarks/imagenette.py`; "
        f"{'; '.join(sorted({about(row) for row in rows}))}."
    )


def any_timm() -> str:
    body = json.loads((HERE / "results" / "any_timm.json").read_text())
    return f"{sweep.summary(body)}\n\n`benchmarks/any_timm.py`; {sweep.about(body)}."


def headline() -> str:
    """One row per data set, for the README."""
    arms = json.loads((HERE / "results" / "demo.json").read_text())["arms"]
    measured = {
        "Fashion-MNIST, ResNet-20 -> ResNet-8x0.5, 8 epochs": {
            arm: dict(enumerate(found["last_top1"])) for arm, found in arms.items()
        }
    }
    for row in grid.known_rows(HERE / "results" / "cifar.jsonl"):
        name = "CIFAR-100, ResNet-56 -> ResNet-8, {epochs} epochs".format(**row)
        measured.setdefault(name, {}).setdefault(row["arm"], {})[row["seed"]] = row["last"]
    for row in each.known_rows(HERE / "results" / "imagenette.jsonl"):
        name = "Imagenette, {teacher} -> {student}, {epochs} epochs".format(**row)
        measured.setdefault(name, {}).setdefault(row["arm"], {})[row["seed"]] = row["top1"]
    cells = []
    for name, found in measured.items():
        means = [each.spread(list(found[arm].values())) for arm in ("alone", "KD", "MAS+KD")]
        gains = [top1 - found["KD"][seed] for seed, top1 in found["MAS+KD"].items()]
        cells.append([name, *means, each.spread(gains, "+"), str(len(gains))])
    return markdown(["data, teacher -> student", "alone", "KD", "MAS+KD", "MAS+KD over KD", "seeds"], cells)


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "demo": demo,
    "step": step,
    "shortcuts": shortcuts,
    "cifar": cifar,
    "public": public,
    "criteria": criteria,
    "hosts": hosts,
    "allocator": allocator,
    "imagenette": imagenette,
    "any_timm": any_timm,
}


def filled(text: str) -> str:
    for name, make in TABLES.items():
        if f"<!-- {name} -->" not in text:
            continue
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda m, make=make: f"{m[1]}{make()}\n{m[2]}",
            text,
            flags=re.S,
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the tables are not those of the results")
    args = parser.parse_args()
    for page in PAGES:
        text = page.read_text()
        if args.check and filled(text) != text:
            raise SystemExit(f"{page.name}: tables differ from benchmarks/results; run python benchmarks/readme.py")
        if not args.check:
            page.write_text(filled(text))


if __name__ == "__main__":
    main()
