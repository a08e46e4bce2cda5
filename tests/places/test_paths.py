"""Folders as people name them: ~, names that are not text, empty ones, and a run within its own data."""

import multiprocessing
import os
from pathlib import Path

import pytest

from mgd_timm.cli.main import main
from mgd_timm.pipeline.run_folder import check_outside_data
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import expand_home
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.storage.atomic_write import write_text_atomically
from mgd_timm.storage.cache import cache_folder

TRAIN = ["train", "--model", "cifar_resnet8x05", "--epochs", "1"]


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The error of a command that is refused; it is one line."""
    assert main([str(word) for word in words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    recipe = make_recipe(
        output=Path("~/run"),
        data_dir="~/data",
        teacher=["~/teacher", "local-dir:~/export", "resnet18", "~nobody-of-this-name/x"],
        teacher_classes="~/classes.txt",
        student_checkpoint="~/weights.safetensors",
    )
    assert (recipe.output, recipe.data.data_dir) == ("/home/ada/run", "/home/ada/data")
    assert recipe.teacher == ("/home/ada/teacher", "local-dir:/home/ada/export", "resnet18", "~nobody-of-this-name/x")
    assert recipe.teacher_classes == ("/home/ada/classes.txt",)
    assert recipe.student_checkpoint == "/home/ada/weights.safetensors"
    assert make_recipe(teacher="embedded", teacher_store="~").teacher_store == "/home/ada"
    monkeypatch.setenv("MGD_TIMM_CACHE", "~/cache")
    assert cache_folder() == Path("/home/ada/cache")
    monkeypatch.delenv("MGD_TIMM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/ada/.cache/mgd_timm")


@pytest.mark.slow
def test_commands_take_a_tilde(little, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").symlink_to(little)
    (tmp_path / "flags.yaml").write_text("data_dir: ~/data\noutput: ~/run\n")
    monkeypatch.chdir(tmp_path.parent)
    assert main([*TRAIN, "--config", "~/flags.yaml"]) == 0
    assert main(["evaluate", "~/run", "--data-dir", "~/data"]) == 0
    assert main(["evaluate", "local-dir:~/run/export", "--data-dir", "~/data"]) == 0
    assert main(["export", "~/run", "~/export"]) == 0
    weights = "~/export/model.safetensors"
    assert main(["import", weights, "~/imported", "--model", "cifar_resnet8x05", "--num-classes", "2"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"data", "flags.yaml", "run", "export", "imported"}
    capsys.readouterr()


def _without_home(results) -> None:
    os.setgroups([])
    os.setuid(54321)  # an id without an entry in /etc/passwd, as containers are given
    for name in ("HOME", "XDG_CACHE_HOME", "MGD_TIMM_CACHE"):
        os.environ.pop(name, None)
    for action in (lambda: expand_home("~/run", "output"), cache_folder):
        try:
            results.put(str(action()))
        except (ValueError, OSError) as error:
            results.put(str(error))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become a user without a home")
def test_an_unknown_home_is_refused():
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    process = context.Process(target=_without_home, args=(results,))
    process.start()
    process.join()
    assert "output='~/run': the home folder is unknown: set HOME" in results.get()
    assert "set the environment variable MGD_TIMM_CACHE" in results.get()


def test_a_cache_that_cannot_be_written_is_named(little, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MGD_TIMM_CACHE", "/proc/none/cache")
    error = refused(capsys, *TRAIN, "--data-dir", little, "--output", tmp_path / "run")
    assert "cannot be written" in error
    assert "MGD_TIMM_CACHE" in error


def test_an_empty_name_is_no_name(tmp_path, monkeypatch, capsys):
    """Such as --data-dir=$UNSET, which would be the embedded data."""
    monkeypatch.chdir(tmp_path)
    assert "data_dir='': expected text. For the default leave --data-dir out" in refused(capsys, *TRAIN, "--data-dir=")
    assert "output=''" in refused(capsys, *TRAIN, "--output=")
    assert "teacher=''" in refused(capsys, "distill", "--teacher=")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_text_is_refused(capsys):
    error = refused(capsys, *TRAIN, "--output", os.fsdecode("café".encode("latin-1")))
    assert r"\udce9': its bytes are not UTF-8" in error
    assert "PYTHONUTF8=1" in error


def test_a_file_name_that_is_not_text_can_be_listed(tmp_path):
    write_text_atomically(tmp_path / "list.txt", f"café {os.fsdecode(bytes([0xE9]))}\n")
    assert (tmp_path / "list.txt").read_bytes() == "café ".encode() + b"\xe9\n"


def test_a_value_with_a_dash_is_explained(capsys):
    with pytest.raises(SystemExit):
        main([*TRAIN, "--output", "-run"])
    assert "--output=-name" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "train/run", "train/cat/../deep/run", "../link/train/run"])
def test_nothing_is_written_into_the_data(tmp_path, place):
    data = tmp_path / "data"
    (data / "train" / "cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to(data)
    for options in (Data(data_dir=str(data)), Data(dataset=str(data)), Data(data_dir=str(tmp_path / "link"))):
        with pytest.raises(ValueError, match="is in the data folder"):
            check_outside_data(options, {"--output": data / place})


def test_nothing_is_written_beside_class_folders(tmp_path):
    """There it would be a class."""
    (tmp_path / "data" / "cat").mkdir(parents=True)
    options = Data(data_dir=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="is in the data folder"):
        check_outside_data(options, {"--output": tmp_path / "data" / "run"})
    (tmp_path / "data" / "train").mkdir()
    check_outside_data(options, {"--output": tmp_path / "data" / "run"})  # beside a split


def test_what_is_beside_the_data_may_be_written(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for place in (tmp_path / "run", tmp_path / "data-run", tmp_path, Path("run")):
        check_outside_data(Data(data_dir=str(data)), {"--output": place})
    check_outside_data(Data(), {"--output": Path("embedded/run")})
    check_outside_data(Data(dataset="uoft-cs/cifar10"), {"--output": Path("uoft-cs/cifar10/run")})


def test_each_folder_of_a_run_is_kept_out_of_the_data(little, tmp_path, monkeypatch, capsys):
    before = sorted(little.rglob("*"))
    data, distill = ["--data-dir", little], ["distill", "--method", "none"]
    assert "--output" in refused(capsys, *TRAIN, *data, "--output", little / "train" / "run")
    assert "--output" in refused(capsys, *TRAIN, *data, "--output", little, "--resume")
    store = ["--output", tmp_path / "run", "--teacher-store", little / "train" / "store"]
    assert "--teacher-store" in refused(capsys, *distill, *data, *store)
    monkeypatch.setenv("MGD_TIMM_CACHE", str(little / "train" / "cache"))
    assert "MGD_TIMM_CACHE" in refused(capsys, *TRAIN, *data, "--output", tmp_path / "run")
    assert "MGD_TIMM_CACHE" in refused(capsys, "evaluate", "embedded", *data)
    assert sorted(little.rglob("*")) == before
