"""FSDP2: what trains is sharded between the processes, and whole where it is evaluated, saved and exported.

`torch.distributed.fsdp.fully_shard` changes a module for good (its class, its hooks). So a copy of it is sharded, and
the caller's module has no memory while the copy trains: `Sharded.full_parameters` gives it the current values for a
while. Accelerate's own FSDP2 path is for GPUs alone, casts all that enters the module to bfloat16 (the teacher's
logits, the losses) and would do so with BatchNorm's weights; so accelerate decides and computes here as under DDP, and
CPU and GPU run the same lines.
"""

import contextlib
import copy
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin, convert_outputs_to_fp32
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from mgd_timm.distributed.collectives import broadcast_tensors
from mgd_timm.features import FeatureTap

# Parts gathered one at a time: as large as that a few of them are little of the network, and worth a message between
# processes.
LARGEST, SMALLEST = 1 / 8, 1 / 200


def fsdp_requested() -> bool:
    """Whether `accelerate launch` was configured for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_sharding(accelerator: Accelerator) -> None:
    """Refuse what an accelerate configuration asks for and `Sharded` does not do.

    Raises:
        ValueError: DeepSpeed and other engines, FSDP version 1, fp16, weights that wait on the CPU, recomputed
            activations, or a mesh of several dimensions.
    """
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        reason = "its engine keeps weights and optimizer to itself, where our checkpoints cannot hold them"
        raise ValueError(
            f"accelerate was configured for {kind.value}"
            + (f": {reason}" if kind == DistributedType.DEEPSPEED else "")
            + ". Supported are one process, several on CPUs or GPUs (DDP), and FSDP2 "
            "(recipes/fsdp.yaml): configure one of these."
        )
    if not fsdp_requested():
        return
    plugin = FullyShardedDataParallelPlugin()  # from the environment, as on a GPU accelerate's own
    refused = {
        f"fsdp_version {plugin.fsdp_version}": plugin.fsdp_version != 2,
        "fsdp_offload_params": os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true",
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_ignored_modules": plugin.ignored_modules is not None,
        "mixed_precision fp16": accelerator.mixed_precision == "fp16",
        f"mixed_precision {accelerator.mixed_precision}": accelerator.mixed_precision not in ("no", "fp16", "bf16"),
        "parallelism_config": accelerator.parallelism_config is not None,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(
                f"accelerate was configured for FSDP with {name}, which is not supported: expected fsdp_version 2, "
                "float32 or bf16, and all of it on the devices. Start from recipes/fsdp.yaml."
            )


def is_sharding() -> bool:
    """Whether a fit is cut up between the processes that there are."""
    return fsdp_requested() and torch.distributed.is_available() and torch.distributed.is_initialized()


class Replicated:
    """What trains lies on every process as a whole: accelerate's DDP, or one process alone.

    Args:
        trainee: The module to train, on the accelerator's device.
        accelerator: Device, processes and precision.
    """

    def __init__(self, trainee: nn.Module, accelerator: Accelerator) -> None:
        self.trainee, self.accelerator = trainee, accelerator

    def prepare(self, wrapper: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        """What gives the losses, and what updates."""
        model, prepared = self.accelerator.prepare(wrapper, optimizer)
        return model, prepared

    def no_sync(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """While it is open, gradients are added up and not exchanged."""
        return self.accelerator.no_sync(model)

    def full_parameters(self) -> contextlib.AbstractContextManager[None]:
        """While it is open, the caller's module has the current values."""
        return contextlib.nullcontext()

    def copy_to_caller(self) -> None:
        """The caller's module has the current values from now on."""

    def moving_average(self, part: nn.Module, **options: Any) -> tuple[ModelEmaV3, nn.Module, nn.Module]:
        """A moving average of a part of the trainee, what it is to follow, and the module that has its values in
        `full_parameters`."""
        ema = ModelEmaV3(part, **options)
        return ema, part, ema.module

    def gather_full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as a checkpoint holds them; all processes ask together, the main one saves."""
        return dict(tensors)


class Sharded(Replicated):
    """Parameters, gradients and optimizer state of what trains are cut up between the processes (FSDP2).

    Buffers lie whole on each process: `fit` keeps BatchNorm's statistics equal; of others the main process's are saved,
    as under DDP.

    Args:
        trainee: The module to train: it is without memory but in `full_parameters`, and after `copy_to_caller`.
        accelerator: Device, processes and precision; mixed precision is autocast's, weights travel as float32.

    Raises:
        ValueError: A parameter without dimensions, which cannot be cut.
    """

    def __init__(self, trainee: nn.Module, accelerator: Accelerator) -> None:
        names = [name for tap, kept in _taps(trainee) for name in (f"{tap}{unit}" for unit in fsdp_units(kept))]
        super().__init__(copy.deepcopy(trainee), accelerator)
        self._caller, self._mirrors = trainee, [_Mirror(trainee, self.trainee)]
        _lay_flat(self.trainee)
        # As DDP does: shards of different copies would be no network.
        broadcast_tensors(self.trainee.parameters(), accelerator)
        shard(self.trainee, names, accelerator)

    def prepare(self, wrapper: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        """The trainee is cut up already: this adds autocast as accelerate does for DDP."""

        def forward(*inputs: Any) -> Any:
            with self.accelerator.autocast():
                return wrapper(*inputs)

        return convert_outputs_to_fp32(forward), optimizer

    @contextlib.contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:  # noqa: ARG002 - the trainee's own switch
        """Gradients are added up as a whole on each process, which takes the memory of an uncut gradient."""
        root = cast(FSDPModule, self.trainee)
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    @contextlib.contextmanager
    def full_parameters(self) -> Iterator[None]:
        """While it is open, the caller's module and its average have memory, and the current values."""
        self.copy_to_caller()
        try:
            yield
        finally:
            for mirror in self._mirrors:
                mirror.release()

    def copy_to_caller(self) -> None:
        """The caller's module and its average have the current values from now on; all processes together."""
        for mirror in self._mirrors:
            mirror.fill()

    def moving_average(self, part: nn.Module, **options: Any) -> tuple[ModelEmaV3, nn.Module, nn.Module]:
        """As ever, cut up like the part that it follows."""
        place = next(name for name, module in self._caller.named_modules() if module is part)
        followed = self.trainee.get_submodule(place)
        with self.full_parameters():
            ema = ModelEmaV3(part, foreach=False, **options)  # foreach takes no lists of cut and whole tensors
        whole = ema.module
        ema.module = copy.deepcopy(whole)
        for (name, _), live in zip(list(ema.module.named_parameters()), followed.parameters(), strict=True):
            owner, _, own = name.rpartition(".")
            ema.module.get_submodule(owner).register_parameter(
                own, nn.Parameter(live.detach().clone(), requires_grad=False)
            )
        self._mirrors.append(_Mirror(whole, ema.module))
        return ema, followed, whole

    def gather_full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the main process's CPU; nothing on the others."""
        found = {}
        for name, tensor in tensors.items():
            whole = (
                tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            )  # one after the other: all take part
            if self.accelerator.is_main_process:
                found[name] = whole.detach().cpu()
        return found


