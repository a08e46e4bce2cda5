"""Erasing, mixing and repeats: as the papers define them, once for teacher and student, and by (seed, epoch, samples)
alone."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from small import write_pictures

from mgd_timm.data.dataset import Images, load_images
from mgd_timm.data.mixed_source import Taught, taught
from mgd_timm.data.rng import mix
from mgd_timm.data.sampler import cut_updates, repeated_order
from mgd_timm.data.transforms import distributions, erase, mixed
from mgd_timm.pipeline.checks import check_taught
from mgd_timm.recipe.recipe import Data, make_recipe

CPU = torch.device("cpu")


def batch(count: int = 8, side: int = 16, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, side, side + 4, generator=generator), torch.randint(
        0, classes, (count,), generator=generator
    )


def reference(images: torch.Tensor, labels: torch.Tensor, key: int, data: Data) -> tuple[np.ndarray, np.ndarray, str]:
    """mixup and cutmix by the papers' formulas in float64, from the same draws."""
    state = np.random.RandomState(key & 0xFFFFFFFF)
    x, y = images.double().numpy(), np.eye(5)[labels.numpy()]
    if state.rand() >= data.mixup_prob:
        return x, y, "none"
    kind = "cutmix" if data.cutmix and (not data.mixup or state.rand() < data.mixup_switch_prob) else "mixup"
    alpha = data.cutmix if kind == "cutmix" else data.mixup
    lam = state.beta(alpha, alpha)
    out = x.copy()
    if kind == "mixup":
        for i in range(len(x)):
            out[i] = lam * x[i] + (1 - lam) * x[len(x) - 1 - i]
    else:
        height, width = x.shape[2:]
        cut = [int(side * (1 - lam) ** 0.5) for side in (height, width)]
        middle = [state.randint(0, side) for side in (height, width)]
        changed = np.zeros((height, width), dtype=bool)
        for row in range(height):
            for column in range(width):
                inside = [
                    m - c // 2 <= place < m + (c + 1) // 2
                    for place, m, c in zip((row, column), middle, cut, strict=True)
                ]
                changed[row, column] = all(inside)
        for i in range(len(x)):
            out[i][:, changed] = x[len(x) - 1 - i][:, changed]
        lam = 1 - changed.mean()
    return out, lam * y + (1 - lam) * y[::-1], kind


@pytest.mark.parametrize("count", [8, 7])
def test_mixing_is_the_papers(count: int) -> None:
    images, labels = batch(count)
    before = images.clone()
    kinds = set()
    for key in range(40):
        data = Data(mixup=0.8, cutmix=1.0, mixup_prob=0.8)
        x, y, kind = reference(images, labels, mix(key), data)
        found, shares = mixed(images, distributions(labels, 5), mix(key), data)
        np.testing.assert_allclose(found.double().numpy(), x, atol=1e-6)
        np.testing.assert_allclose(shares.double().numpy(), y, atol=1e-6)
        kinds.add(kind)
    assert kinds == {"none", "mixup", "cutmix"}
    assert torch.equal(images, before)


