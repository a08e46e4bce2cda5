"""The command line: `mgd-timm COMMAND`, with one module for each command."""

import codecs
import difflib
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from mgd_timm._version import __version__

COMMANDS = {
    "demo": "mgd_timm.cli.demo",
    "train": "mgd_timm.cli.train",
    "distill": "mgd_timm.cli.distill",
    "data": "mgd_timm.cli.data",
    "evaluate": "mgd_timm.cli.evaluate",
    "report": "mgd_timm.cli.report",
    "order": "mgd_timm.cli.order",
    "import": "mgd_timm.cli.import_checkpoint",
    "export": "mgd_timm.cli.export",
    "publish": "mgd_timm.cli.publish",
    "verify": "mgd_timm.cli.verify",
    "list": "mgd_timm.cli.list",
}
"""Module of each command, imported when it is called; its `main` takes the arguments."""

_HELP = f"""mgd-timm {__version__}: Multi-Granularity Distillation for timm

  mgd-timm demo                                                   train a small student four ways and compare
  mgd-timm distill --teacher NAME --student NAME --dataset NAME   distil a teacher into a student
  mgd-timm train --model NAME --dataset NAME                      train a model without a teacher
  mgd-timm data --data-dir FOLDER                                 print what a run would train and evaluate on
  mgd-timm evaluate RUN                                           print the accuracy of a run's student
  mgd-timm report RUN RUN ...                                     write a page that compares runs and their teacher
  mgd-timm order --teacher NAME --teacher NAME --student NAME     print an order for teachers in sequence
  mgd-timm import FILE FOLDER --model NAME                        convert a public checkpoint, such as a teacher
  mgd-timm export RUN FOLDER --to onnx,int8                       write a run's student for timm, ONNX, OpenVINO, ...
  mgd-timm publish RUN user/name                                  upload a student to the Hugging Face hub, with a card
  mgd-timm verify FOLDER                                          check that a student's files belong together
  mgd-timm list criteria | models | data                          list criteria, models or data sets

Each has --help, and --help-all for every flag.
Several processes: accelerate launch -m mgd_timm distill ..."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Words after `mgd-timm`; by default those of this process.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a wrong call, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "--help-all"):
        print(_HELP)
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}."
        print(f"mgd-timm: unknown command {words[0]!r}: {hint}", file=sys.stderr)
        return 2
    return guarded("mgd-timm", lambda: import_module(COMMANDS[words[0]]).main(words[1:]))


def guarded(name: str, action: Callable[[], None]) -> int:
    """Run a command and print an error in one line, with a traceback only for bugs of mgd-timm.

    Args:
        name: Name of the program, printed before an error.
        action: The command.

    Returns:
        The exit code: 0, 1 for a failure, 130 or that of the signal for an interruption.
    """
    _prepare_streams()
    if not _current_folder_exists():
        print(f"{name}: error: the current folder was deleted: cd to another one first.", file=sys.stderr)
        return 1
    try:
        return _call(name, action)
    finally:
        _flush_stdout(name)


def _prepare_streams() -> None:
    """Open closed standard streams on the null device, or a file of the run would get their descriptor and with it
    what libraries write to it. Escape characters that stdout's encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest free one: the stream's own
            setattr(sys, name, os.fdopen(descriptor, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("mgd_timm.escape", _escape)
        sys.stdout.reconfigure(errors="mgd_timm.escape")


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write the bytes of names that the locale cannot decode as they are, and escape other characters."""
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeError:
        return codecs.backslashreplace_errors(error)


def _current_folder_exists() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _flush_stdout(name: str) -> None:
    """Write what stdout still holds. A reader that has ended (`| head`) wants no more of it."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
        if not isinstance(error, BrokenPipeError):
            print(f"{name}: error: the output cannot be written ({error}).", file=sys.stderr)
            sys.exit(1)


def _call(name: str, action: Callable[[], None]) -> int:
    try:
        action()
        if "accelerate" in sys.modules:
            from mgd_timm.distributed.collectives import leave

            leave()
    except KeyboardInterrupt as stop:
        reason = str(stop) or "interrupted; --resume continues from the newest checkpoint, if there is one"
        print(f"\n{name}: {reason}", file=sys.stderr)
        return int(getattr(stop, "code", 130))
    except BrokenPipeError as error:
        print(
            f"{name}: error: what read the output has ended ({error}): --resume continues a run; give it a file "
            "(> log.txt) to write to.",
            file=sys.stderr,
        )
        return 1
    except UnicodeError as error:
        print(f"{name}: error: {error}: if the locale (LC_ALL) is not of UTF-8, set PYTHONUTF8=1.", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        message = _explain(error)
        if message is None:
            if "RANK" in os.environ:
                error.add_note(
                    "If another process was killed or hangs, this error only follows from it: see the messages and the "
                    "stacks of all processes. --resume continues from the newest checkpoint."
                )
            raise
        print(f"{name}: error: {message}", file=sys.stderr)
        return 1
    return 0


def _explain(error: RuntimeError) -> str | None:
    """Return the message to a user, or None for a bug of mgd-timm or a fault of the machine."""
    import torch

    from mgd_timm.data.loader import SHARED_MEMORY
    from mgd_timm.storage.checkpoint import CheckpointError
    from mgd_timm.training.report import NonFiniteError

    if isinstance(error, CheckpointError | NonFiniteError):
        return str(error)
    rank = f"process {os.environ['RANK']}: " if "RANK" in os.environ else ""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"{rank}out of GPU memory: use a smaller --batch-size, or --find-batch-size; the global batch can stay "
            f"(--global-batch-size). {str(error).splitlines()[0]}"
        )
    if str(error).startswith("DataLoader worker") and "Bus error" in str(error):
        return f"{rank}{SHARED_MEMORY}; --resume continues from the newest checkpoint."
    if str(error).startswith("DataLoader worker"):  # torch raises it wherever the run is when a worker ends
        return (
            f"{rank}a DataLoader worker was killed (out of memory?): use fewer --workers, or a machine with more "
            f"memory; --resume continues from the newest checkpoint. {str(error).splitlines()[0].strip()}"
        )
    return None
