"""50 real `kill -9` at random instants, half of them inside a save: the exported student is the uninterrupted run's,
bit for bit.

What a scheduler does and no hand: the same command with --resume, from the first start on, until it ends. A cache of
its own makes every run fit its heads and store its images anew, so that these are killed as well.
"""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from forked import Ranks
from small import digest

from mgd_timm.storage.atomic_write import PARTIAL_PREFIX

KILLS, PER_RUN = 50, 5
TASKS = {seed: 2 if seed % 5 in (2, 4) else 1 for seed in range(KILLS // PER_RUN)}
"""Processes by seed: 30 kills of one process, 20 of one or both of two."""


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written just now, of the heads or of the student."""
    return any(
        next(place.glob(f"{PARTIAL_PREFIX}*"), None)
        for place in (folder / "run" / "checkpoints", folder / "run/heads/checkpoints")
    )


class Chain:
    """One run that is killed and started again.

    Args:
        flags: Of the command line.
        folder: For its output, cache and log.
        processes: How many.
        seconds: What an uninterrupted run takes.
        rng: Says when and who.
    """

    def __init__(self, flags: Sequence[str], folder: Path, processes: int, seconds: float, rng: random.Random) -> None:
        self.words = [*flags, "--output", str(folder / "run"), "--resume"]
        self.folder, self.processes, self.seconds, self.rng = folder, processes, seconds, rng
        self.starts = 0

    def start(self) -> Ranks:
        self.starts += 1
        cache = {"MGD_TIMM_CACHE": str(self.folder / "cache")}
        return Ranks(self.words, self.folder / f"log{self.starts}", processes=self.processes, environment=cache)

    def kill(self, inside: bool) -> str | None:
        """Start the run and kill it; gives what was hit, None where the run ended first."""
        run, deadline = self.start(), time.monotonic() + 120
        who = self.rng.choice([(0,), (1,), (0, 1)]) if self.processes == 2 else (0,)
        if inside:
            for _ in range(self.rng.randint(1, 3)):
                while saving(self.folder) and run.alive():
                    time.sleep(0.0005)
                while not saving(self.folder) and run.alive():
                    time.sleep(0.0005)
            time.sleep(self.rng.uniform(0, 0.006))
        else:
            time.sleep(self.rng.uniform(0, 0.8 * self.seconds))
        run.signal(signal.SIGKILL, *who)
        hit = saving(self.folder)
        codes = run.wait(deadline - time.monotonic(), grace=2)
        assert None not in codes, f"{who} of {self.processes} killed, and another one waited on:\n{run.said()}"
        if all(codes[rank] != -signal.SIGKILL for rank in who):
            return None
        return "in a save" if hit else "elsewhere"

    def finish(self) -> str:
        """Let the run end; gives the digest of what it exports."""
        run = self.start()
        assert run.wait(180) == [0] * self.processes, run.said()
        return digest(self.folder / "run" / "export" / "model.safetensors")


def kill_all(seed: int, flags: Sequence[str], folder: Path, seconds: float, expected: str) -> Counter[str]:
    """Five kills, every other one in a save, of as many runs as it takes; each run is resumed to its end and
    compared."""
    rng, found = random.Random(seed), Counter[str]()
    wanted = Counter({"in a save": 2 + seed % 2, "elsewhere": 3 - seed % 2})
    while any(found[kind] < wanted[kind] for kind in wanted):
        found["runs"] += 1
        chain = Chain(flags, folder / str(found["runs"]), TASKS[seed], seconds, rng)
        chain.folder.mkdir(parents=True)
        for _ in range(PER_RUN):
            open_kinds = [kind for kind in wanted if found[kind] < wanted[kind]]
            hit = chain.kill(rng.choice(open_kinds) == "in a save") if open_kinds else None
            if hit is None:
                break
            found[hit] += 1
        assert chain.finish() == expected, f"seed {seed}: another student after {chain.starts} starts in {chain.folder}"
    return found


@pytest.fixture(scope="module")
def whole(tiny_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, str]]:
    """Seconds and digest of the uninterrupted run, by number of processes."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"whole{processes}")
        for name in ("warm", "timed"):  # the first one also starts the process that all others are forked from
            (folder / name).mkdir()
            chain, began = Chain(tiny_flags, folder / name, processes, 0, random.Random()), time.monotonic()
            found[processes] = chain.finish(), time.monotonic() - began
    return {processes: (seconds, digest) for processes, (digest, seconds) in found.items()}


def test_kills(
    whole: dict[int, tuple[float, str]], tiny_flags: list[str], tmp_path: Path, report: Callable[[str], None]
) -> None:
    def task(seed: int) -> Counter[str]:
        return kill_all(seed, tiny_flags, tmp_path / str(seed), *whole[TASKS[seed]])

    began, total = time.monotonic(), Counter[str]()
    with ThreadPoolExecutor(2) as pool:  # two runs side by side, on two cores
        for seed, found in zip(TASKS, pool.map(task, TASKS), strict=True):
            total += found
            report(
                f"kills, seed {seed}: {dict(found)} on {TASKS[seed]} process(es), same student; "
                f"{time.monotonic() - began:.0f} s"
            )
    assert total["in a save"] >= KILLS // 2
    assert total["in a save"] + total["elsewhere"] >= KILLS
    report(
        f"kills: {dict(total)} in {time.monotonic() - began:.0f} s: every exported student is the uninterrupted run's"
    )


def test_three_processes_go_on_to_the_same_bits(tiny_flags: list[str], tmp_path: Path) -> None:
    """Of three summands the order decides the last bits, and DDP sums in another order after its first backward
    pass."""
    chains = {name: Chain(tiny_flags, tmp_path / name, 3, 0, random.Random()) for name in ("whole", "killed")}
    for chain in chains.values():
        chain.folder.mkdir()
    expected, killed = chains["whole"].finish(), chains["killed"]
    run, checkpoints = killed.start(), killed.folder / "run" / "checkpoints"
    while not any(place.name >= "00000002" for place in checkpoints.glob("0*")):
        assert run.alive(), run.said()
        time.sleep(0.002)
    run.signal(signal.SIGKILL)
    assert None not in run.wait(60, grace=2)
    assert not (killed.folder / "run" / "export").exists()
    assert killed.finish() == expected
    assert "distil: resumed after update" in (killed.folder / "log2.0").read_text()
