"""Evaluation under Gaussian noise."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from mgd_timm.data.rng import normal
from mgd_timm.data.sources import Source
from mgd_timm.features import Batch
from mgd_timm.training.evaluation import Metrics, evaluate


def check_noise(noise: float | Sequence[float], seeds: int) -> tuple[float, ...]:
    """Return the standard deviations, each once.

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


# Draws at a time: more take gigabytes, as every number passes through several 64-bit integers.
_DRAWS = 1 << 22


def pixel_noise(images: Float[Tensor, "b c h w"], sample_ids: Int[Tensor, " b"], seed: int) -> Float[Tensor, "b c h w"]:
    """Return standard normal noise in the shape of images: of each pixel by (seed, sample id, position) alone."""
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
    """Return metrics of a plain model on clean images, and with additive Gaussian noise; it is left in eval mode.

    x' = x + sigma * n / std, with n standard normal: noise of standard deviation sigma on pixels in [0, 1], added
    before they are normalised. Pixels are not clipped to [0, 1] afterwards, so the noise is Gaussian in dark and bright
    places too.

    n is a function of (noise seed, sample id, position in the image as the model sees it) alone: the same for every
    sigma and every model, in any batch, on any number of processes and on any device. One pass over the images finds
    all.

    Args:
        model: Takes normalised images, returns logits.
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
        outputs = {"clean": model(batch.images)}
        for seed in range(seeds if sigmas else 0):
            drawn = pixel_noise(batch.images, batch.sample_ids, seed) * scale
            outputs |= {cells[sigma, seed]: model(batch.images + sigma * drawn) for sigma in sigmas}
        return outputs

    found = evaluate(predict, ("clean", *cells.values()), source, accelerator, batch_size, bar=bar)
    noisy: dict[str, Metrics] = {}
    for sigma in sigmas:
        rows = [found[cells[sigma, seed]] for seed in range(seeds)]
        means = {name: fmean(row[name] for row in rows) for name in ("top1", "top5", "loss")}
        spread = stdev(row["top1"] for row in rows) if seeds > 1 else 0.0
        noisy[f"{sigma:.15g}"] = {"top1": means.pop("top1"), "top1_std": spread, **means, "seeds": seeds}
    return found["clean"], noisy
