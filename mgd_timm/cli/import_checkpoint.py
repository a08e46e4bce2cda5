"""`mgd-timm import`: convert a public checkpoint to an exported folder."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mgd_timm.cli.parser import Parser, options_of
from mgd_timm.recipe.options import expand_home


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    values = options_of(_parser().parse_args(list(arguments)))
    file, folder = (expand_home(values.pop(name), name.upper()) for name in ("file", "folder"))
    written = import_checkpoint(file, values.pop("model"), folder, **values)
    print(f"wrote {written}")
    if values["mean"] is None or values["std"] is None:
        config = json.loads((written / "config.json").read_text())["pretrained_cfg"]
        print(
            f"warning: the model's images are normalised by mean {config['mean']} and std {config['std']}, the "
            "architecture's where you gave none. If it was trained with others, give --mean and --std."
        )


def _parser() -> Parser:
    parser = Parser(
        prog="mgd-timm import",
        usage="%(prog)s FILE FOLDER --model NAME [--FLAG VALUE ...]",
        description="Convert a public checkpoint to a folder that --teacher and mgd-timm evaluate take.",
    )
    parser.add_argument(
        "file", type=str, help="checkpoint: safetensors, or tensors that torch.save wrote; no code in it is run"
    )
    parser.add_argument("folder", type=str, help="folder to write; must not exist")
    add = partial(parser.add_flag, group="model")
    add("model", str, None, "timm's name of its architecture, such as cifar_resnet20", required=True)
    add("num_classes", int | None, None, "number of classes, to check; default: the classifier's in the file")
    add("in_chans", int | None, None, "channels of the images; default: those of the weights")
    about = "side of the images in pixels, to which position embeddings are resampled; default: the architecture's"
    add("img_size", int | None, None, about)
    for name in ("mean", "std"):
        about = f"{name} per channel of the images that it was trained on; default: the architecture's"
        add(name, tuple[float, ...] | None, None, about)
    about = "class names in the classifier's order; default: numbers"
    add("class_names", tuple[str, ...] | None, None, about)
    add("license", str, "other", "licence of the weights")
    add("overwrite", bool, False, "replace the folder")
    return parser


def import_checkpoint(
    path: str | os.PathLike[str],
    architecture: str,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Convert a public checkpoint to a folder like that of an exported student, for --teacher, evaluate and timm.

    Args:
        path: The checkpoint.
        architecture: Its name in timm.
        folder: Folder to write; must not exist unless `overwrite`.
        overwrite: Replace the folder.
        **options: As `load_public_checkpoint` takes them.

    Returns:
        The folder.

    Raises:
        ValueError: As `load_public_checkpoint`.
        FileExistsError: The folder exists; with `overwrite`, it holds the checkpoint or files that no export has.
    """
    from mgd_timm.export.timm_folder import check_replaceable, export_model  # after the flags: it loads torch
    from mgd_timm.models.import_checkpoint import load_public_checkpoint
    from mgd_timm.storage.digests import sha256

    if overwrite:
        check_replaceable(Path(folder))
        if Path(path).resolve().is_relative_to(Path(folder).resolve()):
            raise FileExistsError(f"{folder} holds the checkpoint {Path(path).name} itself: choose another folder.")
    model = load_public_checkpoint(path, architecture, **options)
    origin = {"imported": {"file": Path(path).name, "sha256": sha256(Path(path))}, "architecture": architecture}
    return export_model(model, Path(folder), provenance=origin, overwrite=overwrite)