class _Mirror:
    """A whole module and its cut-up counterpart: the whole one gets memory and the other's values, or gives its memory
    back."""

    def __init__(self, whole: nn.Module, live: nn.Module) -> None:
        self.live = live
        self.parameters = list(whole.parameters())
        self.layouts = [(p.shape, p.stride()) for p in self.parameters]
        self.buffers = list(whole.buffers())
        self.release()

    @torch.no_grad()
    def fill(self) -> None:
        for mine, (shape, stride), theirs in zip(self.parameters, self.layouts, self.live.parameters(), strict=True):
            mine.data = torch.empty_strided(shape, stride, dtype=mine.dtype, device=mine.device)
            mine.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
        for buffer, value in zip(self.buffers, self.live.buffers(), strict=True):
            buffer.copy_(value)

    def release(self) -> None:
        for parameter in self.parameters:
            parameter.data = parameter.new_empty(0)


def make_data_parallel(trainee: nn.Module, accelerator: Accelerator) -> Replicated:
    """What trains, where the accelerator's configuration wants it: whole on each process, or cut up between them."""
    return Sharded(trainee, accelerator) if is_sharding() else Replicated(trainee, accelerator)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as this process holds it beside a tensor of that shape: its part, where that one is cut up."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_full_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module that may be cut up."""
    own = module.state_dict()
    module.load_state_dict(
        {name: shard_like(value, own[name]) if name in own else value for name, value in tensors.items()}
    )


