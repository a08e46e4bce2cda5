"""Public CIFAR-10 checkpoints, imported and evaluated as a user does, against their published accuracy.

    python benchmarks/public.py FOLDER --data-dir cifar10

FOLDER holds resnet20_cifar10.pt and resnet56_cifar10.pt: ResNets with 1x1-convolution shortcuts, whose files are not
ours to ship. Writes benchmarks/results/public.json.
"""

import argparse
import json
import tempfile
from pathlib import Path

from report import RESULTS, about, last_line, markdown, provenance, read_rows, write_json

from mgd_timm.storage.digests import sha256

FILE = RESULTS / "public.json"
PUBLISHED = {"resnet20_cifar10.pt": ("cifar_resnet20", 92.40), "resnet56_cifar10.pt": ("cifar_resnet56", 93.39)}
STATISTICS = ["--mean", "0.4914", "0.4822", "0.4465", "--std", "0.2023", "0.1994", "0.2010"]


def section() -> str:
    """The table of docs/results.md."""
    rows = read_rows(FILE)
    header = ["public checkpoint", "test images of", "published top-1 %", "here", "precision"]
    cells = [
        [row["model"], row["data"], f"{row['published']:.2f}", f"{row['top1']:.2f}", row["precision"]] for row in rows
    ]
    return f"{markdown(header, cells)}\n\n`benchmarks/public.py`; {about(*rows)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", required=True, help="folder of CIFAR-10")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, (architecture, published) in PUBLISHED.items():
            file, folder = args.folder / name, f"{place}/{architecture}"
            last_line("-m", "mgd_timm", "import", str(file), folder, "--model", architecture, *STATISTICS)
            found = json.loads(last_line("-m", "mgd_timm", "evaluate", folder, "--data-dir", args.data_dir))
            row = {"model": architecture, "file_sha256": sha256(file), "data": "CIFAR-10", "published": published}
            row |= {"top1": found["top1"], "n": found["n"], "precision": "float32"}
            rows.append(row | provenance())
    write_json(FILE, rows)
    print(section())


if __name__ == "__main__":
    main()
