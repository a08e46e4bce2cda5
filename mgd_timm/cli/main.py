"""The command line: mgd-timm train | distill | evaluate | import | export | list.

Flags are generated from the recipe's dataclasses. Heavy packages load once the arguments are known to be right.
"""

import dataclasses
import difflib
import json
import os
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

from jsonargparse import ActionYesNo, Namespace

from mgd_timm._version import __version__
from mgd_timm.cli.parser import BY_PEER, TRAIN_NAMES, Parser, add_fields, options_of, run_parser


def _train(arguments: Sequence[str]) -> None:
    values = options_of(run_parser("mgd-timm train", distill=False).parse_args(list(arguments)))
    for name, flag in TRAIN_NAMES.items():
        values[name] = values.pop(flag)
    from mgd_timm.pipeline.run import run
    from mgd_timm.recipe.recipe import make_recipe

    run(make_recipe(teacher=None, method="none", **values))


def _distill(arguments: Sequence[str]) -> None:
    values = options_of(run_parser("mgd-timm distill", distill=True).parse_args(list(arguments)))
    values = {name: value for name, value in values.items() if name not in BY_PEER or value is not None}
    from mgd_timm.pipeline.run import run
    from mgd_timm.recipe.recipe import make_recipe

    run(make_recipe(**values))


def _evaluate(arguments: Sequence[str]) -> None:
    from mgd_timm.recipe.data import OF_TRAINING
    from mgd_timm.recipe.recipe import Data

    about = "Top-1, top-5 and loss of a model, as JSON."
    elsewhere = dict.fromkeys(OF_TRAINING, "it is of training alone") | {
        "batch_size": "here it is --validation-batch-size"
    }
    parser = Parser(prog="mgd-timm evaluate", description=about, elsewhere=elsewhere)
    parser.add_argument(
        "model", type=str, help="run folder, exported folder, hf-hub:ID, timm name with weights, or 'embedded'"
    )
    said = "standard deviations of Gaussian noise, added to pixels in [0, 1] before normalisation: such as 0.05 0.1 0.2"
    parser.add_argument("--noise", type=float, nargs="+", default=None, help=said)
    parser.add_argument("--noise-seeds", type=int, default=5, help="noise seeds to average over")
    add_fields(parser, Data, "images (default: those of the run)", set(OF_TRAINING), {})
    # A flag that is not given leaves the run's own value alone.
    parser.set_defaults({f.name: None for f in dataclasses.fields(Data) if f.name not in OF_TRAINING})
    values = {
        name: value for name, value in options_of(parser.parse_args(list(arguments))).items() if value is not None
    }
    model = values.pop("model")
    from mgd_timm.api import evaluate_named

    found, place = evaluate_named(model, **values)
    if int(os.environ.get("RANK", "0")) == 0:
        noise = (
            {"noise": {sigma: _rounded(row) for sigma, row in found.pop("noise").items()}} if "noise" in found else {}
        )
        print(json.dumps({**_rounded(found), "data": place, **noise}))


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in numbers.items()}


def _export(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="mgd-timm export", description="Copy a run's student as timm loads it, under another name or licence."
    )
    parser.add_argument("run", type=str, help="run folder, exported folder, or 'embedded'")
    parser.add_argument("folder", type=str, help="where to; must not exist")
    parser.add_argument("--license", type=str | None, default=None, help="licence of the weights; default: the run's")
    parser.add_argument("--tag", type=str | None, default=None, help="timm's tag of the weights; default: the run's")
    values = parser.parse_args(list(arguments))
    from mgd_timm.export.timm_folder import export_model
    from mgd_timm.models.load import load_model

    model = load_model(values.run)
    given = {name: value for name in ("license", "tag") if (value := getattr(values, name)) is not None}
    model.pretrained_cfg = {**model.pretrained_cfg, **given}  # type: ignore[dict-item, assignment]
    before = next((p for p in (Path(values.run) / "export", Path(values.run)) if (p / "recipe.json").is_file()), None)
    known = json.loads((before / "recipe.json").read_text()) if before is not None else {}
    kept = {name: value for name, value in known.items() if name not in ("versions", "model_sha256")}
    print(f"wrote {export_model(model, values.folder, provenance=kept)}")


