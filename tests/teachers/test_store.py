"""Stored teacher outputs: what live teaching gives, written once, whole or not at all, refused where they are of
something else."""

import errno
import json
import math
import re
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from small import FAST, call, command, digest, end_at, environment, holding, write_pictures

import mgd_timm
from mgd_timm.cli.main import main
from mgd_timm.data.dataset import load_images
from mgd_timm.distiller import Teacher
from mgd_timm.features import Features, FeatureTap
from mgd_timm.granularity import GranularityHeads
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.plan import accelerator_of, context_of, fix_global_batch, store_options_of
from mgd_timm.recipe.derived import with_store_defaults
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.teachers.heads import fit_heads
from mgd_timm.teachers.outputs import store as teacher_store
from mgd_timm.teachers.outputs.layout import Layout, StoreError
from mgd_timm.teachers.outputs.stored_source import open_store, stored_teacher

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LITTLE = {"epochs": 2, "batch_size": 32, "heads_epochs": 2, "heads_augmentations": 2, "log_interval": 5}


@pytest.fixture(scope="module")
def bench(small_data):
    """Accelerator, images, the embedded teacher, and `open(folder, **options)`, which makes a store of 4 shards a
    view."""
    recipe = make_recipe(data_dir=str(small_data))
    accelerator = accelerator_of(recipe)
    recipe = fix_global_batch(recipe, accelerator)
    teacher = Teacher(FeatureTap(load_model("embedded"), input_size=(3, 28, 28)))
    default = load_images(recipe.data, 0)

    def opened(folder, views=2, *, teacher=teacher, images=None, accelerator=accelerator, **options):
        flags = {"data_dir": str(small_data), "teacher_store": str(folder), "teacher_augmentations": views, **options}
        recipe = with_store_defaults(make_recipe(**flags))
        if images is None:
            images = default if "pad" not in options else load_images(recipe.data, 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(teacher_store, "SHARD_ROWS", 100)
            return open_store(store_options_of(recipe), teacher, images, accelerator)

    def filled(folder, views=2, **options):
        stored = opened(folder, views, **options)
        stored.fill(options.get("teacher", teacher), accelerator, 50, quiet=True)
        return stored

    return accelerator, default, teacher, opened, filled


@pytest.fixture(scope="module")
def written(bench, tmp_path_factory):
    """A filled store of two views, not to be changed."""
    folder = tmp_path_factory.mktemp("written") / "store"
    bench[-1](folder)
    return folder


def state(folder: Path) -> dict[str, tuple[int, str]]:
    return {path.name: (path.stat().st_mtime_ns, digest(path)) for path in sorted(folder.glob("[!.]*"))}


def contents(folder: Path) -> dict[str, str]:
    return {name: sha for name, (_, sha) in state(folder).items()}


def losses(output: Path) -> list[dict[str, float]]:
    return [json.loads(line)["train"] for line in (output / "metrics.jsonl").read_text().splitlines()]


# -- what it holds
# ---------------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_teacher_shows_of_each_view(bench, written):
    _, _, teacher, opened, _ = bench
    stored = opened(written)
    assert len(list(written.glob("pass-*.safetensors"))) == 2 * 4
    assert not stored.store.missing
    for epoch in range(4):
        slots = list(torch.randperm(320, generator=torch.Generator().manual_seed(epoch)).split(130))
        teach = stored_teacher(None)
        for batch in stored.batches(slots, epoch, CPU):
            live, shown = teacher(batch.images), teach(batch)
            for one, two in ((live.logits, shown.logits), (live.embedding, shown.embedding)):
                assert two.dtype == torch.float32
                torch.testing.assert_close(two, one, rtol=2**-10, atol=2**-10)


def test_epochs_beyond_the_views_show_them_again_and_views_differ(bench, written):
    stored = bench[3](written)
    ids = torch.arange(40)
    images = [next(stored.batches([ids], epoch, CPU)).images for epoch in range(4)]
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], images[3])
    assert not torch.equal(images[0], images[1])


def test_heads_add_codes_and_views_as_a_live_teacher_does(bench, written):
    stored, teacher = bench[3](written), bench[2]
    torch.manual_seed(0)
    heads = GranularityHeads(64, 10)
    live = Teacher(teacher.tap, heads)
    batch = next(stored.batches([torch.arange(60)], 1, CPU))
    expected, shown = live(batch.images), stored_teacher(live.heads)(batch)
    for one, two in ((expected.codes, shown.codes), (expected.views, shown.views)):
        assert set(one) == set(two) == {"abstract", "detailed"}
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=2e-3, atol=2e-3)
            assert not two[name].requires_grad


