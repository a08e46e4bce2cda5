"""Reference loops of the criteria that compare maps."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from cases import Case, loop_ce, loop_kl, loop_pool
from torch import Tensor, nn

from mgd_timm.criteria import AB, AFD, AFDS, FSP, FT, VID, Criterion, KRNet, MaskedGenerative, ReviewKD
from mgd_timm.criteria.ekd import EKD, GuidedModule
from mgd_timm.features import Batch, Features

Map = list[list[list[list[float]]]]  # of samples, channels, rows, columns


def each(maps: Map, function: Callable[[float], float]) -> Map:
    return [[[[function(v) for v in row] for row in channel] for channel in sample] for sample in maps]


def loop_conv(maps: Map, conv: nn.Conv2d) -> Map:
    """Cross-correlation with a square kernel, zeros beyond the border."""
    weight, (stride, _), (padding, _) = conv.weight.tolist(), conv.stride, conv.padding
    bias = [0.0] * len(weight) if conv.bias is None else conv.bias.tolist()
    side, kernel = len(maps[0][0]), len(weight[0][0])
    places = range((side + 2 * padding - kernel) // stride + 1)

    def at(sample: list[list[list[float]]], kernels: list[list[list[float]]], i: int, j: int) -> float:
        total = 0.0
        for channel, taps in zip(sample, kernels, strict=True):
            for u in range(kernel):
                for v in range(kernel):
                    row, column = i * stride + u - padding, j * stride + v - padding
                    if 0 <= row < side and 0 <= column < side:
                        total += channel[row][column] * taps[u][v]
        return total

    return [
        [
            [[at(sample, kernels, i, j) + shift for j in places] for i in places]
            for kernels, shift in zip(weight, bias, strict=True)
        ]
        for sample in maps
    ]


def loop_norm(maps: Map, norm: nn.BatchNorm2d | nn.BatchNorm1d) -> Map:
    """BatchNorm with the statistics of the batch."""
    out = each(maps, lambda v: v)
    for c, (gain, shift) in enumerate(zip(norm.weight.tolist(), norm.bias.tolist(), strict=True)):
        values = [v for sample in maps for row in sample[c] for v in row]
        mean = sum(values) / len(values)
        scale = gain / math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-5)
        for sample in out:
            sample[c] = [[(v - mean) * scale + shift for v in row] for row in sample[c]]
    return out


def loop_layers(maps: Map, layers: nn.Module) -> Map:
    """Convolutions, BatchNorm and activations one after the other."""
    for layer in layers.children():
        if isinstance(layer, nn.Conv2d):
            maps = loop_conv(maps, layer)
        elif isinstance(layer, nn.BatchNorm2d):
            maps = loop_norm(maps, layer)
        elif isinstance(layer, nn.ReLU):
            maps = each(maps, lambda v: max(v, 0.0))
        elif isinstance(layer, nn.LeakyReLU):
            maps = each(maps, lambda v: v if v > 0 else 0.1 * v)
        else:
            assert isinstance(layer, nn.Identity)
    return maps


def shrunk(maps: Map, side: int) -> Map:
    return [[loop_pool(channel, side) for channel in sample] for sample in maps]


def nearest(maps: Map, side: int) -> Map:
    def resized(channel: list[list[float]]) -> list[list[float]]:
        old = range(len(channel))
        return [[channel[i * len(old) // side][j * len(old) // side] for j in range(side)] for i in range(side)]

    return [[resized(channel) for channel in sample] for sample in maps]


def side_of(maps: Map) -> int:
    return len(maps[0][0])


def flat(nested: object) -> list[float]:
    return [nested] if isinstance(nested, float) else [v for part in nested for v in flat(part)]  # type: ignore[attr-defined]


def mean_square(one: object, other: object) -> float:
    pairs = list(zip(flat(one), flat(other), strict=True))
    return sum((a - b) ** 2 for a, b in pairs) / len(pairs)


def unit(values: list[float]) -> list[float]:
    norm = math.sqrt(sum(v * v for v in values))
    return [v / norm for v in values]


def loop_energy(sample: list[list[list[float]]]) -> list[list[float]]:
    """Mean over channels of squares."""
    places = range(len(sample[0]))
    return [[sum(c[i][j] ** 2 for c in sample) / len(sample) for j in places] for i in places]


def lists(features: Features) -> list[Map]:
    return [m.tolist() for m in features.maps]


def loop_vid(criterion: VID, student: Features, teacher: Features) -> float:
    total = 0.0
    for part, x, y in zip(criterion.conditionals, lists(student), lists(teacher), strict=True):
        mean = loop_layers(shrunk(x, side_of(y)), part.mean)
        variances = [math.log1p(math.exp(r)) + 1e-5 for r in part.rho.tolist()]
        terms = [
            0.5 * ((a - b) ** 2 / variance + math.log(variance))
            for one, other in zip(mean, y, strict=True)
            for p, q, variance in zip(one, other, variances, strict=True)
            for a, b in zip(flat(p), flat(q), strict=True)
        ]
        total += sum(terms) / len(terms)
    return total


def zero_vid(criterion: VID, student: Features) -> tuple[Features, Features]:
    """A variance of 1, whose logarithm is 0, and a teacher that is the mean."""
    with torch.no_grad():
        for part in criterion.conditionals:
            part.rho.fill_(math.log(math.expm1(1 - 1e-5)))
    means = tuple(part.mean(m) for part, m in zip(criterion.conditionals, student.maps, strict=True))
    return student, student._replace(maps=means)


def loop_ab(criterion: AB, student: Features, teacher: Features) -> float:
    total, n = 0.0, len(student.maps)
    for i, (connector, x, y) in enumerate(zip(criterion.connectors, lists(student), lists(teacher), strict=True)):
        for s, t in zip(flat(loop_layers(x, connector)), flat(y), strict=True):
            if t > 0 and s <= 1:
                total += 2 ** (i - n + 1) * (s - 1) ** 2
            if t <= 0 and s > -1:
                total += 2 ** (i - n + 1) * (s + 1) ** 2
    return total / len(student.logits) / 1000 * 3


def zero_ab(criterion: AB, student: Features) -> tuple[Features, Features]:
    """Every neuron of the student is beyond the margin, on the side of the teacher's."""
    return student._replace(maps=tuple(m.sign() * (m.abs() + 1) for m in student.maps)), student


