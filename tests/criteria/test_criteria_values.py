"""Values of what the cases of the criteria leave out: token branches, adapters of any size, options, maps that are not
square.

References are numpy in float64 and loops, with the criterion's weights read as numbers.
"""

import math

import numpy as np
import pytest
import torch
from cases import BATCH, CLASSES, batch, features
from cases_logits import loop_enhanced
from cases_maps import loop_linear
from torch import Tensor, nn

from mgd_timm.criteria import AFD, AT, FT, KDSVD, NST, OFA, SP, MaskedGenerative
from mgd_timm.criteria.fitnet import HintAdapter
from mgd_timm.criteria.ofa import TokenBranch
from mgd_timm.features import Pair, Shapes

Array = np.ndarray


def array(tensor: Tensor) -> Array:
    assert tensor.dtype == torch.float64
    return tensor.detach().numpy()


def spread(module: nn.Module) -> nn.Module:
    """In float64, every parameter drawn anew: no bias is 0 and no gain 1."""
    generator = torch.Generator().manual_seed(4)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=p.dtype) + (p.ndim == 1))
    return module


def unit(values: Array) -> Array:
    return values / math.sqrt((values**2).sum())


def pooled(maps: Array, height: int, width: int) -> Array:
    """Adaptive average pooling: a cell is from floor(i n / m) to ceil((i + 1) n / m) on each axis."""

    def cells(inputs: int, outputs: int) -> list[slice]:
        return [slice(i * inputs // outputs, -(-(i + 1) * inputs // outputs)) for i in range(outputs)]

    across, down = cells(maps.shape[3], width), cells(maps.shape[2], height)
    return np.stack([np.stack([maps[:, :, v, u].mean((2, 3)) for u in across], 2) for v in down], 2)


def both_pooled(one: Array, other: Array) -> list[Array]:
    size = min(one.shape[2], other.shape[2]), min(one.shape[3], other.shape[3])
    return [pooled(m, *size) for m in (one, other)]


def convolved(maps: Array, conv: nn.Conv2d, padding: int = 0, stride: int = 1) -> Array:
    """Cross-correlation, place by place."""
    weight, (_, _, height, width) = array(conv.weight), conv.weight.shape
    wide = np.pad(maps, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    rows = range(0, wide.shape[2] - height + 1, stride)
    columns = range(0, wide.shape[3] - width + 1, stride)
    found = [
        [np.einsum("bcuv,ocuv->bo", wide[:, :, i : i + height, j : j + width], weight) for j in columns] for i in rows
    ]
    shift = array(conv.bias) if conv.bias is not None else np.zeros(len(weight))
    return np.stack([np.stack(row, 2) for row in found], 2) + shift[:, None, None]


def transposed(maps: Array, conv: nn.ConvTranspose2d) -> Array:
    """Every place stamps the kernel, 4x4, two places further on; a border of 1 is cut off."""
    weight, (count, _, height, width) = array(conv.weight), maps.shape
    out = np.zeros((count, weight.shape[1], 2 * height + 2, 2 * width + 2))
    for i in range(height):
        for j in range(width):
            out[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += np.einsum("bc,couv->bouv", maps[:, :, i, j], weight)
    return out[:, :, 1:-1, 1:-1] + array(conv.bias)[:, None, None]


def normalised(maps: Array, norm: nn.BatchNorm2d) -> Array:
    """BatchNorm with the statistics of the batch."""
    mean, variance = maps.mean((0, 2, 3), keepdims=True), maps.var((0, 2, 3), keepdims=True)
    gain, shift = (array(p)[:, None, None] for p in (norm.weight, norm.bias))
    return (maps - mean) / np.sqrt(variance + 1e-5) * gain + shift


def enlarged(maps: Array, height: int, width: int) -> Array:
    """Bilinear between the centres of places, constant beyond the outermost."""

    def shares(inputs: int, outputs: int) -> Array:
        found = np.zeros((outputs, inputs))
        for i in range(outputs):
            place = max((i + 0.5) * inputs / outputs - 0.5, 0.0)
            low = int(place)
            found[i, low] += 1 - (place - low)
            found[i, min(low + 1, inputs - 1)] += place - low
        return found

    return np.einsum("ih,bchw,jw->bcij", shares(maps.shape[2], height), maps, shares(maps.shape[3], width))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    ("side_s", "side_t", "way"),
    [
        ((4, 3), (4, 3), "one by one"),
        ((8, 6), (4, 3), "strided"),
        ((2, 3), (4, 6), "transposed"),
        ((5, 4), (3, 3), "valid"),
        ((9, 7), (3, 7), "valid"),
        ((12, 8), (5, 3), "pooled"),
        ((10, 3), (3, 3), "pooled"),
        ((3, 2), (5, 7), "enlarged"),
        ((12, 3), (4, 5), "enlarged"),  # shrunk on one axis
    ],
)
def test_adapters_of_hints(side_s, side_t, way, relu):
    adapter = spread(HintAdapter((4, *side_s), (5, *side_t), relu=relu))
    maps = torch.randn(BATCH, 4, *side_s, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, conv = array(maps), adapter.conv
    if way in ("pooled", "enlarged"):
        x = pooled(x, *side_t) if way == "pooled" else enlarged(x, *side_t)
    if way == "transposed":
        mixed = transposed(x, conv)
    else:
        mixed = convolved(x, conv, padding=1, stride=2) if way == "strided" else convolved(x, conv)
    expected = normalised(mixed, adapter.norm)
    found = array(adapter(maps))
    assert found.shape == (BATCH, 5, *side_t)
    np.testing.assert_allclose(found, expected.clip(min=0) if relu else expected, rtol=1e-10, atol=1e-12)
    assert (found.min() < 0) is np.bool_(not relu)


# OFA-KD's branch for tokens.


def layer_norm(rows: Array, norm: nn.LayerNorm, eps: float) -> Array:
    centred = rows - rows.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * array(norm.weight) + array(norm.bias)


def linear(rows: Array, layer: nn.Linear) -> Array:
    return rows @ array(layer.weight).T + (array(layer.bias) if layer.bias is not None else 0)


def gelu(values: Array) -> Array:
    return values * (1 + np.vectorize(math.erf)(values / math.sqrt(2))) / 2


def merged(maps: Array, merging: nn.Sequential) -> Array:
    """Two by two places become one: their channels side by side, row by row; LayerNorm, a linear layer and GELU."""
    count, _, height, width = maps.shape
    out = np.zeros((count, merging[1].out_features, height // 2, width // 2))
    for i in range(height // 2):
        for j in range(width // 2):
            near = np.concatenate([maps[:, :, 2 * i + u, 2 * j + v] for u in range(2) for v in range(2)], 1)
            out[:, :, i, j] = gelu(linear(layer_norm(near, merging[0], 1e-5), merging[1]))
    return out


def attended(tokens: Array, attention: nn.Module, heads: int) -> Array:
    """Softmax attention of one sample's tokens (places x channels), head by head."""
    width = tokens.shape[1] // heads
    queries, keys, values = np.split(linear(tokens, attention.qkv), 3, axis=1)
    found = []
    for head in range(heads):
        q, k, v = (m[:, head * width : (head + 1) * width] for m in (queries, keys, values))
        scores = q @ k.T / math.sqrt(width)
        shares = np.exp(scores - scores.max(1, keepdims=True))
        found.append(shares / shares.sum(1, keepdims=True) @ v)
    return linear(np.concatenate(found, 1), attention.proj)


def transformed(tokens: Array, block: nn.Module, heads: int) -> Array:
    """A block as ViT has it: the norms come first, each half adds to what it read."""
    tokens = tokens + attended(layer_norm(tokens, block.norm1, 1e-6), block.attn, heads)
    hidden = gelu(linear(layer_norm(tokens, block.norm2, 1e-6), block.mlp.fc1))
    return tokens + linear(hidden, block.mlp.fc2)


def by_tokens(branch: TokenBranch, maps: Array, heads: int) -> Array:
    for merging in branch.merging:
        maps = merged(maps, merging)
    means = []
    for sample in maps:
        tokens = sample.reshape(len(sample), -1).T
        for block in branch.blocks:
            tokens = transformed(tokens, block, heads)
        means.append(tokens.mean(0))
    return linear(np.stack(means), branch.classifier)


@pytest.mark.parametrize(
    ("shape", "deeper", "merges", "heads"),
    [
        ((8, 4, 3), 1, 0, 4),
        ((6, 3, 3), 2, 0, 1),
        ((8, 14, 16), 0, 1, 4),
        ((4, 28, 28), 1, 2, 4),
        ((5, 15, 14), 1, 0, 1),
    ],
)
def test_a_token_branch(shape, deeper, merges, heads):
    branch = spread(TokenBranch(shape, deeper, CLASSES))
    assert len(branch.merging) == merges
    assert len(branch.blocks) == max(deeper, 1)
    maps = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    np.testing.assert_allclose(array(branch(maps)), by_tokens(branch, array(maps), heads), rtol=1e-9, atol=1e-11)


def test_ofa_of_a_transformer():
    pair = Pair(Shapes(CLASSES, 8, ((8, 4, 4),) * 3), Shapes(CLASSES, 14, ()))
    criterion, student, teacher = spread(OFA(pair)), features(pair.student, 1), features(pair.teacher, 2)
    logits = [
        by_tokens(branch, array(m), 4).tolist() for branch, m in zip(criterion.branches, student.maps, strict=True)
    ]
    targets = batch().labels.tolist()
    expected = sum(loop_enhanced(one, teacher.logits, targets, 1.0) for one in (*logits, student.logits.tolist()))
    assert criterion(student, teacher, batch()).item() == pytest.approx(expected, rel=1e-10)


# KDSVD of several vectors.


@pytest.mark.parametrize("vectors", [1, 2, 3])
def test_singular_vectors(vectors):
    """The teacher's k first, each with the student's nearest of k + 3, both times the teacher's values of unit norm."""
    pair = Pair(
        Shapes(CLASSES, 10, ((6, 5, 4), (6, 3, 3), (7, 2, 3))), Shapes(CLASSES, 14, ((7, 4, 4), (9, 3, 5), (7, 2, 3)))
    )
    criterion, student, teacher = (
        spread(KDSVD(pair, vectors=vectors)),
        features(pair.student, 1),
        features(pair.teacher, 2),
    )
    nearest_is_not_its_own, expected, before = 0, 0.0, None
    for adapter, s, t in zip(criterion.adapters, student.maps, teacher.maps, strict=True):
        adapted = normalised(convolved(array(s), adapter[0]), adapter[1]) if len(adapter) else array(s)
        now = []
        for one, other in zip(adapted, array(t), strict=True):
            values, targets = np.linalg.svd(other.reshape(len(other), -1).T)[1:]
            candidates = np.linalg.svd(one.reshape(len(one), -1).T, full_matrices=False)[2][: vectors + 3]
            shares = unit(values[:vectors])
            pairs = []
            for k in range(vectors):
                target = targets[k] if targets[k].sum() >= 0 else -targets[k]
                cosines = candidates @ target
                best = int(np.abs(cosines).argmax())
                nearest_is_not_its_own += best != k
                pairs.append((shares[k] * math.copysign(1, cosines[best]) * candidates[best], shares[k] * target))
            now.append(pairs)
        if before is not None:
            for after_pairs, before_pairs in zip(now, before, strict=True):
                for after, earlier in zip(after_pairs, before_pairs, strict=True):
                    one, other = (np.exp(-((a[:, None] - b) ** 2) / 8) for a, b in zip(after, earlier, strict=True))
                    expected += ((one - other) ** 2).sum() / BATCH
        before = now
    assert nearest_is_not_its_own
    assert criterion(student, teacher, batch()).item() == pytest.approx(expected, rel=1e-9)


# Masked generative distillation, given what is drawn.


@pytest.mark.parametrize("mask", ["channels", "positions"])
def test_masked_generation(mask):
    pair = Pair(Shapes(CLASSES, 10, ((4, 6, 4),)), Shapes(CLASSES, 14, ((5, 3, 7),)))
    criterion = spread(MaskedGenerative(pair, ratio=0.4, mask=mask))
    student, teacher = features(pair.student, 1), features(pair.teacher, 2)
    torch.manual_seed(3)
    loss = criterion(student, teacher, batch())
    torch.manual_seed(3)
    drawn = torch.rand((BATCH, 5, 1, 1) if mask == "channels" else (BATCH, 1, 3, 4)).numpy()
    assert 0 < (drawn < 0.4).mean() < 1
    ours, theirs = both_pooled(convolved(array(student.maps[0]), criterion.align), array(teacher.maps[0]))
    hidden = convolved(ours * (drawn >= 0.4), criterion.generation[0], padding=1).clip(min=0)
    expected = ((convolved(hidden, criterion.generation[2], padding=1) - theirs) ** 2).sum() / BATCH
    assert loss.item() == pytest.approx(expected, rel=1e-10)


# Maps that are not square, of sides that do not divide each other.


def energies(maps: Array) -> Array:
    """Mean over channels of squares, a unit vector per sample."""
    return np.stack([unit((sample**2).mean(0).ravel()) for sample in maps])


def array_at(criterion: AT, ours: list[Array], theirs: list[Array]) -> float:
    pairs = [[energies(m) for m in both_pooled(s, t)] for s, t in zip(ours, theirs, strict=True)]
    return sum(((one - other) ** 2).mean() for one, other in pairs)


def array_nst(criterion: NST, ours: list[Array], theirs: list[Array]) -> float:
    def kernel(one: list[Array], other: list[Array]) -> float:
        return np.mean([[(a @ b) ** 2 for b in other] for a in one])

    total = 0.0
    for pair in zip(ours, theirs, strict=True):
        for samples in zip(*both_pooled(*pair), strict=True):
            s, t = ([unit(channel.ravel()) for channel in sample] for sample in samples)
            total += (kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)) / BATCH
    return total


def array_sp(criterion: SP, ours: list[Array], theirs: list[Array]) -> float:
    found = []
    for maps in (ours[-1], theirs[-1]):
        rows = [sample.ravel() for sample in maps]
        found.append(np.stack([unit(np.array([row @ other for other in rows])) for row in rows]))
    return ((found[0] - found[1]) ** 2).sum() / BATCH**2


def array_ft(criterion: FT, ours: list[Array], theirs: list[Array]) -> float:
    factors = []
    for maps, layers in ((ours[-1], criterion.translator), (theirs[-1], criterion.paraphraser.encoder)):
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                maps = convolved(maps, layer, padding=1)
            elif isinstance(layer, nn.BatchNorm2d):
                maps = normalised(maps, layer)
            else:
                maps = np.where(maps > 0, maps, 0.1 * maps)
        factors.append(maps)
    one, other = (energies(m) for m in both_pooled(*factors))
    return np.abs(one - other).mean()


def array_afd(criterion: AFD, ours: list[Array], theirs: list[Array]) -> float:
    keys = [loop_linear(m.mean((2, 3)).tolist(), key) for m, key in zip(ours, criterion.keys, strict=True)]
    queries = [loop_linear(m.mean((2, 3)).tolist(), query) for m, query in zip(theirs, criterion.queries, strict=True)]
    bilinear = loop_linear([keys[s][b] for b in range(BATCH) for s in range(len(ours))], criterion.bilinear)
    mixed = np.array(bilinear).reshape(BATCH, len(ours), len(theirs), criterion.dim)
    positions = array(criterion.teacher_positions), array(criterion.student_positions)
    total = 0.0
    for t, maps in enumerate(theirs):
        size, target = maps.shape[2:], energies(maps)
        near = [pooled((m**2).mean(1, keepdims=True), *size) for m in ours]
        for b in range(BATCH):
            scores = [
                (mixed[b, s, t] @ np.array(queries[t][b]) + positions[0][t] @ positions[1][s])
                / math.sqrt(criterion.dim)
                for s in range(len(ours))
            ]
            shares = np.exp(scores) / np.exp(scores).sum()
            gaps = [((unit(energy[b].ravel()) - target[b]) ** 2).mean() for energy in near]
            total += float(shares @ gaps) / BATCH
    return total


OBLONG = Pair(
    Shapes(CLASSES, 10, ((4, 8, 6), (6, 4, 3), (7, 3, 7))), Shapes(CLASSES, 14, ((5, 6, 6), (7, 3, 5), (8, 5, 2)))
)


@pytest.mark.parametrize(
    ("method", "reference"), [(AT, array_at), (NST, array_nst), (SP, array_sp), (FT, array_ft), (AFD, array_afd)]
)
def test_maps_that_are_not_square(method, reference):
    criterion = spread(AFD(OBLONG, dim=6) if method is AFD else method(OBLONG))
    for norm in criterion.modules():
        if isinstance(norm, nn.BatchNorm1d):  # whose reference takes them into account
            assert norm.weight.std() > 0
    student, teacher = features(OBLONG.student, 1), features(OBLONG.teacher, 2)
    expected = reference(criterion, [array(m) for m in student.maps], [array(m) for m in teacher.maps])
    assert criterion(student, teacher, batch()).item() == pytest.approx(expected, rel=1e-10)


def test_both_ways_to_compute_nst_are_taken():
    """Products of positions where these are few, else of channels: the first and the last of these maps."""
    sizes = [
        (s[0], t[0], min(s[1], t[1]) * min(s[2], t[2]))
        for s, t in zip(OBLONG.student.maps, OBLONG.teacher.maps, strict=True)
    ]
    few = [places * (c_s + c_t) <= c_s**2 + c_t**2 + c_s * c_t for c_s, c_t, places in sizes]
    assert few[0] is False
    assert few[-1] is True
