"""The memory that benchmarks/scale.py predicts of DDP, FSDP2 and an average of the weights, beside two real processes'
(gloo)."""

import gc
import os
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from report import markdown
from scale_counts import Case, Step
from scale_memory import CHECKED, allocated, real
from torch import nn
from torch.multiprocessing.spawn import spawn
from tqdm import tqdm

from mgd_timm.distributed.sharding import make_data_parallel
from mgd_timm.training.optimizer import build_optimizer

PROCESSES, STEPS = 2, 3
WAYS = tuple((fsdp, ema) for fsdp in (False, True) for ema in (False, True))
PAIRS = CHECKED[:2]


class _Whole(nn.Module):
    """What a run gives to accelerate: a wrapper around what trains."""

    def __init__(self, trainee: nn.Module) -> None:
        super().__init__()
        self.trainee = trainee

    def forward(self, *inputs: Any) -> Any:
        return self.trainee(*inputs)


def peak_of(case: Case, fsdp: bool, ema: bool) -> int:
    """Bytes that torch's allocator has handed out at the peak of a step, in the first of two processes."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (case, fsdp, ema, folder), nprocs=PROCESSES)
        return int(Path(folder, "peak").read_text())


def _rank(rank: int, case: Case, fsdp: bool, ema: bool, folder: str) -> None:
    """A process: it builds, takes two steps, and looks at the next ones."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(PROCESSES), ACCELERATE_USE_CPU="true")
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT="0"
    )  # accelerate asks for them; the processes meet in a file
    os.environ.update(ACCELERATE_USE_FSDP=str(fsdp).lower(), FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="true")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    accelerator = Accelerator()
    held: list[Any] = []

    def build() -> None:
        step = real(case)
        parallel = make_data_parallel(step.trainee, accelerator)
        held.extend((step, parallel, parallel.moving_average(step.trainee.student) if ema else None))
        optimizer = build_optimizer(parallel.trainee, case.recipe.optim)
        step.trainee, step.optimizer = parallel.prepare(_Whole(parallel.trainee).train(), optimizer)
        step.run()
        step.run()
        torch.distributed.barrier()
        gc.collect()

    state, _ = allocated(build)
    step: Step = held[0]
    # The least: gloo's threads give a message's memory back when they get to it.
    peak = min(allocated(step.run)[1] for _ in range(STEPS))
    if rank == 0:
        Path(folder, "peak").write_text(str(state + peak))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def check(predicted: Callable[[Case, bool, bool], float]) -> dict[str, Any]:
    """A row for each pair and way.

    Args:
        predicted: Bytes of a case on `PROCESSES`, by FSDP or not, with an average or not.
    """
    rows = []
    for names, (fsdp, ema) in tqdm(list(product(PAIRS, WAYS)), desc="several", unit="run"):
        case = Case(*names)
        foreseen, peak = predicted(case, fsdp, ema), peak_of(case, fsdp, ema)
        rows.append(
            {
                **case.words,
                "fsdp": fsdp,
                "ema": ema,
                "peak": {"predicted": foreseen, "measured": peak, "ratio": foreseen / peak},
            }
        )
    return {"rows": rows}


def summary(found: dict[str, Any]) -> str:
    """The rows as a table."""
    cells = []
    for row in found["rows"]:
        way = ("FSDP2" if row["fsdp"] else "DDP") + (", average" if row["ema"] else "")
        sizes = [f"{row['peak'][name] / 2**20:.0f}" for name in ("predicted", "measured")]
        cells.append(
            [
                row["pair"],
                f"{row['img_size']} px, {row['batch_size']}, {row['precision']}",
                way,
                *sizes,
                f"{row['peak']['ratio']:.3f}",
            ]
        )
    return markdown(["pair", "size, batch", "2 processes", "predicted MiB", "measured MiB", "ratio"], cells)
