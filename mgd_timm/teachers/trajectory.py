"""The trajectory of a teacher: snapshots of its weights while it trained, and a student that follows them.

Reference: Harutyunyan, Rawat, Menon, Kim, Kumar, "Supervision Complexity and its Role in Knowledge Distillation" (arXiv
2301.12245): a student at some point of its training learns from the teacher at about the same point of the teacher's.

Differs: inspired by the paper, from its abstract and from memory; its equations and numbers were not verified. Ours
are: the mapping by share of epochs, snapshots and swaps at the ends of epochs only, and codes under MAG that stay those
of the trained teacher.
"""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from mgd_timm.distiller import Teacher
from mgd_timm.distributed.collectives import run_on_main
from mgd_timm.features import Batch, Features, FeatureTap
from mgd_timm.models.load import load_weights, read_safetensors
from mgd_timm.storage.atomic_write import remove_partial_writes, write_atomically, write_text_atomically
from mgd_timm.storage.checkpoint import copy_for_safetensors
from mgd_timm.storage.digests import sha256

FOLDER = "trajectory"


@dataclass(frozen=True)
class Snapshot:
    """Weights of a model after some epochs of its training.

    Args:
        epoch: Epochs done, 1 or more.
        file: Its name in the folder.
        sha256: Of the file.
    """

    epoch: int
    file: str
    sha256: str


@dataclass(frozen=True)
class Trajectory:
    """Snapshots of a finished training.

    Args:
        folder: Of index.json and the snapshots.
        epochs: Of the training; the last snapshot is of its end.
        snapshots: By epoch.
    """

    folder: Path
    epochs: int
    snapshots: tuple[Snapshot, ...]

    @property
    def digests(self) -> list[str]:
        """sha256 of each snapshot."""
        return [one.sha256 for one in self.snapshots]

    def at(self, epoch: int, epochs: int) -> Snapshot:
        """Return the snapshot for an epoch (from 0) of a student's training.

        Of the snapshots, it is the first whose share of the teacher's epochs is at least the share of the student's
        that will be done after this epoch; in the last epoch it is the trained teacher.
        """
        return next(one for one in self.snapshots if one.epoch * epochs >= (epoch + 1) * self.epochs)


