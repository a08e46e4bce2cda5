"""What stands between a trainee and accelerate: the compiled form of whole batches, and what DDP leaves alone."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mgd_timm.criteria import CrossEntropy
from mgd_timm.criteria.base import Criterion, Objective
from mgd_timm.distiller import TeacherFeatures, is_full
from mgd_timm.features import Batch


class Wrapper(nn.Module):
    """What accelerate may wrap and patch; the trainee itself stays as it is.

    Args:
        trainee: Whose forward(batch, teacher) gives its losses by name, and logits.
        micro_batch_size: Of a full update, which alone is compiled.
        mode: torch.compile's; None compiles nothing.
        kept: The trainee's buffers that are kept identical on all processes by other means than DDP's.
    """

    def __init__(self, trainee: nn.Module, micro_batch_size: int, mode: str | None, kept: Sequence[str]) -> None:
        super().__init__()
        self.trainee, self.micro_batch_size = trainee, micro_batch_size
        # Beside the module, not in it: a compiled module would register the same parameters again.
        self.compiled = [torch.compile(trainee, dynamic=False, mode=mode)] if mode is not None else []
        # DDP's: not to be sent from the first process before every step, as we or a criterion keep them identical.
        self._ddp_params_and_buffers_to_ignore = [f"trainee.{name}" for name in kept]
        self._ddp_params_and_buffers_to_ignore += [
            f"trainee.{place}.{name}"
            for place, module in trainee.named_modules()
            if isinstance(module, Criterion)
            for name in module.synchronised
        ]

    def forward(self, batch: Batch, teacher: TeacherFeatures | None) -> tuple[dict[str, Tensor], Tensor]:
        """The trainee's losses and logits. A batch of another size, an epoch's last one, is not worth compiling again
        for."""
        trainee = self.compiled[0] if self.compiled and is_full(batch, self.micro_batch_size) else self.trainee
        found: tuple[dict[str, Tensor], Tensor] = trainee(batch, teacher)
        return found[0], found[
            1
        ].detach()  # to be counted: DDP would take a classifier that no loss reads for one that learns


def reads_logits(trainee: nn.Module) -> bool:
    """Whether a loss reads the student's logits: without one, as of maps alone, its classifier takes no gradient."""
    objectives = [module for module in trainee.modules() if isinstance(module, Objective)]
    criteria = [term for objective in objectives for term in objective.criteria.values() if isinstance(term, Criterion)]
    return not objectives or any(isinstance(term, CrossEntropy) or term.needs & {"logits", "cams"} for term in criteria)


def compile_mode(accelerator: Accelerator) -> str:
    """torch.compile's mode: CUDA graphs on one GPU, unless gradients accumulate, which would outlive the graph that
    made them."""
    alone = accelerator.num_processes == 1 and accelerator.gradient_accumulation_steps == 1
    return "reduce-overhead" if accelerator.device.type == "cuda" and alone else "default"
