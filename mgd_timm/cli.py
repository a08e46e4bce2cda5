"""The command line: mgd-timm train | distill | evaluate | import | export | list.

Flags are generated from the recipe's dataclasses. Heavy packages load once the arguments are known to be right.
"""

import dataclasses
import difflib
import json
import os
import re
import sys
import typing
from argparse import Action
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionYesNo, ArgumentParser, Namespace, get_loader

from mgd_timm._version import __version__
from mgd_timm.options import fits

# Flags of `train`, as timm's train.py has them, that `distill` spells with the student's name.
_TRAIN_NAMES = {"student": "model", "student_pretrained": "pretrained", "student_checkpoint": "initial_checkpoint"}
_DISTILL_ONLY = {
    "teacher",
    "teacher_checkpoint",
    "teacher_classes",
    "teacher_weights",
    "teachers_as",
    "fit_teacher_head",
    "teacher_img_size",
    "teacher_resize",
    "teacher_store",
    "teacher_views",
    "teacher_view_seed",
    "teacher_top_k",
    "method",
    "criterion",
    "task_weight",
    "kd_weight",
    "kd_temperature",
    "maps",
    "peer",
    "criterion_options",
    "standardise_logits",
    "fitting_epochs",
    "fitting_lr",
    "shard_teacher",
    "fold_teacher",
}
_TRAIN_ONLY = {"train_only", "adapt_batchnorm"}

_BY_PEER = ("teacher", "criterion", "method")
"""What these are by default depends on whether there is a peer: make_recipe says it."""


_REPEATED = ("teacher", "teacher_classes")
"""Flags that may be given again, for one more value."""


def _gathered(words: Sequence[str]) -> list[str]:
    """The words of a call, the values of a repeated flag put into one list."""
    left = list(words)
    for name in (option.replace("_", "-") for option in _REPEATED):
        values: list[str] = []
        rest: list[str] = []
        waiting = False
        for word in left:
            if waiting or word.startswith(f"--{name}="):
                values.append(word if waiting else word.partition("=")[2])
                waiting = False
            elif word == f"--{name}":
                waiting = True
            else:
                rest.append(word)
        # A flag without a value stays for the parser to refuse.
        left = [*rest, *([f"--{name}={json.dumps(values)}"] if len(values) > 1 else [f"--{name}={v}" for v in values])]
        left += [f"--{name}"] if waiting else []
    return left


_WRONG_VALUE = re.compile(r'Parser key "([\w.]+)"(?: element \d+)?:\s(.*)(?:Got|Given) value: (.*)', re.DOTALL)
"""How jsonargparse refuses a value: in several lines, and in Python's words for what it expected."""


def _in_words(message: str, actions: Sequence[Action]) -> str:
    """An error of jsonargparse about a value in one line: the flag, its value and what was expected; any other one as it is."""
    found = _WRONG_VALUE.search(message)
    if found is None:
        return message
    name, kinds, value = found.groups()
    if choices := re.search(r"Literal\[(.*?)\]", kinds):
        expected = f"one of {choices[1].replace(chr(39), '')}"
    elif kind := re.search(r"<class '(int|float)'>", kinds):
        expected = {"int": "a whole number", "float": "a number"}[kind[1]]
    else:
        return message
    flag = next((f for action in actions if action.dest == name for f in action.option_strings), name)
    return f"{flag}: {value!r}: expected {expected}."