def test_large_pictures_and_a_validation_cut_of_another_seed(bench, tmp_path):
    accelerator = bench[0]
    torch.manual_seed(0)
    network = timm.create_model("cifar_resnet8x05", num_classes=3)
    write_pictures(tmp_path / "data", 24)
    flags = {
        "data_dir": str(tmp_path / "data"),
        "val_split": 0.25,
        "workers": 0,
        "img_size": 112,
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
    }
    recipe = with_store_defaults(make_recipe(**flags, teacher_store=str(tmp_path / "store"), teacher_augmentations=1))
    seen = []
    for seed in (1, 2):
        images = load_images(recipe.data, seed)
        teacher = Teacher(FeatureTap(network, input_size=(3, 112, 112)))
        stored = open_store(store_options_of(recipe), teacher, images, accelerator)
        assert bool(stored.store.missing) == (seed == 1)  # the second seed finds all that it needs
        stored.fill(teacher, accelerator, 7, quiet=True)
        batch = next(stored.batches([images.train.ids[:6]], 3, CPU))
        seen.append(set(images.train.ids.tolist()))
        torch.testing.assert_close(
            stored_teacher(None)(batch).logits, teacher(batch.images).logits, rtol=2e-3, atol=2e-3
        )
    assert seen[0] != seen[1]
    assert len(seen[0]) == 18


# -- whole runs
# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", "mas"])
def test_stored_and_live_training_have_the_same_losses(small_data, tmp_path, method):
    epochs = 2 if method == "mas" else 1
    common = {**LITTLE, "data": str(small_data), "method": method, "criterion": ("kd",), "seed": 7, "epochs": epochs}
    mgd_timm.distill(output=tmp_path / "live", **common)
    mgd_timm.distill(
        output=tmp_path / "stored", **common, teacher_store=str(tmp_path / "store"), teacher_augmentation_seed=7
    )
    live, stored = losses(tmp_path / "live"), losses(tmp_path / "stored")
    assert len(stored) == len(live) == epochs
    assert stored != live
    for one, two in zip(live, stored, strict=True):
        assert set(one) == set(two) >= {"task", "kd", "top1"} | ({"abstract", "detailed"} if method == "mas" else set())
        for name in set(one) - {"top1"}:
            assert two[name] == pytest.approx(one[name], rel=2e-3), name


def test_another_seed_host_and_student_write_nothing_and_another_number_of_views_adds(
    bench, small_data, tmp_path, capsys
):
    store = tmp_path / "store"
    common = {**LITTLE, "epochs": 1, "data": str(small_data), "teacher_store": str(store)}
    mgd_timm.distill(output=tmp_path / "1", **common, method="none")
    assert "1 pass x 320 images x (64 + 10) fp16 = 0.05 MB" in capsys.readouterr().out
    before = state(store)
    assert len(before) == 2
    mgd_timm.distill(output=tmp_path / "2", **common, method="mag", seed=3, student="cifar_resnet8")
    assert "nothing to write" in capsys.readouterr().out
    assert state(store) == before
    mgd_timm.distill(output=tmp_path / "3", **common | {"epochs": 2}, method="none", val_split=0.1)
    after = state(store)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"pass-00001-rows-000000000.safetensors"}
    recipe = (tmp_path / "3" / "recipe.yaml").read_text()
    assert "teacher_augmentations: 2\nteacher_augmentation_seed: 0\nteacher_top_k: 0\n" in recipe


def test_a_run_on_the_largest_logits(small_data, tmp_path):
    common = {
        **LITTLE,
        "epochs": 1,
        "data": str(small_data),
        "method": "none",
        "teacher_store": str(tmp_path / "store"),
    }
    mgd_timm.distill(output=tmp_path / "run", **common, teacher_top_k=3)
    assert all(math.isfinite(value) for row in losses(tmp_path / "run") for value in row.values())
    with pytest.raises(StoreError, match=r"store of other teacher outputs \(top_k: 3 -> 0\)"):
        mgd_timm.distill(output=tmp_path / "again", **common)
    assert not (tmp_path / "again").exists()


