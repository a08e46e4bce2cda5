"""A GPU of which every tensor has a shape and no values, on a machine without one; it notes what makes the host wait.

Tensors on the CPU are real: sampling, augmentation draws and files work as ever. Those on "cuda" are torch's fake
tensors, which refuse operations on tensors of different devices and shapes that depend on values.
"""

import contextlib
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

import mgd_timm

aten = torch.ops.aten
_PACKAGE = str(Path(mgd_timm.__file__).parent)
SMALL = 1 << 16
"""Bytes of pageable memory that CUDA takes over at once in a copy that is not blocking."""
_DECOMPOSITIONS = {"_linalg_svd", "_linalg_eigh", "linalg_eig", "linalg_lstsq"}
"""Their solvers read a status on the host."""


class FakeGpu(TorchDispatchMode):
    """Runs what concerns the device without values, all else for real, and counts where the host waits.

    `waits` counts by file of mgd_timm, `lines` by the innermost of its lines. What is copied to the host is made up:
    ones, or 0 for a single number that the host reads, such as by `.item()`.

    Raises (from the operation): FakeTensorDeviceMismatchError for tensors of different devices, and
    DynamicOutputShapeException for a shape that depends on values (nonzero, boolean masks), which would wait too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._pinned = WeakTensorKeyDictionary()

    def __enter__(self) -> "FakeGpu":
        self._fake.__enter__()
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # else, with a GPU, torch.tensor(..., device="cuda") would be real
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifted)
        self._fake.__exit__(*error)

    def put(self, module: nn.Module) -> nn.Module:
        """Move a module to the GPU, as `module.to("cuda")` would."""
        return module._apply(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fake = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        target = kwargs.get("device")
        if not fake and (target is None or torch.device(target).type == "cpu"):
            return self._run_on_host(func, tensors, args, kwargs)
        name = func.overloadpacket.__name__
        if func is aten._local_scalar_dense.default:
            self._note()
            return {torch.bool: False, torch.float32: 0.0, torch.float64: 0.0}.get(args[0].dtype, 0)
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copy(func, args, kwargs)
        host = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.ndim]
        if host or name in _DECOMPOSITIONS or (name.startswith("index_put") and _needs_count(args)):
            self._note()
        if func is aten._fused_sgd_.default:  # in place, and torch has no version of it without values
            return None
        return func(*args, **kwargs)

    def _run_on_host(self, func: Any, tensors: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten.is_pinned.default:
            return args[0] in self._pinned
        pins = func is aten._pin_memory.default or kwargs.pop("pin_memory", False)
        with unset_fake_temporarily():
            found = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
        if pins:
            self._pinned[found] = True
        return found

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run a copy or conversion, and note whether it waits as CUDA's does."""
        into = func is aten.copy_.default
        source = args[1] if into else args[0]
        target = args[0].device if into else torch.device(kwargs.get("device") or source.device)
        blocking = not (args[2] if into and len(args) > 2 else kwargs.get("non_blocking", False))
        if source.device.type == target.type or (into and target.type == "cuda" and not source.ndim):
            return func(*args, **kwargs)
        if target.type == "cpu":
            self._note()
            with unset_fake_temporarily():
                return args[0] if into else torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        small = source.numel() * source.itemsize <= SMALL
        if blocking or not (small or source in self._pinned):
            self._note()
        return func(*args, **kwargs)

    def _note(self) -> None:
        frame = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        file = str(Path(frame.f_code.co_filename).relative_to(_PACKAGE)) if frame is not None else "outside mgd_timm"
        self.waits[file] += 1
        self.lines[f"{file}:{frame.f_lineno} in {frame.f_code.co_name}" if frame is not None else file] += 1


def _needs_count(args: Any) -> bool:
    """Return whether index_put has a boolean mask, and values that are more than one number for all places."""
    masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and args[2].numel() != 1


def backward(tensors: Any, *_: Any, **__: Any) -> None:
    """torch.autograd.backward of one scalar: calls the same functions in the same order as torch's engine does, which
    needs a device with streams even for fake tensors.

    Raises AssertionError for a gradient on another device than its tensor, as the engine does.
    """
    loss = tensors if isinstance(tensors, Tensor) else tensors[0]
    waiting: Counter[Any] = Counter()
    seen, stack = {loss.grad_fn}, [loss.grad_fn]
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                waiting[following] += 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    arrived: dict[Any, dict[int, Tensor]] = defaultdict(dict, {loss.grad_fn: {0: torch.ones_like(loss)}})
    ready = [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            grads = arrived.pop(node, {})
            if hasattr(node, "variable"):
                for grad in grads.values():
                    node.variable.grad = grad if node.variable.grad is None else node.variable.grad + grad
                continue
            found = _call(node, grads) if grads else ()
            for number, (following, place) in enumerate(node.next_functions):
                if following is None:
                    continue
                grad = found[number] if number < len(found) else None
                if grad is not None:
                    grad = _fitted(grad, following._input_metadata[place])
                    before = arrived[following].get(place)
                    arrived[following][place] = grad if before is None else before + grad
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)


def _call(node: Any, grads: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradients of a function's inputs."""
    metadata = node._input_metadata
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # one of Python, whose tensors come first
        zeros = (torch.zeros(m.shape, dtype=m.dtype, device=m.device) for m in metadata)
        found = node.apply(*(grads.get(i, zero) for i, zero in enumerate(zeros)))
    else:
        found = node(*(grads.get(i) for i in range(len(metadata))))
    return found if isinstance(found, tuple) else (found,)


def _fitted(grad: Tensor, wanted: Any) -> Tensor:
    assert grad.device == wanted.device, f"a gradient on {grad.device} of a tensor on {wanted.device}"
    return grad.sum_to_size(wanted.shape).to(wanted.dtype)


class HostGenerator(torch.Generator):
    """A generator on the CPU in place of one on a device, which would start CUDA."""

    def __new__(cls, device: Any = None) -> "HostGenerator":
        return super().__new__(cls)


@contextlib.contextmanager
def gpu_machine(precision: str, steps: int = 1, free_memory: int = 80 << 30) -> Iterator[tuple[FakeGpu, Accelerator]]:
    """Yield a GPU without values and accelerate's accelerator of it, and let torch believe in it.

    Args:
        precision: Accelerate's mixed precision.
        steps: Micro-batches per update.
        free_memory: Bytes that the GPU has.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:0")
        patch.setattr(torch.autograd, "backward", backward)
        # torch.autocast turns itself off where there is no GPU.
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (free_memory, free_memory))
        patch.setattr(torch, "Generator", HostGenerator)
        # DataLoader pins memory only then.
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cuda"))
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(
            device_placement=False, mixed_precision=precision, gradient_accumulation_steps=steps
        )  # modules are on the device already, and fake ones cannot be moved again
        try:
            with FakeGpu() as gpu:
                yield gpu, accelerator
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
