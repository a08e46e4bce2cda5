"""What a row of a store holds, and how numbers are rounded."""

import pytest
import torch

from mgd_timm.features import Features
from mgd_timm.teachers.outputs.layout import Layout, StoreError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("classes", "kept", "kind"), [(10, 1, torch.int16), (100, 99, torch.int16), (40_000, 20, torch.int32)]
)
def test_top_k_keeps_its_logits_and_the_probability_of_the_others(classes, kept, kind):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(50, classes, generator=generator)
    logits[0] = 0.0  # all equal
    layout = Layout(8, classes, kept)
    parts = layout.pack(Features(logits, torch.randn(50, 8, generator=generator)))
    assert parts["classes"].dtype == kind
    rebuilt = layout.unpack(parts).logits
    values, where = logits.topk(kept)
    torch.testing.assert_close(rebuilt.gather(1, where), values.half().float(), rtol=0, atol=0)
    before, after = logits.double().softmax(1), rebuilt.double().softmax(1)
    torch.testing.assert_close(after.gather(1, where), before.gather(1, where), rtol=2e-2, atol=0)
    others = torch.ones_like(before).scatter(1, where, 0.0)
    torch.testing.assert_close((after * others).sum(1), (before * others).sum(1), rtol=2e-2, atol=0)
    rest = [row[keep.bool()].unique() for row, keep in zip(rebuilt, others, strict=True)]
    assert all(len(values) == 1 for values in rest)
    assert (
        torch.stack(rest).flatten() <= values[:, -1] + 1e-5
    ).all()  # no class that was left out overtakes one that was kept
    tempered = [((x / 4).softmax(1) * others).sum(1) for x in (rebuilt.double(), logits.double())]
    assert (tempered[0] >= tempered[1] - 1e-3).all()  # what Layout says of T > 1


def test_all_logits_are_rounded_and_nothing_else():
    shown = Features(torch.randn(5, 7) * 100, torch.randn(5, 3))
    layout = Layout(3, 7)
    back = layout.unpack(layout.pack(shown))
    assert torch.equal(back.logits, shown.logits.half().float())
    assert torch.equal(back.embedding, shown.embedding.half().float())
    assert layout.size(5) == 5 * (3 + 7) * 2


@pytest.mark.parametrize("value", [65_520.0, -1e9, float("inf"), float("nan")])
@pytest.mark.parametrize("top_k", [0, 2])
def test_numbers_beyond_fp16_are_refused(value, top_k):
    shown = Features(torch.randn(5, 7), torch.randn(5, 3))
    shown.embedding[2, 1] = value
    with pytest.raises(StoreError, match=r"the largest of the teacher's embedding is .*ends at 65,504: leave --teach"):
        Layout(3, 7, top_k).pack(shown)


@pytest.mark.parametrize("top_k", [-1, 10, 11])
def test_top_k_is_fewer_than_the_classes(top_k):
    with pytest.raises(ValueError, match=rf"teacher_top_k={top_k}: expected 1 to 9, fewer than the 10 classes, or 0"):
        Layout(3, 10, top_k)
