"""Images: what Pillow can open of the known endings; whatever else lies there is counted and named by kind."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from image_files import encoded, noise, pixels, read
from PIL import Image, features
from places import found, picture, put, refused, table, tree

PAIR = {"train/cat": 2, "train/dog": 2}
heif = importlib.util.find_spec("pillow_heif") is not None
no_plugin = pytest.param("heic", marks=pytest.mark.skipif(heif, reason="pillow-heif is installed"))


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        *(
            ("jpg", "JPEG"),
            ("JPG", "JPEG"),
            ("Jpeg", "JPEG"),
            ("jfif", "JPEG"),
            ("jpe", "JPEG"),
            ("png", "PNG"),
            ("PNG", "PNG"),
        ),
        *(
            ("webp", "WEBP"),
            ("bmp", "BMP"),
            ("gif", "GIF"),
            ("tif", "TIFF"),
            ("TIFF", "TIFF"),
            ("ppm", "PPM"),
            ("jp2", "JPEG2000"),
        ),
        pytest.param("avif", "AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="no AVIF")),
    ],
)
def test_endings_in_any_case(tmp_path: Path, ending: str, kind: str) -> None:
    tree(tmp_path, PAIR)
    put(tmp_path / f"train/cat/new.{ending}", picture(kind=kind))
    seen = found(tmp_path)
    assert (seen.train, seen.count) == ({"cat": 3, "dog": 2}, 0)
    assert len(read(tmp_path, defaults=None).train.ids) == 5


@pytest.mark.parametrize(
    ("name", "why"),
    [
        pytest.param("new.heic", "mgd-timm[heic]", marks=pytest.mark.skipif(heif, reason="pillow-heif is installed")),
        *(("new.svg", ".svg"), ("new.dng", ".dng"), ("new.psd", ".psd"), ("new", "no ending"), (".png", "hidden")),
        *(
            ("._0.png", "macOS"),
            (".DS_Store", "hidden"),
            ("Thumbs.db", ".db"),
            ("new.json", ".json"),
            ("new.jpg.part", ".part"),
        ),
        *(
            ("new.jpg ", ".jpg "),
            ("new.png~", ".png~"),
            ("new.mp4", ".mp4"),
            ("labels.csv", "table"),
            ("x.npy", "array"),
        ),
    ],
)
def test_other_files_are_counted_and_named(tmp_path: Path, name: str, why: str) -> None:
    put(tree(tmp_path, PAIR) / "train/cat" / name)
    seen = found(tmp_path)
    assert (seen.train, seen.count) == ({"cat": 2, "dog": 2}, 1)
    assert why in seen.why(f"train/cat/{name}")


@pytest.mark.skipif(not heif, reason="pillow-heif is not installed: make extras")
@pytest.mark.parametrize("ending", ["heic", "HEIF"])
def test_heic_is_read_with_its_plugin(tmp_path: Path, ending: str) -> None:
    from pillow_heif import from_pillow

    place = tree(tmp_path, PAIR, size=(32, 32)) / f"train/cat/new.{ending}"
    colour = (200, 100, 50)
    from_pillow(Image.new("RGB", (32, 32), colour)).save(place, quality=100)
    seen = found(tmp_path)
    assert (seen.train, seen.count) == ({"cat": 3, "dog": 2}, 0)
    off = pixels(read(tmp_path).train).int() - torch.tensor(colour)[:, None, None]
    assert off.abs().amax((1, 2, 3)).min() <= 4


@pytest.mark.parametrize("kind", ["svg", no_plugin])
def test_a_class_of_nothing_else_is_refused(tmp_path: Path, kind: str) -> None:
    tree(tmp_path, PAIR)
    for place in ("train", "test"):
        root = tree(tmp_path / place, {f"{s}/{c}": 2 for s in ("train", "test") for c in ("cat", "dog")})
        put(root / place / f"emu/0.{kind}")
        refused(root, f"{place}/emu", f".{kind}")


def test_files_without_an_ending_are_named_even_if_they_are_images(tmp_path: Path) -> None:
    tree(tmp_path, PAIR)
    put(tmp_path / "train/emu/0")
    refused(tmp_path, "train/emu", "no ending")


def test_the_first_of_each_kind_is_named(tmp_path: Path) -> None:
    tree(tmp_path, PAIR)
    for i in range(30):
        put(tmp_path / f"train/cat/{i:02}.json", "{}")
    put(tmp_path / "train/dog/x.svg", "")
    put(tmp_path / "train/dog/y", "")
    seen = found(tmp_path)
    assert seen.count == 32
    assert len(seen.ignored) == 20
    assert {"train/cat/00.json", "train/dog/x.svg", "train/dog/y"} <= set(seen.ignored)


def test_an_image_of_another_format_than_its_ending(tmp_path: Path) -> None:
    put(tree(tmp_path, PAIR) / "train/cat/new.jpg", picture(kind="PNG"))
    assert (found(tmp_path).train, found(tmp_path).count) == ({"cat": 3, "dog": 2}, 0)
    assert len(read(tmp_path).train.ids) == 5


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"\x89PNG\r\n\x1a\n", encoded(Image.new("I;16", (8, 8)))],
    ids=["empty", "text", "head", "16"],
)
@pytest.mark.parametrize("place", ["train", "test"])
def test_what_cannot_be_opened_is_refused_or_skipped(tmp_path: Path, content: bytes, place: str) -> None:
    tree(tmp_path, {**PAIR, "test/cat": 1, "test/dog": 1})
    put(tmp_path / place / "cat/bad.png", content)
    for ask in (found, read):
        refused(tmp_path, f"{place}/cat/bad.png", "--max-bad", ask=ask)
    seen = found(tmp_path, max_bad=1)
    assert (seen.train, seen.eval, seen.count) == ({"cat": 2, "dog": 2}, {"cat": 1, "dog": 1}, 1)
    assert seen.why(f"{place}/cat/bad.png")
    assert len(read(tmp_path, max_bad=1).train.ids) == 4
    put(tmp_path / place / "cat/bad2.png", b"")
    refused(tmp_path, "2 corrupt images", "--max-bad 1", max_bad=1)


def test_a_class_that_loses_all_its_images_to_corruption_is_refused(tmp_path: Path) -> None:
    put(tree(tmp_path, PAIR) / "train/emu/bad.png", b"")
    refused(tmp_path, "emu", max_bad=1)
    refused(tmp_path, "emu", max_bad=1, ask=read)


def test_corrupt_images_of_a_table(tmp_path: Path) -> None:
    images = [picture(), b"", picture(), picture(), b"junk", None]
    table(tmp_path / "train.parquet", ["cat", "dog"] * 3, images)
    refused(tmp_path, "train image 1")
    table(tmp_path / "b/train.parquet", ["cat", "dog"] * 2, [picture(), picture(), b"junk", picture()])
    refused(tmp_path / "b", "train image 2", "--max-bad")
    assert found(tmp_path / "b", max_bad=1).train == {"cat": 1, "dog": 2}


def test_links_of_images(tmp_path: Path) -> None:
    tree(tmp_path, PAIR)
    put(tmp_path / "store/new.png")
    for name, target in (
        *(("good.png", "../../store/new.png"), ("broken.png", "nowhere.png"), ("broken", "nowhere")),
        *(("ring.png", "ring2.png"), ("ring2.png", "ring.png"), ("self.png", "self.png")),
    ):
        (tmp_path / "train/cat" / name).symlink_to(target)
    seen = found(tmp_path)
    assert seen.train == {"cat": 3, "dog": 2}
    reasons = {seen.why(f"train/cat/{name}") for name in ("broken.png", "broken", "ring.png", "ring2.png", "self.png")}
    assert reasons == {"a link that leads nowhere"}
    assert seen.why("store/") == "a folder beside the splits"
    assert seen.count == 6


def test_a_class_of_broken_links_is_refused(tmp_path: Path) -> None:
    (tree(tmp_path, {**PAIR, "train/emu": 0}) / "train/emu/0.png").symlink_to("nowhere")
    refused(tmp_path, "train/emu/0.png", "link that leads nowhere")


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tree(tmp_path, PAIR) / "train/cat/new.png")
    os.mkfifo(tmp_path / "train/cat/new.csv")
    seen = found(tmp_path)
    assert (seen.train, seen.count) == ({"cat": 2, "dog": 2}, 2)
    assert seen.why("train/cat/new.png") == "not a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    put(tree(tmp_path, PAIR) / "train/cat/new.png").chmod(0)
    assert (found(tmp_path).train, found(tmp_path).count) == ({"cat": 2, "dog": 2}, 1)
    assert "permission" in found(tmp_path).why("train/cat/new.png")


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    put(tree(tmp_path, PAIR) / "train/cat" / name)
    put(tmp_path / "train/cat" / os.fsdecode(b"caf\xe9.txt"), "")
    seen = found(tmp_path)
    assert (seen.train, seen.count) == ({"cat": 3, "dog": 2}, 1)
    assert len(read(tmp_path).train.ids) == 5


@pytest.mark.parametrize("large", ["first", "last", "evaluation"])
def test_memory_or_files_is_decided_by_all_images(tmp_path: Path, large: str) -> None:
    tree(tmp_path, {**PAIR, "test/cat": 1, "test/dog": 1})
    assert found(tmp_path).all["path"] == "memory"
    place = {"first": "train/cat/00.png", "last": "train/dog/zz.bmp", "evaluation": "test/dog/zz.png"}[large]
    put(tmp_path / place, encoded(noise(0, 97, 20), "BMP" if place.endswith("bmp") else "PNG"))
    assert found(tmp_path).all["path"] == "files"
    assert found(tmp_path, img_size=32).all["path"] == "files"
    assert read(tmp_path, img_size=32).description["path"] == "files"


def test_a_large_image_of_few_bytes_is_seen(tmp_path: Path) -> None:
    tree(tmp_path, {"train/cat": 70, "train/dog": 2}, size=(40, 40))
    put(tmp_path / "train/dog/zz.png", encoded(Image.new("RGB", (200, 200))))
    assert found(tmp_path, img_size=32).all["path"] == "files"
    assert read(tmp_path, img_size=32).description["path"] == "files"


def test_the_image_size_decides_too(tmp_path: Path) -> None:
    tree(tmp_path, PAIR)
    assert found(tmp_path, img_size=96).all["path"] == "memory"
    assert found(tmp_path, img_size=97).all["path"] == "files"


def test_small_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    put(tree(tmp_path, PAIR) / "train/dog/new.png", picture(9, 8))
    for ask in (found, read):
        refused(tmp_path, "9x8", "8x8", "--img-size", ask=ask)
    assert found(tmp_path, img_size=8).all["path"] == "memory"


def test_duplicates_between_training_and_evaluation(tmp_path: Path) -> None:
    tree(tmp_path, {**PAIR, "test/cat": 1, "test/dog": 1})
    content = put(tmp_path / "train/cat/a.png").read_bytes()
    put(tmp_path / "test/dog/b.png", content)
    put(tmp_path / "train/dog/b.png", content)  # within a split it does not count
    seen = found(tmp_path)
    assert seen.all["duplicates"] == 1
    ((first, second),) = seen.all["duplicate_examples"]
    assert "train/cat/a.png" in first
    assert "test/dog/b.png" in second


def test_duplicates_with_a_held_out_part(tmp_path: Path) -> None:
    tree(tmp_path, {"train/cat": 0, "train/dog": 0})
    content = picture()
    for i in range(4):
        put(tmp_path / f"train/cat/{i}.png", content)
        put(tmp_path / f"train/dog/{i}.png")
    tree(tmp_path, {"test/cat": 2, "test/dog": 2})  # not evaluated on
    assert found(tmp_path, val_split=0.25).all["duplicates"] == 1
