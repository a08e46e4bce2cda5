"""The command line on one and on two real processes (gloo), and a disk that fills up."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from every_criterion import term_names
from forked import Ranks
from safetensors.torch import load_file
from small import FAST, ONE_IMAGE, call, command, end_launched_at, environment, write_pictures
from traced import launch, recorded

import mgd_timm
from mgd_timm.criteria import CRITERIA
from mgd_timm.data.dataset import load_images
from mgd_timm.recipe.data import Data

pytestmark = pytest.mark.slow


def flags(data: Path, output: Path, *more: str) -> list[str]:
    return ["distill", *FAST, "--epochs", "2", "--data-dir", str(data), "--output", str(output), *more]


def history(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_close(
    found: dict[str, float], expected: dict[str, float], rel: float = 1e-3, image: float = ONE_IMAGE
) -> None:
    """The same losses to rounding, and accuracies but for one image between two classes."""
    for name, value in found.items():
        top = name.startswith(("top1", "top5"))
        assert value == pytest.approx(expected[name], rel=rel, abs=image if top else 1e-5), name


def call_machines(*arguments: str) -> list[subprocess.CompletedProcess[str]]:
    """Two machines of one process each, which meet at a port of this one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        "127.0.0.1",
    ]
    launch += ["--master_port", port, "--node_rank"]
    begun = [
        subprocess.Popen(
            [*launch, str(machine), "-m", "mgd_timm", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for machine in (0, 1)
    ]
    ended = [(process, *process.communicate(timeout=400)) for process in begun]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, out, errors) for process, out, errors in ended
    ]


# Of 320 images a tail of 2 is left, one micro-batch: one of two processes has nothing. The learning rate is so low that
# rounding does not grow.
GLOBAL = ["--batch-size", "53", "--global-batch-size", "106", "--lr", "0.001"]
LAUNCHED = ("one process", "two processes", "two machines")


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    """The same recipe, heads included, on one process of two steps, on two processes, and on two machines of one
    each."""
    folder, caches = tmp_path_factory.mktemp("processes"), os.environ["MGD_TIMM_CACHE"]
    for name in LAUNCHED:
        words = [
            *flags(small_data, folder / name, *GLOBAL, "--method", "mas", "--criterion", "at"),
            "--heads-batch-size",
            "57",
        ]
        os.environ["MGD_TIMM_CACHE"] = str(folder / f"cache of {name}")  # or the first one's heads would be found
        if name == "two machines":
            done = call_machines(*words)
            assert [machine.returncode for machine in done] == [0, 0], done[0].stderr + done[1].stderr
        else:
            done = [call(*words, processes=1 if name == "one process" else 2, torchrun=True)]
            assert done[0].returncode == 0, done[0].stderr
        assert f"106 images per update in {2 if name == 'one process' else 1} step" in done[0].stdout
    os.environ["MGD_TIMM_CACHE"] = caches
    return {name: folder / name for name in LAUNCHED}


@pytest.mark.parametrize("stage", ["", "heads"])
@pytest.mark.parametrize("name", LAUNCHED[1:])
def test_learning_rate_losses_and_evaluation_do_not_depend_on_the_number_of_processes(runs, name, stage):
    one, other = history(runs["one process"] / stage), history(runs[name] / stage)
    assert [row["updates"] for row in one] == [row["updates"] for row in other]
    assert [row["lr"] for row in one] == [row["lr"] for row in other]
    if not stage:
        assert [row["updates"] for row in one] == [4, 8]
        assert set(one[0]["train"]) == {"task", "kd", "at", "abstract", "detailed", "top1"}
    for before, after in zip(one, other, strict=True):
        for part in ("train", "eval"):
            assert_close(after[part], before[part])


def test_the_recipe_of_a_run_is_that_of_any_number_of_processes(runs):
    texts = [(runs[name] / "recipe.yaml").read_text().replace(str(runs[name]), "") for name in LAUNCHED]
    assert texts[0] == texts[1] == texts[2]
    assert "global_batch_size: 106" in texts[0]


