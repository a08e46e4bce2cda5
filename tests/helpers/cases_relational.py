"""Reference loops of the criteria that compare the samples of a batch or its channels."""

import itertools
import math

import numpy as np
from cases import Case, loop_pool
from torch import Tensor

from mgd_timm.criteria import CC, CRD, KDSVD, Criterion
from mgd_timm.features import Batch, Features

Row = list[float]


def dot(one: Row, two: Row) -> float:
    return sum(a * b for a, b in zip(one, two, strict=True))


def unit(row: Row) -> Row:
    norm = math.sqrt(dot(row, row))
    return [v / norm for v in row]


def huber(difference: float) -> float:
    size = abs(difference)
    return size * size / 2 if size < 1 else size - 0.5


def loop_linear(layer, rows: Tensor) -> list[Row]:
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [[dot(w, row) + b for w, b in zip(weight, bias, strict=True)] for row in rows.tolist()]


def loop_sp(student: Tensor, teacher: Tensor) -> float:
    matrices = []
    for maps in (student, teacher):
        rows = maps.flatten(1).tolist()
        matrices.append([unit([dot(one, two) for two in rows]) for one in rows])
    squares = [(s - t) ** 2 for one, two in zip(*matrices, strict=True) for s, t in zip(one, two, strict=True)]
    return sum(squares) / len(student) ** 2


def loop_cc(one: list[Row], two: list[Row]) -> float:
    deltas = [[abs(s - t) for s, t in zip(a, b, strict=True)] for a, b in zip(one, two, strict=True)]
    return sum(dot(a, b) for a, b in itertools.pairwise(deltas)) / (len(one) - 1)


def loop_relations(rows: list[Row]) -> tuple[list[Row], list[list[Row]]]:
    def from_to(a: Row, b: Row) -> Row:
        return [v - u for u, v in zip(a, b, strict=True)]

    def cosine(at: Row, one: Row, two: Row) -> float:
        u, v = from_to(at, one), from_to(at, two)
        return dot(unit(u), unit(v)) if any(u) and any(v) else 0.0

    distances = [[math.sqrt(dot(from_to(a, b), from_to(a, b))) for b in rows] for a in rows]
    mean = sum(map(sum, distances)) / (len(rows) * (len(rows) - 1))
    angles = [[[cosine(at, one, two) for two in rows] for one in rows] for at in rows]
    return [[d / mean for d in row] for row in distances], angles


def loop_rkd(student: Tensor, teacher: Tensor) -> float:
    (far_s, wide_s), (far_t, wide_t) = loop_relations(student.tolist()), loop_relations(teacher.tolist())
    count = range(len(student))
    far = sum(huber(far_s[i][j] - far_t[i][j]) for i in count for j in count)
    wide = sum(huber(wide_s[k][i][j] - wide_t[k][i][j]) for k in count for i in count for j in count)
    return 25 * far / len(student) ** 2 + 50 * wide / len(student) ** 3


def loop_pkt(student: Tensor, teacher: Tensor) -> float:
    def chances(rows: list[Row]) -> list[Row]:
        units = [[v / (math.sqrt(dot(row, row)) + 1e-7) for v in row] for row in rows]
        likeness = [[(dot(a, b) + 1) / 2 for b in units] for a in units]
        return [[v / sum(row) for v in row] for row in likeness]

    pairs = zip(chances(student.tolist()), chances(teacher.tolist()), strict=True)
    terms = [t * math.log((t + 1e-7) / (s + 1e-7)) for one, two in pairs for s, t in zip(one, two, strict=True)]
    return sum(terms) / len(terms)


def loop_nst(student: Tensor, teacher: Tensor) -> float:
    side = min(student.shape[2], teacher.shape[2])

    def mean_kernel(one: list[Row], two: list[Row]) -> float:
        return sum(dot(a, b) ** 2 for a in one for b in two) / (len(one) * len(two))

    total = 0.0
    for sample_s, sample_t in zip(student.tolist(), teacher.tolist(), strict=True):
        s, t = (
            [unit([v for row in loop_pool(c, side) for v in row]) for c in sample] for sample in (sample_s, sample_t)
        )
        total += mean_kernel(t, t) + mean_kernel(s, s) - 2 * mean_kernel(s, t)
    return total / len(student)