def loop_ft(criterion: FT, student: Features, teacher: Features) -> float:
    ours = loop_layers(student.maps[-1].tolist(), criterion.translator)
    theirs = loop_layers(teacher.maps[-1].tolist(), criterion.paraphraser.encoder)
    gaps = [
        abs(p - q)
        for one, other in zip(ours, theirs, strict=True)
        for p, q in zip(unit(flat(loop_energy(one))), unit(flat(loop_energy(other))), strict=True)
    ]
    return sum(gaps) / len(gaps)


def zero_ft(criterion: FT, student: Features) -> tuple[Features, Features]:
    """Factors of one value everywhere: neither their size nor their sign is compared."""
    with torch.no_grad():
        for last, value in ((criterion.translator[-2], -3.0), (criterion.paraphraser.encoder[-2], 1.0)):
            last.weight.zero_()
            last.bias.fill_(value)
    return student, student


def loop_flow(lower: Map, upper: Map) -> list[list[list[float]]]:
    side = min(side_of(lower), side_of(upper))
    pairs = zip(shrunk(lower, side), shrunk(upper, side), strict=True)
    return [
        [[sum(p * q for p, q in zip(flat(a), flat(b), strict=True)) / side**2 for a in one] for b in other]
        for one, other in pairs
    ]


def loop_fsp(criterion: FSP, student: Features, teacher: Features) -> float:
    ours = [loop_layers(m, adapter) for m, adapter in zip(lists(student), criterion.adapters, strict=True)]
    steps = zip(pairwise(ours), pairwise(lists(teacher)), strict=True)
    return sum(mean_square(loop_flow(*s), loop_flow(*t)) for s, t in steps)


