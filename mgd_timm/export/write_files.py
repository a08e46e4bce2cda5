"""Write a network in one file that another runtime runs: ONNX, torch.export, OpenVINO, ExecuTorch.

Every file takes normalised images, as a timm model does, and returns logits.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from mgd_timm.features.tap import model_name

INPUT, OUTPUT = "pixel_values", "logits"
"""Names of the input and the output, as Transformers has them."""
_LARGEST_ONNX = 2 * 1000**3
"""Bytes; protobuf's limit of a file is 2 GiB."""


def export_program(model: nn.Module, input_size: tuple[int, int, int], batch: int | None = None) -> ExportedProgram:
    """Return torch.export's graph of a network, of a dynamic batch or of a fixed one.

    Args:
        model: A network in eval mode, on the CPU.
        input_size: (channels, height, width).
        batch: Images of a fixed batch; None for a dynamic one.
    """
    # An example of one image would be taken for a batch that never changes.
    images = torch.zeros(batch or 2, *input_size)
    shapes = None if batch else ({0: Dim("batch")},)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    for part in program.graph_module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it has paths of this machine, and files would keep it
    return program


def check_fits_onnx(model: nn.Module) -> None:
    """Raise ValueError for weights that one ONNX file cannot hold."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > _LARGEST_ONNX:
        raise ValueError(
            f"{model_name(model)} has {size / 1e9:.1f} GB of weights, and an ONNX file holds 2 GB: leave onnx and int8 "
            "out of --to."
        )


def write_onnx(program: ExportedProgram, target: Path, metadata: Mapping[str, Any]) -> None:
    """Write an ONNX file in float32.

    Args:
        program: Of `export_program`.
        target: File to write.
        metadata: JSON values to write to the file's metadata_props.
    """
    with _without_warnings():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: "batch"},),  # the name of the axis
            verbose=False,
            external_data=False,
        )
    assert exported is not None
    _remove_traces(exported.model)
    exported.model.metadata_props.update({key: json.dumps(value) for key, value in metadata.items()})
    exported.save(target, external_data=False)


def _remove_traces(model: Any) -> None:
    """Remove what torch writes of each node for those who debug exporters, such as paths of this machine."""
    import onnx_ir

    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    for graph in graphs:
        graph.metadata_props.clear()
        for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def write_half_onnx(float_onnx: Path, target: Path) -> None:
    """Write an ONNX file with weights and arithmetic in float16; its input and its logits stay in float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(float_onnx), keep_io_types=True), target)


def write_pt2(program: ExportedProgram, target: Path) -> None:
    """Write a file that torch.export.load reads."""
    torch.export.save(program, target)


def write_openvino(program: ExportedProgram, input_size: tuple[int, int, int], target: Path) -> None:
    """Write OpenVINO's .xml, with a .bin of the same name beside it: weights in float16, as OpenVINO does by itself.

    Args:
        program: Of `export_program`.
        input_size: (channels, height, width).
        target: File to write.
    """
    import openvino

    with _without_warnings():
        converted = openvino.convert_model(program)
    converted.reshape([-1, *input_size])  # a convolutional network came out with any height and width
    converted.inputs[0].get_tensor().set_names({INPUT})
    converted.outputs[0].get_tensor().set_names({OUTPUT})
    openvino.save_model(converted, target)


def write_executorch(program: ExportedProgram, target: Path) -> None:
    """Write an ExecuTorch file for XNNPACK, the CPUs of phones.

    Args:
        program: Of `export_program`, with a fixed batch.
        target: File to write.
    """
    with _without_warnings():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    target.write_bytes(lowered.buffer)


@contextlib.contextmanager
def refused_formats(model: nn.Module, *formats: str) -> Iterator[None]:
    """Turn any error in the body into a ValueError that says which formats a network cannot be exported to."""
    try:
        yield
    except OSError:  # such as of a full disk
        raise
    except Exception as error:  # an exporter may raise anything
        raise ValueError(
            f"{model_name(model)} cannot be exported to {' and '.join(formats)} ({_reason(error)}): leave "
            f"{'it' if len(formats) == 1 else 'them'} out of --to."
        ) from error


def _reason(error: BaseException) -> str:
    """Return the first line of the error that caused others, without colours."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep the exporters' warnings from users, who can do nothing about them: they are of the libraries' own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
