"""`mgd-timm list`: list the criteria, the models or the data sets."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

from jsonargparse import Namespace

from mgd_timm.cli.parser import Parser

_DATA = """\
embedded     part of Fashion-MNIST: 10,000 training and 4,000 test images, 28x28, 10 classes; in the package
HUB ID       any image classification data set of the hub, such as uoft-cs/cifar100
FOLDER       class folders (train/CLASS/*.png, test/CLASS/*.png), tables (train.parquet, train.csv), tar or npy files"""


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = _parser()
    values = parser.parse_args(list(arguments))
    for what in ("criteria", "models"):
        for action in parser.group(what)._group_actions:
            if what != values.what and getattr(values, action.dest) != action.default:
                flag = action.option_strings[0]
                parser.error(f"{flag} goes with mgd-timm list {what}, not with list {values.what}: leave it out.")
    if values.what == "criteria":
        _list_criteria(values)
    elif values.what == "models":
        _list_models(values.filter)
    else:
        print(_DATA)


def _parser() -> Parser:
    parser = Parser(prog="mgd-timm list", description="List the criteria, the models or the data sets.")
    kinds = Literal["criteria", "models", "data"]
    parser.add_argument("what", type=kinds, metavar="what", help="criteria, models or data")
    parser.add_flag("filter", str, "", "a wildcard, such as cifar_*", group="models", value="WORD")
    criteria = partial(parser.add_flag, group="criteria")
    criteria("teacher", str, "cifar_resnet32x4", "teacher of the pair; its weights do not matter")
    criteria("student", str, "cifar_resnet8x4", "student of the pair")
    criteria("img_size", int | None, None, "side of the images in pixels; default: the student's")
    criteria("in_chans", int | None, None, "channels of the images; default: the networks'")
    criteria("num_classes", int | None, None, "number of classes; default: that of a trained network, or 100")
    criteria("num_samples", int, 50_000, "training images, which set the size of CRD's memory banks")
    criteria("maps", str, "stages", "stages, last, mid, all, or a number of maps")
    criteria("markdown", bool, False, "print the text of docs/methods.md instead")
    return parser


def _list_criteria(values: Namespace) -> None:
    from mgd_timm.cli.list_criteria import connect, markdown, table  # loads torch

    if values.markdown:
        print(markdown(), end="")
        return
    names = ("teacher", "student", "img_size", "in_chans", "num_classes", "num_samples", "maps")
    for line in table(connect(**{name: getattr(values, name) for name in names})):
        print(line)


def _list_models(wildcard: str) -> None:
    import timm

    import mgd_timm.models  # noqa: F401  # registers cifar_*

    found = timm.list_models(wildcard)
    if not found:
        raise ValueError(f"--filter {wildcard!r}: no model of this name; * matches any characters, as in 'resnet*'.")
    print("\n".join(found))
