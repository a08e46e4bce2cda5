"""Reference loops of the criteria that compare logits, or classify with the teacher."""

import math

import torch
from cases import Case, log_softmax, loop_ce, loop_kl, loop_pool
from torch import Tensor, nn

from mgd_timm.criteria import OFA, SRRL, Criterion, SelfKD
from mgd_timm.features import Batch, Features


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    return [math.exp(v) for v in log_softmax([v / temperature for v in row])]


def loop_dkd(
    student: Tensor, teacher: Tensor, targets: list[int], alpha: float, beta: float, temperature: float
) -> float:
    """From probabilities, as the paper has it."""
    total = 0.0
    for s, t, y in zip(student.tolist(), teacher.tolist(), targets, strict=True):
        p_s, p_t = softmax(s, temperature), softmax(t, temperature)
        rest_s, rest_t = sum(p for k, p in enumerate(p_s) if k != y), sum(p for k, p in enumerate(p_t) if k != y)
        tckd = p_t[y] * math.log(p_t[y] / p_s[y]) + rest_t * math.log(rest_t / rest_s)
        others = [(p / rest_s, q / rest_t) for k, (p, q) in enumerate(zip(p_s, p_t, strict=True)) if k != y]
        total += alpha * tckd + beta * sum(q * math.log(q / p) for p, q in others)
    return total * temperature**2 / len(targets)


def loop_correlation(one: list[float], two: list[float]) -> float:
    mean_one, mean_two = sum(one) / len(one), sum(two) / len(two)
    product = sum((p - mean_one) * (q - mean_two) for p, q in zip(one, two, strict=True))
    norms = math.sqrt(sum((p - mean_one) ** 2 for p in one)) * math.sqrt(sum((q - mean_two) ** 2 for q in two))
    return product / (norms + 1e-8)


def loop_dist(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> float:
    rows_s, rows_t = ([softmax(row, temperature) for row in z.tolist()] for z in (student, teacher))
    inter = [loop_correlation(one, two) for one, two in zip(rows_s, rows_t, strict=True)]
    columns = zip(zip(*rows_s, strict=True), zip(*rows_t, strict=True), strict=True)
    intra = [loop_correlation(list(one), list(two)) for one, two in columns]
    return temperature**2 * (beta * (1 - sum(inter) / len(inter)) + gamma * (1 - sum(intra) / len(intra)))


def loop_linear(layer: nn.Linear, rows: list[list[float]]) -> list[list[float]]:
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [
        [
            sum(w * x for w, x in zip(weight, row, strict=True)) + b
            for weight, b in zip(layer.weight.tolist(), bias, strict=True)
        ]
        for row in rows
    ]


def loop_normalised(values: list[float]) -> list[float]:
    """A channel of a batch as BatchNorm in train mode leaves it, before its weight and bias, which start at 1 and 0."""
    mean = sum(values) / len(values)
    scale = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-5)
    return [(v - mean) / scale for v in values]


def loop_mean_square(one: list[list[float]], two: list[list[float]]) -> float:
    squares = [(p - q) ** 2 for rows in zip(one, two, strict=True) for p, q in zip(*rows, strict=True)]
    return sum(squares) / len(squares)


def loop_srrl(criterion: SRRL, student: Features, teacher: Features) -> float:
    hidden = loop_linear(criterion.connector[0], student.embedding.tolist())
    columns = [[max(0.0, v) for v in loop_normalised(list(column))] for column in zip(*hidden, strict=True)]
    connected = [list(row) for row in zip(*columns, strict=True)]
    target = teacher.embedding.tolist()
    logits, expected = (loop_linear(criterion.classifier, rows) for rows in (connected, target))
    return loop_mean_square(connected, target) + loop_mean_square(logits, expected)


Maps = list[list[list[list[float]]]]  # by sample, channel, row and column


def loop_convolution(layer: nn.Conv2d, maps: Maps) -> Maps:
    """Any stride and padding; as many groups as input channels, or one."""
    weights, (stride, pad, size) = layer.weight.tolist(), (layer.stride[0], layer.padding[0], layer.kernel_size[0])
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_channels
    out_side = (len(maps[0][0]) + 2 * pad - size) // stride + 1

    def at(channel: list[list[float]], i: int, j: int) -> float:
        return channel[i][j] if 0 <= i < len(channel) and 0 <= j < len(channel) else 0.0

    def value(sample: list[list[list[float]]], c: int, i: int, j: int) -> float:
        read = [sample[c]] if layer.groups > 1 else sample
        return bias[c] + sum(
            weights[c][k][u][v] * at(channel, i * stride + u - pad, j * stride + v - pad)
            for k, channel in enumerate(read)
            for u in range(size)
            for v in range(size)
        )

    side = range(out_side)
    return [
        [[[value(sample, c, i, j) for j in side] for i in side] for c in range(layer.out_channels)] for sample in maps
    ]


