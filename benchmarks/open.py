"""How long a folder of images takes to open, beside timm's reader.

    python benchmarks/open.py [--counts 13000 130000 1300000]

Each count is a folder of 1,000 classes of hard links to 100 JPEG files. Each way of opening it runs in a process of its
own, in turn: timm's reader of image folders; our scan with its index, checks and digest, which `mgd-timm distill` does;
and the scan and index alone, which `mgd-timm data` does. Writes benchmarks/results/open.json.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import RESULTS, about, last_line, markdown, provenance, write_json

FILE = RESULTS / "open.json"
CLASSES, DISTINCT = 1000, 100
WAYS = ("timm", "index", "index and digest")


def make_folder(root: Path, count: int) -> None:
    """Write a folder of images with hard links."""
    from PIL import Image
    from tqdm import tqdm

    originals = root / "originals"
    originals.mkdir(parents=True)
    for i in range(DISTINCT):
        noise = np.random.default_rng(i).integers(0, 256, (14, 14, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((160, 160)).save(originals / f"{i}.jpg")
    for label in tqdm(range(CLASSES), desc=f"{count:,} links", unit="class"):
        folder = root / "data" / "train" / f"n{label:08d}"
        folder.mkdir(parents=True)
        for i in range(count // CLASSES):
            os.link(originals / f"{(label + i) % DISTINCT}.jpg", folder / f"n{label:08d}_{i}.JPEG")


def measure(way: str, folder: Path) -> dict[str, float]:
    """Seconds to open a folder once, and bytes per image that stay in memory."""
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    from mgd_timm.data.dataset import locate, scan_on_main
    from mgd_timm.data.description import read_rows
    from mgd_timm.recipe.data import Data

    data = Data(data_dir=str(folder))
    before, began = _resident(), time.perf_counter()
    if way == "timm":
        found: Any = ReaderImageFolder(str(folder / "train"))
    else:
        found = read_rows(locate(data), data, lambda _: None, scan_on_main(locate(data), data, None)).train
        if way == "index and digest":
            found.digest()
    seconds, count = time.perf_counter() - began, len(found)
    return {"seconds": seconds, "images": count, "bytes_per_image": (_resident() - before) / count}


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def section() -> str:
    """The text of docs/results.md."""
    found = json.loads(FILE.read_text())
    rows = [
        [
            f"{row['images']:,}",
            f"{row['timm']['seconds']:.2f}",
            f"{row['index']['seconds']:.2f} ({row['index']['ratio']:.2f})",
            f"{row['index and digest']['seconds']:.2f} ({row['index and digest']['ratio']:.2f})",
            f"{row['index']['bytes_per_image']:.0f}",
        ]
        for row in found["rows"]
    ]
    header = ["images", "timm, s", "index, s (ratio)", "with digest, s (ratio)", "bytes per image"]
    return f"{markdown(header, rows)}\n\nMedians of n={found['n']} turns. `benchmarks/open.py`; {about(found)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[13_000, 130_000, 1_300_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=WAYS)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure, given.folder)))
        return
    row = {**provenance(), "n": given.rounds, "rows": []}
    for count in given.counts:
        root = Path(tempfile.mkdtemp(prefix="open"))
        try:
            make_folder(root, count)
            row["rows"].append(_compare(root / "data", given.rounds))
        finally:
            shutil.rmtree(root)
    write_json(FILE, row)
    print(section())


def _compare(folder: Path, rounds: int) -> dict[str, Any]:
    """Measure every way in turn, and return medians and their ratios to timm's time of the same round."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            found[way].append(json.loads(last_line(__file__, "--measure", way, "--folder", str(folder))))
    row: dict[str, Any] = {"images": int(found["timm"][0]["images"])}
    for way, turns in found.items():
        ratios = [turn["seconds"] / base["seconds"] for turn, base in zip(turns, found["timm"], strict=True)]
        row[way] = {
            "seconds": statistics.median(turn["seconds"] for turn in turns),
            "ratio": statistics.median(ratios),
            "bytes_per_image": statistics.median(turn["bytes_per_image"] for turn in turns),
        }
    return row


if __name__ == "__main__":
    main()
