"""Load exported files, each in its own runtime, as modules that return logits of normalised images."""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint

from mgd_timm.export.formats import FORMATS, check_libraries

Predict = Callable[[Tensor], Tensor]
METADATA = ("mean", "std", "interpolation", "crop_pct", "architecture", "label_names")
"""What `mgd-timm export` writes into an ONNX file, of what is known of its images and classes."""


class ExportedFile(nn.Module):
    """A network in an exported file. It runs on the CPU, and has no weights that torch knows.

    Args:
        config: mean, std and names of classes, as far as they are known.
        predict: Returns logits of images on the CPU.
        input_size: (channels, height, width) of its images.
        num_classes: Number of its logits.
    """

    def __init__(
        self, config: dict[str, Any], predict: Predict, input_size: tuple[int, int, int], num_classes: int
    ) -> None:
        super().__init__()
        self.predict, self.num_classes = predict, num_classes
        self.pretrained_cfg = {**config, "input_size": input_size, "fixed_input_size": True}

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Return logits, on the device of the images."""
        return self.predict(images.detach().cpu().contiguous()).to(images.device)


def is_exported_file(name: str) -> bool:
    """Return whether a name is that of a file that `load_file` reads, by its ending."""
    return Path(name).suffix.lower() in _LOADERS and not Path(name).is_dir()


def load_file(path: str | Path) -> ExportedFile:
    """Load an ONNX, torch.export, OpenVINO or ExecuTorch file, on the CPU with torch's number of threads.

    mean, std and names of classes are read from the config.json in its folder or the one above; where there is none,
    from what mgd-timm export has written into an ONNX file.

    Raises:
        ValueError: A library is missing, or the file is not of its kind, or not a classifier of a dynamic batch of
            images.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    extra, load = _LOADERS[path.suffix.lower()]
    check_libraries([name for name in FORMATS[extra].libraries if name != "onnxscript"], extra, str(path))
    try:
        predict, inputs, outputs, about = load(path)
    except Exception as error:  # each runtime has errors of its own
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as {extra} ({text}): export it again.") from error
    _check_shapes(path, inputs, outputs)
    (_, channels, height, width), num_classes = cast(list[int], inputs[0]), cast(int, outputs[0][1])
    return ExportedFile(_read_config(path) or about, predict, (channels, height, width), num_classes)


def _check_shapes(path: Path, inputs: Sequence[Sequence[Any]], outputs: Sequence[Sequence[Any]]) -> None:
    """Raise ValueError unless a file takes images and returns logits, of any number.

    Args:
        path: Of the file.
        inputs, outputs: Shapes, with None for a dynamic axis. ExecuTorch's are of one image at a time.
    """
    if [len(shape) for shape in (*inputs, *outputs)] != [4, 2] or None in (*inputs[0][1:], outputs[0][1]):
        raise ValueError(
            f"{path} takes {_words(inputs)} and returns {_words(outputs)}: expected one input [batch, channels, "
            "height, width] and logits [batch, classes], of which the batch alone is dynamic."
        )
    if inputs[0][0] is not None and path.suffix != ".pte":
        raise ValueError(
            f"{path} takes exactly {inputs[0][0]} images at a time: export it with a dynamic batch, as mgd-timm export "
            "does."
        )


def _words(shapes: Sequence[Sequence[Any]]) -> str:
    texts = (", ".join("?" if size is None else str(size) for size in shape) for shape in shapes)
    return " and ".join(f"[{text}]" for text in texts) or "nothing"


def _sizes(shape: Sequence[Any]) -> list[int | None]:
    """Return a shape with None for names and symbols."""
    return [size if type(size) is int else None for size in shape]


_Loaded = tuple[Predict, list[list[int | None]], list[list[int | None]], dict[str, Any]]
"""Function of images, shapes of the inputs and of the outputs, and what the file says of its images and classes."""


def _load_onnx(path: Path) -> _Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    kinds = {node.type for node in session.get_inputs()} - {"tensor(float)"}
    if kinds:
        raise ValueError(f"its input is {', '.join(sorted(kinds))}, and images are tensor(float)")
    written = session.get_modelmeta().custom_metadata_map
    about = {name: json.loads(written[name]) for name in METADATA if name in written}

    def predict(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {names[0]: images.numpy()})[0])

    shapes = [[_sizes(node.shape) for node in nodes] for nodes in (session.get_inputs(), session.get_outputs())]
    return predict, shapes[0], shapes[1], about


def _load_pt2(path: Path) -> _Loaded:
    _check_tensors_alone(path)
    program = torch.export.load(path)
    module = program.module()
    nodes = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    signature = program.graph_signature
    shapes = [
        [_sizes(nodes[name].shape) for name in names] for names in (signature.user_inputs, signature.user_outputs)
    ]

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        return module(images)

    return predict, shapes[0], shapes[1], {}


def _check_tensors_alone(path: Path) -> None:
    """Raise ValueError for a torch.export file that holds pickled objects or compiled code: loading would run them."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            runs = "/data/aotinductor/" in name or "custom_obj" in name
            if name.endswith("_config.json"):
                entries = json.loads(archive.read(name)).get("config", {}).values()
                runs = runs or any(entry.get("use_pickle") for entry in entries)
            # Example inputs; in files of older versions of torch also weights.
            runs = runs or (name.endswith(".pt") and _may_run_code(archive.read(name)))
            if runs:
                raise ValueError(f"{name} in it may run code, and was not loaded")


def _may_run_code(content: bytes) -> bool:
    """Return whether a file of torch names more than tensors are made of, without loading it."""
    try:
        return bool(get_unsafe_globals_in_checkpoint(io.BytesIO(content)))
    except Exception:  # what cannot be looked into is not loaded
        return True


def _load_openvino(path: Path) -> _Loaded:
    import openvino

    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(path, "CPU", threads)
    request = compiled.create_infer_request()

    def predict(images: Tensor) -> Tensor:
        return torch.from_numpy(request.infer([images.numpy()])[0].copy())

    shapes = [
        [[None if axis.is_dynamic else axis.get_length() for axis in node.get_partial_shape()] for node in nodes]
        for nodes in (compiled.inputs, compiled.outputs)
    ]
    return predict, shapes[0], shapes[1], {}


def _load_executorch(path: Path) -> _Loaded:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    if method is None:
        raise ValueError("it has no method 'forward'")
    about = method.metadata

    def predict(images: Tensor) -> Tensor:
        return torch.cat([method.execute([image[None]])[0].clone() for image in images])

    inputs = [list(about.input_tensor_meta(i).sizes()) for i in range(about.num_inputs())]
    return predict, inputs, [list(about.output_tensor_meta(i).sizes()) for i in range(about.num_outputs())], {}


_LOADERS: dict[str, tuple[str, Callable[[Path], _Loaded]]] = {
    ".onnx": ("onnx", _load_onnx),
    ".pt2": ("pt2", _load_pt2),
    ".xml": ("openvino", _load_openvino),
    ".pte": ("executorch", _load_executorch),
}


def _read_config(path: Path) -> dict[str, Any]:
    """Return the pretrained_cfg of the config.json beside a file or in the folder above; empty where there is none."""
    config = next(
        (one for one in (path.parent / "config.json", path.parents[1] / "config.json") if one.is_file()), None
    )
    if config is None:
        return {}
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        known = dict(values["pretrained_cfg"])
        return {**known, "architecture": values["architecture"], "label_names": values.get("label_names")}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{config}: not a config.json of timm ({error!r}): export the model again.") from error
