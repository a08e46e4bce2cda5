"""What ranks wait for: work of one process may take longer than a collective; a rank that hangs ends the run."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import Accelerator
from forked import Ranks

from mgd_timm.distributed.collectives import broadcast_from_main, join, leave, local_main_first, run_on_main
from mgd_timm.distributed.hangs import print_stacks_before_timeout
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.teachers.outputs.store import _together

pytestmark = pytest.mark.slow

WORK = 3.0
"""Seconds for which one process works, where collectives time out after 2."""


def first_on_the_machine(accelerator: Accelerator, folder: Path) -> None:
    for name in "ab":
        with local_main_first(accelerator):
            if accelerator.is_main_process:
                time.sleep(WORK)
                (folder / name).touch()
            assert (folder / name).exists()


def first_on_two_machines(accelerator: Accelerator, folder: Path) -> None:
    """The second machine has nothing to do."""
    assert accelerator.is_local_main_process
    with local_main_first(accelerator):
        if accelerator.is_main_process:
            time.sleep(WORK)


def main_alone(accelerator: Accelerator, folder: Path) -> None:
    """The other process waits in a collective afterwards."""

    def read() -> str:
        time.sleep(WORK)
        return "read"

    assert broadcast_from_main(accelerator, read) == "read"
    run_on_main(accelerator, lambda: time.sleep(WORK))


def shards(accelerator: Accelerator, folder: Path) -> None:
    """One process has a shard more to write."""
    _together(lambda: time.sleep(0 if accelerator.is_main_process else WORK), accelerator)


CASES: list[Callable[[Accelerator, Path], None]] = [first_on_the_machine, first_on_two_machines, main_alone, shards]


def work(case: Callable[[Accelerator, Path], None], folder: Path) -> int:
    if case is first_on_two_machines:
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    accelerator = join(process_timeout=2)
    case(accelerator, folder)
    accelerator.wait_for_everyone()
    leave()
    return 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_one_process_may_work_for_longer_than_a_collective(
    case: Callable[[Accelerator, Path], None], tmp_path: Path
) -> None:
    ranks = Ranks([case, tmp_path], tmp_path / "log", processes=2, target=work)
    assert ranks.wait(60) == [0, 0], ranks.said() + ranks.said(1)


def read_for_ever() -> None:
    time.sleep(1000)


def hang() -> int:
    """Three steps, each with a collective; rank 1 hangs in the third. A loop before took long, outside of steps."""
    accelerator = join(process_timeout=5)
    with print_stacks_before_timeout(accelerator) as start_step:
        start_step()
    time.sleep(5)
    with print_stacks_before_timeout(accelerator) as start_step:
        for step in range(3):
            start_step()
            if (accelerator.process_index, step) == (1, 2):
                read_for_ever()
            accelerator.wait_for_everyone()
    return 0


def test_a_hang_ends_with_the_timeout_and_shows_where_each_rank_is(tmp_path: Path) -> None:
    ranks = Ranks([], tmp_path / "log", processes=2, target=hang)
    assert ranks.wait(60, grace=0) == [1, -signal.SIGTERM], ranks.said()
    assert re.search(r"RuntimeError: .*Timed out", ranks.said(0), re.DOTALL), ranks.said(0)
    for rank in (0, 1):
        said = ranks.said(rank)
        assert len(re.findall(r"^Timeout \(0:00:04\.\d+\)!|^Timeout \(0:00:04\)!", said, re.MULTILINE)) == 1, said
        assert ("in read_for_ever" in said) == (rank == 1), said
        assert ("in wait_for_everyone" in said.partition("Traceback")[0]) == (rank == 0), said


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_a_timeout_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"process_timeout=\S+: expected a positive number"):
        make_recipe(process_timeout=seconds)
