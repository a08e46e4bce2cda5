"""KRNet: attention over features that is learnt by the student's progress on its task (Zhu, Chen, Liu 2022)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from mgd_timm.criteria.adapters import ChannelAdapter, paired_maps, pool_larger
from mgd_timm.criteria.base import Criterion, at_least_float32
from mgd_timm.features import Batch, Features, Pair


class AttentionNet(nn.Module):
    """Attention maps of one stage: 1x1 convolutions on both networks' maps, each normalised over its sample, and a
    softmax over the groups.

    Args:
        student_channels, teacher_channels: Of the maps.
        groups: Number of attention maps.
        hidden: Width of the hidden layer.
    """

    def __init__(self, student_channels: int, teacher_channels: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(teacher_channels, student_channels, 1, bias=False)
        self.layers = nn.Sequential(nn.Conv2d(2 * student_channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, groups, 1))

    def forward(
        self, student: Float[Tensor, "b c h w"], teacher: Float[Tensor, "b c2 h w"]
    ) -> Float[Tensor, "b g h w"]:
        """Return attention maps, whose sum over the groups is 1 at each position."""
        projected = self.project(F.group_norm(teacher, 1))
        return self.layers(torch.cat([projected, F.group_norm(student, 1)], dim=1)).softmax(1)


class KRNet(Criterion):
    """Knowledge-representation networks: sum over stages of mean(sum_g (a_g * (r(F_s) - F_t))^2), where attention nets
    learn a from the student's progress on its task.

    a = softmax over g of 1x1 convolutions on (project(F_t), F_s): G attention maps per stage, so that the squared
    difference at a position counts by sum_g a_g^2, from 1 / G (equal maps) to 1 (one map alone). r is a 1x1 convolution
    with BatchNorm where the channels differ; the larger map is average-pooled. For the student's update a is a
    constant, and r learns with the student.

    Every `interval` updates, before the update, the attention nets take a step of their own. The student takes a
    virtual step of gradient descent by its task and this loss on the first half of the batch, theta' = theta -
    inner_lr * grad(task + weight * loss); the gradient of the task at theta' on the second half of the batch, by the
    attention nets' weights, goes to their Adam (learning rate meta_lr). With fewer than 4 samples both halves are the
    whole batch. Where gradients accumulate, the batch is the first one of an update. With several processes each takes
    a virtual step on its local batch, and the gradients are averaged. The step is computed in float32, not compiled. It
    leaves the student, r and all BatchNorm statistics as they are. Other criteria, and the codes of MAG and MAS, have
    no part in the virtual step.

    Cost: the step differentiates twice through the student. Its share of an update's time falls with the interval: at
    the default, training takes twice the time of KD's (benchmarks/related.py; benchmarks/criteria.py leaves it out).
    With first_order=True, no graph of gradients is kept.

    Reference: Zhu, Chen, Liu, "Learning Knowledge Representation with Meta Knowledge Distillation for Single Image
    Super-Resolution" (arXiv 2207.08356).

    Weight: 100, ours, as are all other constants.

    Differs: inspired by the paper, whose equations are not known to us; no result of it is reproduced. Served in this
    form for classification only: the task is the cross-entropy with the labels (in the paper: the difference of the
    pixels of super-resolution). The paper's networks generate dynamic kernels from both maps and their correlation;
    here they give attention maps.

    Args:
        pair: Shapes of both networks, with the same number of maps.
        groups: G, the number of attention maps of a stage, 2 or more.
        hidden: Width of the attention nets' hidden layer, 1 or more.
        interval: Updates from one step of the attention nets to the next, 1 or more.
        inner_lr: Learning rate of the virtual step, positive.
        meta_lr: Learning rate of the attention nets, positive.
        first_order: Replace the second derivatives by a difference of two first ones, near the student's weights (as
            DARTS does): less memory, and for students that cannot be differentiated twice.

    Raises:
        ValueError: A network has no maps, the numbers of maps differ, or an option is out of range.
    """

    weight = 100.0
    needs = frozenset({"maps"})
    own_step = True
    note = "inspired by arXiv 2207.08356, in a form for classification; constants ours"

    def __init__(
        self,
        pair: Pair,
        *,
        groups: int = 4,
        hidden: int = 64,
        interval: int = 5,
        inner_lr: float = 0.01,
        meta_lr: float = 0.001,
        first_order: bool = False,
    ) -> None:
        super().__init__(pair)
        for name, count, fewest in (("groups", groups, 2), ("hidden", hidden, 1), ("interval", interval, 1)):
            if count < fewest:
                raise ValueError(f"{name}={count}: expected {fewest} or more.")
        for name, rate in (("inner_lr", inner_lr), ("meta_lr", meta_lr)):
            if not 0 < rate < float("inf"):
                raise ValueError(f"{name}={rate}: expected a finite number above 0.")
        self.interval, self.inner_lr, self.meta_lr, self.first_order = interval, inner_lr, meta_lr, first_order
        channels = [(student[0], teacher[0]) for student, teacher in paired_maps("KRNet", pair)]
        self.adapters = nn.ModuleList(ChannelAdapter(*both) for both in channels)
        self.attention = nn.ModuleList(AttentionNet(*both, groups, hidden) for both in channels)
        self.attention.requires_grad_(False)  # the run's optimizer leaves it alone

    def forward(
        self, student: Features, teacher: Features, batch: Batch, attended: Features | None = None
    ) -> Float[Tensor, ""]:
        """Return the loss, at least float32; `attended` are the student's features that the attention nets see, by
        default the same."""
        distances = []
        attended = student if attended is None else attended
        stages = zip(self.adapters, self.attention, student.maps, attended.maps, teacher.maps, strict=True)
        for adapter, net, ours, seen, theirs in stages:
            adapted, target = (at_least_float32(m) for m in pool_larger(adapter(ours), theirs))
            shown, _ = pool_larger(at_least_float32(seen.detach()), target)
            with torch.autocast(target.device.type, enabled=False):
                attention = net(shown, target)
            # sum_g (a_g d)^2 = d^2 sum_g a_g^2
            distances.append((attention.square().sum(1, keepdim=True) * (adapted - target).square()).mean())
        return torch.stack(distances).sum()

    def attention_gradients(
        self,
        student: nn.Module,
        task: Callable[[Features, Batch], Tensor],
        weigh: Callable[[Tensor], Tensor],
        batch: Batch,
        teacher: Features,
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the student's task after a virtual step, by each parameter of `attention`.

        All modules stay as they are, buffers included.

        Args:
            student: Returns features of images, in train mode.
            task: Returns the weighted loss of the student's task.
            weigh: Multiplies this criterion's loss by its weight.
            batch: Of images and labels.
            teacher: Features of the batch.
        """
        half = len(batch.labels) // 2 if len(batch.labels) >= 4 else len(batch.labels)
        inner, outer = (Batch(*(part[rows] for part in batch)) for rows in (slice(half), slice(-half, None)))
        maps = tuple(at_least_float32(m[:half]) for m in teacher.maps)
        target = Features(teacher.logits[:half], teacher.embedding[:half], maps)
        weights = {name: p.detach().requires_grad_() for name, p in student.named_parameters() if p.requires_grad}
        own = {f"attention.{name}": p.detach().requires_grad_() for name, p in self.attention.named_parameters()}

        def distance(moving: Features) -> Tensor:
            return weigh(_call(self, own, moving, target, inner, seen))

        with _differentiable_twice(batch.images.device):
            seen = _call(student, weights, inner.images)
            slopes = _gradients(task(seen, inner) + distance(seen), weights, create_graph=not self.first_order)
            moved = {
                name: (weight - self.inner_lr * slope).detach().requires_grad_()
                for (name, weight), slope in zip(weights.items(), slopes, strict=True)
            }
            # d task(theta') / d phi = - inner_lr * directions . d slopes / d phi
            directions = _gradients(task(_call(student, moved, outer.images), outer), moved)
            if not self.first_order:
                parts = [(s, -self.inner_lr * d) for s, d in zip(slopes, directions, strict=True) if s.requires_grad]
                outputs, factors = zip(*parts, strict=True)
                return torch.autograd.grad(outputs, tuple(own.values()), factors)
            size = 0.01 / torch.stack([d.norm() for d in directions]).norm().clamp_min(1e-12)
            sides = []
            for step in (size, -size):
                with torch.no_grad(), _same_random_numbers(batch.images.device):
                    near = {k: w + step * d for (k, w), d in zip(weights.items(), directions, strict=True)}
                    moving = _call(student, near, inner.images)
                sides.append(torch.autograd.grad(distance(moving), tuple(own.values())))
        return tuple(-self.inner_lr * (above - below) / (2 * size) for above, below in zip(*sides, strict=True))


def _call(module: nn.Module, parameters: Mapping[str, Tensor], *inputs: Any) -> Any:
    """Call a module with other parameters, and copies of its buffers: BatchNorm's statistics move in an update only."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return functional_call(module, (dict(parameters), buffers), inputs)


def _gradients(loss: Tensor, by: Mapping[str, Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
    """Return the gradient by each tensor, 0 for one that the loss does not depend on."""
    return torch.autograd.grad(
        loss, tuple(by.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


@contextlib.contextmanager
def _differentiable_twice(device: torch.device) -> Iterator[None]:
    """Compute in float32, and attention by operations that have second derivatives, which its fused kernels lack."""
    with torch.autocast(device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield


def _same_random_numbers(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Draw in the body (dropout) what every such body draws."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])
