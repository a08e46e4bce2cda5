"""Images per second of our loader beside timm's `create_loader` with its defaults: same files, transforms and workers.

    python benchmarks/loader.py "Imagenette, 224 px" FOLDER         JPEG files, in any folders
    python benchmarks/loader.py "ImageNet photos" FOLDER
    python benchmarks/loader.py "12-megapixel photos" FOLDER --enlarge 24 --repeat 8 --batch-size 16

The first argument names the row of the table. timm's loader has the prefetcher, uint8 and its persistent workers; both
give normalised float batches of training. An epoch of each is timed in turn after one of warm-up, in one process, which
keeps freed memory as our runs do.
Processor time is that of this process and the workers; unlike images per second it hardly depends on what else runs.
--enlarge resizes N photos to 4000x3000 pixels and saves them as JPEG of quality 90; --repeat shows each image several
times in an epoch. Memory is that of the workers after the last epoch, shared pages counted in part (PSS). Writes
benchmarks/results/loader.json.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import report
import torch
from PIL import Image

from mgd_timm.data.dataset import load_images
from mgd_timm.distributed.allocator import keep_freed_memory
from mgd_timm.features import Defaults
from mgd_timm.recipe.data import Data

FILE = report.RESULTS / "loader.json"
CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Loop = Callable[[], None]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the images, in the table")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--interpolation", default="bilinear")
    parser.add_argument("--aa", help="auto-augment policy")
    parser.add_argument("--enlarge", type=int, default=0, metavar="N")
    parser.add_argument("--repeat", type=int, default=1, metavar="N")
    parser.add_argument("--images", type=int, default=2048, metavar="N", help="at most, evenly spaced in the folder")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def linked(args: argparse.Namespace, folder: Path) -> Path:
    """A class folder whose images occur `--repeat` times, in two classes."""
    found = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if args.enlarge:
        photos: list[Path] = []
        for path in sorted(found, key=lambda path: path.stat().st_size, reverse=True):
            with Image.open(path) as image:
                if 1.2 < image.width / image.height < 1.5:
                    photos.append(folder / f"{len(photos)}.jpg")
                    large = image.convert("RGB").resize((4000, 3000), Image.Resampling.BICUBIC)
                    large.save(photos[-1], quality=90)
            if len(photos) == args.enlarge:
                break
        found = photos
    found = found[:: -(-len(found) // args.images)]
    for number, path in enumerate(path for path in found for _ in range(args.repeat)):
        place = folder / "data" / "train" / "ab"[number % 2] / f"{number}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path.resolve())
    return folder / "data"


def timms(args: argparse.Namespace, folder: Path) -> tuple[Loop, int]:
    from timm.data.dataset import ImageDataset
    from timm.data.loader import create_loader

    loader = create_loader(
        ImageDataset(str(folder / "train")),
        (3, args.size, args.size),
        args.batch_size,
        is_training=True,
        color_jitter=None,  # type: ignore[arg-type]  # as ours
        auto_augment=args.aa,
        interpolation=args.interpolation,
        num_workers=args.workers,
        device=CPU,
    )

    def loop() -> None:
        for images, _ in loader:
            assert images.dtype == torch.float32

    return loop, len(loader)


def ours(args: argparse.Namespace, folder: Path) -> tuple[Loop, int]:
    options = {"img_size": args.size, "workers": args.workers, "interpolation": args.interpolation, "aa": args.aa}
    data = Data(data_dir=str(folder), **options)
    source = load_images(data, 0, Defaults(mean=MEAN, std=STD), log=lambda _: None).train
    generator = torch.Generator().manual_seed(0)
    batches = len(source.ids) // args.batch_size  # as timm, which drops the last ones
    epoch = 0

    def loop() -> None:
        nonlocal epoch
        order = source.ids[torch.randperm(len(source.ids), generator=generator)]
        for batch in source.batches(order[: batches * args.batch_size].split(args.batch_size), epoch, CPU):
            assert batch.images.dtype == torch.float32
        epoch += 1

    return loop, batches


def workers_memory(before: set[int]) -> tuple[set[int], float]:
    """The ids of this process's children, and the mean PSS in MiB of those that are not in `before`."""
    children = {child.pid: child for child in psutil.Process().children()}
    sizes = [child.memory_full_info().pss for pid, child in children.items() if pid not in before]
    return set(children), statistics.fmean(sizes) / 2**20 if sizes else 0.0


