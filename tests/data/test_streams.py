"""Streams: an order of (seed, epoch), the folder's images and labels, the same for any number of workers and from any
update on."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from image_files import class_folders, files, shards
from small import write_pictures
from traced import launch, recorded

from mgd_timm.data.dataset import Images, load_images
from mgd_timm.data.decode import DataError
from mgd_timm.data.readers.streams import Stream, StreamSource, open_streams, read_stream, shuffled
from mgd_timm.recipe.data import Data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 24, 100)


@pytest.fixture(scope="module")
def parquets(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in four training files and one to test on."""
    import datasets

    folder = tmp_path_factory.mktemp("parquets")
    for split, count in (("train", 4), ("test", 1)):
        rows = [
            {"image": {"bytes": p.read_bytes(), "path": p.name}, "label": "abc".index(p.parent.name)}
            for p in files(pictures / split)
        ]
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list("abc")))
        table = datasets.Dataset.from_list(rows, features=features)
        for shard in range(count):
            table.shard(count, shard).to_parquet(folder / f"{split}-{shard:05d}-of-{count:05d}.parquet")
    return folder


def stream(place: Path, seed: int = 1, **options: object) -> Images:
    values = {"workers": 0, "img_size": 32, "shuffle_buffer": 10, **options}
    return load_images(Data(data_dir=str(place), streaming=True, **values), seed, log=lambda _: None)  # type: ignore[arg-type]


def batches(images: Images, micro_batches: list[torch.Tensor], epoch: int = 1) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(batch) for batch in images.train.batches(micro_batches, epoch, CPU)]


def equal(one: list[tuple[torch.Tensor, ...]], two: list[tuple[torch.Tensor, ...]]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))


def test_a_stream_has_the_folders_images_and_labels(pictures: Path, parquets: Path, tmp_path: Path) -> None:
    plain = load_images(Data(data_dir=str(pictures), workers=0, img_size=32), 1, log=lambda _: None)
    assert plain.test is not None
    expected = next(iter(plain.test.batches([plain.test.ids], 0, CPU)))
    shards(pictures, tmp_path)
    for place, names in ((pictures, "abc"), (parquets, "abc"), (tmp_path, "012")):
        found = stream(place)
        assert isinstance(found.train, StreamSource)
        assert (found.class_names, found.num_samples) == (tuple(names), 24)
        assert found.test is not None
        assert torch.equal(found.test.labels, expected.labels)
        parts = list(found.test.batches(list(found.test.ids[1::2].split(2)), 0, CPU))  # what a second process evaluates
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images[1::2])
        seen = torch.cat([labels for _, labels, _ in batches(found, [found.train.ids])])
        assert seen.bincount().tolist() == [8, 8, 8]


def test_an_epochs_order_is_shards_and_a_buffer_by_seed_and_epoch(parquets: Path) -> None:
    rows = open_streams(str(parquets), None)["train"]

    def order(seed: int, epoch: int, buffer: int) -> list[int]:
        return [hash(row["image"].tobytes()) for row in shuffled(rows, seed, epoch, buffer)]

    every = [hash(row["image"].tobytes()) for row in rows]
    orders = [order(0, 0, 5), order(0, 1, 5), order(1, 0, 5)]
    for found in orders:
        assert sorted(found) == sorted(every)
        assert found != every
    assert orders[0] not in orders[1:]
    assert order(0, 0, 5) == orders[0]
    blocks = [every[i : i + 6] for i in range(0, 24, 6)]
    assert order(0, 0, 1) in [list(itertools.chain(*some)) for some in itertools.permutations(blocks)]


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_for_any_workers_processes_and_start(workers: int, parquets: Path) -> None:
    images = stream(parquets, num_samples=22)
    order = images.train.order(1, 1)  # type: ignore[attr-defined]
    assert order.tolist() == list(range(22))
    micro_batches = list(order.split(4))
    torch.manual_seed(workers)
    before = torch.get_rng_state()
    whole = batches(images, micro_batches)
    assert torch.equal(torch.get_rng_state(), before)
    assert not equal(whole, batches(images, micro_batches, epoch=2))
    other = stream(parquets, num_samples=22, workers=workers)
    assert equal(batches(other, micro_batches), whole)
    assert equal(batches(other, micro_batches[1::2]), whole[1::2])  # the second process
    assert equal(batches(other, micro_batches[3:]), whole[3:])  # after a resume