def loop_batchnorm_relu(maps: Maps) -> Maps:
    side, samples = len(maps[0][0]), len(maps)
    out: Maps = [[] for _ in maps]
    for c in range(len(maps[0])):
        values = [max(0.0, v) for v in loop_normalised([v for sample in maps for row in sample[c] for v in row])]
        for b in range(samples):
            image = values[b * side * side : (b + 1) * side * side]
            out[b].append([image[i * side : (i + 1) * side] for i in range(side)])
    return out


def loop_branch(branch: nn.Sequential, maps: Tensor) -> list[list[float]]:
    found: Maps = maps.tolist()
    for layer in branch:
        if isinstance(layer, nn.Conv2d):
            found = loop_convolution(layer, found)
        elif isinstance(layer, nn.BatchNorm2d):
            found = loop_batchnorm_relu(found)
    means = [[sum(sum(row) for row in channel) / len(channel) ** 2 for channel in sample] for sample in found]
    return loop_linear(branch[-1], means)


def loop_enhanced(
    student: list[list[float]], teacher: Tensor, targets: list[int], eps: float, temperature: float = 1.0
) -> float:
    total = 0.0
    for s, t, y in zip(student, teacher.tolist(), targets, strict=True):
        log_s, p_t = log_softmax([v / temperature for v in s]), softmax(t, temperature)
        total -= sum(((p + (k == y)) ** eps - (k == y)) * q for k, (p, q) in enumerate(zip(p_t, log_s, strict=True)))
    return total / len(targets)


def loop_ofa(criterion: OFA, student: Features, teacher: Features, batch: Batch) -> float:
    logits = [loop_branch(branch, maps) for branch, maps in zip(criterion.branches, student.maps, strict=True)]
    return sum(
        loop_enhanced(one, teacher.logits, batch.labels.tolist(), 1.0) for one in (*logits, student.logits.tolist())
    )


def loop_catkd(student: Tensor, teacher: Tensor, side: int, normalise: bool = False) -> float:
    squares = []
    for s, t in zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True):
        one, two = ([v for row in loop_pool(image, side) for v in row] for image in (s, t))
        if normalise:
            one, two = ([v / math.sqrt(sum(w * w for w in flat)) for v in flat] for flat in (one, two))
        squares += [(p - q) ** 2 for p, q in zip(one, two, strict=True)]
    return sum(squares) / len(squares)


def loop_selfkd(criterion: SelfKD, student: Features, teacher: Features, batch: Batch) -> float:
    """Either form, at its default weights: kd 1, hint 0.03, T 3."""
    labels = batch.labels
    target = labels if labels.is_floating_point() else torch.eye(student.logits.shape[1], dtype=torch.float64)[labels]
    hidden, logits, total = [[] for _ in labels], [], 0.0
    for project, head, maps in zip(criterion.projections, criterion.heads, student.maps[:-1], strict=True):
        means = [[sum(map(sum, channel)) / maps[0, 0].numel() for channel in sample] for sample in maps.tolist()]
        level = loop_linear(project, means)
        total += 0.03 * loop_mean_square(level, student.embedding.tolist())
        rectified = [[max(0.0, v) for v in row] for row in level]
        logits.append(torch.tensor(loop_linear(head, rectified), dtype=torch.float64))
        hidden = [before + row for before, row in zip(hidden, rectified, strict=True)]
    teaches, taught = student.logits, list(logits)
    if criterion.fused is not None:
        rows = [before + row for before, row in zip(hidden, student.embedding.tolist(), strict=True)]
        teaches = torch.tensor(loop_linear(criterion.fused, rows), dtype=torch.float64)
        logits, taught = [*logits, teaches], [*taught, student.logits]
    total += sum(loop_ce(one, target) for one in logits)
    return total + sum(loop_kl(one, teaches, 3.0) for one in taught)


def zero_srrl(criterion: Criterion, student: Features) -> tuple[Features, Features]:
    assert isinstance(criterion, SRRL)
    return student, student._replace(embedding=criterion.connector(student.embedding))


CASES: dict[str, Case] = {
    "dkd": Case(lambda c, s, t, b: loop_dkd(s.logits, t.logits, b.labels.tolist(), 1.0, 8.0, 4.0), lambda c, s: (s, s)),
    "dist": Case(lambda c, s, t, b: loop_dist(s.logits, t.logits, 1.0, 1.0, 1.0), None),  # 1e-8 in the denominator
    "srrl": Case(lambda c, s, t, b: loop_srrl(c, s, t), zero_srrl),
    "ofa": Case(loop_ofa, None),  # the teacher's entropy is what is left
    "catkd": Case(lambda c, s, t, b: loop_catkd(s.cam, t.cam, 2), lambda c, s: (s, s)),
    "selfkd": Case(loop_selfkd, None),  # the heads learn the labels too
    "dml": Case(lambda c, s, t, b: loop_kl(s.logits, t.logits, 1.0), lambda c, s: (s, s)),
}
