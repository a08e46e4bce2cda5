"""Calls from Python: what the caller has set in torch neither changes a run nor is changed by it."""

import contextlib
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import mgd_timm
import mgd_timm.models  # registers cifar_*
from mgd_timm.data.dataset import load_images
from mgd_timm.data.loader import allowed_workers
from mgd_timm.recipe.data import Data

TINY = {"epochs": 1, "batch_size": 4}


@contextlib.contextmanager
def set_to(set_value: Callable, value: object, before: object) -> Iterator[None]:
    set_value(value)
    try:
        yield
    finally:
        set_value(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "no gradients": lambda: set_to(torch.set_grad_enabled, False, True),
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "default device": lambda: set_to(torch.set_default_device, "meta", None),
    "device context": lambda: torch.device("meta"),
    "float64": lambda: set_to(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16": lambda: set_to(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": lambda: set_to(torch.use_deterministic_algorithms, True, False),
}


def settings() -> tuple:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_device(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
    )


def random_state() -> tuple:
    """Without that of `random`, from which beartype draws in tests."""
    return np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


@pytest.fixture(scope="module")
def plain(little, tmp_path_factory):
    """A run and its evaluation, where nothing is set."""
    run = tmp_path_factory.mktemp("plain") / "run"
    mgd_timm.train("cifar_resnet8x05", little, output=run, **TINY)
    return run, mgd_timm.evaluate(run)


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_the_caller_changes_nothing(little, plain, tmp_path, setting):
    run, metrics = plain
    torch.manual_seed(7)
    with SETTINGS[setting]():
        before, drawn = settings(), random_state()
        student = mgd_timm.train("cifar_resnet8x05", little, output=tmp_path / "run", **TINY)
        found = mgd_timm.evaluate(run)
        mgd_timm.export_model(student, tmp_path / "export")
        assert settings() == before
        assert random_state() == drawn
    assert found == metrics
    assert all(p.requires_grad and not p.is_inference() and p.dtype == torch.float32 for p in student.parameters())
    expected = load_file(run / "export" / "model.safetensors")
    for folder in (tmp_path / "run" / "export", tmp_path / "export"):
        weights = load_file(folder / "model.safetensors")
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_distillation_trains_without_the_callers_gradients(little, plain, tmp_path):
    run, _ = plain
    options = {**TINY, "heads_epochs": 1, "heads_augmentations": 1}
    students = []
    for name, setting in (("plain", contextlib.nullcontext), ("set", torch.inference_mode)):
        with setting():
            students.append(
                mgd_timm.distill(str(run), "cifar_resnet8x05", little, output=tmp_path / name, **options).state_dict()
            )
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


def test_a_student_that_cannot_be_trained_is_refused(little, tmp_path):
    with torch.inference_mode():
        student = timm.create_model("cifar_resnet8x05", num_classes=2)
    with pytest.raises(ValueError, match=r"inference_mode.*: build the model outside"):
        mgd_timm.train(student, little, output=tmp_path / "run", **TINY)
    with torch.device("meta"):
        student = timm.create_model("cifar_resnet8x05", num_classes=2)
    with pytest.raises(ValueError, match="meta and has no values"):
        mgd_timm.distill("embedded", student, little, output=tmp_path / "run", **TINY)
    assert not (tmp_path / "run").exists()


def _read_in_daemon(data: Path, results) -> None:
    lines: list[str] = []
    try:
        source = load_images(Data(data_dir=str(data), img_size=32, workers=2), 0, log=lines.append).train
        results.put((sum(len(batch.labels) for batch in source.batches([source.ids], 0, torch.device("cpu"))), lines))
    except BaseException as error:
        results.put((repr(error), lines))


def test_a_daemonic_process_reads_images_itself(big):
    """As a worker of multiprocessing.Pool is, which may not have children."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_read_in_daemon, args=(big, results), daemon=True)
    process.start()
    count, lines = results.get(timeout=60)
    process.join()
    assert count == 16
    assert any("this process is daemonic" in line and "--workers 0" in line for line in lines)


def test_other_processes_may_have_workers():
    lines: list[str] = []
    assert allowed_workers(2, lines.append) == 2
    assert lines == []


@pytest.mark.slow
def test_a_script_without_a_guard_is_run_once(big, tmp_path):
    """Python 3.14 starts processes by a fork server, which like spawn imports the caller's script again."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import multiprocessing, sys
print("started")
import torch
from mgd_timm.data.dataset import load_images
from mgd_timm.recipe.data import Data
for method in ("spawn", "forkserver"):
    multiprocessing.set_start_method(method, force=True)
    source = load_images(Data(data_dir={str(big)!r}, img_size=32, workers=2), 0, log=lambda _: None).train
    print(sum(len(batch.labels) for batch in source.batches([source.ids], 0, torch.device("cpu"))))
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split() == ["started", "16", "16"], done.stderr


@pytest.mark.slow
def test_a_run_folder_may_have_any_name(little, tmp_path):
    name = "[v2] a::b\n'q' \"d\" 50%20 %s {x} #1 café 犬 \\ *?"
    run = tmp_path / name
    mgd_timm.train("cifar_resnet8x05", little, output=run, **TINY)
    mgd_timm.train("cifar_resnet8x05", little, output=run, resume=True, **TINY)
    assert mgd_timm.evaluate(run)["top1"] == json.loads((run / "summary.json").read_text())["top1"]
    timm.create_model(f"local-dir:{run / 'export'}", pretrained=True)
