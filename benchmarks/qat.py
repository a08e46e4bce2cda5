"""What int8 costs a student, and what --qat gives back: the demo's student, and one with hard-swish and
squeeze-and-excitation, which int8 breaks.

    python benchmarks/qat.py                      3 seeds; a row for each cell goes to benchmarks/results/qat.jsonl
    python benchmarks/qat.py --arms float qat     without NNCF, which takes minutes for each student

Four arms of the same student, distilled by KD on the embedded images:
float: quantised after training by onnxruntime (static, U8S8, per channel, min and max)
bias correction: the same weights, quantised by NNCF with full bias correction
longer: trained for as many epochs more as --qat takes, with its learning rate, and then as the first
qat: after the stage of --qat, and then as the first

What is measured already is not measured again; runs that were stopped go on.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from report import RESULTS, about, append_rows, gains, has_row, markdown, provenance, read_rows, spread
from torch import Tensor, nn

import mgd_timm.models  # noqa: F401  (registers cifar_*)
from mgd_timm.data.dataset import Images, load_images
from mgd_timm.data.sources import Source
from mgd_timm.export.int8 import quantize_onnx, quantize_onnx_with_bias_correction
from mgd_timm.export.load_file import load_file
from mgd_timm.export.write_files import export_program, write_onnx
from mgd_timm.pipeline.run import run
from mgd_timm.recipe.derived import qat_optim
from mgd_timm.recipe.recipe import Recipe, make_recipe

FILE = RESULTS / "qat.jsonl"
NETWORKS = ("cifar_resnet8x05", "mobilenetv3_small_050")
ARMS = ("float", "bias correction", "longer", "qat")
BUDGET: dict[str, Any] = {"epochs": 8, "lr": 0.1, "batch_size": 64, "pad": 2, "method": "none"}
CALIBRATION_IMAGES = 320


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=BUDGET["epochs"])
    parser.add_argument("--results", type=Path, default=FILE)
    parser.add_argument("--output", type=Path, default=Path("runs/qat"))
    return parser.parse_args(arguments)


def train(network: str, arm: str, seed: int, epochs: int, output: Path) -> Path:
    """Carry out the run of an arm, after that of the float student which it begins with; return its folder."""
    name = "float" if arm == "bias correction" else arm
    folder, first = (output / f"{network}-{seed}" / one for one in (name, "float"))
    recipe = make_recipe(**BUDGET | {"epochs": epochs}, student=network, seed=seed, output=str(first), resume=True)
    if not (first / "summary.json").is_file():
        run(recipe, quiet=True)
    if name == "qat" and not folder.exists():
        shutil.copytree(first, folder)
        (folder / "summary.json").unlink()
    if not (folder / "summary.json").is_file():
        given = replace(recipe, output=str(folder), qat=True)
        run(given if name == "qat" else without_rounding(given, first), quiet=True)
    return folder


def without_rounding(recipe: Recipe, first: Path) -> Recipe:
    """The stage of a recipe with --qat as a run of its own, from the weights of the float student."""
    weights = str(first / "export" / "model.safetensors")
    return replace(recipe, qat=False, optim=qat_optim(recipe), student_checkpoint=weights)


@torch.no_grad()
def classes(network: nn.Module, source: Source) -> tuple[Tensor, Tensor]:
    """Predicted classes of a split, and their labels."""
    batches = list(source.batches(source.ids.split(250), 0, torch.device("cpu")))
    return torch.cat([network(batch.images).argmax(1) for batch in batches]), torch.cat([b.labels for b in batches])


def measure(folder: Path, arm: str, images: Images) -> dict[str, Any]:
    """Top-1 of a student in PyTorch and of its int8 file, and how often both say the same."""
    model = timm.create_model(f"local-dir:{folder / 'export'}", pretrained=True).eval()
    chosen = images.train.ids[torch.randperm(len(images.train.ids), generator=torch.Generator().manual_seed(0))]
    shown = images.train.batches(chosen[:CALIBRATION_IMAGES].split(64), 0, torch.device("cpu"))
    assert images.test is not None
    with tempfile.TemporaryDirectory() as place:
        whole, int8 = Path(place) / "float.onnx", Path(place) / "int8.onnx"
        write_onnx(export_program(model, images.input_size), whole, {})
        quantise = quantize_onnx_with_bias_correction if arm == "bias correction" else quantize_onnx
        quantise(whole, int8, [batch.images for batch in shown])
        quantised, labels = classes(load_file(int8), images.test)
    expected, _ = classes(model, images.test)

    def percent(hits: Tensor) -> float:
        return 100 * float(hits.double().mean())

    return {
        "float_top1": percent(expected == labels),
        "int8_top1": percent(quantised == labels),
        "agreement": percent(quantised == expected),
        "n_test": len(labels),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Accuracy in float and int8 of each arm, and what the arm gains in int8 over plain quantisation."""
    cells = []
    for network in dict.fromkeys(row["network"] for row in rows):
        found = {arm: {r["seed"]: r for r in rows if (r["network"], r["arm"]) == (network, arm)} for arm in ARMS}
        base = {seed: row["int8_top1"] for seed, row in found["float"].items()}
        for arm in (arm for arm in ARMS if found[arm]):
            of = {name: {s: r[name] for s, r in found[arm].items()} for name in ("float_top1", "int8_top1")}
            lost, gained = gains(of["int8_top1"], of["float_top1"]), gains(of["int8_top1"], base)
            numbers = [spread(list(of["float_top1"].values())), spread(list(of["int8_top1"].values()))]
            numbers += [spread(lost, "+"), spread(gained, "+") if arm != "float" else "", str(len(lost))]
            cells.append([f"{network}, {arm}", *numbers])
    return markdown(
        ["student, arm", "float top-1 %", "int8 top-1 %", "int8 - float", "int8 over plain", "seeds"], cells
    )


def section() -> str:
    """The table of docs/results.md."""
    rows = sorted(read_rows(FILE), key=lambda row: NETWORKS.index(row["network"]))
    first = rows[0]
    return (
        f"{table(rows)}\n\nFashion-MNIST, {first['n_test']:,} test images; {first['epochs']} epochs of KD on 10,000 "
        f"images, then {first['more_epochs']} more in the arms longer and qat; the int8 file calibrated on "
        f"{CALIBRATION_IMAGES} training images; mean ± standard deviation over the seeds, differences seed by seed. "
        f"`benchmarks/qat.py`; {about(*rows)}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    made_by = provenance()
    for seed in args.seeds:
        for network in args.networks:
            for arm in args.arms:
                key = {"network": network, "arm": arm, "seed": seed, "epochs": args.epochs}
                if has_row(args.results, key):
                    continue
                print(f"\n== {network}, {arm}, seed {seed}", flush=True)
                folder = train(network, arm, seed, args.epochs, args.output)
                recipe = make_recipe(**BUDGET | {"epochs": args.epochs})
                plain = replace(recipe.data, pad=0, hflip=0.0)  # for calibration: as images are evaluated
                images = load_images(plain, seed, log=lambda _: None)
                row = {**key, "more_epochs": qat_optim(recipe).epochs, **measure(folder, arm, images)}
                append_rows(args.results, [row | made_by])
    print("\n" + table(read_rows(args.results)))


if __name__ == "__main__":
    main()
