"""The only evaluation loop."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from mgd_timm.criteria.base import at_least_float32
from mgd_timm.data.rng import normal
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
    """Top-1, top-5 (both in %) and cross-entropy of named logits, each image counted once on any number of processes.

    Args:
        predict: Gives logits [batch, classes] for each of `names`; models are the caller's to put into eval mode.
        names: Names of the logits.
        source: Images, and their labels.
        accelerator: Device and processes.
        batch_size: Images per process and step.
        bar: Show a progress bar, on the main process and a terminal.

    Raises:
        ValueError: No images.
    """
    if not len(source.ids):
        raise ValueError("there is no image to evaluate on.")
    mine = source.ids[accelerator.process_index :: accelerator.num_processes]
    precise = torch.float32 if accelerator.device.type == "mps" else torch.float64
    sums = torch.zeros(len(names), 3, dtype=precise, device=accelerator.device)
    classes = 0
    slots = mine.split(batch_size) if len(mine) else ()
    batches = source.batches(slots, 0, accelerator.device)
    hidden = None if bar and accelerator.is_main_process else True  # None: hidden where there is no terminal
    with (
        print_stacks_before_timeout(accelerator) as start_step,
        tqdm(total=len(mine), desc="evaluate", unit="img", leave=False, disable=hidden) as shown_bar,
    ):
        for _ in slots:
            start_step()
            batch = next(batches)
            with accelerator.autocast():
                shown = predict(batch)
            target = batch.labels.argmax(1) if batch.labels.is_floating_point() else batch.labels
            for row, name in enumerate(names):
                logits = at_least_float32(shown[name])
                classes = logits.shape[1]
                ranked = logits.topk(min(5, classes)).indices == target[:, None]
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


def evaluate_model(
    model: nn.Module, source: Source, accelerator: Accelerator, batch_size: int, *, bar: bool = False
) -> Metrics:
    """Metrics of a plain model, which is left in eval mode on the accelerator's device."""
    model.to(accelerator.device).eval()

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        return {"model": model(batch.images)}

    return evaluate(predict, ("model",), source, accelerator, batch_size, bar=bar)["model"]


def check_noise(noise: float | Sequence[float], seeds: int) -> tuple[float, ...]:
    """The standard deviations, each once.

    Raises:
        ValueError: One that is not from 0 to 1, or no seed.
    """
    sigmas = (noise,) if isinstance(noise, int | float) else tuple(noise)
    for sigma in sigmas:
        if not isinstance(sigma, int | float) or not 0 <= sigma <= 1:
            raise ValueError(
                f"noise={sigma!r}: expected standard deviations from 0 to 1, of pixels in [0, 1] (of 0 to 255: divide "
                "by 255)."
            )
    if not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"noise_seeds={seeds!r}: expected a whole number, 1 or more.")
    return tuple(dict.fromkeys(float(sigma) for sigma in sigmas))


# Draws in one go: more take gigabytes, as every number is several 64-bit integers on its way.
_DRAWS = 1 << 22


def pixel_noise(images: Float[Tensor, "b c h w"], sample_ids: Int[Tensor, " b"], seed: int) -> Float[Tensor, "b c h w"]:
    """Standard normal noise in the shape of images: of each pixel by (seed, sample id, place in the image) alone."""
    draws = math.prod(images.shape[1:])
    parts = [normal(ids, seed, draws).to(images.dtype) for ids in sample_ids.split(max(1, _DRAWS // draws))]
    return torch.cat(parts).reshape(images.shape)


def evaluate_noise(
    model: nn.Module,
    source: Source,
    accelerator: Accelerator,
    batch_size: int,
    *,
    std: Sequence[float],
    noise: float | Sequence[float],
    seeds: int = 5,
    bar: bool = False,
) -> tuple[Metrics, dict[str, Metrics]]:
    """Metrics of a plain model on images as they are, and with additive Gaussian noise; the model is left in eval mode.

    x' = x + sigma * n / std, with n standard normal: noise of standard deviation sigma on pixels in [0, 1], added
    before they are normalised. Pixels are not clipped to [0, 1] afterwards, so the noise is Gaussian in dark and bright
    places too.

    n is a function of (noise seed, sample id, place in the image as the model sees it) alone: the same for every sigma
    and every model, in any batch, on any number of processes and on any device. All is found in one pass over the
    images.

    Args:
        model: Takes normalised images, gives logits.
        source: Images without augmentation, and their labels.
        accelerator: Device and processes.
        batch_size: Images per process and step.
        std: Per channel, what the source divided pixels in [0, 1] by.
        noise: Standard deviations sigma from 0 to 1, of pixels in [0, 1].
        seeds: Number of noise seeds, which are 0, 1, ...
        bar: Show a progress bar, on the main process and a terminal.

    Returns:
        Metrics without noise; and by sigma the means over the noise seeds, with "top1_std", the sample standard
        deviation of top-1 between them (0 of a single seed), and "seeds".

    Raises:
        ValueError: No images, no seed, or a sigma that is not from 0 to 1.
    """
    sigmas = check_noise(noise, seeds)
    model.to(accelerator.device).eval()
    scale = 1 / torch.tensor(std, device=accelerator.device)[:, None, None]
    cells = {(sigma, seed): f"{sigma} {seed}" for sigma in sigmas for seed in range(seeds)}

    def predict(batch: Batch) -> dict[str, Tensor]:
        shown = {"clean": model(batch.images)}
        for seed in range(seeds if sigmas else 0):
            drawn = pixel_noise(batch.images, batch.sample_ids, seed) * scale
            shown |= {cells[sigma, seed]: model(batch.images + sigma * drawn) for sigma in sigmas}
        return shown

    found = evaluate(predict, ("clean", *cells.values()), source, accelerator, batch_size, bar=bar)
    noisy: dict[str, Metrics] = {}
    for sigma in sigmas:
        rows = [found[cells[sigma, seed]] for seed in range(seeds)]
        means = {name: fmean(row[name] for row in rows) for name in ("top1", "top5", "loss")}
        spread = stdev(row["top1"] for row in rows) if seeds > 1 else 0.0
        noisy[f"{sigma:.15g}"] = {"top1": means.pop("top1"), "top1_std": spread, **means, "seeds": seeds}
    return found["clean"], noisy
