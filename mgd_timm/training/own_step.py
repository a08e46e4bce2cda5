"""A criterion's step of its own, before an update: KRNet's attention nets learn from a virtual step of the student."""

from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mgd_timm.criteria import CrossEntropy, KRNet
from mgd_timm.criteria.base import Objective
from mgd_timm.distiller import Distiller
from mgd_timm.features import Batch, Features


class OwnStep:
    """Updates what the run's optimizer leaves alone, by an optimizer of its own.

    Args:
        student: Of the trainee.
        objective: Has the criterion, and the student's task.
        name: The criterion's term.
        accelerator: Device and processes.

    Raises:
        ValueError: There is no loss of the labels, or the precision is fp16.
    """

    def __init__(self, student: nn.Module, objective: Objective, name: str, accelerator: Accelerator) -> None:
        self.student, self.objective, self.name, self.accelerator = student, objective, name, accelerator
        self.criterion = cast(KRNet, objective.criteria[name])
        tasks = [name for name, criterion in objective.criteria.items() if isinstance(criterion, CrossEntropy)]
        if not tasks:
            raise ValueError(
                f"{name} learns from the labels' loss, which has no weight: give it one (--task-weight 1)."
            )
        if accelerator.mixed_precision == "fp16":
            raise ValueError(
                f"{name} with fp16: its own step has gradients of gradients, which do not fit a loss scale. Launch "
                "with --mixed_precision bf16 or no."
            )
        self.task = tasks[0]
        self.parameters = list(self.criterion.attention.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.criterion.meta_lr)

    def is_due(self, done: int) -> bool:
        """Return whether the step is to be taken before the next update, of `done` updates so far."""
        return done % self.criterion.interval == 0

    def run(self, batch: Batch, teacher: Features, count: int) -> None:
        """Take the step. All processes take it together.

        Args:
            batch: This process's.
            teacher: Features of the batch.
            count: Samples of its own, by which the processes' gradients are averaged.
        """
        gradients = self.criterion.attention_gradients(
            self.student, self._task, lambda loss: self.objective.weigh(self.name, loss), batch, teacher
        )
        # DDP does not know of these parameters.
        values = [gradient.flatten() for gradient in gradients]
        total = cast(Tensor, self.accelerator.reduce(torch.cat([*values, values[0].new_ones(1)]) * count, "sum"))
        mean = (total[:-1] / total[-1]).split([len(value) for value in values])
        for parameter, gradient in zip(self.parameters, mean, strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _task(self, student: Features, batch: Batch) -> Tensor:
        loss = self.objective.criteria[self.task](student, student, batch)  # labels are all that it compares with
        return self.objective.weigh(self.task, loss)


def find_own_step(trainee: nn.Module, accelerator: Accelerator) -> OwnStep | None:
    """Return the step of its own of a criterion in a trainee, or None."""
    for objective in trainee.modules():
        if isinstance(objective, Objective):
            for name, criterion in objective.criteria.items():
                if isinstance(criterion, KRNet):
                    assert isinstance(trainee, Distiller)  # one student, one teacher
                    return OwnStep(trainee.student, objective, name, accelerator)
    return None
