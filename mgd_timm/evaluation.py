"""The only evaluation loop."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mgd_timm.criteria.base import at_least_float32
from mgd_timm.data import Source
from mgd_timm.features import Batch

Metrics = dict[str, float]


@torch.no_grad()
def evaluate(
    predict: Callable[[Batch], dict[str, Tensor]], names: tuple[str, ...], source: Source, accelerator: Accelerator, batch_size: int
) -> dict[str, Metrics]:
    """Top-1, top-5 (both in %) and cross-entropy of named logits, each image counted once on any number of processes.

    Args:
        predict: Gives logits [batch, classes] for each of `names`; models are the caller's to put into eval mode.
        names: Names of the logits.
        source: Images, and their labels.
        accelerator: Device and processes.
        batch_size: Images per process and step.

    Raises:
        ValueError: No images.
    """
    if not len(source.ids):
        raise ValueError("there is no image to evaluate on.")
    mine = source.ids[accelerator.process_index :: accelerator.num_processes]
    sums = torch.zeros(len(names), 3, dtype=torch.float64)
    classes = 0
    for batch in source.batches(list(mine.split(batch_size)) if len(mine) else [], 0, accelerator.device):
        with accelerator.autocast():
            shown = predict(batch)
        target = batch.labels.argmax(1) if batch.labels.is_floating_point() else batch.labels
        for row, name in enumerate(names):
            logits = at_least_float32(shown[name])
            classes = logits.shape[1]
            ranked = logits.topk(min(5, classes)).indices == target[:, None]
            loss = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
            found = torch.stack([ranked[:, 0].sum(), ranked.sum(), loss])
            sums[row] += found.double().cpu()
    share = (accelerator.reduce(sums.to(accelerator.device), "sum").cpu() / len(source.ids)).tolist()
    return {
        name: {"top1": 100 * top1, "top5": 100 * top5, "loss": loss, "n": float(len(source.ids))}
        for name, (top1, top5, loss) in zip(names, share, strict=True)
    }


def evaluate_taps(taps: dict[str, nn.Module], source: Source, accelerator: Accelerator, batch_size: int) -> dict[str, Metrics]:
    """Metrics of the logits of taps or teachers, in eval mode; their modes are as before afterwards."""
    modes = {name: tap.training for name, tap in taps.items()}
    for tap in taps.values():
        tap.eval()
    found = evaluate(
        lambda batch: {name: tap(batch.images).logits for name, tap in taps.items()},
        tuple(taps),
        source,
        accelerator,
        batch_size,
    )
    for name, tap in taps.items():
        tap.train(modes[name])
    return found


def evaluate_model(model: nn.Module, source: Source, accelerator: Accelerator, batch_size: int) -> Metrics:
    """Metrics of a plain model, which is left in eval mode on the accelerator's device."""
    model.to(accelerator.device).eval()

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        return {"model": model(batch.images)}

    return evaluate(predict, ("model",), source, accelerator, batch_size)["model"]