def test_mixing_is_timms_and_smoothing_after_it_is_smoothing_before_it() -> None:
    from timm.data.mixup import Mixup

    images, labels = batch()
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    for key in range(20):
        data = Data(mixup=0.8, cutmix=1.0)
        found, shares = mixed(images, distributions(labels, 5), key, data)
        np.random.seed(key)
        expected, targets = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=5, label_smoothing=0.1)(
            images.clone(), labels
        )
        torch.testing.assert_close(found, expected)
        ours = torch.nn.functional.cross_entropy(logits, shares, label_smoothing=0.1)
        torch.testing.assert_close(ours, -(targets * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_erasing_has_the_distribution_of_timms(mode: str) -> None:
    from timm.data.random_erasing import RandomErasing

    count, keys = 1500, torch.arange(1500)
    blank = torch.full((count, 3, 24, 28), 7.0)
    random.seed(0)
    torch.manual_seed(0)
    theirs = RandomErasing(0.4, mode=mode, max_count=2, device="cpu")(blank.clone())
    ours = erase(blank, keys, 1, 2, 0.4, mode, 2)
    numbers = []
    for found in (ours, theirs):
        gone = (found != 7).any(1).flatten(1)
        erased = gone.any(1)
        areas = gone.double().mean(1)[erased]
        values = found.permute(1, 0, 2, 3)[:, (found != 7).any(1)]
        numbers.append(
            [erased.double().mean(), areas.mean(), areas.std(), values.mean(), values.std(), gone[:, 0].double().mean()]
        )
    np.testing.assert_allclose(numbers[0], numbers[1], atol=0.05)
    assert torch.equal((ours != 7).all(1), (ours != 7).any(1))  # a box goes through all channels


def test_erasing_depends_on_seed_epoch_and_sample_alone() -> None:
    images = torch.full((40, 3, 16, 16), 7.0)
    keys = torch.arange(40)
    whole = erase(images, keys, 1, 2, 0.5, "pixel", 3)
    some = torch.tensor([30, 2, 17])
    torch.manual_seed(5)
    assert torch.equal(erase(images[:3], keys[some], 1, 2, 0.5, "pixel", 3), whole[some])
    for other in ((2, 2), (1, 3)):
        assert not torch.equal(erase(images, keys, *other, 0.5, "pixel", 3), whole)
    assert torch.equal(erase(images, keys, 1, 2, 0.0, "pixel", 1), images)


@pytest.mark.parametrize(("count", "length"), [(1000, 768), (100, 100), (256, 256)])
def test_repeated_augmentation_has_an_epochs_length_and_each_image_several_times(count: int, length: int) -> None:
    rows, repeats = repeated_order(count, 3, 1, 2)
    assert len(rows) == len(repeats) == length
    whole = length // 3 * 3
    assert torch.equal(rows[:whole:3], rows[1:whole:3])
    assert torch.equal(rows[:whole:3], rows[2:whole:3])
    assert len(rows[:whole:3].unique()) == whole // 3
    assert repeats[:whole].tolist() == [0, 1, 2] * (whole // 3)
    assert not torch.equal(repeated_order(count, 3, 1, 3)[0], rows)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 24, 112)


@pytest.fixture(scope="module")
def thumbnails(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("thumbnails"), 24, 20)


def shown(
    images: Images, data: Data, slots: list[torch.Tensor], epoch: int, seed: int = 3
) -> list[tuple[torch.Tensor, ...]]:
    source = Taught(images.train, data, seed, images.num_samples, images.num_classes)
    return [tuple(batch) for batch in source.batches(slots, epoch, CPU)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more readers than this machine has cores
@pytest.mark.parametrize("kind", ["pictures", "thumbnails"])
def test_a_student_is_shown_the_same_by_any_workers_and_from_any_update_on(
    kind: str, request: pytest.FixtureRequest
) -> None:
    whole: list[tuple[torch.Tensor, ...]] = []
    options = {"reprob": 0.5, "recount": 2, "mixup": 0.8, "cutmix": 1.0, "aug_repeats": 2, "img_size": 32}
    options["data_dir"] = str(request.getfixturevalue(kind))
    for workers in (0,) if kind == "thumbnails" else (0, 1, 3):
        data = Data(workers=workers, **options)  # type: ignore[arg-type]
        images = load_images(data, 3, say=lambda _: None)
        source = taught(images, make_recipe(seed=3, **options))
        assert isinstance(source, Taught)
        updates = cut_updates(source.order(3, 1)[:24], 6, 2, 12)
        torch.manual_seed(workers)
        before = torch.get_rng_state()
        every = shown(images, data, [slot for slots in updates for slot in slots], 1)
        assert torch.equal(torch.get_rng_state(), before)
        second = shown(images, data, [slots[1] for slots in updates], 1)  # the second process
        later = shown(images, data, updates[1], 1)  # after a resume
        for one, two in [*zip(every[1::2], second, strict=True), *zip(every[2:], later, strict=True)]:
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        whole = whole or every
        assert all(
            torch.equal(a, b) for one, two in zip(every, whole, strict=True) for a, b in zip(one, two, strict=True)
        )
    assert whole[0][1].shape == (6, images.num_classes)
    assert whole[0][2].tolist()[::2] == whole[0][2].tolist()[1::2]  # an image and its second augmentation


def test_a_further_augmentation_is_another_crop_of_the_same_image(pictures: Path) -> None:
    data = Data(data_dir=str(pictures), workers=0, img_size=32)
    images = load_images(data, 3, say=lambda _: None)
    first, second = images.train.batches([torch.tensor([4, 5]), torch.tensor([4 + 24, 5 + 48])], 0, CPU)
    assert first.sample_ids.tolist() == second.sample_ids.tolist() == [4, 5]
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.images, second.images)


def test_mixing_ends_with_its_epoch_and_labels_stay_distributions(pictures: Path) -> None:
    data = Data(data_dir=str(pictures), workers=0, img_size=32, mixup=1.0, mixup_off_epoch=2)
    images = load_images(data, 3, say=lambda _: None)
    slot = torch.arange(6)
    plain = next(iter(images.train.batches([slot], 2, CPU)))
    pixels, labels, _ = shown(images, data, [slot], 2)[0]
    assert torch.equal(pixels, plain.images)
    assert torch.equal(labels, torch.nn.functional.one_hot(plain.labels, 3).float())
    assert not torch.equal(
        shown(images, data, [slot], 1)[0][0], next(iter(images.train.batches([slot], 1, CPU))).images
    )


@pytest.mark.parametrize("mode", ["const", "pixel"])
def test_large_images_are_erased_as_timm_does(mode: str, pictures: Path) -> None:
    erased = Data(data_dir=str(pictures), workers=0, img_size=32, reprob=1.0, remode=mode, recount=1, hflip=0.0)  # type: ignore[arg-type]
    found = load_images(erased, 3, say=lambda _: None).train
    plain = load_images(Data(data_dir=str(pictures), workers=0, img_size=32, hflip=0.0), 3, say=lambda _: None).train
    one, two = (next(iter(source.batches([torch.arange(24)], 0, CPU))).images for source in (found, plain))
    gone = (one != two).any(1).flatten(1).double().mean(1)
    assert 0.02 < gone.mean() < 0.34
    assert (gone < 0.36).all()


def test_what_cannot_be_mixed_repeated_or_streamed_is_refused() -> None:
    for options, said in (
        ({"mixup": 0.2, "teacher_store": "store"}, "mixup=0.2 beside teacher_store='store'"),
        ({"aug_repeats": 3, "teacher_store": "store"}, "aug_repeats=3 beside teacher_store"),
        ({"cutmix": 1.0, "criterion": ("crd",)}, "cutmix=1.0 beside criterion 'crd'"),
        ({"streaming": True}, "--heads-protocol live"),
        ({"streaming": True, "method": "none", "criterion": ("crd",)}, "streaming beside criterion 'crd'"),
        ({"streaming": True, "method": "none", "teacher_store": "s"}, "streaming beside teacher_store"),
    ):
        with pytest.raises(ValueError, match=said):
            check_taught(make_recipe(**options))  # type: ignore[arg-type]
    check_taught(make_recipe(mixup=0.2, criterion=("dkd",)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reprob": 1.5}, "reprob=1.5: expected 0 to 1"),
        ({"mixup": -1.0}, "mixup=-1.0: expected 0 or more"),
        ({"aug_repeats": -1}, "aug_repeats=-1"),
        ({"streaming": True, "val_split": 0.1}, "val_split=0.1 needs any image at any time"),
        ({"num_samples": 10}, "num_samples=10 is for streamed images"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Data(**options)  # type: ignore[arg-type]


def test_an_unknown_way_to_erase_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown remode 'noise': known: const, pixel, rand"):
        make_recipe(remode="noise")


def test_small_images_refuse_what_only_large_ones_have(thumbnails: Path) -> None:
    with pytest.raises(ValueError, match="aa=rand-m9: images of 96 pixels or less"):
        load_images(Data(data_dir=str(thumbnails), aa="rand-m9"), 0, say=lambda _: None)
