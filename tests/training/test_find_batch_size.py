"""Out of memory: the batch size of a step is halved, the global batch stays, and the weights are those of a run started
so."""

import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small import environment, launched
from torch import nn

from mgd_timm.training.find_batch_size import find_batch_size

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "helpers" / "short_of_memory.py"


@pytest.mark.parametrize(("processes", "first", "steps"), [(1, 64, 4), (2, 32, 2)])
def test_a_process_that_the_system_refuses_memory_makes_all_take_smaller_steps(processes, first, steps):
    """Really refused: the last process may grow by 160 MB only, in which 16 of its images have room. The others are not
    limited."""
    words = launched(str(SCRIPT), str(processes - 1), "160", "16", processes=processes)
    # glibc reserves 64 MB of addresses for a thread that starts after the limit is set.
    variables = environment() | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    assert f"out of memory with {first} images in a step of a process: {first // 2}, in" in done.stdout
    assert f": 16, in {steps} steps per update of 64 as before" in done.stdout
    assert all(f"process {rank}: the same bits" in done.stdout for rank in range(processes))


def search(attempt, batch_size: int = 64, global_batch: int = 40) -> tuple[int, int]:
    """What is found, and the steps per update that accelerate then knows of."""
    AcceleratorState._reset_state(reset_partial_state=False)
    accelerator = Accelerator()
    found = find_batch_size(attempt, nn.Linear(2, 2), accelerator, batch_size, global_batch)
    return found, accelerator.gradient_accumulation_steps


def up_to(size: int, error: type[Exception] = torch.OutOfMemoryError):
    tried = []

    def attempt(batch_size: int) -> None:
        tried.append(batch_size)
        if batch_size > size:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB")

    return attempt, tried


def test_sizes_are_halved_from_the_largest_micro_batch_on():
    attempt, tried = up_to(12)
    assert search(attempt) == (10, 4)
    assert tried == [40, 20, 10]
    assert search(up_to(100)[0]) == (40, 1)
    assert search(up_to(10, MemoryError)[0], batch_size=16) == (8, 5)
    attempt, tried = up_to(2)
    assert search(attempt, batch_size=12, global_batch=12) == (2, 6)
    assert tried == [12, 6, 3, 2]


def test_two_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="out of memory with 2 images in a step of a process"):
        search(up_to(1)[0])


def test_another_error_is_not_taken_for_a_lack_of_memory():
    def attempt(_: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        search(attempt)