def test_heads_read_the_store_without_the_teacher(bench, written, tmp_path, monkeypatch):
    accelerator, images, teacher, opened, _ = bench
    monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path / "cache"))
    stored, shown = opened(written), []
    handle = teacher.register_forward_hook(lambda *_: shown.append(1))
    found = {}
    for name in ("live", "stored"):
        recipe = make_recipe(
            output=str(tmp_path / name), seed=0, heads_augmentations=2, heads_epochs=8, heads_batch_size=64
        )
        (tmp_path / name).mkdir()
        shown.clear()
        # Seed 0 is the store's view seed too: the same views.
        context = context_of(recipe, images, accelerator, quiet=True)
        fit_heads(teacher, recipe.heads, context, store=stored.store if name == "stored" else None)
        rows = [json.loads(line) for line in (tmp_path / name / "heads" / "metrics.jsonl").read_text().splitlines()]
        found[name] = rows[-1]["train"], len(shown)
    assert found["stored"][1] == 1  # the watched images alone
    assert found["live"][1] > 2
    largest = opened(tmp_path / "largest", teacher_top_k=3)
    shown.clear()
    context = context_of(replace(recipe, seed=1), images, accelerator, quiet=True)
    fit_heads(teacher, recipe.heads, context, store=largest.store)
    handle.remove()
    assert len(shown) > 2  # all logits are wanted
    for name in ("abstract", "detailed"):
        assert found["stored"][0][name] == pytest.approx(found["live"][0][name], rel=1e-3)


