"""Every test session has caches of its own, no network and few threads; set before any library reads them."""

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

_LONG = {
    "test_sharding",
    "test_collectives",
    "test_resume",
    "test_pretraining",
    "test_cifar_stages",
    "test_waiting",
    "test_main",
    "test_store",
    "test_snippets",
    "test_distiller",
    "test_find_batch_size",
    "test_formats",
    "test_onnx_families",
    "test_publish",
    "test_learn_int8",
    "test_trajectory",
    "test_turns",
    "test_evolutionary",
    "test_krnet_runs",
    "test_student_friendly",
    "test_connect",
    "test_page",
    "test_fake_gpu",
    "test_no_host_sync",
    "test_loop",
}
_FOLDER = pytest.StashKey[tempfile.TemporaryDirectory]()


def pytest_configure(config: pytest.Config) -> None:
    folder = tempfile.TemporaryDirectory(prefix="mgd_timm-tests-", ignore_cleanup_errors=True)
    config.stash[_FOLDER] = folder
    os.environ.update(
        MGD_TIMM_CACHE=f"{folder.name}/mgd_timm",
        HF_HOME=f"{folder.name}/hf",
        HF_DATASETS_CACHE=f"{folder.name}/hf/datasets",
        HF_HUB_OFFLINE="1",
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of real processes, which take a minute or more each, come first: begun last, they would leave a core
    without work."""
    items.sort(key=lambda item: item.path.stem not in _LONG)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_FOLDER].cleanup()


@pytest.fixture
def small_disk(tmp_path: Path) -> Callable[[str], AbstractContextManager[None]]:
    """A real small disk, mounted at `tmp_path` with the given options; a machine that does not permit it skips the
    test."""

    @contextlib.contextmanager
    def mount(options: str) -> Iterator[None]:
        if shutil.which("mount") is None or os.geteuid() != 0:
            pytest.skip("mounting a small disk needs root")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(tmp_path)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"no small disk: {mounted.stderr.strip()}")
        try:
            yield
        finally:
            subprocess.run(
                ["umount", "--lazy", tmp_path], check=True
            )  # a mapped file may live until garbage is collected

    return mount


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 training and 100 test images of the embedded data set, as parquet files."""
    from small import write_small

    return write_small(tmp_path_factory.mktemp("small"))