def loop_afds(criterion: AFDS, student: Features, teacher: Features) -> float:
    total = 0.0
    for adapter, attention, x, y in zip(
        criterion.adapters, criterion.attentions, lists(student), lists(teacher), strict=True
    ):
        ours = shrunk(loop_layers(x, adapter), side_of(y))
        hidden = each(loop_conv(shrunk(y, 1), attention[1]), lambda v: max(v, 0.0))
        scores = each(loop_conv(hidden, attention[3]), lambda v: 1 / (1 + math.exp(-v)))
        for one, other, weights in zip(ours, y, scores, strict=True):
            for p, q, (((weight,),),) in zip(one, other, [[w] for w in weights], strict=True):
                norms = [math.sqrt(sum(v * v for v in flat(c))) + 1e-6 for c in (p, q)]
                gap = [(a / norms[0] - b / norms[1]) ** 2 for a, b in zip(flat(p), flat(q), strict=True)]
                total += weight / sum(flat(weights)) * sum(gap) / len(gap)
    return total / len(student.logits) / len(student.maps)


def loop_linear(rows: list[list[float]], layers: nn.Sequential) -> list[list[float]]:
    """A linear layer, BatchNorm, and perhaps a ReLU, on rows."""
    weight, bias = layers[0].weight.tolist(), layers[0].bias.tolist()
    out = [
        [sum(a * b for a, b in zip(row, taps, strict=True)) + shift for taps, shift in zip(weight, bias, strict=True)]
        for row in rows
    ]
    normed = loop_norm([[[[v]] for v in row] for row in out], layers[1])
    return [[max(v, 0.0) if len(layers) == 3 else v for v in flat(sample)] for sample in normed]


def loop_afd(criterion: AFD, student: Features, teacher: Features) -> float:
    ours, theirs, dim = lists(student), lists(teacher), criterion.dim
    means = [[[sum(flat(c)) / len(flat(c)) for c in sample] for sample in m] for m in (*ours, *theirs)]
    keys = [loop_linear(m, key) for m, key in zip(means[: len(ours)], criterion.keys, strict=True)]
    queries = [loop_linear(m, query) for m, query in zip(means[len(ours) :], criterion.queries, strict=True)]
    batch = len(means[0])
    mixed = loop_linear([keys[s][b] for b in range(batch) for s in range(len(ours))], criterion.bilinear)
    places = [criterion.teacher_positions.tolist(), criterion.student_positions.tolist()]
    total = 0.0
    for b in range(batch):
        for t, m in enumerate(theirs):
            scores = []
            for s in range(len(ours)):
                key = mixed[b * len(ours) + s][t * dim : (t + 1) * dim]
                score = sum(p * q for p, q in zip(key, queries[t][b], strict=True))
                scores.append(
                    (score + sum(p * q for p, q in zip(places[0][t], places[1][s], strict=True))) / math.sqrt(dim)
                )
            norm = sum(math.exp(score) for score in scores)
            target = unit(flat(loop_energy(m[b])))
            for s, score in enumerate(scores):
                energy = unit(flat(loop_pool(loop_energy(ours[s][b]), side_of(m))))
                total += math.exp(score) / norm * mean_square(energy, target) / batch
    return total


def zero_afd(criterion: AFD, student: Features) -> tuple[Features, Features]:
    """As much energy at every place of every map: nothing is left to be matched."""
    flat_maps = tuple(m.abs().mean((2, 3), keepdim=True).expand_as(m) for m in student.maps)
    return student._replace(maps=flat_maps), student._replace(maps=tuple(3 * m for m in flat_maps))