def _import(arguments: Sequence[str]) -> None:
    parser = Parser(
        prog="mgd-timm import", description="Write a public checkpoint as a folder that teaches and is evaluated."
    )
    parser.add_argument(
        "file", type=str, help="checkpoint: safetensors, or tensors that torch.save wrote; no code in it is run"
    )
    parser.add_argument("folder", type=str, help="where to; must not exist")
    parser.add_argument(
        "--model", type=str, required=True, help="timm's name of its architecture, such as cifar_resnet20"
    )
    parser.add_argument(
        "--num-classes", type=int | None, default=None, help="to check; default: the classifier's in the file"
    )
    parser.add_argument(
        "--in-chans", type=int | None, default=None, help="channels of the image; default: the weights'"
    )
    for name in ("mean", "std"):
        about = (
            f"{name} of the images that it was trained on, per channel; default: the architecture's (CIFAR-100's for "
            "cifar_*)"
        )
        parser.add_argument(f"--{name}", type=float, nargs="+", default=None, help=about)
    parser.add_argument(
        "--class-names", type=str, nargs="+", default=None, help="in the classifier's order; default: numbers"
    )
    parser.add_argument("--license", type=str, default="other", help="licence of the weights")
    parser.add_argument("--overwrite", action=ActionYesNo(no_prefix="no-"), default=False, help="replace the folder")
    values = options_of(parser.parse_args(list(arguments)))
    from mgd_timm.cli.import_checkpoint import import_checkpoint

    file, model, folder = (values.pop(name) for name in ("file", "model", "folder"))
    written = import_checkpoint(file, model, folder, **values)
    print(f"wrote {written}")
    if values["mean"] is None or values["std"] is None:
        config = json.loads((written / "config.json").read_text())["pretrained_cfg"]
        print(
            f"warning: mean {config['mean']}, std {config['std']}, as far as not given, are the architecture's: name "
            "those of the images that it was trained on (--mean, --std), or lose accuracy."
        )


def _list(arguments: Sequence[str]) -> None:
    parser = Parser(prog="mgd-timm list", description="What there is to name.")
    parser.add_argument("what", type=typing.Literal["criteria", "models", "data"], help="criteria, models or data")
    parser.add_argument("--filter", type=str, default="", help="models: a wildcard, such as cifar_*")
    parser.add_argument(
        "--teacher", type=str, default="cifar_resnet32x4", help="criteria: for which pair; its weights do not matter"
    )
    parser.add_argument("--student", type=str, default="cifar_resnet8x4", help="criteria: for which pair")
    parser.add_argument(
        "--img-size", type=int | None, default=None, help="criteria: side in pixels; default: the student's"
    )
    parser.add_argument("--in-chans", type=int | None, default=None, help="criteria: channels; default: the networks'")
    parser.add_argument(
        "--num-classes",
        type=int | None,
        default=None,
        help="criteria: of the data; default: a trained teacher's, or 100",
    )
    parser.add_argument(
        "--num-samples", type=int, default=50_000, help="criteria: training images, which size CRD's memory banks"
    )
    parser.add_argument(
        "--maps", type=str, default="stages", help="criteria: stages, last, mid, all, or a number of maps"
    )
    parser.add_argument(
        "--markdown", action=ActionYesNo(no_prefix="no-"), default=False, help="criteria: all that is known of them"
    )
    values = parser.parse_args(list(arguments))
    for action in parser._actions:  # whose help begins with what they are for
        of = action.help.partition(":")[0] if action.help else ""
        if of in ("criteria", "models") and of != values.what and getattr(values, action.dest) != action.default:
            parser.error(
                f"{action.option_strings[0]} is of mgd-timm list {of}, not of mgd-timm list {values.what}: leave it "
                "out."
            )
    if values.what == "criteria":
        _list_criteria(values)
    elif values.what == "models":
        import timm

        import mgd_timm.models  # noqa: F401  # registers cifar_*

        found = timm.list_models(values.filter)
        if not found:
            raise ValueError(
                f"--filter {values.filter!r}: no model of this name; * stands for any characters, as in 'resnet*'."
            )
        print("\n".join(found))
    else:
        print(
            "embedded     part of Fashion-MNIST: 10,000 training and 4,000 test images, 28x28, 10 classes; in the "
            "package"
        )
        print("HUB ID       any image classification data set of the hub, such as uoft-cs/cifar100")
        print(
            "FOLDER       parquet or arrow files, train/CLASS/*.png and test/CLASS/*.png, or tar files of these or of "
            "a webdataset"
        )


