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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

from mgd_timm.distributed.collectives import broadcast_tensors, has_process_group
from mgd_timm.features import FeatureTap

# Shares of a network's parameters in an FSDP unit: a few gathered units are little of the network, and each is worth a
# message between processes.
LARGEST, SMALLEST = 1 / 8, 1 / 200


def fsdp_requested() -> bool:
    """Return whether `accelerate launch` was configured for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_sharding() -> bool:
    """Return whether what trains is sharded between the processes of this launch."""
    return fsdp_requested() and has_process_group()


def check_sharding(accelerator: Accelerator) -> None:
    """Refuse what an accelerate configuration asks for and `Sharded` does not do.

    Raises:
        ValueError: DeepSpeed and other engines; with FSDP: version 1, fp16, weights that are offloaded to the CPU,
            recomputed activations, ignored modules, or a parallelism_config.
    """
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP):
        reason = ": it keeps weights and optimizer to itself, and checkpoints here could not hold them"
        raise ValueError(
            f"accelerate was configured for {kind.value}{reason if kind == DistributedType.DEEPSPEED else ''}. "
            "Expected one process, several on CPUs or GPUs (DDP), or FSDP2 (recipes/fsdp.yaml): configure one of these."
        )
    if not fsdp_requested():
        return
    plugin = FullyShardedDataParallelPlugin()  # from the environment, as on a GPU accelerate's own
    refused = {
        f"fsdp_version {plugin.fsdp_version}": plugin.fsdp_version != 2,
        "fsdp_offload_params": os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true",
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_ignored_modules": plugin.ignored_modules is not None,
        f"mixed_precision {accelerator.mixed_precision}": accelerator.mixed_precision not in ("no", "bf16"),
        "parallelism_config": accelerator.parallelism_config is not None,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(
                f"accelerate was configured for FSDP with {name}, which is not supported: expected fsdp_version 2, "
                "float32 or bf16, and all of it on the devices. Start from recipes/fsdp.yaml."
            )


@dataclass(frozen=True)
class MovingAverage:
    """timm's moving average of a part of what trains.

    Args:
        ema: Holds the average, whole or in shards.
        followed: The part of what trains that it averages.
        module: Has the average's values within `full_parameters`, and after `copy_to_caller`.
    """

    ema: ModelEmaV3
    followed: nn.Module
    module: nn.Module


class Replicated:
    """What trains, whole on every process: accelerate's DDP, or one process alone.

    Args:
        trainee: The module to train, on the accelerator's device.
        accelerator: Device, processes and precision.
    """

    def __init__(self, trainee: nn.Module, accelerator: Accelerator) -> None:
        self.trainee, self.accelerator = trainee, accelerator

    def prepare(self, wrapper: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        """Return what is called for the losses, and what is called for an optimizer step."""
        model, prepared = self.accelerator.prepare(wrapper, optimizer)
        return model, prepared

    def rebuild_buckets(self, model: Any, backward: Callable[[], None]) -> None:
        """Have DDP settle now, by one backward pass, how it groups gradients; the caller drops the gradients.

        DDP sums gradients in other buckets after its first pass. Of three or more processes, the buckets decide the
        order in which a number is summed: a resumed run would end in other last bits than one that was never stopped.

        Args:
            model: What `prepare` returned.
            backward: Carries out a forward and a backward pass.
        """
        if isinstance(model, nn.parallel.DistributedDataParallel) and self.accelerator.num_processes > 2:
            backward()

    def no_sync(self, model: Any) -> contextlib.AbstractContextManager[None]:
        """Add gradients up on each process, without exchanging them."""
        return self.accelerator.no_sync(model)

    def full_parameters(self) -> contextlib.AbstractContextManager[None]:
        """Let the caller's module, and its moving average, have the current values in the body."""
        return contextlib.nullcontext()

    def copy_to_caller(self) -> None:
        """Let the caller's module, and its moving average, have the current values from now on."""

    def moving_average(self, part: nn.Module, **options: Any) -> MovingAverage:
        """Return a moving average of a part of the trainee; `options` are those of timm's ModelEmaV3."""
        ema = ModelEmaV3(part, **options)
        return MovingAverage(ema, part, ema.module)

    def gather_full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors for a checkpoint on the main process. All processes call it together."""
        return dict(tensors)


class Sharded(Replicated):
    """What trains, its parameters, gradients and optimizer state sharded between the processes (FSDP2).

    Buffers are whole on each process: `fit` keeps BatchNorm's statistics equal; of others the main process's are saved,
    as under DDP.

    Args:
        trainee: The module to train. It has no memory but within `full_parameters` and after `copy_to_caller`.
        accelerator: Device, processes and precision; mixed precision is autocast's, weights travel as float32.

    Raises:
        ValueError: A parameter without dimensions, which cannot be sharded.
    """

    def __init__(self, trainee: nn.Module, accelerator: Accelerator) -> None:
        names = [
            f"{name}.{unit}" if name else unit
            for name, tap in trainee.named_modules()
            if isinstance(tap, FeatureTap)
            for unit in fsdp_units(tap)
        ]
        super().__init__(copy.deepcopy(trainee), accelerator)
        self._caller, self._copies = trainee, [_FullCopy(trainee, self.trainee)]
        _make_contiguous(self.trainee)
        # As DDP does: shards of different copies would be no network.
        broadcast_tensors(self.trainee.parameters(), accelerator)
        shard(self.trainee, names, accelerator)

    def prepare(self, wrapper: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        """As of `Replicated`: adds autocast as accelerate does under DDP, as the trainee is sharded already."""

        def forward(*inputs: Any) -> Any:
            with self.accelerator.autocast():
                return wrapper(*inputs)

        return convert_outputs_to_fp32(forward), optimizer

    @contextlib.contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:  # noqa: ARG002 - the trainee's own switch
        """As of `Replicated`; it takes the memory of a whole gradient on each process."""
        root = cast(FSDPModule, self.trainee)
        root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            root.set_requires_gradient_sync(True)

    @contextlib.contextmanager
    def full_parameters(self) -> Iterator[None]:
        """As of `Replicated`; they have memory in the body alone. All processes enter it together."""
        self.copy_to_caller()
        try:
            yield
        finally:
            for full in self._copies:
                full.release()

    def copy_to_caller(self) -> None:
        """As of `Replicated`. All processes call it together."""
        for full in self._copies:
            full.fill()

    def moving_average(self, part: nn.Module, **options: Any) -> MovingAverage:
        """As of `Replicated`, sharded as the part that it follows."""
        name = next(name for name, module in self._caller.named_modules() if module is part)
        followed = self.trainee.get_submodule(name)
        with self.full_parameters():
            ema = ModelEmaV3(part, foreach=False, **options)  # foreach takes no lists of sharded and whole tensors
        full = ema.module
        ema.module = copy.deepcopy(full)
        for (path, _), live in zip(list(ema.module.named_parameters()), followed.parameters(), strict=True):
            owner, _, own = path.rpartition(".")
            ema.module.get_submodule(owner).register_parameter(
                own, nn.Parameter(live.detach().clone(), requires_grad=False)
            )
        self._copies.append(_FullCopy(full, ema.module))
        return MovingAverage(ema, followed, full)

    def gather_full(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As of `Replicated`: on the main process's CPU, one tensor after another; the others get nothing."""
        found = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.accelerator.is_main_process:
                found[name] = full.detach().cpu()
        return found


