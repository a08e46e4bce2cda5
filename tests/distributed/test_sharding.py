"""FSDP2 on two real processes (gloo), started by the shipped configuration: as DDP, to rounding; killed, resumed,
refused."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small import FAST, digest, environment

from mgd_timm.distributed.launch import build_accelerator
from mgd_timm.recipe.recipe import make_recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes" / "fsdp.yaml")]
LAUNCH += ["--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [*LAUNCH, "--mixed_precision", "no", str(ROOT / "tests" / "helpers" / "sharded_runs.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("case", "far", "rel"),
    [("resnet", 1e-6, 1e-3), ("crossed", 1e-6, 1e-3), ("vit", 1e-6, 1e-3), ("bf16", 1e-2, 1e-2)],
)
def test_losses_metrics_and_weights_are_those_of_ddp(found, case, far, rel):
    """BatchNorm, clipping, accumulation and averaging; each one's run gone on by the other; a ViT, its teacher cut up;
    bf16."""
    for rank in range(2):
        row = found[rank][case]
        image = 100 / 13 + 1e-3  # one image may fall to another side
        assert row["fsdp"].keys() == row["ddp"].keys()
        for name, value in row["ddp"].items():
            assert row["fsdp"][name] == pytest.approx(value, rel=rel, abs=image if "top" in name else None), name
        assert row["far"] < far
        assert row["rates"][0] == row["rates"][1]
        assert row["plain"]  # what the caller goes on with
        assert {f"{name} 2" for name in ("ce", "kd", "at", "abstract", "detailed", "student_top1")} <= set(row["fsdp"])


def test_a_process_holds_its_part_alone(found):
    rows = [row["portion"] for row in found]
    for part in ("", "teacher_"):
        assert sum(row[f"{part}local"] for row in rows) == rows[0][f"{part}total"]
        assert max(row[f"{part}local"] for row in rows) < 0.52 * rows[0][f"{part}total"]
    assert [row["released"] for row in rows] == [0, 0]  # the caller's own module, while the parts train
    assert all(row["same"] for row in rows)
    assert {name.split(".")[1] for name in rows[0]["units"]} >= {"patch_embed", "blocks"}


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [*LAUNCH, "-m", "mgd_timm", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_very_same_weights(small_data, tmp_path):
    """bf16, as the shipped configuration says; all processes are killed at once after the second checkpoint."""
    flags = [
        "distill",
        *FAST,
        "--method",
        "none",
        "--epochs",
        "2",
        "--checkpoint-interval",
        "2",
        "--data-dir",
        str(small_data),
    ]
    flags += ["--model-ema", "--model-ema-decay", "0.9", "--clip-grad", "1"]
    process = start(*flags, "--output", str(tmp_path / "killed"))
    deadline = time.monotonic() + 600
    while not (tmp_path / "killed" / "checkpoints" / "00000004").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    assert (tmp_path / "killed" / "checkpoints" / "00000004").exists()
    for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "export").exists()
    for more in (["--output", str(tmp_path / "killed"), "--resume"], ["--output", str(tmp_path / "whole")]):
        process = start(*flags, *more)
        output, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        assert "2 processes on cpu, sharded (FSDP2), precision bf16" in output
        assert ("resumed after update" in output) == ("--resume" in more)
    killed, whole = (digest(tmp_path / name / "export" / "model.safetensors") for name in ("killed", "whole"))
    assert killed == whole


def bf16_run(small_data: Path, output: Path, *, sharded: bool, flag: str) -> tuple[dict, torch.Tensor]:
    """Losses and weights of two processes in bf16: teacher, heads, MAS over AT, an average."""
    flags = ["distill", *FAST, "--data-dir", str(small_data), "--criterion", "at", "--epochs", "1", "--lr", "0.001"]
    flags += ["--batch-size", "24", "--heads-epochs", "1", "--model-ema", "--model-ema-decay", "0.5"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launch = LAUNCH if sharded else [*launch, "--rdzv_endpoint", "localhost:0"]
    command = [*launch, "-m", "mgd_timm", *flags, flag, *([] if sharded else ["--amp"]), "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert ("sharded (FSDP2), precision bf16" if sharded else "cpu, precision bf16") in done.stdout
    (row,) = (json.loads(line)["train"] for line in (output / "metrics.jsonl").read_text().splitlines())
    tensors = load_file(output / "export" / "model.safetensors")
    return row, torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def eager(small_data, tmp_path_factory):
    return bf16_run(small_data, tmp_path_factory.mktemp("eager") / "run", sharded=False, flag="--no-compile")


@pytest.mark.long
@pytest.mark.parametrize("sharded", [True, False], ids=["fsdp", "ddp"])
def test_a_compiled_run_in_bf16_ends_where_an_eager_one_does(sharded, eager, small_data, tmp_path):
    """Under FSDP2 by the shipped configuration, which says bf16; the eager run is of DDP."""
    losses, weights = bf16_run(small_data, tmp_path / "run", sharded=sharded, flag="--compile")
    expected, others = eager
    for name, value in losses.items():  # logits of 8 bits have ties
        assert value == pytest.approx(expected[name], rel=1e-2, abs=3 if name == "top1" else None), name
    assert (weights - others).norm() < 2e-2 * others.norm()


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("FSDP_VERSION", "1", "fsdp_version 1"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing"),
    ],
)
def test_what_is_not_done_is_refused(monkeypatch, variable, value, named):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"FSDP with {named}, which is not supported.*recipes/fsdp.yaml"):
        build_accelerator()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match=r"fp16 on a CPU: losses are not scaled .* Use --amp-dtype bfloat16"):
        build_accelerator(amp_dtype="float16")


def test_a_teacher_that_cannot_be_sharded_is_refused():
    with pytest.raises(ValueError, match="--shard-teacher with one process: expected several"):
        build_accelerator(shard_teacher=True)
    with pytest.raises(ValueError, match="--find-batch-size with --shard-teacher: a process cannot try"):
        build_accelerator(shard_teacher=True, find_batch_size=True)
    with pytest.raises(ValueError, match="shard_teacher=True: there is no teacher"):
        make_recipe(shard_teacher=True, teacher=None)
    with pytest.raises(ValueError, match="teacher_store='x' replaces the teacher in memory"):
        make_recipe(shard_teacher=True, teacher_store="x")
