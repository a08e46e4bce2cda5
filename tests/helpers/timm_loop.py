"""A training loop as timm's train.py has it, around a MultiGranularityTask; run by test_task on one process and on two.

With two processes each takes half of every batch, so both ways give the same weights: the student normalises each
sample by itself.
"""

import os
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver
from torch.nn.parallel import DistributedDataParallel

from mgd_timm.distributed.collectives import leave
from mgd_timm.recipe.heads import Heads
from mgd_timm.task import MultiGranularityTask

SIZE, CLASSES, COUNT, BATCH = (3, 32, 32), 10, 48, 16
CASES: dict[str, dict[str, Any]] = {
    "mas": {"criterion": "kd", "method": "mas", "backend": "eager"},
    "codes": {"criterion": "pkt,ce:0,kd:0", "method": "mag"},  # no loss reads the student's logits
    "crd": {"criterion": "crd", "method": "none"},
}


def ranks() -> tuple[int, int]:
    """Return this process's rank, and the number of processes."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def make_loader() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Return batches (input, target, sample ids): this process's part of each."""
    generator = torch.Generator().manual_seed(0)
    images, ids = torch.randn(COUNT, *SIZE, generator=generator), torch.arange(COUNT)
    rank, processes = ranks()
    parts = (part.split(BATCH) for part in (images, ids % CLASSES, ids))
    return [tuple(part.chunk(processes)[rank] for part in batch) for batch in zip(*parts, strict=True)]


def make_task(criterion: str, method: str) -> MultiGranularityTask:
    torch.manual_seed(0)
    student = timm.create_model("test_vit", num_classes=CLASSES, img_size=SIZE[1])
    teacher = timm.create_model("test_resnet", num_classes=CLASSES)
    heads = Heads(heads_epochs=2, heads_augmentations=1, heads_batch_size=BATCH)
    return MultiGranularityTask(
        student, teacher, criterion, method, heads, input_size=SIZE, verbose=False, labels=torch.arange(COUNT) % CLASSES
    )


def train(folder: Path, criterion: str, method: str, backend: str | None = None) -> dict[str, Any]:
    """Train for an epoch in the order of train.py's steps, and return its checkpoint."""
    task, loader = make_task(criterion, method), make_loader()
    if method != "none":
        task.fit_heads([batch[:2] for batch in loader])
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="momentum", lr=0.01, weight_decay=0.1)
    task.setup_ema(decay=0.5)
    if backend is not None:
        task.compile(backend=backend)
        task.compile_ema(backend=backend)
    if ranks()[1] > 1:
        task.prepare_distributed()
        assert isinstance(task.get_trainable_module(), DistributedDataParallel)
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=str(folder), task=task)
    task.get_trainable_module().train()
    for number, batch in enumerate(loader, start=1):
        result = task(*(batch if task.needs_ids else batch[:2]))
        result["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.get_clip_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=number)
    for ema in (False, True):
        assert task.get_eval_model(ema=ema).eval()(loader[0][0]).isfinite().all()
    path = folder / f"last{ranks()[0]}.pth.tar"
    saver._save(str(path), 0)
    saved = torch.load(path, weights_only=True)
    return {name: saved[name] for name in ("state_dict", "state_dict_ema", "task_state")}


def main(folder: str) -> None:
    """Write what each case leaves on this process. The first is compiled: what dynamo cannot trace would raise."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for name, options in CASES.items():
        torch.save(train(Path(folder), **options), Path(folder) / f"{name}{ranks()[0]}.pt")
    leave()
