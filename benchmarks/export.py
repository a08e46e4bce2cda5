"""Size, accuracy and latency of every exported format beside PyTorch, for real networks on Imagenette.

    python benchmarks/export.py --data-dir IMAGENETTE --networks FOLDER

FOLDER holds folders that timm wrote (local-dir:) of ImageNet-1k classifiers. Each is cut down to Imagenette's ten
classes and exported by `mgd_timm.export_formats`. Nothing is left out here: the gate of `mgd-timm export` is shown, not
applied. Latencies are of calls in turn, in one process. A network that is in benchmarks/results/export.jsonl is not
measured again.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from report import RESULTS, about, append_rows, has_row, markdown, provenance, read_rows

import mgd_timm
from mgd_timm.models.classes import select_classes
from mgd_timm.models.load import load_model

FILE = RESULTS / "export.jsonl"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with train/ and val/, by synset")
    parser.add_argument("--networks", type=Path, required=True, help="folder of folders that timm wrote")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="to evaluate on, as many of each class")
    parser.add_argument("--to", default="timm,onnx,int8,openvino,pt2,executorch")
    parser.add_argument("--max-drop", type=float, default=1.0, help="above which int8 is corrected by NNCF")
    parser.add_argument("--results", type=Path, default=FILE)
    return parser.parse_args(arguments)


def link_images(source: Path, folder: Path, counts: dict[str, int]) -> Path:
    """Link the first images of each class of each split."""
    for split, count in counts.items():
        classes = sorted(path for path in (source / split).iterdir() if path.is_dir())
        for place in classes:
            target = folder / split / place.name
            target.mkdir(parents=True)
            for path in sorted(place.iterdir())[: count // len(classes)]:
                (target / path.name).symlink_to(path.resolve())
    return folder


def measure(folder: Path, data: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of a network's formats."""
    model = load_model(f"local-dir:{folder}")
    select_classes(model, "auto", sorted(path.name for path in (data / "train").iterdir()))
    with tempfile.TemporaryDirectory() as place:
        try:
            results = mgd_timm.export_formats(
                model, Path(place) / "out", args.to, data_dir=str(data), max_drop=args.max_drop
            )
        except mgd_timm.AccuracyDropError as error:
            print(error)
            results = error.results
    return [asdict(row) for row in results]


def table(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        base = row["files"][0]
        for one in row["files"]:
            latency = [
                f"{one['latency'][size]:.1f} ({one['latency'][size] / base['latency'][size]:.2f})"
                for size in base["latency"]
            ]
            numbers = [f"{one['top1']:.1f}", f"{one['drop']:+.1f}", f"{one['agreement']:.1f}"]
            way = f" ({one['quantised_by']})" if one["quantised_by"] else ""
            cells.append([row["network"], f"{one['file']}{way}", *numbers, f"{one['megabytes']:.1f}", *latency])
    header = ["network", "file", "top-1 %", "drop", "agree %", "MB", "ms at 1 (ratio)", "ms at 64 (ratio)"]
    return markdown(header, cells)


def section() -> str:
    """The table of docs/results.md."""
    rows = read_rows(FILE)
    counts = [f"{count:,}" for count in sorted({row["images"] for row in rows})]
    return (
        f"{table(rows)}\n\nTop-1 among Imagenette's ten classes on {' or '.join(counts)} of its validation "
        "images, at each network's own size; int8 calibrated on 300 training images. Agree: share of images with "
        "PyTorch's prediction. Milliseconds per call at batches of 1 and 64, median of calls in turn; in brackets the "
        f"ratio to PyTorch. {rows[0]['threads']} threads. `benchmarks/export.py`; {about(*rows)}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        data = link_images(args.data_dir, Path(folder), {"train": 400, "val": args.images})
        for network in sorted(path for path in args.networks.iterdir() if path.is_dir()):
            key = {"network": network.name, "images": args.images, "formats": args.to}
            if has_row(args.results, key):
                continue
            print(f"\n== {network.name}", flush=True)
            made_by = provenance()
            append_rows(args.results, [{**key, "files": measure(network, data, args), **made_by}])
    print("\n" + table(read_rows(args.results)))


if __name__ == "__main__":
    main()