class _FullCopy:
    """A whole module beside its sharded counterpart, with memory and the counterpart's values between `fill` and
    `release`."""

    def __init__(self, full: nn.Module, sharded: nn.Module) -> None:
        self.sharded = sharded
        self.parameters = list(full.parameters())
        self.layouts = [(p.shape, p.stride()) for p in self.parameters]
        self.buffers = list(full.buffers())
        self.release()

    @torch.no_grad()
    def fill(self) -> None:
        for mine, (shape, stride), theirs in zip(self.parameters, self.layouts, self.sharded.parameters(), strict=True):
            mine.data = torch.empty_strided(shape, stride, dtype=mine.dtype, device=mine.device)
            mine.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
        for buffer, value in zip(self.buffers, self.sharded.buffers(), strict=True):
            buffer.copy_(value)

    def release(self) -> None:
        for parameter in self.parameters:
            parameter.data = parameter.new_empty(0)


def make_data_parallel(trainee: nn.Module, accelerator: Accelerator) -> Replicated:
    """Return what trains, whole on each process or sharded, as the accelerator was configured."""
    return Sharded(trainee, accelerator) if is_sharding() else Replicated(trainee, accelerator)


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a whole tensor if `like`, a tensor of its shape, is sharded; else the tensor."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_full_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors into a module that may be sharded."""
    own = module.state_dict()
    module.load_state_dict(
        {name: shard_like(value, own[name]) if name in own else value for name, value in tensors.items()}
    )


