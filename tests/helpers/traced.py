"""Runs of mgd_timm with a record of every update: which images it saw, how they were cropped, and at which learning
rate.

A job is {"record": FILE, "stop_after": UPDATES or null, "options": {...} of mgd_timm.train}. Process r writes FILE.r,
one line per update of the student. Where a run is to stop, the first process sends itself a SIGINT.
"""

import hashlib
import json
import os
import signal
from pathlib import Path

from forked import Ranks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import mgd_timm
from mgd_timm.distiller import Distiller
from mgd_timm.distributed.collectives import join, leave
from mgd_timm.distributed.sharding import Replicated
from mgd_timm.training.signals import Stopped

seen: dict[int, str] = {}


def look(module, inputs) -> None:
    """Note every image of a training step, as it is shown."""
    if isinstance(module, Distiller):
        batch = inputs[0]
        for sample, image, label in zip(batch.sample_ids.tolist(), batch.images, batch.labels.tolist(), strict=True):
            shown = hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:12]
            assert seen.setdefault(sample, f"{label} {shown}") == f"{label} {shown}"


_rebuild_buckets = Replicated.rebuild_buckets


def rebuild_buckets(parallel: Replicated, model, backward) -> None:
    """Forget the images of a pass whose gradients are dropped, as three or more processes have one: no update has
    them."""
    _rebuild_buckets(parallel, model, backward)
    seen.clear()


def carry_out(job: dict, rank: int) -> None:
    lines: list[str] = []

    def note(optimizer, *_) -> None:
        lines.append(json.dumps({"lr": optimizer.param_groups[0]["lr"], "seen": sorted(seen.items())}))
        seen.clear()
        if len(lines) == job.get("stop_after") and rank == 0:
            os.kill(os.getpid(), signal.SIGINT)

    hook = register_optimizer_step_post_hook(note)
    try:
        mgd_timm.train(**job["options"])
    except Stopped as stop:
        print(stop, flush=True)
    hook.remove()
    Path(f"{job['record']}.{rank}").write_text("\n".join(lines))


def carry_out_all(jobs: list[dict]) -> int:
    rank = join().process_index
    register_module_forward_pre_hook(look)
    Replicated.rebuild_buckets = rebuild_buckets
    for job in jobs:
        carry_out(job, rank)
    leave()
    return 0


def launch(jobs: list[dict], processes: int) -> str:
    """Carry jobs out, one after another, on a number of new processes; gives what they say."""
    ranks = Ranks([jobs], Path(f"{jobs[0]['record']} log"), processes=processes, target=carry_out_all)
    codes = ranks.wait(300)
    said = "".join(ranks.said(rank) for rank in range(processes))
    assert codes == [0] * processes, said
    return said


def recorded(record: Path, processes: int) -> list[tuple[float, dict[int, str]]]:
    """Of every update its learning rate, and the images that all processes together saw, by sample id."""
    updates = []
    ranks = [
        [json.loads(line) for line in Path(f"{record}.{rank}").read_text().splitlines()] for rank in range(processes)
    ]
    for rows in zip(*ranks, strict=True):
        assert len({row["lr"] for row in rows}) == 1
        updates.append((rows[0]["lr"], {sample: shown for row in rows for sample, shown in sorted(row["seen"])}))
    return updates