def loop_hcl(one: Map, other: Map) -> float:
    loss, weight, total = mean_square(one, other), 1.0, 1.0
    for side in (4, 2, 1):
        if side < side_of(one):
            weight /= 2
            total += weight
            loss += weight * mean_square(shrunk(one, side), shrunk(other, side))
    return loss / total


def levels_of(features: Features) -> list[Map]:
    return [[[[[v]] for v in row] for row in features.embedding.tolist()], *reversed(lists(features))]


def loop_reviewed(criterion: ReviewKD, student: Features, sides: list[int]) -> list[Map]:
    """What each level compares with the teacher's map of that side."""
    passed: Map = []
    found = []
    for fusion, level, side in zip(criterion.fusions, levels_of(student), sides, strict=True):
        fused = loop_layers(level, fusion.enter)
        if passed:
            deeper = nearest(passed, side_of(fused))
            joined = [[*one, *other] for one, other in zip(fused, deeper, strict=True)]
            gates = each(loop_conv(joined, fusion.attention), lambda v: 1 / (1 + math.exp(-v)))
            places = range(side_of(fused))
            fused = [
                [
                    [[p[i][j] * own[i][j] + q[i][j] * below[i][j] for j in places] for i in places]
                    for p, q in zip(x, y, strict=True)
                ]
                for x, y, (own, below) in zip(fused, deeper, gates, strict=True)
            ]
        passed = nearest(fused, side)
        found.append(loop_layers(passed, fusion.leave))
    return found


def loop_reviewkd(criterion: ReviewKD, student: Features, teacher: Features) -> float:
    targets = levels_of(teacher)
    found = loop_reviewed(criterion, student, [side_of(m) for m in targets])
    return sum(loop_hcl(one, other) for one, other in zip(found, targets, strict=True))


def zero_reviewkd(criterion: ReviewKD, student: Features) -> tuple[Features, Features]:
    passed, found = None, []
    for fusion, level in zip(
        criterion.fusions, [student.embedding[:, :, None, None], *student.maps[::-1]], strict=True
    ):
        compared, passed = fusion(level, passed, (level.shape[2], level.shape[3]))
        found.append(compared)
    return student, student._replace(embedding=found[0][:, :, 0, 0], maps=tuple(found[:0:-1]))


def loop_masked_generative(criterion: MaskedGenerative, student: Features, teacher: Features) -> float:
    aligned, target = loop_conv(student.maps[-1].tolist(), criterion.align), teacher.maps[-1].tolist()
    drawn = (
        torch.rand(len(aligned), len(aligned[0]), 1, 1).flatten(1).tolist()
    )  # what the criterion draws from this seed
    masked = [
        [c if draw >= 0.15 else [[0.0] * len(c)] * len(c) for c, draw in zip(sample, draws, strict=True)]
        for sample, draws in zip(aligned, drawn, strict=True)
    ]
    generated = loop_layers(masked, criterion.generation)
    return sum((p - q) ** 2 for p, q in zip(flat(generated), flat(target), strict=True)) / len(target)


def zero_masked_generative(criterion: MaskedGenerative, student: Features) -> tuple[Features, Features]:
    """Whatever is masked, a generation that is blind gives its bias."""
    last = criterion.generation[-1]
    with torch.no_grad():
        last.weight.zero_()
    target: Tensor = last.bias[:, None, None].expand_as(student.maps[-1])
    return student, student._replace(maps=(*student.maps[:-1], target))


def loop_layer_norm(sample: list[list[list[float]]]) -> list[list[list[float]]]:
    """A sample without its mean and of variance 1."""
    values = flat(sample)
    mean = sum(values) / len(values)
    scale = 1 / math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-5)
    return [[[(v - mean) * scale for v in row] for row in channel] for channel in sample]