def test_batchnorm_has_the_statistics_of_the_micro_batches_in_turn(runs):
    """Two steps of one process move them twice an update: so do two processes together."""
    one, *others = [load_file(runs[name] / "export" / "model.safetensors") for name in LAUNCHED]
    moved = [key for key in one if "running_" in key]
    assert moved
    for other in others:
        for key in moved:
            torch.testing.assert_close(other[key], one[key], rtol=2e-3, atol=1e-3)


def test_a_run_stopped_on_two_processes_goes_on_on_one_as_if_never_stopped(tmp_path):
    """Stopped within an epoch, by a signal; other numbers of workers as well. Six micro-batches of 4 images on both."""
    data = write_pictures(tmp_path / "data", count=51)
    options = {"model": "cifar_resnet8x05", "data_dir": str(data), "img_size": 104, "epochs": 2, "log_interval": 1}
    options |= {
        "batch_size": 4,
        "global_batch_size": 24,
        "aa": "rand-m5",
        "drop": 0.2,
        "model_ema": True,
        "model_ema_decay": 0.5,
    }
    stopped = {"record": str(tmp_path / "stopped"), "stop_after": 4}
    stopped["options"] = {**options, "output": str(tmp_path / "run"), "workers": 1}
    resumed = {"record": str(tmp_path / "resumed"), "options": {**stopped["options"], "resume": True, "workers": 0}}
    whole = {
        "record": str(tmp_path / "whole"),
        "options": {**options, "output": str(tmp_path / "whole run"), "workers": 2},
    }
    said = [launch([stopped], 2), launch([resumed, whole], 1)]
    assert "after update 4: its state is saved" in said[0]
    assert "resumed after update 4 (epoch 2)" in said[1]
    assert recorded(tmp_path / "stopped", 2) + recorded(tmp_path / "resumed", 1) == recorded(tmp_path / "whole", 1)
    for row, expected in zip(history(tmp_path / "run"), history(tmp_path / "whole run"), strict=True):
        assert (row["updates"], row["lr"]) == (expected["updates"], expected["lr"])
        for part in ("train", "eval"):
            assert_close(row[part], expected[part], image=100 / 25)


def test_every_criterion_at_once_on_two_processes(small_data, tmp_path):
    """Under MAS, after the stages of AB and FT: no parameter is left without a gradient, which DDP would wait for in
    vain."""
    names = [name for name, kind in CRITERIA.items() if name not in ("ce", "kd", "fsp") and not kind.peers]
    more = [
        "--criterion",
        ",".join(names),
        "--fitting-epochs",
        "1",
        "--epochs",
        "1",
        "--sample-weight",
        "entropy",
        "--batch-size",
        "16",
        "--img-size",
        "32",
    ]
    done = call(*flags(small_data, tmp_path / "run", *more), processes=2)
    assert done.returncode == 0, done.stderr
    assert "memory banks 2 x 320 x 128: 0.3 MB" in done.stdout
    assert 0 < history(tmp_path / "run")[-1]["sample_weights"]["mean"] < 1
    terms = set(history(tmp_path / "run")[-1]["train"])
    named = {part for name in names if name != "ab" for part in term_names(name)}
    assert terms == {"task", "kd", "abstract", "detailed", "top1", *named}


def test_a_classifier_that_no_loss_reads_stays_as_it_is_on_any_number_of_processes(small_data, tmp_path):
    """Of maps alone: DDP would wait for its gradient in vain. In two steps an update of two processes, and in four of
    one."""
    words = [
        "distill",
        "--data-dir",
        str(small_data),
        "--student",
        "cifar_resnet8x05",
        "--batch-size",
        "16",
        "--clip-grad",
        "1",
    ]
    words += [
        "--global-batch-size",
        "64",
        "--epochs",
        "1",
        "--method",
        "none",
        "--criterion",
        "at:1",
        "--task-weight",
        "0",
    ]
    found = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        ranks = Ranks([*words, "--output", str(output)], tmp_path / f"log{processes}", processes=processes)
        assert ranks.wait(120) == [0] * processes, "".join(ranks.said(rank) for rank in range(processes))
        assert "Warning" not in ranks.said()
        found.append((history(output), load_file(output / "export" / "model.safetensors")))
    (one, weights), (other, others) = found
    for before, after in zip(one, other, strict=True):
        assert after["lr"] == before["lr"]
        assert_close(after["train"], before["train"])
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-4)
    assert torch.equal(others["fc.weight"], weights["fc.weight"])