def snapshot_epochs(epochs: int, count: int) -> list[int]:
    """Return the numbers of epochs after which evenly spaced snapshots are kept; the last one is the training's end."""
    return [-(-number * epochs // count) for number in range(1, count + 1)]


class SnapshotWriter:
    """Writes evenly spaced snapshots of a model that trains, and index.json, which names them.

    A run that is resumed writes the snapshots of the epochs that it repeats again.

    Args:
        run: Folder of the run.
        epochs: Of the run.
        count: Snapshots to keep.
        student: What trains.
        accelerator: Its main process writes.
    """

    def __init__(self, run: Path, epochs: int, count: int, student: FeatureTap, accelerator: Accelerator) -> None:
        self.folder, self.epochs, self.student, self.accelerator = run / FOLDER, epochs, student, accelerator
        self.kept = frozenset(snapshot_epochs(epochs, count))

    def end_epoch(self, epoch: int, averaged: nn.Module | None) -> None:
        """Write a snapshot after `epoch` epochs, if it is one of those to keep: of the moving average where there is
        one, as it is what the run exports.

        Raises:
            OSError: It could not be written; earlier ones are whole.
        """
        if epoch in self.kept:
            model = cast(FeatureTap, averaged or self.student).model
            run_on_main(self.accelerator, lambda: self._write(epoch, model))

    def _write(self, epoch: int, model: nn.Module) -> None:
        path, index = self.folder / f"epoch_{epoch:05d}.safetensors", self.folder / "index.json"
        remove_partial_writes(self.folder)
        write_atomically(path, lambda draft: save_file(copy_for_safetensors(model.state_dict()), draft))
        earlier = _read_index(index).snapshots if index.exists() else ()
        snapshots = [*(one for one in earlier if one.epoch < epoch), Snapshot(epoch, path.name, sha256(path))]
        values = {"epochs": self.epochs, "snapshots": [asdict(one) for one in snapshots]}
        write_text_atomically(index, json.dumps(values, indent=2) + "\n")


def read_trajectory(run: Path) -> Trajectory:
    """Read the snapshots that a finished run has kept.

    Raises:
        ValueError: The run has kept none, has not finished, or a file is missing or corrupt.
    """
    index = run / FOLDER / "index.json"
    if not run.is_dir():
        raise ValueError(
            f"teacher_trajectory={str(run)!r}: there is no such folder: expected the folder of a run of mgd-timm train "
            "--keep-checkpoints N."
        )
    if not index.is_file():
        raise ValueError(
            f"teacher_trajectory={str(run)!r}: {index} is missing, so the run has kept no snapshots: train the teacher "
            "with mgd-timm train --keep-checkpoints N."
        )
    found = _read_index(index)
    if found.snapshots[-1].epoch != found.epochs:
        raise ValueError(
            f"teacher_trajectory={str(run)!r}: the run has not finished, its last snapshot is of epoch "
            f"{found.snapshots[-1].epoch} of {found.epochs}: continue it with mgd-timm train --resume."
        )
    for one in found.snapshots:
        path = found.folder / one.file
        if not path.is_file() or sha256(path) != one.sha256:
            raise ValueError(
                f"teacher_trajectory={str(run)!r}: {path} is missing or corrupt: restore it, or train the teacher anew."
            )
    return found


def _read_index(path: Path) -> Trajectory:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        snapshots = tuple(Snapshot(one["epoch"], Path(one["file"]).name, one["sha256"]) for one in values["snapshots"])
        if not snapshots:
            raise ValueError("it names no snapshot")
        return Trajectory(path.parent, int(values["epochs"]), snapshots)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is corrupt ({error}): restore it, or train the teacher anew.") from error


def check_last_snapshot(teacher: Teacher, trajectory: Trajectory) -> None:
    """Raise ValueError unless the last snapshot has the teacher's weights."""
    path = trajectory.folder / trajectory.snapshots[-1].file
    own, last = copy_for_safetensors(teacher.tap.model.state_dict()), read_safetensors(path)
    if own.keys() != last.keys() or not all(own[name].equal(last[name]) for name in own):
        raise ValueError(
            f"the last snapshot, {path}, does not have the weights of the teacher {teacher.tap.name}: expected the "
            "same, as a run leaves them. Train the teacher anew with mgd-timm train --keep-checkpoints N."
        )


class FollowedTeacher:
    """A frozen teacher whose weights follow its own training; returns features of a batch, as `fit` takes them.

    It is not compiled: on a CPU a compiled teacher has its weights as constants.

    Args:
        teacher: Trained, with its own weights unchanged: no folded BatchNorm, no other classes. With heads, codes are
            those of the trained teacher, which sees each batch as well.
        trajectory: Of the teacher's training.
        epochs: Of the student's training.
    """

    def __init__(self, teacher: Teacher, trajectory: Trajectory, epochs: int) -> None:
        self.teacher, self.trajectory, self.epochs = teacher, trajectory, epochs
        self.follower, self.shown = teacher, trajectory.snapshots[-1]
        if teacher.heads is not None:
            tap, adapter = copy.deepcopy(teacher.tap), teacher.input_adapter
            self.follower = Teacher(tap, input_adapter=adapter, digest=teacher.digest, logits=teacher.has_logits)
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Load the snapshot for an epoch, from 0, unless it is loaded already."""
        wanted = self.trajectory.at(epoch, self.epochs)
        if wanted != self.shown:
            load_weights(self.follower.tap.model, self.follower.tap.name, self.trajectory.folder / wanted.file)
            self.shown = wanted

    def __call__(self, batch: Batch) -> Features:
        """Return the snapshot's logits, and under MAG the trained teacher's codes."""
        features: Features = self.follower(batch.images)
        if self.follower is self.teacher:
            return features
        codes: Features = self.teacher(batch.images)
        return codes._replace(logits=features.logits)
