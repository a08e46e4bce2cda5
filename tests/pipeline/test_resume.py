"""A run that was really killed goes on to the very same weights.

Real processes on shuffled and augmented real images, with dropout, moving average and accumulation on.
"""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from forked import Ranks, command_line
from small import FAST, call, digest, end_at, write_pictures

from mgd_timm.storage.atomic_write import PARTIAL_PREFIX

pytestmark = pytest.mark.slow


HARD = [*FAST, "--epochs", "3", "--drop", "0.2", "--grad-accum-steps", "2", "--model-ema", "--model-ema-decay", "0.9"]
HARD += ["--opt", "adamw", "--lr", "0.003", "--clip-grad", "5", "--checkpoint-interval", "1", "--warmup-epochs", "1"]
UPDATES = 15  # 320 images / (32 x 2) x 3 epochs


def flags(data: Path, output: Path, method: str = "mas") -> list[str]:
    return [
        "distill",
        *HARD,
        "--method",
        method,
        "--criterion",
        "fitnet,selfkd",
        "--match-channels",
        "50",
        "--data-dir",
        str(data),
        "--output",
        str(output),
    ]


def history(output: Path) -> list[dict]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "images_per_second")} for row in rows
    ]


@pytest.fixture(scope="module")
def whole(small_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    done = call(*flags(small_data, output))
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.parametrize("moment", [2, 7, 12])
def test_killed_run_goes_on_to_the_same_bits(whole, small_data, tmp_path, moment):
    output = tmp_path / "run"
    code, _ = end_at(moment, output / "checkpoints", signal.SIGKILL, *flags(small_data, output))
    assert code == -signal.SIGKILL
    assert not (output / "export").exists()
    done = call(*flags(small_data, output), "--resume")
    assert done.returncode == 0, done.stderr
    resumed = re.search(r"resumed after update (\d+)", done.stdout)
    assert resumed is not None, done.stdout
    assert moment <= int(resumed[1]) <= UPDATES
    assert digest(output / "export" / "model.safetensors") == digest(whole / "export" / "model.safetensors")
    assert history(output) == history(whole)


def test_killed_while_the_heads_are_fitted(small_data, tmp_path, monkeypatch):
    outputs = []
    for name in ("whole", "killed"):
        monkeypatch.setenv("MGD_TIMM_CACHE", str(tmp_path / name / "cache"))  # or the heads would be found there
        output = tmp_path / name / "run"
        words = [*flags(small_data, output), "--heads-epochs", "40"]
        if name == "killed":
            code, _ = end_at(1, output / "heads" / "checkpoints", signal.SIGKILL, *words)
            assert code == -signal.SIGKILL
            assert not (output / "checkpoints").exists()
            (output / "heads" / f"{PARTIAL_PREFIX}x").mkdir(
                exist_ok=True
            )  # as a kill in the midst of a write to metrics.jsonl leaves it
            words.append("--resume")
        done = call(*words)
        assert done.returncode == 0, done.stderr
        assert not list(output.rglob(f"{PARTIAL_PREFIX}*"))
        assert ("heads: resumed after update" in done.stdout) == (name == "killed")
        outputs.append(digest(output / "export" / "model.safetensors"))
    assert outputs[0] == outputs[1]


def test_large_images_in_workers_ended_by_a_signal_to_the_whole_group(tmp_path):
    """As a cluster's scheduler or a terminal sends it: to the loader's workers too."""
    data, digests = write_pictures(tmp_path / "data"), []
    words = ["train", "--model", "cifar_resnet8x05", "--data-dir", str(data), "--img-size", "112", "--batch-size", "4"]
    words += ["--epochs", "2", "--workers", "2", "--checkpoint-interval", "1", "--aa", "rand-m5", "--drop", "0.2"]
    for name in ("whole", "ended"):
        output = ["--output", str(tmp_path / name)]
        if name == "ended":
            code, errors = end_at(2, tmp_path / name / "checkpoints", signal.SIGTERM, *words, *output, group=True)
            assert code == 143, errors
            assert "its state is saved" in errors
            output.append("--resume")
        done = call(*words, *output)
        assert done.returncode == 0, done.stderr
        digests.append(digest(tmp_path / name / "export" / "model.safetensors"))
    assert digests[0] == digests[1]


def test_another_teacher_under_the_same_name_is_refused(small_data, tmp_path, capsys):
    teacher = ["train", "--model", "cifar_resnet8x05", "--epochs", "1", "--data-dir", str(small_data)]
    assert command_line(*teacher, "--output", str(tmp_path / "teacher")) == 0
    words = [*flags(small_data, tmp_path / "run"), "--teacher", str(tmp_path / "teacher")]
    code, _ = end_at(3, tmp_path / "run" / "checkpoints", signal.SIGKILL, *words)
    assert code == -signal.SIGKILL
    shutil.rmtree(tmp_path / "teacher")
    assert command_line(*teacher, "--seed", "7", "--output", str(tmp_path / "teacher")) == 0
    assert command_line(*words, "--resume") == 1
    said = capsys.readouterr().err
    assert "is of another recipe" in said
    assert "teacher" in said


def test_ctrl_c_saves_the_state_and_says_so(whole, small_data, tmp_path):
    output = tmp_path / "run"
    code, errors = end_at(3, output / "checkpoints", signal.SIGINT, *flags(small_data, output))
    assert code == 130, errors
    assert re.search(r"stopped by SIGINT after update \d+: its state is saved, --resume continues it", errors)
    done = call(*flags(small_data, output), "--resume")
    assert done.returncode == 0, done.stderr
    assert digest(output / "export" / "model.safetensors") == digest(whole / "export" / "model.safetensors")


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(whole, small_data, tmp_path):
    output = tmp_path / "run"
    code, _ = end_at(4, output / "checkpoints", signal.SIGTERM, *flags(small_data, output))
    assert code == 143
    newest = max((output / "checkpoints").glob("0*"))
    path = newest / "trainee.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = call(*flags(small_data, output), "--resume")
    assert done.returncode == 0, done.stderr
    assert f"{newest.name}: trainee.safetensors does not match its sha256" in done.stdout
    assert digest(output / "export" / "model.safetensors") == digest(whole / "export" / "model.safetensors")


def test_another_recipe_is_refused_with_what_differs(whole, small_data, capsys):
    changed = [word if word != "0.003" else "0.004" for word in flags(small_data, whole)]
    assert command_line(*changed, "--resume") == 1
    said = capsys.readouterr().err
    assert "is a run of another recipe (optim.lr: 0.003 -> 0.004)" in said
    assert "Traceback" not in said


def test_an_existing_folder_is_refused(whole, small_data, capsys):
    before = {path: digest(path) for path in whole.rglob("*") if path.is_file()}
    assert command_line(*flags(small_data, whole)) == 1
    said = capsys.readouterr().err
    assert "exists: choose another --output, or continue it with --resume" in said
    assert before == {path: digest(path) for path in whole.rglob("*") if path.is_file()}


def on_own_disk(folder: str, *words: str) -> int:
    """The command line with a folder that no other rank sees."""
    return command_line(*words, "--output", f"{folder}/{os.environ.get('RANK', '0')}")


def test_machines_that_do_not_share_the_output_folder_are_refused(small_data, tmp_path):
    """One would go on from the checkpoint and the other one begin, and their gradients would be averaged all the
    same."""
    words = [
        "train",
        "--model",
        "cifar_resnet8x05",
        "--data-dir",
        str(small_data),
        "--global-batch-size",
        "64",
        "--epochs",
        "1",
    ]
    for processes, more in ((1, []), (2, ["--resume"])):
        ranks = Ranks([str(tmp_path), *words, *more], tmp_path / "log", processes=processes, target=on_own_disk)
        assert ranks.wait(120) == [processes - 1] * processes, ranks.said()
    for rank in (0, 1):
        expected = (
            r"error: rank 0 found in .* the checkpoint of update 5, and rank 1 none: expected the "
            r"same on all. Give an --output folder that all machines share"
        )
        assert re.search(expected, ranks.said(rank)), ranks.said(rank)