def words(data: Path, output: Path, store: Path) -> list[str]:
    more = [
        "--epochs",
        "2",
        "--teacher-augmentations",
        "8",
        "--checkpoint-interval",
        "2",
        "--drop",
        "0.1",
        "--validation-batch-size",
        "64",
    ]
    place = ["--data-dir", str(data), "--output", str(output), "--teacher-store", str(store)]
    return ["distill", *FAST, *more, *place]


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory):
    """An uninterrupted run of one process: its output and its store of 8 views."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(words(small_data, folder / "run", folder / "store")) == 0
    assert len(contents(folder / "store")) == 9
    return folder


def test_killed_while_writing_and_killed_while_training_goes_on_to_the_same_bytes(whole, small_data, tmp_path, capsys):
    output, store = tmp_path / "run", tmp_path / "store"
    flags = words(small_data, output, store)
    process = subprocess.Popen(command(*flags), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    while process.poll() is None and len(list(store.glob("pass-*"))) < 2:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    there = state(store)
    assert 3 <= len(list(store.glob("pass-*"))) + 1 < 9
    code, errors = end_at(4, output / "checkpoints", signal.SIGKILL, *flags, "--resume")
    assert code == -signal.SIGKILL, errors
    assert contents(store).items() >= contents(whole / "store").items()
    assert all(state(store)[name] == seen for name, seen in there.items() if name.startswith("pass-"))
    assert main([*flags, "--resume"]) == 0
    out = capsys.readouterr().out
    assert "nothing to write" in out
    assert int(re.search(r"distil: resumed after update (\d+)", out)[1]) >= 4
    assert digest(output / "export" / "model.safetensors") == digest(whole / "run" / "export" / "model.safetensors")


def test_two_processes_write_the_same_bytes_as_one(whole, small_data, tmp_path):
    done = call(*words(small_data, tmp_path / "run", tmp_path / "store"), "--method", "none", processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert contents(tmp_path / "store") == contents(whole / "store")
    assert all(math.isfinite(value) for row in losses(tmp_path / "run") for value in row.values())


# -- written whole or not at all
# ---------------------------------------------------------------------------------------------------


def test_a_store_grows_by_views_to_what_it_would_be_at_once(bench, written, tmp_path):
    filled = bench[-1]
    before = contents(shutil.copytree(written, tmp_path / "grown"))
    filled(tmp_path / "grown", 3)
    filled(tmp_path / "at once", 3)
    grown = contents(tmp_path / "grown")
    assert grown == contents(tmp_path / "at once")
    assert grown.items() > before.items()
    bench[3](tmp_path / "grown", 1)  # fewer views than there are


def test_a_disk_that_fills_up_leaves_whole_shards_and_a_later_call_goes_on(bench, written, tmp_path, small_disk):
    accelerator, _, teacher, opened, _ = bench
    with small_disk("size=600k"):
        stored, calls = opened(tmp_path / "store"), []

        def teach(batch):
            calls.append(len(batch.labels))
            if len(calls) == 5:  # something else takes the room meanwhile
                free = shutil.disk_usage(tmp_path).free
                (tmp_path / "hog").write_bytes(bytes(free - 12_000))
            return teacher(batch.images)

        with pytest.raises(OSError, match=r"no space left to write .*pass-00000-rows-000000200") as caught:
            stored.store.fill(teach, stored.source, accelerator, 50, quiet=True)
        assert caught.value.errno == errno.ENOSPC
        there = state(tmp_path / "store")
        assert sorted(there) == [*(f"pass-00000-rows-000000{n}.safetensors" for n in ("000", "100")), "store.json"]
        with pytest.raises(
            OSError, match=r"needs 0\.07 MB more, and 0\.01 MB are free: choose fewer --teacher-augmentations"
        ):
            opened(tmp_path / "store")
        (tmp_path / "hog").unlink()
        stored = opened(tmp_path / "store")
        stored.fill(teacher, accelerator, 50, quiet=True)
        assert contents(tmp_path / "store") == contents(written)
        assert state(tmp_path / "store").items() > there.items()


def test_another_run_that_writes_is_waited_for_and_what_it_wrote_is_read(bench, written, tmp_path, capsys):
    """The other run holds the lock, writes half of the store, begins with another shard, and is killed."""
    accelerator, _, teacher, opened, _ = bench
    store, stray = tmp_path / "store", tmp_path / "store" / ".writing-x" / "pass-00001-rows-000000200.safetensors"
    stored = opened(store)
    assert len(stored.store.missing) == 8

    def work_and_die() -> None:
        time.sleep(0.5)
        for path in [written / "store.json", *sorted(written.glob("pass-*"))[:5]]:
            shutil.copy(path, store)
        there.update(state(store))
        stray.parent.mkdir()
        stray.write_bytes(b"a part")
        other.kill()

    there: dict[str, tuple[int, str]] = {}
    with holding(store) as other:
        worker = threading.Thread(target=work_and_die)
        worker.start()
        stored.fill(teacher, accelerator, 50, quiet=True)
        worker.join()
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        rf"teacher store {store}: another run \(\S+, pid {other.pid}\) writes it; waiting for it to end", said[1]
    )
    assert re.fullmatch(rf"teacher store {store}: free after \d+ s", said[2])
    assert said[3:] == ["teacher store: another run has written shards; 3 of 8 shards to write"]
    assert not stray.parent.exists()
    assert contents(store) == contents(written)
    assert len(there) == 6
    assert state(store).items() > there.items()


def test_what_another_run_writes_meanwhile_is_refused_where_it_is_of_another_teacher(bench, written, tmp_path):
    accelerator, _, teacher, opened, _ = bench
    stored = opened(tmp_path / "store", teacher_augmentation_seed=1)
    shutil.copytree(written, tmp_path / "store")
    before = state(tmp_path / "store")
    with pytest.raises(
        StoreError, match=r"store of other teacher outputs \(seed: 0 -> 1\): choose another --teacher-store"
    ):
        stored.fill(teacher, accelerator, 50, quiet=True)
    assert state(tmp_path / "store") == before


def test_a_filled_store_is_read_without_a_lock_while_another_run_adds_to_it(bench, written, tmp_path):
    accelerator, _, teacher, opened, _ = bench
    store = shutil.copytree(written, tmp_path / "store")
    with holding(store):
        before = sorted(store.iterdir())
        stored = opened(store)
        stored.fill(teacher, accelerator, 50, quiet=True)
        assert len(stored.store.features(torch.arange(320), 1, CPU).logits) == 320
        assert sorted(store.iterdir()) == before


def test_a_filled_store_is_read_from_a_disk_that_nothing_can_be_written_to(bench, written, tmp_path, small_disk):
    accelerator, _, teacher, opened, _ = bench
    with small_disk("size=4m"):
        store = tmp_path / "store"
        store.mkdir()
        for path in written.glob("[!.]*"):
            shutil.copy(path, store)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        stored = opened(store)
        stored.fill(teacher, accelerator, 50, quiet=True)
        assert len(stored.store.features(torch.arange(320), 1, CPU).logits) == 320
        with pytest.raises(OSError, match="Read-only file system"):
            opened(store, 3).fill(teacher, accelerator, 50, quiet=True)
        del stored  # it maps files of the disk


# -- refused
# ---------------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("wanted", "views"), [("--teacher-augmentations 4", 4), ("", None)])
def test_a_run_is_not_resumed_with_other_views_or_live(whole, small_data, capsys, wanted, views):
    flags = [*words(small_data, whole / "run", whole / "store"), "--resume"]
    place = flags.index("--teacher-augmentations")
    flags[place : place + 2] = wanted.split()
    if views is None:
        place = flags.index("--teacher-store")
        del flags[place : place + 2]
    assert main(flags) == 1
    assert re.search(rf"of another recipe \(.*teacher_augmentations: 8 -> {views}[;)]", capsys.readouterr().err)


# -- damaged
# ---------------------------------------------------------------------------------------------------------------------

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


# -- rows --------------------------------------------------------------------------------------------------------------


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
