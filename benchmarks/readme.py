"""Write the tables of README.md and docs/ from benchmarks/results/: `python benchmarks/readme.py`.

With --check, fail if they differ.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import allocator
import any_timm
import cifar_tables
import criteria
import demo
import export
import hosts
import imagenette
import loader
import memory
import open as open_folder
import public
import qat
import related
import shortcuts
import step
from report import RESULTS, gains, markdown, read_rows, spread

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "docs/results.md", "docs/any_timm.md", "docs/scaling.md")]


def headline() -> str:
    """One row per data set, for the README."""
    arms = json.loads((RESULTS / "demo.json").read_text())["arms"]
    measured = {
        "Fashion-MNIST, ResNet-20 -> ResNet-8x0.5, 8 epochs": {
            arm: dict(enumerate(found["last_top1"])) for arm, found in arms.items()
        }
    }
    for row in read_rows(cifar_tables.FILE):
        name = "CIFAR-100, ResNet-56 -> ResNet-8, {epochs} epochs".format(**row)
        measured.setdefault(name, {}).setdefault(row["arm"], {})[row["seed"]] = row["last"]
    for row in read_rows(imagenette.FILE):
        name = "Imagenette, {teacher} -> {student}, {epochs} epochs".format(**row)
        measured.setdefault(name, {}).setdefault(row["arm"], {})[row["seed"]] = row["top1"]
    cells = []
    for name, found in measured.items():
        means = [spread(list(found[arm].values())) for arm in ("alone", "KD", "MAS+KD")]
        gained = gains(found["MAS+KD"], found["KD"])
        cells.append([name, *means, spread(gained, "+"), str(len(gained))])
    return markdown(["data, teacher -> student", "alone", "KD", "MAS+KD", "MAS+KD over KD", "seeds"], cells)


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "demo": demo.section,
    "step": step.section,
    "shortcuts": shortcuts.section,
    "cifar": cifar_tables.section,
    "public": public.section,
    "criteria": criteria.section,
    "hosts": hosts.section,
    "allocator": allocator.section,
    "open": open_folder.section,
    "loader": loader.section,
    "imagenette": imagenette.section,
    "export": export.section,
    "qat": qat.section,
    "related": related.section,
    "any_timm": any_timm.section,
    "any_timm_reasons": any_timm.section_reasons,
    "any_timm_families": any_timm.section_families,
    "memory": memory.section,
}


def filled(text: str) -> str:
    """A page with its tables written anew."""
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
