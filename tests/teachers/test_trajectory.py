"""Snapshots of a teacher's training, and a student that follows them."""

import json
import signal
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from forked import Ranks
from safetensors.torch import load_file
from small import FAST, digest, write_small

from mgd_timm.cli.main import main
from mgd_timm.distiller import Teacher
from mgd_timm.features import Batch, FeatureTap
from mgd_timm.granularity import GranularityHeads
from mgd_timm.models.load import load_model
from mgd_timm.pipeline.checks import check_recipe
from mgd_timm.pipeline.plan import terms_of
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.teachers.trajectory import FollowedTeacher, Snapshot, Trajectory, read_trajectory, snapshot_epochs


def test_snapshots_are_evenly_spaced_and_end_with_the_training():
    assert snapshot_epochs(12, 4) == [3, 6, 9, 12]
    assert snapshot_epochs(10, 3) == [4, 7, 10]
    for epochs in range(1, 20):
        for count in range(1, epochs + 1):
            found = snapshot_epochs(epochs, count)
            assert len(set(found)) == count
            assert found == sorted(found)
            assert (found[0] >= 1, found[-1]) == (True, epochs)


def trajectory_of(epochs: int, count: int) -> Trajectory:
    shots = tuple(Snapshot(epoch, f"{epoch}", "") for epoch in snapshot_epochs(epochs, count))
    return Trajectory(Path(), epochs, shots)


@pytest.mark.parametrize(("theirs", "count"), [(1, 1), (5, 5), (7, 3), (30, 10), (240, 12)])
@pytest.mark.parametrize("ours", [1, 2, 5, 13, 60])
def test_each_epoch_has_the_snapshot_just_at_or_after_its_share(theirs, count, ours):
    trajectory = trajectory_of(theirs, count)
    found = [trajectory.at(epoch, ours) for epoch in range(ours)]
    for epoch, shot in enumerate(found):
        share = Fraction(epoch + 1, ours)
        later = [one for one in trajectory.snapshots if Fraction(one.epoch, theirs) >= share]
        assert shot == min(later, key=lambda one: one.epoch)
    assert [shot.epoch for shot in found] == sorted(shot.epoch for shot in found)
    assert found[-1].epoch == theirs
    if ours % count == 0:
        assert {shot.epoch for shot in found} == set(snapshot_epochs(theirs, count))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"teacher": "embedded"}, "names the teacher, and there is also teacher 'embedded': leave --teacher out"),
        ({"method": "mas"}, "its target is the mean of a teacher's logits and of views"),
        ({"teacher_store": "x"}, "are loaded into the teacher as it was trained. Leave --teacher-store out"),
        ({"fit_teacher_head": "probe"}, "Leave --fit-teacher-head out"),
        ({"teacher_classes": "auto"}, "Leave --teacher-classes out"),
        ({"teacher_resize": "positions"}, "Leave --teacher-resize out"),
        ({"peer": "cifar_resnet8x05"}, "there is no teacher. Leave --teacher-trajectory out"),
        ({"keep_checkpoints": 2}, "only a model that trains without a teacher"),
    ],
)
def test_contradictions_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        make_recipe(**{"teacher_trajectory": "runs/teacher", **options})


def test_more_snapshots_than_epochs_are_refused():
    with pytest.raises(ValueError, match="keep_checkpoints=4: a snapshot is kept at the end of an epoch, and there"):
        make_recipe(teacher=None, method="none", keep_checkpoints=4, epochs=3)


def test_snapshots_that_a_later_stage_would_leave_behind_are_refused():
    with pytest.raises(ValueError, match=r"after the last snapshot\. Leave --keep-checkpoints out"):
        make_recipe(teacher=None, method="none", keep_checkpoints=1, qat=True)


def test_a_trajectory_without_a_criterion_of_logits_is_refused():
    recipe = make_recipe(teacher_trajectory="runs/teacher", criterion=("ce", "selfkd"))
    with pytest.raises(ValueError, match="none of task, selfkd reads the teacher's logits"):
        check_recipe(recipe, terms_of(recipe))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("data"), train=80, test=40)


@pytest.fixture(scope="module")
def training(data):
    words = ["train", "--model", "cifar_resnet8x05", "--epochs", "3", "--batch-size", "20", "--lr", "0.2"]
    words += ["--checkpoint-hist", "9", "--model-ema", "--model-ema-decay", "0.5", "--keep-checkpoints", "2"]
    return [*words, "--data-dir", str(data)]