def test_evaluation_counts_each_image_once_on_two_processes(runs):
    done = call("evaluate", str(runs["one process"]), processes=2)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    last = json.loads((runs["one process"] / "summary.json").read_text())["last"]
    for found in (json.loads(lines[0]), mgd_timm.evaluate(str(runs["one process"]))):
        assert found["n"] == 100
        assert_close({name: found[name] for name in ("top1", "top5", "loss")}, last)


def test_the_headline_of_two_processes_is_the_accuracy_of_what_they_export(runs):
    """The BatchNorm statistics that were evaluated must be those that are exported."""
    found = mgd_timm.evaluate(str(runs["two processes"]))
    last = json.loads((runs["two processes"] / "summary.json").read_text())["last"]
    assert_close({name: found[name] for name in ("top1", "top5", "loss")}, last, rel=1e-4)


def test_ctrl_c_on_two_processes_saves_the_state_and_another_global_batch_is_refused(small_data, tmp_path):
    output = tmp_path / "run"
    more = flags(
        small_data,
        output,
        "--method",
        "none",
        "--checkpoint-interval",
        "2",
        "--epochs",
        "12",
        "--grad-accum-steps",
        "1",
    )
    code, errors = end_launched_at(4, output / "checkpoints", signal.SIGINT, *more)
    assert code != 0
    assert "its state is saved, --resume continues it" in errors
    done = call(*more, "--resume", "--global-batch-size", "32")
    assert done.returncode == 1
    assert "optim.global_batch_size: 64 -> 32" in done.stderr
    done = call(*more, "--resume")  # the same flags, on one process
    assert done.returncode == 0, done.stderr
    assert "64 images per update in 2 steps" in done.stdout
    assert "grad_accum_steps=1 is of the run's start: its 64 images per update stay, in 2 steps now." in done.stdout
    assert "resumed after update" in done.stdout


def test_a_full_disk_ends_both_processes_at_once(small_data, tmp_path):
    output = tmp_path / "run"
    load_images(Data(data_dir=str(small_data)), 0)  # their store is larger than a file may be
    more = flags(small_data, output, "--method", "none")
    started = time.monotonic()
    done = subprocess.run(
        command(*more, processes=2),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)),
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("no space left to write") >= 2  # each process says it, none waits for the other
    assert time.monotonic() - started < 90


def test_accelerate_launch_runs_the_module(small_data, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "mgd_timm"]
    flags_here = [
        "train",
        "--model",
        "cifar_resnet8x05",
        "--epochs",
        "1",
        "--data-dir",
        str(small_data),
        "--output",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [*launch, *flags_here], capture_output=True, text=True, timeout=180, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    # Without mpirun it starts one process where two were asked for, and says nothing: we do.
    started = int(re.search(r"(\d) process", done.stdout)[1])
    assert started == 2 or "warning: 2 processes were asked for and 1 run" in done.stdout


def test_a_full_disk_leaves_whole_checkpoints_and_a_clear_error(small_data, tmp_path):
    output = tmp_path / "run"
    more = flags(small_data, output, "--method", "none", "--checkpoint-interval", "2")

    def limit() -> None:  # a real refusal by the system: no file may grow past 40 kB (the weights need 80 kB)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    load_images(Data(data_dir=str(small_data)), 0)  # their store is larger than a file may be
    done = subprocess.run(
        command(*more),
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(),
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "no space left to write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (output / "export").exists()
    assert [path.name for path in output.rglob(".writing-*")] == []
    done = call(*more, "--resume")
    assert done.returncode == 0, done.stderr
    assert (output / "export" / "model.safetensors").is_file()