def loop_krnet(criterion: KRNet, student: Features, teacher: Features) -> float:
    """Every squared difference times the sum of its squared attentions, one by one."""
    total = 0.0
    for adapter, net, x, y in zip(criterion.adapters, criterion.attention, lists(student), lists(teacher), strict=True):
        side = min(side_of(x), side_of(y))
        adapted, target, shown = (shrunk(m, side) for m in (loop_layers(x, adapter), y, x))
        projected = loop_conv([loop_layer_norm(sample) for sample in target], net.project)
        both = [one + loop_layer_norm(other) for one, other in zip(projected, shown, strict=True)]
        terms = []
        for one, other, scores in zip(adapted, target, loop_layers(both, net.layers), strict=True):
            powers = each([scores], math.exp)[0]
            for p, q in zip(one, other, strict=True):
                for i in range(side):
                    for j in range(side):
                        whole = sum(group[i][j] for group in powers)
                        terms.append(sum(((p[i][j] - q[i][j]) * group[i][j] / whole) ** 2 for group in powers))
        total += sum(terms) / len(terms)
    return total


def loop_guide(guide: GuidedModule, maps: Tensor) -> tuple[list[list[float]], list[list[float]]]:
    """Convolution, normalisation over all of a sample with a scale per channel, ReLU and mean; then the classifier."""
    convolution, norm, _ = guide.bottleneck
    vectors = []
    for sample in loop_conv(maps.tolist(), convolution):
        values = flat(sample)
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + 1e-5)
        vectors.append([])
        for channel, gain, shift in zip(sample, norm.weight.tolist(), norm.bias.tolist(), strict=True):
            rectified = [max(0.0, (v - mean) / deviation * gain + shift) for v in flat(channel)]
            vectors[-1].append(sum(rectified) / len(rectified))
    rows = list(zip(guide.classifier.weight.tolist(), guide.classifier.bias.tolist(), strict=True))
    logits = [[sum(w * v for w, v in zip(row, vector, strict=True)) + b for row, b in rows] for vector in vectors]
    return vectors, logits


def loop_ekd(criterion: EKD, student: Features, teacher: Features, shown: Batch) -> float:
    total = loop_kl(student.logits, teacher.logits, 3.0)
    guides = zip(criterion.student_guides, student.maps, criterion.teacher_guides, teacher.maps, strict=True)
    for own, own_maps, other, other_maps in guides:
        (vectors, logits), (targets, target_logits) = loop_guide(own, own_maps), loop_guide(other, other_maps)
        scores, target_scores = (torch.tensor(rows, dtype=torch.float64) for rows in (logits, target_logits))
        total += loop_kl(scores, target_scores, 3.0)
        pairs = zip(flat(vectors), flat(targets), strict=True)
        total += 0.05 * sum((p - q) ** 2 for p, q in pairs) / len(vectors)
        total += loop_ce(scores, torch.eye(len(logits[0]), dtype=torch.float64)[shown.labels])
    return total


def same(_: Criterion, student: Features) -> tuple[Features, Features]:
    return student, student


CASES: dict[str, Case] = {
    "vid": Case(lambda c, s, t, b: loop_vid(c, s, t), zero_vid, negative=True),
    "ekd": Case(loop_ekd, None),  # the guided modules learn the labels
    "ab": Case(lambda c, s, t, b: loop_ab(c, s, t), zero_ab),
    "ft": Case(lambda c, s, t, b: loop_ft(c, s, t), zero_ft),
    "fsp": Case(lambda c, s, t, b: loop_fsp(c, s, t), same),
    "afds": Case(lambda c, s, t, b: loop_afds(c, s, t), same),
    "afd": Case(lambda c, s, t, b: loop_afd(c, s, t), zero_afd),
    "reviewkd": Case(lambda c, s, t, b: loop_reviewkd(c, s, t), zero_reviewkd),
    "krnet": Case(lambda c, s, t, b: loop_krnet(c, s, t), same),
    "masked_generative": Case(
        lambda c, s, t, b: loop_masked_generative(c, s, t), zero_masked_generative, draws=True, rate=1e-3
    ),
}
