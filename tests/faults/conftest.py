"""What the groups of faults share: tiny images, and a line for the reader after each group."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Shows a line at once, past pytest's capture."""

    def show(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", flush=True)

    return show


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 20 test images of the embedded data set."""
    from small import write_small

    return write_small(tmp_path_factory.mktemp("tiny"), train=60, test=20)


@pytest.fixture(scope="session")
def tiny_flags(tiny_data: Path) -> list[str]:
    """A run of seconds that has all there is to lose: heads, moving average, accumulation, dropout, and a save at every
    update."""
    words = [
        "distill",
        "--student",
        "cifar_resnet8x05",
        "--data-dir",
        str(tiny_data),
        "--method",
        "mas",
        "--criterion",
        "fitnet",
    ]
    words += [
        "--batch-size",
        "4",
        "--grad-accum-steps",
        "2",
        "--epochs",
        "2",
        "--drop",
        "0.2",
        "--opt",
        "adamw",
        "--lr",
        "0.003",
    ]
    words += [
        "--model-ema",
        "--model-ema-decay",
        "0.9",
        "--clip-grad",
        "5",
        "--heads-epochs",
        "4",
        "--heads-augmentations",
        "2",
    ]
    return [*words, "--heads-batch-size", "40", "--log-interval", "2", "--checkpoint-interval", "1"]