@pytest.mark.slow
def test_a_run_stopped_on_two_processes_goes_on_on_three_as_on_one(parquets: Path, tmp_path: Path) -> None:
    """In the midst of the second epoch: the same images in every update, shown in the same way."""
    options = {"model": "cifar_resnet8x05", "data_dir": str(parquets), "streaming": True, "num_samples": 22}
    options |= {"img_size": 32, "shuffle_buffer": 10, "aa": "rand-m5", "epochs": 2, "log_interval": 1}
    options |= {"batch_size": 2, "global_batch_size": 12}  # the last update has 10 images, which 3 processes want 12 of

    def job(name: str, output: str, workers: int, **more: object) -> dict[str, object]:
        given = {**options, "output": str(tmp_path / output), "workers": workers, **more}
        return {"record": str(tmp_path / name), "options": given}

    launch([{**job("stopped", "run", 1), "stop_after": 3}], 2)
    launch([job("resumed", "run", 0, resume=True)], 3)
    launch([job("whole", "whole run", 2)], 1)
    whole = recorded(tmp_path / "whole", 1)
    assert [len(seen) for _, seen in whole] == [12, 10, 12, 10]
    assert recorded(tmp_path / "stopped", 2) + recorded(tmp_path / "resumed", 3) == whole


def test_a_process_decodes_its_own_images_alone(pictures: Path, tmp_path: Path) -> None:
    """One that cannot be decoded is no matter to who does not show it."""
    shutil.copytree(pictures, tmp_path / "copy")
    path = files(tmp_path / "copy" / "train")[3]
    path.write_bytes(path.read_bytes()[:500])
    whole, images = stream(pictures, num_samples=24), stream(tmp_path / "copy", num_samples=24)
    slots = list(images.train.ids.split(2))
    with pytest.raises(DataError, match=r"^train image \d+ of the stream") as error:
        batches(images, slots)
    place = int(str(error.value).split()[2])
    shown = [slots[rank::2] for rank in range(2)]
    with pytest.raises(DataError, match=f"^train image {place} of the stream"):
        batches(images, shown[place // 2 % 2])
    other = shown[1 - place // 2 % 2]
    assert equal(batches(images, other), batches(whole, other))


def test_what_a_stream_does_not_know_is_asked_for(pictures: Path, parquets: Path, tmp_path: Path) -> None:
    shards(pictures, tmp_path)
    splits = open_streams(str(tmp_path), None)  # as a data set of the hub that states nothing

    def read(**options: Any) -> Stream:
        return read_stream(Data(streaming=True, **options), splits, "train", lambda _: None)

    with pytest.raises(DataError, match="does not name its classes: give their number with --num-classes"):
        read(target_key="cls", num_samples=24)
    with pytest.raises(DataError, match="does not state its number of images: give it with --num-samples"):
        read(target_key="cls", num_classes=3)
    with pytest.raises(DataError, match="unknown split 'trian': did you mean train"):
        stream(parquets, train_split="trian", num_samples=24)
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        stream(tmp_path / "nowhere", num_samples=24)
    with pytest.raises(DataError, match=r"no/where: cannot be streamed"):
        open_streams("no/where", None)
    images = stream(parquets, num_samples=30)
    with pytest.raises(DataError, match=r"ended after 24 images, expected 30: give its true number"):
        batches(images, [images.train.ids])
    plain = stream(parquets).train.transform  # type: ignore[attr-defined]
    narrow = StreamSource(read(target_key="cls", num_samples=24, num_classes=2), Data(workers=0), plain, 1)
    with pytest.raises(DataError, match="has the label 2: expected 0 to 1"):
        list(narrow.batches([narrow.ids], 0, CPU))


def test_a_corrupt_image_in_a_stream_is_named(pictures: Path, tmp_path: Path) -> None:
    shutil.copytree(pictures, tmp_path / "copy")
    path = files(tmp_path / "copy" / "train")[3]
    path.write_bytes(path.read_bytes()[:500])
    images = stream(tmp_path / "copy", workers=1, num_samples=24)
    # without --max-bad
    said = r"^train image \d+ of the stream in epoch 2: truncated or corrupt .*: replace it by an intact copy, .*\.$"
    with pytest.raises(DataError, match=said):
        batches(images, [images.train.ids])


def test_class_folders_in_a_streamed_tar_are_refused_with_the_way_out(pictures: Path, tmp_path: Path) -> None:
    class_folders(pictures, tmp_path)
    splits = open_streams(str(tmp_path), None)  # as a data set of the hub
    with pytest.raises(DataError, match=r"a stream does not see their class folders: leave --streaming out"):
        read_stream(Data(streaming=True, num_samples=24), splits, "train", lambda _: None)
    assert stream(tmp_path).class_names == ("a", "b", "c")  # of local tars they are read