class _Parser(ArgumentParser):
    """Takes a repeated flag as a list, and in a --config a single value for a list of one; the error for a flag that does not exist
    says where it belongs, or names the nearest.

    Args:
        elsewhere: Words for the error about an option, by its name with underscores, that this command does not take.
        **options: Of jsonargparse's parser.
    """

    def __init__(self, *, elsewhere: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.elsewhere = dict(elsewhere or {})
        self.elements: dict[str, type] = {}
        """Of each option that is a list, the kind of its elements."""

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        return super().parse_args(_gathered(sys.argv[1:] if args is None else args), *more, **options)

    def parse_string(self, content: str, *more: Any, **options: Any) -> Namespace:
        try:
            values = get_loader("yaml")(content)
        except yaml.YAMLError:
            values = None  # jsonargparse will say it
        if isinstance(values, dict):
            listed = {name: self._listed(name, value) for name, value in values.items()}
            content = content if listed == values else json.dumps(listed)
        return super().parse_string(content, *more, **options)

    def _listed(self, name: str, value: Any) -> Any:
        """The value of an option in a --config, a single one of an option that is a list as a list."""
        kind = self.elements.get(name)
        values = value if isinstance(value, list) else [value]
        if kind is None or value is None:
            return value
        if not all(fits(one, kind) for one in values):
            word, example = ("word", "[a, b]") if kind is str else ("number", "[1, 2]" if kind is int else "[0.5, 0.5]")
            whole = "whole " if kind is int else ""
            self.error(
                f"{name}: {value!r} in --config: expected a {whole}{word} or a list of {whole}{word}s, as in {name}: {example}."
            )
        return values

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        wrong = re.search(
            r"(?:unrecognized arguments|ambiguous option): (--[\w-]+)|option '([\w.]+)' is not accepted", message, re.I
        )
        if wrong:
            name = (wrong[1] or f"--{wrong[2]}").replace("_", "-")
            words = self.elsewhere.get(name.removeprefix("--").removeprefix("no-").replace("-", "_"))
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            near = difflib.get_close_matches(name, flags, n=2, cutoff=0.6)
            if name.startswith(("--data.", "--optim.", "--heads.")):
                words = "a run's recipe.yaml is no file of flags, which --print_config writes; --resume continues a run"
            message += f": {words}." if words else f"; did you mean {' or '.join(near)}?" if near else ""
        message = _in_words(message, self._actions)
        self.usage = "%(prog)s ..."  # not its hundred flags, above the one that is wrong
        super().error(message, ex)


def _add_fields(parser: _Parser, kind: type, title: str, leave: set[str], names: dict[str, str]) -> None:
    """A flag for every field of a dataclass: typed, spelled with dashes, its help from the field."""
    group = parser.add_argument_group(title)
    types = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name in leave or dataclasses.is_dataclass(types[field.name]):
            continue
        flag = f"--{names.get(field.name, field.name).replace('_', '-')}"
        default: Any = None if field.default is dataclasses.MISSING else field.default
        options: dict[str, Any] = {"help": field.metadata["help"], "default": default}
        inner = _element(types[field.name])
        if inner is not None:
            parser.elements[field.name] = inner
        if types[field.name] in (bool, bool | None):
            group.add_argument(flag, action=ActionYesNo(no_prefix="no-"), **options)
        elif field.name in _REPEATED:
            group.add_argument(flag, type=list[str] | str | None, **options)
        elif inner is not None:
            options["default"] = list(default) if isinstance(default, tuple) else default
            group.add_argument(flag, type=inner, nargs="+" if default or default is None else "*", **options)
        else:
            group.add_argument(flag, type=types[field.name], **options)


def _element(kind: Any) -> Any:
    """The element type of tuple[X, ...] or tuple[X, ...] | None; None for what is no tuple."""
    for option in typing.get_args(kind) if isinstance(kind, UnionType) else (kind,):
        if option is not NoneType and typing.get_origin(option) is tuple:
            return typing.get_args(option)[0]
    return None


def run_parser(prog: str, *, distill: bool, without: Mapping[str, str] | None = None) -> ArgumentParser:
    """The parser of `mgd-timm distill` or `train`, for scripts that take the same flags.

    Args:
        prog: What is called.
        distill: Which of both.
        without: Options that a script does not take, and the words for who gives one.
    """
    from mgd_timm.recipe import Data, Heads, Optim, Recipe

    about = "Distil a teacher into a student." if distill else "Train a model on its own: a teacher, or a student alone."
    if distill:
        elsewhere = dict.fromkeys(_TRAIN_ONLY, "mgd-timm train takes it")
        elsewhere |= {theirs: f"here it is --{ours.replace('_', '-')}" for ours, theirs in _TRAIN_NAMES.items()}
    else:
        elsewhere = dict.fromkeys(_DISTILL_ONLY | {f.name for f in dataclasses.fields(Heads)}, "mgd-timm distill takes it")
        elsewhere |= {ours: f"here it is --{theirs.replace('_', '-')}" for ours, theirs in _TRAIN_NAMES.items()}
    parser = _Parser(prog=prog, description=about, elsewhere={**elsewhere, **(without or {})})
    parser.add_argument("--config", action="config", help="YAML file of flags")
    leave = (_TRAIN_ONLY if distill else _DISTILL_ONLY) | set(without or {})
    _add_fields(parser, Recipe, "run", leave, {} if distill else _TRAIN_NAMES)
    _add_fields(parser, Data, "images", set(), {})
    _add_fields(parser, Optim, "optimisation", set(), {})
    if distill:
        _add_fields(parser, Heads, "granularity heads", set(), {})
        parser.set_defaults(dict.fromkeys(_BY_PEER))
    else:
        parser.set_defaults(output="runs/train")
    return parser


def _options(namespace: Namespace) -> dict[str, Any]:
    values = dict(vars(namespace))
    values.pop("config", None)
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def given_options(parser: ArgumentParser, arguments: Sequence[str]) -> dict[str, Any]:
    """The options of `make_recipe` that a call or its --config names, and none of those that it leaves alone."""
    parser.set_defaults({name: None for name in vars(parser.get_defaults()) if name != "config"})
    return {name: value for name, value in _options(parser.parse_args(list(arguments))).items() if value is not None}


def _train(arguments: Sequence[str]) -> None:
    values = _options(run_parser("mgd-timm train", distill=False).parse_args(list(arguments)))
    for name, flag in _TRAIN_NAMES.items():
        values[name] = values.pop(flag)
    from mgd_timm.recipe import make_recipe
    from mgd_timm.run import run

    run(make_recipe(teacher=None, method="none", **values))


def _distill(arguments: Sequence[str]) -> None:
    values = _options(run_parser("mgd-timm distill", distill=True).parse_args(list(arguments)))
    values = {name: value for name, value in values.items() if name not in _BY_PEER or value is not None}
    from mgd_timm.recipe import make_recipe
    from mgd_timm.run import run

    run(make_recipe(**values))


def _evaluate(arguments: Sequence[str]) -> None:
    from mgd_timm.data_options import OF_TRAINING
    from mgd_timm.recipe import Data

    about = "Top-1, top-5 and loss of a model, as JSON."
    elsewhere = dict.fromkeys(OF_TRAINING, "it is of training alone") | {"batch_size": "here it is --validation-batch-size"}
    parser = _Parser(prog="mgd-timm evaluate", description=about, elsewhere=elsewhere)
    parser.add_argument("model", type=str, help="run folder, exported folder, hf-hub:ID, timm name with weights, or 'embedded'")
    said = "standard deviations of Gaussian noise, added to pixels in [0, 1] before normalisation: such as 0.05 0.1 0.2"
    parser.add_argument("--noise", type=float, nargs="+", default=None, help=said)
    parser.add_argument("--noise-seeds", type=int, default=5, help="noise seeds to average over")
    _add_fields(parser, Data, "images (default: those of the run)", set(OF_TRAINING), {})
    # A flag that is not given leaves the run's own value alone.
    parser.set_defaults({f.name: None for f in dataclasses.fields(Data) if f.name not in OF_TRAINING})
    values = {name: value for name, value in _options(parser.parse_args(list(arguments))).items() if value is not None}
    model = values.pop("model")
    from mgd_timm.api import evaluate_named

    found, place = evaluate_named(model, **values)
    if int(os.environ.get("RANK", "0")) == 0:
        noise = {"noise": {sigma: _rounded(row) for sigma, row in found.pop("noise").items()}} if "noise" in found else {}
        print(json.dumps({**_rounded(found), "data": place, **noise}))


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in numbers.items()}