@pytest.fixture(scope="module")
def run(training, tmp_path_factory):
    """Of 3 epochs of 4 updates; snapshots after the second and the third."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert main([*training, "--output", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_a_run_keeps_the_averaged_weights_of_its_epochs(run):
    found = read_trajectory(run)
    assert [one.epoch for one in found.snapshots] == [2, 3]
    for one in found.snapshots:
        average = load_file(run / "checkpoints" / f"{4 * one.epoch:08d}" / "ema.safetensors")
        for name, tensor in load_file(found.folder / one.file).items():
            assert average[f"model.{name}"].equal(tensor)
    exported = load_file(run / "export" / "model.safetensors")
    last = load_file(found.folder / found.snapshots[-1].file)
    assert exported.keys() == last.keys()
    assert all(exported[name].equal(last[name]) for name in last)
    assert {path.name for path in found.folder.iterdir()} == {"index.json", *(one.file for one in found.snapshots)}


@pytest.mark.slow
def test_a_killed_run_keeps_the_same_snapshots(run, training, tmp_path):
    words = [*training, "--output", str(tmp_path / "run"), "--resume"]
    first = Ranks(words, tmp_path / "first")
    while first.alive() and not (tmp_path / "run" / "trajectory" / "index.json").exists():
        time.sleep(0.002)
    first.signal(signal.SIGKILL)
    assert first.wait(60) == [-signal.SIGKILL], first.said()
    with pytest.raises(ValueError, match="the run has not finished, its last snapshot is of epoch 2 of 3"):
        read_trajectory(tmp_path / "run")
    assert main(words) == 0
    for path in (run / "trajectory").iterdir():
        assert digest(tmp_path / "run" / "trajectory" / path.name) == digest(path)


@pytest.mark.slow
def test_a_run_without_snapshots_or_with_corrupt_ones_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match="there is no such folder: expected the folder of a run of mgd-timm train"):
        read_trajectory(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has kept no snapshots: train the teacher with mgd-timm train --keep-checkp"):
        read_trajectory(tmp_path)
    folder = tmp_path / "trajectory"
    folder.mkdir()
    for path in (run / "trajectory").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "epoch_00002.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"epoch_00002.safetensors is missing or corrupt"):
        read_trajectory(tmp_path)
    (folder / "index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index.json is corrupt"):
        read_trajectory(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("with_heads", [False, True])
def test_the_teacher_shows_the_logits_of_its_snapshots_and_the_codes_of_its_end(run, with_heads):
    trajectory = read_trajectory(run)
    teacher = Teacher(FeatureTap(load_model(str(run)), input_size=(3, 28, 28)))
    if with_heads:
        torch.manual_seed(0)
        teacher = teacher.with_heads(GranularityHeads(teacher.tap.embed_dim, 10, make_recipe().heads.granularities))
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    end = teacher(images)
    followed = FollowedTeacher(teacher, trajectory, epochs=4)
    for epoch, place in ((3, 1), (0, 0), (2, 1), (1, 0)):  # in any order, as resumed runs ask
        followed.start_epoch(epoch)
        model = load_model(str(run)).eval()
        model.load_state_dict(load_file(trajectory.folder / trajectory.snapshots[place].file))
        with torch.no_grad():
            assert followed(batch).logits.equal(model(images))
        assert followed(batch).logits.equal(end.logits) == (place == 1)
        assert not with_heads or all(followed(batch).codes[name].equal(end.codes[name]) for name in end.codes)


@pytest.fixture(scope="module")
def flags(data):
    return ["distill", *FAST, "--batch-size", "20", "--data-dir", str(data), "--drop", "0.2"]


@pytest.fixture(scope="module")
def hard(run, flags):
    words = [*flags, "--epochs", "3", "--teacher-trajectory", str(run), "--method", "mag", "--criterion", "dkd"]
    return [*words, "--batch-size", "10", "--global-batch-size", "20", "--checkpoint-interval", "1"]


@pytest.fixture(scope="module")
def whole(hard, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main([*hard, "--output", str(output)]) == 0
    return output


@pytest.mark.slow
def test_the_export_names_all_snapshots_and_no_folder(run, whole):
    provenance = json.loads((whole / "export" / "recipe.json").read_text())
    assert provenance["trajectory_sha256"] == read_trajectory(run).digests
    assert provenance["recipe"]["teacher_trajectory"] == "run"


@pytest.mark.long
def test_a_stage_that_a_finished_run_gets_later_has_the_trained_teacher(hard, tmp_path):
    later, once = ([*hard, "--output", str(tmp_path / name)] for name in ("later", "once"))
    assert main(later) == 0
    assert main([*later, "--qat", "--resume"]) == 0
    assert main([*once, "--qat"]) == 0
    digests = [digest(tmp_path / name / "export" / "model.safetensors") for name in ("later", "once")]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_killed_and_resumed_it_follows_on_to_the_same_bits(whole, hard, tmp_path):
    words = [*hard, "--output", str(tmp_path / "run"), "--resume"]
    first, checkpoints = Ranks(words, tmp_path / "first"), tmp_path / "run" / "checkpoints"
    while first.alive() and not any(path.name >= "00000006" for path in checkpoints.glob("0*")):
        time.sleep(0.002)
    first.signal(signal.SIGKILL)
    assert first.wait(60) == [-signal.SIGKILL], first.said()
    ranks = Ranks(words, tmp_path / "again")
    assert ranks.wait(120) == [0], ranks.said()
    assert "resumed after update" in ranks.said()
    digests = [digest(output / "export" / "model.safetensors") for output in (whole, tmp_path / "run")]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_criteria_that_read_more_than_logits_are_refused(run, flags, capsys, tmp_path):
    words = [*flags, "--teacher-trajectory", str(run), "--output", str(tmp_path / "run")]
    for criterion, part in (("fitnet", "maps"), ("srrl", "embedding")):
        assert main([*words, "--criterion", criterion]) == 1
        assert f"criterion {criterion!r} reads the teacher's {part}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_follow_as_one_does(whole, hard, tmp_path):
    ranks = Ranks([*hard, "--output", str(tmp_path / "run")], tmp_path / "log", processes=2)
    assert ranks.wait(120) == [0, 0], ranks.said()
    one, two = (
        [json.loads(line)["train"] for line in (output / "metrics.jsonl").read_text().splitlines()]
        for output in (whole, tmp_path / "run")
    )
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
