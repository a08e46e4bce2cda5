"""The only evaluation loop."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from mgd_timm.criteria.base import at_least_float32, target_classes
from mgd_timm.data.sources import Source
from mgd_timm.distributed.hangs import print_stacks_before_timeout
from mgd_timm.features import Batch

Metrics = dict[str, float]


@torch.no_grad()
def evaluate(
    predict: Callable[[Batch], dict[str, Tensor]],
    names: tuple[str, ...],
    source: Source,
    accelerator: Accelerator,
    batch_size: int,
    *,
    bar: bool = False,
) -> dict[str, Metrics]:
    """Return metrics of named logits: "top1" and "top5" in %, "loss" (mean cross-entropy) and "n" (images).

    Each image is counted once, on any number of processes.

    Args:
        predict: Returns logits [batch, classes] for each of `names`; models are the caller's to put into eval mode.
        names: Names of the logits.
        source: Images, and their labels.
        accelerator: Device and processes.
        batch_size: Images per process and step.
        bar: Show a progress bar, on the main process and a terminal.

    Raises:
        ValueError: There are no images.
    """
    if not len(source.ids):
        raise ValueError("there are no images to evaluate on: expected at least one in the evaluation split.")
    mine = source.ids[accelerator.process_index :: accelerator.num_processes]
    precise = torch.float32 if accelerator.device.type == "mps" else torch.float64
    sums = torch.zeros(len(names), 3, dtype=precise, device=accelerator.device)
    micro_batches = mine.split(batch_size) if len(mine) else ()
    batches = source.batches(micro_batches, 0, accelerator.device)
    hidden = None if bar and accelerator.is_main_process else True  # None: hidden where there is no terminal
    with (
        print_stacks_before_timeout(accelerator) as start_step,
        tqdm(total=len(mine), desc="evaluate", unit="img", leave=False, disable=hidden) as shown_bar,
    ):
        for _ in micro_batches:
            start_step()
            batch = next(batches)
            with accelerator.autocast():
                outputs = predict(batch)
            target = target_classes(batch.labels)
            for row, name in enumerate(names):
                logits = at_least_float32(outputs[name])
                ranked = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
                loss = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
                found = torch.stack([ranked[:, 0].sum(), ranked.sum(), loss])
                sums[row] += found.to(precise)  # on the device: nothing waits for it
            shown_bar.update(len(batch.labels))
        share = (accelerator.reduce(sums, "sum").cpu() / len(source.ids)).tolist()
    return {
        name: {"top1": 100 * top1, "top5": 100 * top5, "loss": loss, "n": float(len(source.ids))}
        for name, (top1, top5, loss) in zip(names, share, strict=True)
    }


def evaluate_taps(
    taps: dict[str, nn.Module], source: Source, accelerator: Accelerator, batch_size: int
) -> dict[str, Metrics]:
    """Return metrics of the logits of taps or teachers in eval mode; they are then put back into their modes."""
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


def evaluate_model(
    model: nn.Module, source: Source, accelerator: Accelerator, batch_size: int, *, bar: bool = False
) -> Metrics:
    """Return metrics of a plain model, which is left in eval mode on the accelerator's device."""
    model.to(accelerator.device).eval()

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        return {"model": model(batch.images)}

    return evaluate(predict, ("model",), source, accelerator, batch_size, bar=bar)["model"]
