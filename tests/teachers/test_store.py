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
from stores import CPU, contents, state

import mgd_timm
from mgd_timm.cli.main import main
from mgd_timm.data.dataset import load_images
from mgd_timm.distiller import Teacher
from mgd_timm.features import FeatureTap
from mgd_timm.granularity import GranularityHeads
from mgd_timm.pipeline.plan import context_of, store_options_of
from mgd_timm.recipe.derived import with_store_defaults
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.teachers.heads import fit_heads
from mgd_timm.teachers.outputs.layout import StoreError
from mgd_timm.teachers.outputs.stored_source import open_store, stored_teacher

pytestmark = pytest.mark.slow

LITTLE = {"epochs": 2, "batch_size": 32, "heads_epochs": 2, "heads_augmentations": 2, "log_interval": 5}


def losses(output: Path) -> list[dict[str, float]]:
    return [json.loads(line)["train"] for line in (output / "metrics.jsonl").read_text().splitlines()]


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