def _list_criteria(values: Namespace) -> None:
    from mgd_timm.cli import list_criteria as methods

    if values.markdown:
        print(methods.markdown(), end="")
        return
    names = ("teacher", "student", "img_size", "in_chans", "num_classes", "num_samples", "maps")
    for line in methods.table(methods.connect(**{name: getattr(values, name) for name in names})):
        print(line)


_COMMANDS = {
    "train": _train,
    "distill": _distill,
    "evaluate": _evaluate,
    "import": _import,
    "export": _export,
    "list": _list,
}
_HELP = f"""mgd-timm {__version__}: Multi-Granularity Distillation for timm

  mgd-timm distill --teacher NAME --student NAME --dataset NAME   teach a student
  mgd-timm train --model NAME --dataset NAME                      train a model on its own
  mgd-timm evaluate RUN                                           its accuracy
  mgd-timm import FILE FOLDER --model NAME                        a public checkpoint, as a teacher
  mgd-timm export RUN FOLDER                                      its student, as timm loads it
  mgd-timm list criteria | models | data                          what there is

Each has --help. Several processes: accelerate launch -m mgd_timm distill ..."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code: 0, 1 for what failed, 2 for a wrong call, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_HELP)
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in _COMMANDS:
        near = difflib.get_close_matches(words[0], _COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(_COMMANDS)}."
        print(f"mgd-timm: unknown command {words[0]!r}: {hint}", file=sys.stderr)
        return 2
    return guarded("mgd-timm", lambda: _COMMANDS[words[0]](words[1:]))


def guarded(name: str, action: Callable[[], None]) -> int:
    """Carry a command out; gives the exit code, and says what failed or stopped it without a traceback, but for faults
    of ours."""
    try:
        action()
        if "accelerate" in sys.modules:
            from mgd_timm.distributed.collectives import leave

            leave()
    except KeyboardInterrupt as stop:
        _part(None if hasattr(stop, "code") else "it was interrupted")
        said = str(stop) or "interrupted; whatever checkpoints there are stay, --resume continues from them"
        print(f"\n{name}: {said}", file=sys.stderr)
        return int(getattr(stop, "code", 130))
    except (ValueError, OSError, RuntimeError) as error:
        from mgd_timm.storage.checkpoint import CheckpointError
        from mgd_timm.training.checkpointer import NonFiniteError

        if str(error).startswith("DataLoader worker"):  # torch raises it wherever the run is when a reader ends
            rank = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""
            which = str(error).splitlines()[0].strip()
            print(
                f"{name}: error: {rank}a reader of images was ended from outside, as a machine does that is short of "
                f"memory ({which}). Give fewer --workers or more memory; --resume continues from the newest "
                "checkpoint.",
                file=sys.stderr,
            )
            _part(f"a reader of images was ended from outside ({which})")
            return 1
        if isinstance(error, RuntimeError) and not isinstance(error, CheckpointError | NonFiniteError):
            if "mgd_timm.distributed.watchdog" in sys.modules:
                sys.modules["mgd_timm.distributed.watchdog"].end_if_lost()
            _part(f"{type(error).__name__}: {error}")
            raise  # a fault of ours, or the machine's: with its traceback
        print(f"{name}: error: {error}", file=sys.stderr)
        _part(f"{type(error).__name__}: {error}")
        return 1
    return 0


def _part(failure: str | None) -> None:
    """Tell the other processes of a launch, where there are any, that this one has ended."""
    if "mgd_timm.distributed.watchdog" in sys.modules:
        sys.modules["mgd_timm.distributed.watchdog"].stop(failure)
