"""Quantise an ONNX file to int8 after training: static, QDQ, unsigned activations, signed weights per channel."""

import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mgd_timm.storage.atomic_write import write_atomically


def quantize_onnx(
    float_onnx: Path, target: Path, calibration_batches: Iterable[Float[Tensor, "_ channels height width"]]
) -> None:
    """Quantise a float32 ONNX file with onnxruntime: QDQ, weights int8 per channel, activations uint8, min and max.

    Args:
        float_onnx: File with one input, of dynamic batch.
        target: File to write, or to replace.
        calibration_batches: Images as the network gets them, normalised; 300 or more are enough for ranges that hold.

    Raises:
        ValueError: There are no images.
        OSError: The file could not be written; nothing partial is left.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = _check_not_empty(calibration_batches)
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Symbolic inference of shapes is for language models, and fails on some networks.
        quant_pre_process(str(float_onnx), str(prepared), skip_symbolic_shape=True)

        def write(draft: Path) -> None:
            quantize_static(
                str(prepared),
                str(draft),
                _CalibrationReader(input_name(float_onnx), batches),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )

        write_atomically(target, write)


def quantize_onnx_with_bias_correction(
    float_onnx: Path, target: Path, calibration_batches: Iterable[Float[Tensor, "_ channels height width"]]
) -> str:
    """Quantise a float32 ONNX file with NNCF, for networks that `quantize_onnx` breaks.

    Networks with hard-swish and squeeze-and-excitation are such. The full correction takes minutes where
    `quantize_onnx` takes seconds.

    Args:
        float_onnx: As for `quantize_onnx`.
        target: File to write, or to replace.
        calibration_batches: As for `quantize_onnx`; used image by image.

    Returns:
        What was done: full bias correction, or what NNCF does for transformers, where that fails.

    Raises:
        ValueError: There are no images.
        OSError: The file could not be written; nothing partial is left.
    """
    import nncf
    import onnx

    images = [image[None].numpy() for batch in _check_not_empty(calibration_batches) for image in batch]
    name = input_name(float_onnx)
    nncf.set_log_level(logging.ERROR)

    def quantise(**options: Any) -> Any:
        dataset = nncf.Dataset(images, lambda image: {name: image})
        with contextlib.redirect_stdout(sys.stderr):  # of its progress bars
            return nncf.quantize(onnx.load(float_onnx), dataset, subset_size=len(images), **options)

    way = "full bias correction"
    try:
        quantised = quantise(fast_bias_correction=False)
    except Exception:  # NNCF 3.4 cuts graphs with attention into parts that onnxruntime does not load
        way = "smoothing and fast bias correction"
        quantised = quantise(model_type=nncf.ModelType.TRANSFORMER)
    write_atomically(target, lambda draft: onnx.save(quantised, draft))
    return way


def input_name(path: Path) -> str:
    """Return the name of an ONNX file's first input."""
    import onnx

    return onnx.load(path, load_external_data=False).graph.input[0].name


class _CalibrationReader:
    """Batches as onnxruntime's quantiser asks for them."""

    def __init__(self, name: str, batches: Iterator[Tensor]) -> None:
        self.name, self.batches = name, batches

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch by the input's name; None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch.numpy()}


def _check_not_empty(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Return an iterator over batches. Raise ValueError if there are none."""
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None or not len(first):
        raise ValueError("there are no images to calibrate int8 on: expected at least one, better 300.")

    def every() -> Iterator[Tensor]:
        yield first
        yield from iterator

    return every()