def _export(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="mgd-timm export", description="Copy a run's student as timm loads it, under another name or licence.")
    parser.add_argument("run", type=str, help="run folder, exported folder, or 'embedded'")
    parser.add_argument("folder", type=str, help="where to; must not exist")
    parser.add_argument("--license", type=str | None, default=None, help="licence of the weights; default: the run's")
    parser.add_argument("--tag", type=str | None, default=None, help="timm's tag of the weights; default: the run's")
    values = parser.parse_args(list(arguments))
    from mgd_timm.build import load_model
    from mgd_timm.export import export_model

    model = load_model(values.run)
    given = {name: value for name in ("license", "tag") if (value := getattr(values, name)) is not None}
    model.pretrained_cfg = {**model.pretrained_cfg, **given}  # type: ignore[dict-item, assignment]
    before = next((p for p in (Path(values.run) / "export", Path(values.run)) if (p / "recipe.json").is_file()), None)
    known = json.loads((before / "recipe.json").read_text()) if before is not None else {}
    kept = {name: value for name, value in known.items() if name not in ("versions", "model_sha256")}
    print(f"wrote {export_model(model, values.folder, provenance=kept)}")


def _import(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="mgd-timm import", description="Write a public checkpoint as a folder that teaches and is evaluated.")
    parser.add_argument("file", type=str, help="checkpoint: safetensors, or tensors that torch.save wrote; no code in it is run")
    parser.add_argument("folder", type=str, help="where to; must not exist")
    parser.add_argument("--model", type=str, required=True, help="timm's name of its architecture, such as cifar_resnet20")
    parser.add_argument("--num-classes", type=int | None, default=None, help="to check; default: the classifier's in the file")
    parser.add_argument("--in-chans", type=int | None, default=None, help="channels of the image; default: the weights'")
    for name in ("mean", "std"):
        about = f"{name} of the images that it was trained on, per channel; default: the architecture's (CIFAR-100's for cifar_*)"
        parser.add_argument(f"--{name}", type=float, nargs="+", default=None, help=about)
    parser.add_argument("--class-names", type=str, nargs="+", default=None, help="in the classifier's order; default: numbers")
    parser.add_argument("--license", type=str, default="other", help="licence of the weights")
    parser.add_argument("--overwrite", action=ActionYesNo(no_prefix="no-"), default=False, help="replace the folder")
    values = _options(parser.parse_args(list(arguments)))
    from mgd_timm.importing import import_checkpoint

    file, model, folder = (values.pop(name) for name in ("file", "model", "folder"))
    written = import_checkpoint(file, model, folder, **values)
    print(f"wrote {written}")
    if values["mean"] is None or values["std"] is None:
        config = json.loads((written / "config.json").read_text())["pretrained_cfg"]
        print(
            f"warning: mean {config['mean']}, std {config['std']}, as far as not given, are the architecture's: name those of the "
            "images that it was trained on (--mean, --std), or lose accuracy."
        )