def shard(module: nn.Module, names: Sequence[str], accelerator: Accelerator) -> None:
    """Cut a module's parameters up between all processes, in place and for good: its parts of these names, then what
    remains.

    Raises:
        ValueError: A parameter without dimensions that is to be trained (timm: dm_nfnet_*); a frozen one stays whole.
    """
    numbers = {name: parameter for name, parameter in module.named_parameters() if not parameter.ndim}
    for name, parameter in numbers.items():
        if parameter.requires_grad:
            raise ValueError(f"{name} is a single number, which FSDP2 cannot cut up: train this network under DDP.")
    _lay_flat(module)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    free = FullyShardedDataParallelPlugin(fsdp_version=2).reshard_after_forward
    frozen = set(numbers.values())
    for name in names:
        fully_shard(module.get_submodule(name), mesh=mesh, reshard_after_forward=free, ignored_params=frozen)
    trains = any(parameter.requires_grad for parameter in module.parameters())
    # What remains is needed at once by the backward pass, where there is one.
    fully_shard(module, mesh=mesh, reshard_after_forward=not trains, ignored_params=frozen)


def _lay_flat(module: nn.Module) -> None:
    """Contiguous parameters, the only ones that can be cut up: not channels-last."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


def _taps(module: nn.Module) -> list[tuple[str, FeatureTap]]:
    return [(f"{name}." if name else "", part) for name, part in module.named_modules() if isinstance(part, FeatureTap)]


def fsdp_units(tap: FeatureTap) -> list[str]:
    """Names of the parts of a network that are gathered one at a time: all else is gathered once, for the whole step.

    A part's parameters are there while it is called, and only then. So they are found by one forward pass: the largest
    modules of at most `LARGEST` of all parameters that are called once, share no parameter and of which nothing is
    called from outside.
    """
    calls, entered = _calls(tap)
    uses = Counter(id(parameter) for _, parameter in tap.named_parameters(remove_duplicate=False))
    total = sum(parameter.numel() for parameter in tap.parameters())
    found: list[str] = []

    def search(place: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            own = list(child.parameters())
            size = sum(parameter.numel() for parameter in own)
            closed = calls[child] == 1 and child not in entered and all(uses[id(parameter)] == 1 for parameter in own)
            divisible = any(next(part.parameters(), None) is not None for part in child.children())
            if size < SMALLEST * total:
                continue
            if closed and (size <= LARGEST * total or not divisible):
                found.append(f"{place}{name}")
            else:
                search(f"{place}{name}.", child)

    search("", tap)
    return found


def _calls(tap: FeatureTap) -> tuple[Counter[nn.Module], set[nn.Module]]:
    """How often a forward pass calls each module, and the modules of which it calls a part while they are not called
    themselves."""
    calls: Counter[nn.Module] = Counter()
    entered: set[nn.Module] = set()
    running: list[nn.Module] = []
    around: dict[nn.Module, list[nn.Module]] = defaultdict(list)
    for module in tap.modules():
        for part in module.modules():
            around[part].append(module)

    def enter(module: nn.Module, _: Any) -> None:
        running.append(module)
        calls[module] += 1
        entered.update(outer for outer in around[module] if outer not in running)

    def leave(module: nn.Module, *_: Any) -> None:
        assert running.pop() is module

    handles = [module.register_forward_pre_hook(enter) for module in tap.modules()]
    handles += [module.register_forward_hook(leave) for module in tap.modules()]
    tap.shapes((tap.input_size[1], tap.input_size[2]))
    for handle in handles:
        handle.remove()
    return calls, entered