def processor_seconds() -> float:
    """What this process and its children have taken."""
    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (own, *own.children()))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    found = {"timm": timms(args, folder), "ours": ours(args, folder)}
    steps = found["timm"][1]
    assert found["ours"][1] == steps
    children: set[int] = set()
    memory: dict[str, float] = {}
    for name, (loop, _) in found.items():  # starts the workers, and reads the files into the page cache
        loop()
        children, memory[name] = workers_memory(children)
    taken: dict[str, list[float]] = {name: [] for name in found}

    def counted(name: str) -> Loop:
        def loop() -> None:
            before = processor_seconds()
            found[name][0]()
            taken[name].append((processor_seconds() - before) / (steps * args.batch_size) * 1000)

        return loop

    times = report.time_in_turn({name: counted(name) for name in found}, args.rounds, steps)
    rates = {name: args.batch_size * 1000 / statistics.median(values) for name, values in times.items()}
    return {
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": report.ratio(times["timm"], times["ours"]),
        "processor_ms": {name: round(statistics.median(values), 3) for name, values in taken.items()},
        "processor_ratio": report.ratio(taken["timm"], taken["ours"]),
        "worker_mib": {name: round(size, 1) for name, size in memory.items()},
        "images": steps * args.batch_size,
    }


def table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        rates, spent, memory = row["images_per_second"], row["processor_ms"], row["worker_mib"]
        ratios = [
            f"{row[name]['median']:.2f} ({row[name]['quartiles'][0]:.2f} to {row[name]['quartiles'][1]:.2f})"
            for name in ("ratio", "processor_ratio")
        ]
        cells.append(
            [
                row["name"],
                ", ".join([row["interpolation"], *([row["aa"]] if row["aa"] else [])]),
                f"{rates['ours']:,.0f} / {rates['timm']:,.0f}",
                ratios[0],
                f"{spent['ours']:.2f} / {spent['timm']:.2f}",
                ratios[1],
                f"{memory['ours']:.0f} / {memory['timm']:.0f}",
            ]
        )
    header = ["images", "transform", "images/s, ours / timm's", "ratio (quartiles)", "processor ms per image"]
    return report.markdown([*header, "timm's / ours (quartiles)", "MiB per worker"], cells)


def section() -> str:
    """The table of docs/results.md."""
    rows = report.read_rows(FILE)
    rounds, batches, sizes, workers = (
        " or ".join(map(str, sorted(set(values))))
        for values in zip(
            *((row["ratio"]["n"], row["batch_size"], row["size"], row["workers"]) for row in rows), strict=True
        )
    )
    return (
        f"{table(rows)}\n\nTraining batches of {batches} at {sizes} px by {workers} workers: random crops and flips, "
        f"normalised; n={rounds} epochs of each, in turn. `benchmarks/loader.py`; {report.about(*rows)}."
    )


def main() -> None:
    args = parse()
    keep_freed_memory()
    key = {name: getattr(args, name) for name in ("name", "size", "batch_size", "workers", "interpolation", "aa")}
    row: dict[str, Any] = key | report.provenance()
    with tempfile.TemporaryDirectory() as folder:
        row |= measure(args, linked(args, Path(folder)))
    others = [old for old in report.read_rows(FILE) if any(old[name] != value for name, value in key.items())]
    report.write_json(FILE, [*others, row])
    print(table([row]))


if __name__ == "__main__":
    main()
