"""CRD: contrastive representation distillation (Tian, Krishnan and Isola 2020)."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mgd_timm.criteria.base import Criterion, at_least_float32, smallest_norm
from mgd_timm.distributed.collectives import gathered, several_processes
from mgd_timm.features import Batch, Features, Pair
from mgd_timm.recipe.granularity import check_temperature

EPS = 1e-7  # of the authors' code


def contrast(
    positive: Float[Tensor, " b"],
    negatives: Float[Tensor, "b k"],
    num_samples: int,
    mask: Bool[Tensor, "b k"] | None = None,
) -> Float[Tensor, ""]:
    """Return the noise-contrastive loss of one network, mean over the batch.

    -log(o_0 / (o_0 + K / N)) - sum_k log((K / N) / (o_k + K / N)), with K negatives per sample.

    Args:
        positive: o_0, an estimated probability among N samples.
        negatives: o_k, likewise.
        num_samples: N.
        mask: The negatives that count; None for all.
    """
    count = torch.full_like(positive, negatives.shape[1]) if mask is None else mask.sum(1).to(positive.dtype)
    noise = count / num_samples
    hit = (positive / (positive + noise + EPS)).log()
    missed = noise.log()[:, None] - (negatives + noise[:, None] + EPS).log()
    if mask is not None:
        missed = torch.where(mask, missed, 0)
    return -(hit + missed.sum(1)).mean()


@torch.compiler.disable
def first_of_each(sample_ids: Int[Tensor, " b"]) -> Int[Tensor, " m"]:
    """Return the index of the first occurrence of each sample id, in ascending order."""
    here = torch.arange(len(sample_ids), device=sample_ids.device)
    return here[(sample_ids[:, None] == sample_ids).int().argmax(1) == here]


@torch.compiler.disable
def mean_of_processes(tensor: Tensor) -> Tensor:
    """Return the mean over all processes."""
    total = tensor.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


class CRD(Criterion):
    """Contrastive representations: -log h(own sample) - sum over K others of log(1 - h), h = o / (o + K / N), for both
    networks.

    o = exp(<v, m> / tau) / Z compares a sample's embedding v (a linear map of 128 dims, of unit norm) with entries m of
    a memory of the other network's embeddings of all N training samples: that of the sample itself, and K of other
    classes. Z is set once, from the first batch, to N times the mean of exp(<v, m> / tau). After each batch m becomes
    0.5 m + 0.5 v, divided by its norm.

    Reference: Tian, Krishnan, Isola, "Contrastive Representation Distillation" (arXiv 1910.10699), equation 18.

    Weight: 0.8 (RepDistiller, which is the authors' code; the MGD authors' script), with 16384 negatives, tau 0.07 and
    momentum 0.5.

    Differs: negatives are drawn on the device, uniformly and with replacement (there: in the data loader, without
    replacement if there are enough), and at most as many as there are samples of other classes. If a sample is twice in
    a batch, its last embedding is stored. With several processes, each process stores the samples of all and Z is
    averaged, so that their memories are equal. The queue is not in the paper: its positive is the other network's
    embedding of the sample, its negatives are all entries of other classes, and N is its length. A linear map of a
    sample with a root mean square below 0.001 is not scaled up to unit norm. On GPUs the backward pass of a gather adds
    in no fixed order: runs agree up to rounding.

    Args:
        pair: Shapes of both networks, with embeddings of any width; num_samples; and labels by sample id (samples with
            a label below 0 are never negatives).
        dim: Width of the common space, 1 or more.
        negatives: K of the memory banks, 1 or more.
        temperature: tau, 0.02 or more.
        momentum: Share of the old entry in the new one, 0 or more and below 1.
        positives: "exact", the sample's own entry, or "relax", that of a random sample of its class.
        queue: Store this many of the latest samples instead of all N: memory does not depend on N.

    Raises:
        ValueError: The pair has no num_samples or labels, or labels of only one class; a number is out of range; or
            there is a queue with positives="relax".
    """

    weight = 0.8
    needs = frozenset({"embedding"})
    synchronised = (
        *("student_bank", "teacher_bank", "partition"),
        *("labels", "order", "starts", "counts", "queue_labels", "head"),
    )

    student_bank: Tensor
    teacher_bank: Tensor
    partition: Tensor
    labels: Tensor
    order: Tensor
    starts: Tensor
    counts: Tensor
    queue_labels: Tensor
    head: Tensor

    def __init__(
        self,
        pair: Pair,
        *,
        dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        positives: Literal["exact", "relax"] = "exact",
        queue: int | None = None,
    ) -> None:
        super().__init__(pair)
        for name, number in (("dim", dim), ("negatives", negatives), ("queue", queue)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}: expected 1 or more.")
        if check_temperature(temperature) < 0.02:
            raise ValueError(
                f"temperature={temperature}: expected 0.02 or more, because exp(1 / temperature) would overflow "
                "float32; the paper has 0.07."
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: expected 0 or more and below 1; the paper has 0.5.")
        if positives not in ("exact", "relax") or (queue is not None and positives == "relax"):
            raise ValueError(f"positives={positives!r}, queue={queue}: expected 'exact', or 'relax' without a queue.")
        labels = _labels(pair)
        self.temperature, self.momentum, self.positives = temperature, momentum, positives
        self.queued = queue is not None
        self.student_embed = nn.Linear(pair.student.embed_dim, dim)
        self.teacher_embed = nn.Linear(pair.teacher.embed_dim, dim)
        bound = 1 / math.sqrt(dim / 3)
        for side in ("student", "teacher"):
            self.register_buffer(f"{side}_bank", torch.empty(queue or pair.num_samples, dim).uniform_(-bound, bound))
        self.register_buffer("partition", torch.full((2,), -1.0))  # Z of student and teacher; below 0: not yet known
        self.register_buffer("labels", labels, persistent=False)
        counts = torch.bincount(labels[labels >= 0])
        self.negatives = min(negatives, int(counts.sum() - counts.max()))
        if queue is not None:
            self.num_samples = queue
            self.register_buffer("queue_labels", torch.full((queue,), -1))  # random vectors at first, of no class
            self.register_buffer("head", torch.zeros((), dtype=torch.int64))
        else:
            self.num_samples = int(counts.sum())
            # Sample ids sorted by class: those of other classes are all but one interval.
            order = labels.argsort(stable=True)[len(labels) - self.num_samples :]
            self.register_buffer("order", order, persistent=False)
            self.register_buffer("starts", counts.cumsum(0) - counts, persistent=False)
            self.register_buffer("counts", counts, persistent=False)

    def remark(self) -> str:
        """Return the size of the memory, and what each step needs in addition."""
        rows, dim = self.student_bank.shape
        kind, size = "queues" if self.queued else "banks", 2 * rows * dim * self.student_bank.element_size() / 1e6
        return (
            f"memory {kind} 2 x {rows:,} x {dim}: {size:.1f} MB, as much again in each step, and 2 x BATCH x {rows:,} "
            "products"
        )

    def draw(self, sample_ids: Int[Tensor, " b"]) -> Int[Tensor, "b m"]:
        """Draw sample ids of the positive (first column) and of the negatives, with the device's generator."""
        labels = self.labels[sample_ids]
        starts, counts = self.starts[labels, None], self.counts[labels, None]

        def below(bound: Tensor, count: int) -> Tensor:
            return torch.randint(1 << 62, (len(sample_ids), count), device=sample_ids.device) % bound

        places = below(self.num_samples - counts, self.negatives)
        negatives = self.order[places + counts * (places >= starts)]
        positive = sample_ids[:, None] if self.positives == "exact" else self.order[starts + below(counts, 1)]
        return torch.cat([positive, negatives], 1)

    def forward(self, student: Features, teacher: Features, batch: Batch) -> Float[Tensor, ""]:
        """Return the loss, at least float32. In training mode, update the memory."""
        with torch.autocast(student.embedding.device.type, enabled=False):
            one = self.student_embed(at_least_float32(student.embedding))
            two = self.teacher_embed(at_least_float32(teacher.embedding))
            one, two = (F.normalize(v, dim=1, eps=smallest_norm(v.shape[1])) for v in (one, two))
            mask, similarities = self._compare(one, two, batch.sample_ids)
            scores = [(s / self.temperature).exp() for s in similarities]
            partition = self._partition(scores, mask)
            losses = []
            for score, z in zip(scores, partition.unbind(), strict=True):
                o = score / z
                losses.append(contrast(o[:, 0], o[:, 1:], self.num_samples, mask))
            if self.training:
                self._remember(one.detach(), two.detach(), batch.sample_ids, partition)
        return losses[0] + losses[1]

    def _compare(self, one: Tensor, two: Tensor, sample_ids: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """Return a mask of valid negatives, and similarities of both networks to the positive (first column) and
        negatives."""
        # Products with all N entries, then a gather. The authors multiply b x K x 128 gathered numbers, which took 510
        # ms and 610 MB per network with N = 50,000, b = 64 and K = 16384 on one CPU core; this took 35 ms and 150 MB
        # with the copy, which the gradient needs because the update overwrites the memory.
        pairs = ((one, two, self.teacher_bank.clone()), (two, one, self.student_bank.clone()))
        if self.queued:
            mask = self.labels[sample_ids, None] != self.queue_labels
            return mask, [
                torch.cat([(v * other.detach()).sum(1, keepdim=True), v @ bank.T], 1) for v, other, bank in pairs
            ]
        drawn = self.draw(sample_ids)
        return None, [(v @ bank.T).gather(1, drawn) for v, _, bank in pairs]

    @torch.no_grad()
    def _partition(self, scores: list[Tensor], mask: Tensor | None) -> Tensor:
        """Return Z of student and teacher; before it is set, compute it from these scores."""
        if mask is None:
            means = torch.stack([s.mean() for s in scores])
        else:
            valid = F.pad(mask, (1, 0), value=True)
            means = torch.stack([torch.where(valid, s, 0).sum() for s in scores]) / valid.sum()
        if several_processes() and not self.alone:
            # In each step, although Z is fixed after the first: whether it is set is the value of a tensor, which the
            # host must not wait for, and a separate flag would be wrong after the state is loaded or reset. It is two
            # numbers.
            means = mean_of_processes(means)
        return torch.where(self.partition < 0, means * self.num_samples, self.partition)

    @torch.no_grad()
    def _remember(self, one: Tensor, two: Tensor, sample_ids: Tensor, partition: Tensor) -> None:
        """Store a batch, that of all processes, in the memory."""
        self.partition.copy_(partition)
        if several_processes() and not self.alone:
            one, two, sample_ids = gathered(one, two, sample_ids)
            if self.queued:  # a process without samples in a step gets those of the first process
                fresh = first_of_each(sample_ids)
                one, two, sample_ids = one[fresh], two[fresh], sample_ids[fresh]
        if self.queued:
            length = len(self.queue_labels)
            one, two, sample_ids = one[-length:], two[-length:], sample_ids[-length:]
            places = (self.head + torch.arange(len(one), device=one.device)) % length
            self.queue_labels.index_copy_(0, places, self.labels[sample_ids])
            self.head.copy_((self.head + len(one)) % length)
            self.student_bank.index_copy_(0, places, one)
            self.teacher_bank.index_copy_(0, places, two)
            return
        # All occurrences of a sample write the last one's value, so that the device's order of writes does not matter.
        here = torch.arange(len(one), device=one.device)
        last = ((sample_ids[:, None] == sample_ids) * here).amax(1)
        for bank, new in ((self.student_bank, one), (self.teacher_bank, two)):
            mixed = self.momentum * bank[sample_ids] + (1 - self.momentum) * new
            bank.index_copy_(0, sample_ids, F.normalize(mixed, dim=1)[last])


def _labels(pair: Pair) -> Int[Tensor, " n"]:
    """Return the classes of all training samples."""
    labels = pair.labels
    if labels is None or not pair.num_samples or len(labels) != pair.num_samples:
        given = "no labels" if labels is None else f"{len(labels)} labels"
        raise ValueError(
            f"CRD stores every training sample and needs its class: the pair has num_samples={pair.num_samples} and "
            f"{given}. Give both, Pair(..., num_samples=len(labels), labels=labels), or use a criterion without a "
            "memory, such as 'rkd'."
        )
    known = labels[labels >= 0].unique()
    if len(known) < 2:
        raise ValueError(
            f"CRD needs negatives of other classes, but all samples are of {len(known)} class: use data with 2 or more."
        )
    return labels.long().clone()
