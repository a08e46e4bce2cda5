"""Formats that a student is exported to: their files, the libraries that they need, and refusals before a file is
written."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from mgd_timm.recipe.options import Range, unknown


@dataclass(frozen=True)
class Format:
    """A format of exported files.

    Args:
        files: Paths in the exported folder.
        libraries: Modules that write and run the files, beside torch.
        about: What it is for, for the help.
    """

    files: tuple[str, ...]
    libraries: tuple[str, ...]
    about: str


FLOAT_ONNX = "onnx/model.onnx"
HALF_ONNX = "onnx/model_fp16.onnx"
INT8_ONNX = "onnx/model_int8.onnx"
_ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")

FORMATS = {
    "timm": Format(("model.safetensors",), (), "timm and Transformers"),
    "onnx": Format((FLOAT_ONNX, HALF_ONNX), _ONNX_LIBRARIES, "ONNX in float32 and float16"),
    "int8": Format((INT8_ONNX,), (*_ONNX_LIBRARIES, "nncf"), "ONNX, quantised"),
    "openvino": Format(("openvino/openvino_model.xml",), ("openvino",), "OpenVINO, weights in float16"),
    "pt2": Format(("pt2/model.pt2",), (), "torch.export"),
    "executorch": Format(("executorch/model.pte",), ("executorch",), "ExecuTorch with XNNPACK, of one image at a time"),
}


def parse_formats(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return names of formats, given in one text with commas or as a list, each once.

    Raises:
        ValueError: There are none, one is unknown, or a library that it needs is not installed.
    """
    words = names.split(",") if isinstance(names, str) else list(names)
    found = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not found:
        raise ValueError(f"--to {names!r}: expected one or more of {', '.join(FORMATS)}, as in --to timm,onnx.")
    for name in found:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
        check_libraries(FORMATS[name].libraries, name, f"--to {name}")
    return found


def check_max_drop(value: float) -> None:
    """Raise ValueError unless a file may lose this many points of accuracy."""
    if value not in Range(minimum=0, maximum=100):
        raise ValueError(f"--max-drop {value}: expected points of top-1 from 0 to 100, as in --max-drop 1.")


def check_libraries(modules: Sequence[str], extra: str, what: str) -> None:
    """Raise ValueError, with the command that installs them, if modules are missing.

    Args:
        modules: Names of modules.
        extra: Extra of mgd-timm that brings them.
        what: What needs them, for the message.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ValueError(f"{what} needs {' and '.join(missing)}: pip install 'mgd-timm[{extra}]'.")
