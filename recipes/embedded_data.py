"""Take the package's embedded data set from Fashion-MNIST: 1,000 training and 400 test images of each of 10 classes.

    python recipes/embedded_data.py FOLDER [--full OUT]

FOLDER holds the four official files (Debian: package dataset-fashion-mnist, usr/share/datasets/fashion-mnist). The
first images of each class in the official order are taken. PNG without compression inside parquet with zstd is a fifth
smaller than compressed PNG. `--full OUT` writes all 60,000 and 10,000 images as well, which the embedded teacher is
trained on.
"""

import argparse
import gzip
import io
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
SPLITS = {"train": ("train", 1000), "test": ("t10k", 400)}


def read(folder: Path, stem: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images [n, 28, 28] and labels [n], uint8, of one split in the official order."""

    def idx(name: str, header: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((folder / f"{stem}-{name}.gz").read_bytes()), np.uint8)[header:]

    return idx("images-idx3-ubyte", 16).reshape(-1, 28, 28), idx("labels-idx1-ubyte", 8)


def png(image: np.ndarray) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=0)
    return {"bytes": buffer.getvalue(), "path": None}


def write(images: np.ndarray, labels: np.ndarray, path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"image": [png(image) for image in images], "label": labels.tolist()}
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(rows, features=features).with_format("arrow")[:]
    pq.write_table(table, path, compression="zstd", compression_level=19, use_dictionary=["label"])
    print(f"{path}: {len(table)} images, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "mgd_timm" / "embedded" / "fashion_mnist"
    )
    parser.add_argument("--full", type=Path)
    args = parser.parse_args()
    for split, (stem, per_class) in SPLITS.items():
        images, labels = read(args.folder, stem)
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(len(CLASSES))]))
        write(images[chosen], labels[chosen], args.out / f"{split}.parquet")
        if args.full:
            write(images, labels, args.full / f"{split}.parquet")


if __name__ == "__main__":
    main()
