"""What a fit keeps and shows."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FitOptions:
    """What a fit keeps and shows while it goes on.

    Args:
        folder: Folder for checkpoints/, and for metrics.jsonl unless `metrics_folder` is given; None keeps nothing.
        metrics_folder: Folder for metrics.jsonl, which several fits of a run may share.
        epochs_before, updates_before: Of earlier fits of the run; metrics.jsonl and trackers count on from them.
        fingerprint: The values that decide the weights; a checkpoint with others is refused.
        stage: Name of the fit in metrics and the log; it also enters the seeds of dropout.
        resume: Continue from the newest whole checkpoint, if there is one.
        checkpoint_interval: Updates between checkpoints; 0 for the ends of epochs only.
        checkpoint_hist: Checkpoints kept.
        log_interval: Updates between checks and reports of the losses.
        quiet: No progress bar.
        track: Report to accelerate's trackers.
        advice: What to do about a loss or weight that is not finite.
        memory_hint: What to do where memory runs out.
    """

    folder: Path | None = None
    metrics_folder: Path | None = None
    epochs_before: int = 0
    updates_before: int = 0
    fingerprint: dict[str, Any] = field(default_factory=dict)
    stage: str = "distil"
    resume: bool = False
    checkpoint_interval: int = 0
    checkpoint_hist: int = 2
    log_interval: int = 50
    quiet: bool = False
    track: bool = True
    advice: str = "Lower --lr, clip gradients (--clip-grad 1) or warm up (--warmup-epochs)."
    memory_hint: str = "give --find-batch-size, or a smaller --batch-size beside the --global-batch-size."