def loop_adapted(adapter, maps: Tensor) -> np.ndarray:
    """1x1 convolution without bias, and BatchNorm over the batch: [sample, channel, position]."""
    x = maps.flatten(2).numpy()
    if not len(adapter):
        return x
    mixed = np.stack([adapter[0].weight[:, :, 0, 0].detach().numpy() @ sample for sample in x])
    mean, variance = mixed.mean((0, 2), keepdims=True), mixed.var((0, 2), keepdims=True)
    return (mixed - mean) / np.sqrt(variance + 1e-5)


def loop_kdsvd(criterion: KDSVD, student: Features, teacher: Features) -> float:
    """One right singular vector of the teacher, of four of the student's the nearest; numpy has the decomposition."""
    found: list[list[tuple[Row, Row]]] = []
    for adapter, s, t in zip(criterion.adapters, student.maps, teacher.maps, strict=True):
        found.append([])
        for one, two in zip(loop_adapted(adapter, s), t.flatten(2).numpy(), strict=True):
            target = np.linalg.svd(two.T, full_matrices=False)[2][0].tolist()
            target = [v if sum(target) >= 0 else -v for v in target]
            candidates = np.linalg.svd(one.T, full_matrices=False)[2][:4].tolist()
            best = max(candidates, key=lambda row, target=target: abs(dot(row, target)))
            sign = math.copysign(1, dot(best, target))
            found[-1].append(([sign * v for v in best], target))
    total = 0.0
    for before, after in itertools.pairwise(found):
        for (s0, t0), (s1, t1) in zip(before, after, strict=True):
            for i in range(len(t1)):
                for j in range(len(t0)):
                    total += (math.exp(-((s1[i] - s0[j]) ** 2) / 8) - math.exp(-((t1[i] - t0[j]) ** 2) / 8)) ** 2
    return total / len(student.embedding)


def loop_contrast(scores: list[Row], num_samples: int) -> float:
    """The first of each row is the positive's."""
    total = 0.0
    for own, *others in scores:
        noise = len(others) / num_samples
        total -= math.log(own / (own + noise + 1e-7)) + sum(math.log(noise / (o + noise + 1e-7)) for o in others)
    return total / len(scores)


def loop_crd(criterion: CRD, student: Features, teacher: Features, batch: Batch) -> float:
    """From the banks as they were built; which samples are drawn is tested for itself."""
    one, two = ([unit(row) for row in loop_linear(*part)] for part in embeddings(criterion, student, teacher))
    drawn, count = criterion.draw(batch.sample_ids).tolist(), criterion.num_samples
    loss = 0.0
    for rows, bank in ((one, criterion.teacher_bank.tolist()), (two, criterion.student_bank.tolist())):
        scores = [[math.exp(dot(row, bank[n]) / 0.07) for n in ids] for row, ids in zip(rows, drawn, strict=True)]
        z = count * sum(map(sum, scores)) / sum(map(len, scores))
        loss += loop_contrast([[s / z for s in row] for row in scores], count)
    return loss


def embeddings(criterion, student: Features, teacher: Features):
    return (criterion.student_embed, student.embedding), (criterion.teacher_embed, teacher.embedding)


def zero_cc(criterion: CC, student: Features) -> tuple[Features, Features]:
    criterion.teacher_embed.load_state_dict(criterion.student_embed.state_dict())
    return student, student


def zero_rkd(criterion: Criterion, student: Features) -> tuple[Features, Features]:
    return student, student._replace(embedding=4 * student.embedding.flip(1) + 1)  # moved, scaled and mirrored


def scaled_maps(criterion: Criterion, student: Features) -> tuple[Features, Features]:
    return student, student._replace(maps=tuple(4 * m for m in student.maps))


CASES: dict[str, Case] = {
    "sp": Case(lambda c, s, t, b: loop_sp(s.maps[-1], t.maps[-1]), scaled_maps),
    "cc": Case(
        lambda c, s, t, b: loop_cc(*(loop_linear(*part) for part in embeddings(c, s, t))),
        zero_cc,
        ordered=True,
        rate=0.01,
    ),
    "rkd": Case(lambda c, s, t, b: loop_rkd(s.embedding, t.embedding), zero_rkd),
    "pkt": Case(lambda c, s, t, b: loop_pkt(s.embedding, t.embedding), lambda c, s: (s, s)),
    "nst": Case(lambda c, s, t, b: sum(loop_nst(*maps) for maps in zip(s.maps, t.maps, strict=True)), scaled_maps),
    "kdsvd": Case(lambda c, s, t, b: loop_kdsvd(c, s, t), scaled_maps),
    "crd": Case(loop_crd, None, draws=True),
}
