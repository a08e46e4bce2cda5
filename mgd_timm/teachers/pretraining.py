"""What is trained before a run: kept in the cache by a digest of all that made it, and loaded from there by later runs.

Granularity heads (teachers.heads), a teacher's classifier (teachers.classifier), and what criteria fit first
(pipeline.fit_criteria): each is `fit` with another trainee.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from mgd_timm.data.dataset import Images
from mgd_timm.data.mixed_source import MIXING_OPTIONS
from mgd_timm.distiller import Teacher
from mgd_timm.distributed.collectives import broadcast_from_main, broadcast_tensors, lock_on_main, run_on_main
from mgd_timm.recipe.data import Data
from mgd_timm.recipe.options import as_dict, digest
from mgd_timm.storage import checkpoint
from mgd_timm.storage.cache import cache_folder
from mgd_timm.storage.lock import Lock
from mgd_timm.training.evaluation import Metrics
from mgd_timm.training.options import FitOptions


@dataclass(frozen=True)
class RunContext:
    """What everything that is trained in a run shares: images, processes, and where and how it is logged.

    Args:
        folder: Of the run.
        images: Of the run.
        data: Options of the images: batch sizes and transforms.
        accelerator: Device, processes, precision.
        seed: Of the run.
        fold_teacher: Fold the teacher's BatchNorm into its convolutions.
        channels_last: Memory format; None where it is known to be safe.
        compile: Compile the networks.
        resume: Continue from checkpoints in `folder`.
        log_interval: Updates between two reports.
        quiet: No progress bars.
    """

    folder: Path
    images: Images
    data: Data
    accelerator: Accelerator
    seed: int
    fold_teacher: bool
    channels_last: bool | None
    compile: bool
    resume: bool
    log_interval: int
    quiet: bool = False

    def fit_options(self, name: str, fingerprint: dict[str, Any], **options: Any) -> FitOptions:
        """Return the options of a fit before the run, and create its folder `name` inside the run's.

        Args:
            name: Of the folder.
            fingerprint: What decides the result.
            **options: Fields of FitOptions, which replace the values here.
        """
        folder = self.folder / name
        run_on_main(self.accelerator, lambda: folder.mkdir(parents=True, exist_ok=True))
        options = {
            "advice": "Lower --fitting-lr, or clip gradients (--clip-grad 1).",
            "stage": folder.name,
            "quiet": self.quiet,
            **options,
        }
        return FitOptions(
            folder=folder,
            fingerprint=fingerprint,
            resume=self.resume,
            log_interval=self.log_interval,
            track=False,
            **options,
        )

    def teacher_fingerprint(self, teacher: Teacher) -> dict[str, Any]:
        """What decides the teacher's features before the run: network, images, input adapter, precision."""
        images = self.images
        return {
            "teacher": [teacher.tap.name, teacher.digest],
            "folded": self.fold_teacher,
            "compiled": self.compile,
            "channels_last": self.channels_last,
            "input": teacher.describe_input(),
            "images": [images.train.digest, list(images.mean), list(images.std), list(images.input_size)],
            "shown": {k: v for k, v in as_dict(self.data, digest_only=True).items() if k not in MIXING_OPTIONS},
            "seed": self.seed,
            "precision": str(self.accelerator.mixed_precision),
        }


@dataclass(frozen=True)
class PreTrained:
    """Metrics of what was trained before the run, and whether it was found in the cache."""

    metrics: Metrics
    from_cache: bool


def load_or_fit(
    kind: str, module: nn.Module, made_of: dict[str, Any], accelerator: Accelerator, fit_module: Callable[[], Metrics]
) -> PreTrained:
    """Load a module's trained weights from the cache where a digest of all that makes them matches, else train it.

    What is trained is written to the cache. One run at a time trains it: others that need the same wait, and load it.

    Args:
        kind: The folder of the cache.
        module: Loaded or trained in place; on the accelerator's device.
        made_of: All that decides the weights, as JSON values.
        accelerator: Processes.
        fit_module: Trains `module` and returns metrics.

    Raises:
        OSError: They cannot be written.
    """
    folder = cache_folder() / kind / digest(made_of)[:32]
    metrics = _load_cached(folder, kind, module, accelerator, print)
    if metrics is not None:
        return PreTrained(metrics, from_cache=True)
    with lock_on_main(Lock(folder, f"fitted {kind} ({folder})", accelerator.print), accelerator):
        metrics = _load_cached(folder, kind, module, accelerator, lambda _: None)  # another run's, meanwhile
        if metrics is not None:
            return PreTrained(metrics, from_cache=True)
        metrics = fit_module()
        state = checkpoint.State({kind: module.state_dict()}, {"made_of": made_of, "metrics": metrics})
        run_on_main(accelerator, lambda: checkpoint.save(folder, 1, state))
    return PreTrained(metrics, from_cache=False)


def _load_cached(
    folder: Path, kind: str, module: nn.Module, accelerator: Accelerator, log: Callable[[str], None]
) -> Metrics | None:
    """The metrics of what the cache holds, whose weights are loaded into `module`; None where it holds none."""
    # One process looks and decides: others may have a disk of their own.
    found: list[checkpoint.State | None] = [None]

    def look() -> Metrics | None:
        found[0] = checkpoint.load_newest(folder, log)
        return dict(found[0].values["metrics"]) if found[0] is not None else None

    metrics = broadcast_from_main(accelerator, look)
    if metrics is None:
        return None
    if found[0] is not None:
        module.load_state_dict(dict(found[0].tensors[kind]))
    broadcast_tensors(module.state_dict().values(), accelerator)
    return metrics


def epochs_text(pretrained: PreTrained, epochs: int) -> str:
    """How something came to be trained, for the log."""
    return "from the cache" if pretrained.from_cache else f"{epochs} epoch{'s' if epochs > 1 else ''}"
