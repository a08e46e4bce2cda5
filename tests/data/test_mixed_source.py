"""The student sees the same mixed and repeated images with any number of workers and from any update on."""

from pathlib import Path

import pytest
import torch
from small import write_pictures

from mgd_timm.data.dataset import Images, load_images
from mgd_timm.data.mixed_source import MixedSource, mixed_source
from mgd_timm.data.sampler import cut_updates
from mgd_timm.pipeline.checks import check_recipe
from mgd_timm.pipeline.plan import terms_of
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.recipe import make_recipe

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 24, 112)


@pytest.fixture(scope="module")
def thumbnails(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("thumbnails"), 24, 20)


def shown(
    images: Images, data: Data, micro_batches: list[torch.Tensor], epoch: int, seed: int = 3
) -> list[tuple[torch.Tensor, ...]]:
    source = MixedSource(images.train, data, seed, images.num_samples, images.num_classes)
    return [tuple(batch) for batch in source.batches(micro_batches, epoch, CPU)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("kind", ["pictures", "thumbnails"])
def test_a_student_is_shown_the_same_by_any_workers_and_from_any_update_on(
    kind: str, request: pytest.FixtureRequest
) -> None:
    whole: list[tuple[torch.Tensor, ...]] = []
    options = {"reprob": 0.5, "recount": 2, "mixup": 0.8, "cutmix": 1.0, "aug_repeats": 2, "img_size": 32}
    options["data_dir"] = str(request.getfixturevalue(kind))
    for workers in (0,) if kind == "thumbnails" else (0, 1, 3):
        data = Data(workers=workers, **options)  # type: ignore[arg-type]
        images = load_images(data, 3, log=lambda _: None)
        source = mixed_source(images, data, 3)
        assert isinstance(source, MixedSource)
        updates = cut_updates(source.order(3, 1)[:24], 6, 2, 12)
        torch.manual_seed(workers)
        before = torch.get_rng_state()
        every = shown(images, data, [ids for micro_batches in updates for ids in micro_batches], 1)
        assert torch.equal(torch.get_rng_state(), before)
        second = shown(images, data, [micro_batches[1] for micro_batches in updates], 1)  # the second process
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
    images = load_images(data, 3, log=lambda _: None)
    first, second = images.train.batches([torch.tensor([4, 5]), torch.tensor([4 + 24, 5 + 48])], 0, CPU)
    assert first.sample_ids.tolist() == second.sample_ids.tolist() == [4, 5]
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.images, second.images)


def test_mixing_ends_with_its_epoch_and_labels_stay_distributions(pictures: Path) -> None:
    data = Data(data_dir=str(pictures), workers=0, img_size=32, mixup=1.0, mixup_off_epoch=2)
    images = load_images(data, 3, log=lambda _: None)
    ids = torch.arange(6)
    plain = next(iter(images.train.batches([ids], 2, CPU)))
    pixels, labels, _ = shown(images, data, [ids], 2)[0]
    assert torch.equal(pixels, plain.images)
    assert torch.equal(labels, torch.nn.functional.one_hot(plain.labels, 3).float())
    assert not torch.equal(shown(images, data, [ids], 1)[0][0], next(iter(images.train.batches([ids], 1, CPU))).images)


def test_what_cannot_be_mixed_repeated_or_streamed_is_refused() -> None:
    def refuse(recipe):
        check_recipe(recipe, terms_of(recipe))

    for options, said in (
        ({"mixup": 0.2, "teacher_store": "store"}, "mixup=0.2 with teacher_store='store'"),
        ({"aug_repeats": 3, "teacher_store": "store"}, "aug_repeats=3 with teacher_store"),
        ({"cutmix": 1.0, "criterion": ("crd",)}, "cutmix=1.0 with criterion 'crd'"),
        ({"mixup": 0.2, "criterion": ("sskd",)}, "mixup=0.2 with criterion 'sskd', which compares each image with"),
        ({"aug_repeats": 3, "criterion": ("sskd",)}, "aug_repeats=3 with criterion 'sskd'"),
        ({"criterion": ("sskd",), "teacher_store": "store"}, "'sskd' reads the teacher's outputs of rotated images"),
        ({"streaming": True}, "--heads-protocol live"),
        ({"streaming": True, "method": "none", "criterion": ("sskd",)}, "--heads-protocol live"),
        ({"streaming": True, "method": "none", "criterion": ("crd",)}, "streaming with criterion 'crd'"),
        ({"streaming": True, "method": "none", "teacher_store": "s"}, "streaming with teacher_store"),
    ):
        with pytest.raises(ValueError, match=said):
            refuse(make_recipe(**options))  # type: ignore[arg-type]
    refuse(make_recipe(mixup=0.2, criterion=("dkd",)))