def _list(arguments: Sequence[str]) -> None:
    parser = _Parser(prog="mgd-timm list", description="What there is to name.")
    parser.add_argument("what", type=typing.Literal["criteria", "models", "data"], help="criteria, models or data")
    parser.add_argument("--filter", type=str, default="", help="models: a wildcard, such as cifar_*")
    parser.add_argument(
        "--teacher", type=str, default="cifar_resnet32x4", help="criteria: for which pair; its weights do not matter"
    )
    parser.add_argument("--student", type=str, default="cifar_resnet8x4", help="criteria: for which pair")
    parser.add_argument("--img-size", type=int | None, default=None, help="criteria: side in pixels; default: the student's")
    parser.add_argument("--in-chans", type=int | None, default=None, help="criteria: channels; default: the networks'")
    parser.add_argument(
        "--num-classes", type=int | None, default=None, help="criteria: of the data; default: a trained teacher's, or 100"
    )
    parser.add_argument("--num-samples", type=int, default=50_000, help="criteria: training images, which size CRD's memory banks")
    parser.add_argument("--maps", type=str, default="stages", help="criteria: stages, last, mid, all, or a number of maps")
    parser.add_argument(
        "--markdown", action=ActionYesNo(no_prefix="no-"), default=False, help="criteria: all that is known of them"
    )
    values = parser.parse_args(list(arguments))
    for action in parser._actions:  # whose help begins with what they are for
        of = action.help.partition(":")[0] if action.help else ""
        if of in ("criteria", "models") and of != values.what and getattr(values, action.dest) != action.default:
            parser.error(f"{action.option_strings[0]} is of mgd-timm list {of}, not of mgd-timm list {values.what}: leave it out.")
    if values.what == "criteria":
        _list_criteria(values)
    elif values.what == "models":
        import timm

        import mgd_timm.models  # noqa: F401  # registers cifar_*

        found = timm.list_models(values.filter)
        if not found:
            raise ValueError(f"--filter {values.filter!r}: no model of this name; * stands for any characters, as in 'resnet*'.")
        print("\n".join(found))
    else:
        print("embedded     part of Fashion-MNIST: 10,000 training and 4,000 test images, 28x28, 10 classes; in the package")
        print("HUB ID       any image classification data set of the hub, such as uoft-cs/cifar100")
        print(
            "FOLDER       parquet or arrow files, train/CLASS/*.png and test/CLASS/*.png, or tar files of these or of a webdataset"
        )