def shard(module: nn.Module, names: Sequence[str], accelerator: Accelerator) -> None:
    """Shard a module's parameters between all processes, in place and for good.

    Args:
        module: To be sharded.
        names: Its FSDP units; what remains is one more unit.
        accelerator: Device and processes.

    Raises:
        ValueError: A parameter without dimensions that is to be trained (timm: dm_nfnet_*); a frozen one stays whole.
    """
    scalars = {name: parameter for name, parameter in module.named_parameters() if not parameter.ndim}
    for name, parameter in scalars.items():
        if parameter.requires_grad:
            raise ValueError(f"{name} is a single number, which FSDP2 cannot shard: train this network under DDP.")
    _make_contiguous(module)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshard = FullyShardedDataParallelPlugin(fsdp_version=2).reshard_after_forward
    frozen = set(scalars.values())
    for name in names:
        fully_shard(module.get_submodule(name), mesh=mesh, reshard_after_forward=reshard, ignored_params=frozen)
    trains = any(parameter.requires_grad for parameter in module.parameters())
    # What remains is needed at once by the backward pass, where there is one.
    fully_shard(module, mesh=mesh, reshard_after_forward=not trains, ignored_params=frozen)


def _make_contiguous(module: nn.Module) -> None:
    """Make parameters contiguous, not channels-last: no others can be sharded."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


def fsdp_units(tap: FeatureTap) -> list[str]:
    """Return names of the parts of a network that are gathered one at a time; the rest is gathered once for a step.

    A unit's parameters are there while it is called, and only then. So the units are found by one forward pass: the
    largest modules of at most `LARGEST` of all parameters that are called once, share no parameter and of which nothing
    is called from outside.
    """
    calls, entered = _record_calls(tap)
    uses = Counter(id(parameter) for _, parameter in tap.named_parameters(remove_duplicate=False))
    total = sum(parameter.numel() for parameter in tap.parameters())
    found: list[str] = []

    def search(prefix: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            own = list(child.parameters())
            size = sum(parameter.numel() for parameter in own)
            closed = calls[child] == 1 and child not in entered and all(uses[id(parameter)] == 1 for parameter in own)
            divisible = any(next(part.parameters(), None) is not None for part in child.children())
            if size < SMALLEST * total:
                continue
            if closed and (size <= LARGEST * total or not divisible):
                found.append(f"{prefix}{name}")
            else:
                search(f"{prefix}{name}.", child)

    search("", tap)
    return found


def _record_calls(tap: FeatureTap) -> tuple[Counter[nn.Module], set[nn.Module]]:
    """Return how often a forward pass calls each module, and the modules of which it calls a part from outside."""
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
        last = running.pop()
        assert last is module

    handles = [module.register_forward_pre_hook(enter) for module in tap.modules()]
    handles += [module.register_forward_hook(leave) for module in tap.modules()]
    tap.shapes((tap.input_size[1], tap.input_size[2]))
    for handle in handles:
        handle.remove()
    return calls, entered
