"""Stores that are corrupt or of something else are refused by name, and the way out leads out."""

import shutil
from dataclasses import replace

import pytest
import timm
import torch
from stores import CPU, contents, state

import mgd_timm
from mgd_timm.distiller import Teacher
from mgd_timm.features import FeatureTap
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.plan import accelerator_of
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.teachers.outputs.layout import StoreError

pytestmark = pytest.mark.slow


def test_a_store_of_something_else_is_refused(bench, written, tmp_path, small_data):
    _, images, _, opened, _ = bench
    before = state(written)
    changed = load_model("embedded")
    with torch.no_grad():
        next(changed.parameters()).flatten()[0] += 1e-3
    other = Teacher(FeatureTap(changed, input_size=(3, 28, 28)))
    cases = {
        r"teacher: '\w+' -> '\w+'\)": {"teacher": other},
        r"transform\.pad: 4 -> 2\)": {"pad": 2},
        r"seed: 0 -> 1\)": {"teacher_augmentation_seed": 1},
        r"top_k: 0 -> 4\)": {"teacher_top_k": 4},
        r"mean: \[": {"images": replace(images, mean=(0.5, 0.5, 0.5))},
    }
    for match, options in cases.items():
        with pytest.raises(
            StoreError, match=rf"store of other teacher outputs \(.*{match}.*: choose another --teacher-store"
        ):
            opened(written, **options)
    try:
        half = accelerator_of(make_recipe(amp=True, data_dir=str(small_data)))
        with pytest.raises(StoreError, match=r"precision: 'no' -> 'bf16'\)"):
            opened(written, accelerator=half)
    finally:
        accelerator_of(make_recipe())
    assert state(written) == before


def test_an_architecture_that_shows_other_things_by_the_same_weights_has_another_store(bench, tmp_path):
    opened = bench[3]
    names = ("efficientnet_lite0", "tf_efficientnet_lite0")  # whose padding differs
    one, other = (timm.create_model(name, num_classes=10) for name in names)
    other.load_state_dict(one.state_dict())
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    teachers = [Teacher(FeatureTap(model, input_size=(3, 28, 28))) for model in (one, other)]
    assert teachers[0].digest == teachers[1].digest
    assert not torch.allclose(*(teacher(images).embedding for teacher in teachers))
    first, second = (opened(tmp_path / "store", teacher=teacher).store for teacher in teachers)
    assert first.digest != second.digest


def test_criteria_that_read_maps_are_refused_before_anything_is_written(small_data, tmp_path):
    with pytest.raises(
        ValueError, match="criterion 'at' reads the teacher's maps, and a teacher store holds its logits and embedding"
    ):
        mgd_timm.distill(
            data=str(small_data), criterion=("kd", "at"), teacher_store=str(tmp_path / "store"), output=tmp_path / "run"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"teacher_augmentations": 3}, "teacher_augmentations=3: it is for stored teacher outputs only"),
        ({"teacher_store": "s", "teacher_augmentations": 0}, "teacher_augmentations=0: expected 1 or more"),
        ({"teacher_store": "s", "teacher_top_k": -1}, "teacher_top_k=-1: expected 0 or more"),
        ({"teacher_store": "s", "teacher": None}, "there is no teacher"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        make_recipe(**options)


SHARD = "pass-00001-rows-000000100.safetensors"


WAY_OUT = rf"{SHARD} is corrupt \(.*\): delete this file and start again"


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


@pytest.mark.parametrize("size", [0, 5, 100, 5000, -1])
def test_a_truncated_shard_is_found_at_the_start(bench, copy, size):
    content = (copy / SHARD).read_bytes()
    (copy / SHARD).write_bytes(content[:size])
    with pytest.raises(StoreError, match=WAY_OUT):
        bench[3](copy)
    (copy / SHARD).write_bytes(content + b"\0")
    with pytest.raises(StoreError, match=WAY_OUT):
        bench[3](copy)


def test_a_flipped_byte_anywhere_is_found_and_the_way_out_leads_out(bench, written, copy):
    opened, filled = bench[3:]
    content = (copy / SHARD).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")

    def read() -> None:
        opened(copy).store.features(torch.arange(320), 1, CPU)

    read()
    places = [*range(header), header, header + 1, (header + len(content)) // 2, len(content) - 1]
    for place in places:
        for flip in (1 if place % 2 else 0x29,) if place < header else (0x80,):
            (copy / SHARD).write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            with pytest.raises(StoreError, match=WAY_OUT):
                opened(copy) if place < header and content[place] not in b"0123456789abcdef" else read()
    (copy / SHARD).unlink()
    filled(copy)
    read()
    assert contents(copy) == contents(written)


def test_a_damaged_index_is_found_and_the_way_out_leads_out(bench, written, copy):
    content = (copy / "store.json").read_bytes()
    for place in range(0, len(content), 7):
        (copy / "store.json").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(StoreError, match=r"store\.json .*: delete this file; the next run"):
            bench[3](copy)
    (copy / "store.json").unlink()
    bench[-1](copy)
    assert contents(copy) == contents(written)


def test_a_shard_under_another_ones_name_is_found(bench, copy):
    shutil.copy(copy / SHARD.replace("00001-rows", "00000-rows"), copy / SHARD)
    with pytest.raises(StoreError, match="names another store or another place in it"):
        bench[3](copy)


def test_a_file_in_place_of_the_folder_is_refused(bench, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="is a file: --teacher-store takes a folder"):
        bench[3](tmp_path / "file")