def _list_criteria(values: Namespace) -> None:
    from mgd_timm import methods

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
    """Carry a command out; gives the exit code, and says what failed or stopped it without a traceback, but for faults of ours."""
    try:
        action()
        if "accelerate" in sys.modules:
            from mgd_timm.processes import leave

            leave()
    except KeyboardInterrupt as stop:
        _part(None if hasattr(stop, "code") else "it was interrupted")
        said = str(stop) or "interrupted; whatever checkpoints there are stay, --resume continues from them"
        print(f"\n{name}: {said}", file=sys.stderr)
        return int(getattr(stop, "code", 130))
    except (ValueError, OSError, RuntimeError) as error:
        from mgd_timm.checkpoint import CheckpointError
        from mgd_timm.upkeep import NonFiniteError

        if str(error).startswith("DataLoader worker"):  # torch raises it wherever the run is when a reader ends
            rank = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""
            which = str(error).splitlines()[0].strip()
            print(
                f"{name}: error: {rank}a reader of images was ended from outside, as a machine does that is short of memory "
                f"({which}). Give fewer --workers or more memory; --resume continues from the newest checkpoint.",
                file=sys.stderr,
            )
            _part(f"a reader of images was ended from outside ({which})")
            return 1
        if isinstance(error, RuntimeError) and not isinstance(error, CheckpointError | NonFiniteError):
            if "mgd_timm.watchdog" in sys.modules:
                sys.modules["mgd_timm.watchdog"].end_if_lost()
            _part(f"{type(error).__name__}: {error}")
            raise  # a fault of ours, or the machine's: with its traceback
        print(f"{name}: error: {error}", file=sys.stderr)
        _part(f"{type(error).__name__}: {error}")
        return 1
    return 0


def _part(failure: str | None) -> None:
    """Tell the other processes of a launch, where there are any, that this one has ended."""
    if "mgd_timm.watchdog" in sys.modules:
        sys.modules["mgd_timm.watchdog"].stop(failure)
