"""Public CIFAR-10 checkpoints, imported and evaluated as a user does, against their published accuracy.

    python benchmarks/public.py FOLDER --data-dir cifar10

FOLDER holds resnet20_cifar10.pt and resnet56_cifar10.pt: ResNets with 1x1-convolution shortcuts, whose files are not
ours to ship. Writes benchmarks/results/public.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from report import machine

from mgd_timm.storage.digests import sha256
from mgd_timm.storage.versions import versions

PUBLISHED = {"resnet20_cifar10.pt": ("cifar_resnet20", 92.40), "resnet56_cifar10.pt": ("cifar_resnet56", 93.39)}
STATISTICS = ["--mean", "0.4914", "0.4822", "0.4465", "--std", "0.2023", "0.1994", "0.2010"]
RESULTS = Path(__file__).parent / "results" / "public.json"


def call(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", "mgd_timm", *words], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", required=True, help="folder of CIFAR-10")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        for name, (architecture, published) in PUBLISHED.items():
            folder = f"{place}/{architecture}"
            call("import", str(args.folder / name), folder, "--model", architecture, *STATISTICS)
            found = json.loads(call("evaluate", folder, "--data-dir", args.data_dir))
            row = {
                "model": architecture,
                "file_sha256": sha256(args.folder / name),
                "data": "CIFAR-10",
                "published": published,
            }
            row |= {"top1": found["top1"], "n": found["n"], "precision": "float32"}
            rows.append(
                row | {"machine": machine(), "versions": versions(), "date": datetime.now(UTC).date().isoformat()}
            )
            print(f"{architecture}: top-1 {found['top1']:.2f} %, published {published:.2f} %")
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
