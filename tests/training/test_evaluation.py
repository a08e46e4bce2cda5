"""Evaluation under noise: Gaussian in pixels, and the same for every sigma, batch, process and model."""

import json
import math

import pytest
import timm
import torch
from accelerate import Accelerator
from small import ONE_IMAGE, call, write_pictures
from torch import nn

import mgd_timm
from mgd_timm.cli.main import main
from mgd_timm.data.dataset import load_images
from mgd_timm.models.load import load_model
from mgd_timm.recipe.data import Data
from mgd_timm.training import noise as noise_module
from mgd_timm.training.evaluation import evaluate_model
from mgd_timm.training.noise import check_noise, evaluate_noise, pixel_noise


class Recorder(nn.Module):
    """Keeps the images that it is shown, and gives logits of no use."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, images):
        self.seen.append(images.clone())
        return images.flatten(1)[:, :10]


def shown(small_data, sigmas: tuple[float, ...], seeds: int, batch_size: int = 100) -> torch.Tensor:
    """What a model sees of all images in units of pixels, [1 + seeds x sigmas, n, c, h, w], and first without noise."""
    std = (0.2, 0.3, 0.4)
    images = load_images(Data(data_dir=str(small_data), mean=(0.5, 0.4, 0.3), std=std), 0)
    assert images.test is not None
    model = Recorder()
    evaluate_noise(model, images.test, Accelerator(), batch_size, std=images.std, noise=sigmas, seeds=seeds)
    passes = 1 + len(sigmas) * seeds
    whole = [torch.cat(model.seen[start::passes]) for start in range(passes)]
    return torch.stack(whole) * torch.tensor(std)[:, None, None] + torch.tensor([0.5, 0.4, 0.3])[:, None, None]


def test_noise_is_gaussian_in_pixels_and_not_clipped(small_data):
    clean, *noisy = shown(small_data, (0.05, 0.2), 2)
    assert 0 <= clean.min() + 1e-6 < clean.max() <= 1 + 1e-6
    differences = [part - clean for part in noisy]  # seed 0: 0.05, 0.2; seed 1: 0.05, 0.2
    for sigma, difference in zip((0.05, 0.2, 0.05, 0.2), differences, strict=True):
        n = difference.numel() / 3
        for channel in difference.unbind(1):
            assert abs(channel.mean()) < 4 * sigma / n**0.5
            assert abs(channel.std() / sigma - 1) < 4 / (2 * n) ** 0.5
    black = differences[1][clean < 1e-3]
    assert len(black) > 10_000
    assert abs((black < 0).double().mean() - 0.5) < 0.02
    # The same draws for both sigmas, others for each seed.
    torch.testing.assert_close(differences[1], 4 * differences[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(differences[3], 4 * differences[2], atol=2e-6, rtol=0)
    flat = [differences[1].flatten(), differences[3].flatten()]
    assert torch.corrcoef(torch.stack(flat))[0, 1].abs() < 4 / len(flat[0]) ** 0.5


def test_noise_is_independent_between_images_channels_and_neighbouring_pixels():
    noise = pixel_noise(torch.zeros(60, 3, 32, 32), torch.arange(60), 0)
    pairs = {
        "images": (noise[1:], noise[:-1]),
        "channels": (noise[:, 1:], noise[:, :-1]),
        "rows": (noise[:, :, 1:], noise[:, :, :-1]),
        "columns": (noise[..., 1:], noise[..., :-1]),
    }
    for name, (one, two) in pairs.items():
        together = torch.stack([one.flatten(), two.flatten()])
        assert torch.corrcoef(together)[0, 1].abs() < 4 / one.numel() ** 0.5, name


def test_noise_does_not_depend_on_the_batch(small_data, monkeypatch):
    """To rounding: a vectorized logarithm may differ in the last bit at another place in a tensor."""
    ids = torch.tensor([7, 3, 900, 3])
    images = torch.zeros(4, 3, 5, 7)
    whole = pixel_noise(images, ids, 1)
    for chosen in ([2], [3, 0], [1, 2, 0]):
        torch.testing.assert_close(pixel_noise(images[chosen], ids[chosen], 1), whole[chosen])
    torch.testing.assert_close(whole[1], whole[3])
    monkeypatch.setattr(noise_module, "_DRAWS", 200)  # two images at once, then one
    torch.testing.assert_close(pixel_noise(images, ids, 1), whole)
    monkeypatch.setattr(noise_module, "_DRAWS", 1)
    torch.testing.assert_close(pixel_noise(images, ids, 1), whole)
    torch.testing.assert_close(shown(small_data, (0.1,), 1, 100), shown(small_data, (0.1,), 1, 7))


def test_no_noise_is_clean_and_more_noise_is_worse(small_data):
    model = load_model("embedded")
    found = mgd_timm.evaluate(model, str(small_data), noise=(0, 0.05, 0.1, 0.3), noise_seeds=3)
    noise = found.pop("noise")
    assert list(noise) == ["0", "0.05", "0.1", "0.3"]
    assert found == mgd_timm.evaluate(model, str(small_data))
    clean = {name: found[name] for name in ("top1", "top5", "loss")}
    # To rounding: in float64 the mean of three equal numbers may be the number next to them.
    assert noise["0"] == pytest.approx(clean | {"top1_std": 0.0, "seeds": 3})
    accuracies = [row["top1"] for row in noise.values()]
    assert found["top1"] > 85
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] < 40
    assert noise["0.1"]["top1_std"] > 0
    alone = mgd_timm.evaluate(model, str(small_data), noise=0.1, noise_seeds=1, validation_batch_size=9)["noise"]
    assert alone["0.1"]["top1_std"] == 0.0
    assert abs(alone["0.1"]["top1"] - noise["0.1"]["top1"]) < 10


def test_the_mean_and_spread_are_those_of_single_seeds(small_data):
    """Against noise that is added by hand, image by image, to pixels before they are normalised."""
    model = load_model("embedded").eval()
    images = load_images(Data(data_dir=str(small_data)), 0)
    test, mean, std = images.test, *(torch.tensor(v)[:, None, None] for v in (images.mean, images.std))
    assert test is not None
    right = []
    for seed in range(3):
        hits = 0
        for row in range(100):
            pixels = test.images[row].float() / 255
            pixels = pixels + 0.1 * pixel_noise(pixels[None], torch.tensor([row]), seed)[0]
            with torch.no_grad():
                hits += int(model(((pixels - mean) / std)[None]).argmax() == test.labels[row])
        right.append(float(hits))
    _, noisy = evaluate_noise(model, test, Accelerator(), 64, std=images.std, noise=0.1, seeds=3)
    assert noisy["0.1"]["top1"] == pytest.approx(sum(right) / 3, abs=0.4)  # one image may stand on the border
    assert noisy["0.1"]["top1_std"] == pytest.approx(float(torch.tensor(right).std()), abs=1)


@pytest.mark.slow
def test_the_command_line_on_one_process_and_on_two(small_data, capsys):
    words = ["evaluate", "embedded", "--data-dir", str(small_data), "--noise", "0.05", "0.1", "--noise-seeds", "2"]
    assert main(words) == 0
    one = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    done = call(*words, "--validation-batch-size", "13", processes=2)
    assert done.returncode == 0, done.stderr
    two = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
    assert set(one) == {"top1", "top5", "loss", "n", "data", "noise"}
    assert set(one["noise"]["0.05"]) == {"top1", "top1_std", "top5", "loss", "seeds"}
    assert one["noise"]["0.1"]["seeds"] == 2
    for a, b in ((one, two), *((one["noise"][sigma], two["noise"][sigma]) for sigma in ("0.05", "0.1"))):
        for name in ("n", "data", "seeds"):
            assert a.get(name) == b.get(name)
        for name in ("top1", "top5", "top1_std"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), abs=ONE_IMAGE)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert "evaluate:" not in done.stderr  # a bar is for terminals


def test_large_images_from_files(tmp_path):
    data = write_pictures(tmp_path / "data", count=12, size=112)
    torch.manual_seed(0)
    model = timm.create_model("cifar_resnet8x05", num_classes=3)
    options = {"img_size": 104, "noise": (0, 0.2), "noise_seeds": 2}
    found = mgd_timm.evaluate(model, str(data), workers=0, **options)
    assert found["noise"]["0"]["loss"] == pytest.approx(found["loss"])
    assert found["noise"]["0.2"]["loss"] != found["loss"]
    again = mgd_timm.evaluate(model, str(data), workers=2, validation_batch_size=4, **options)
    assert again["noise"]["0.2"]["loss"] == pytest.approx(found["noise"]["0.2"]["loss"], rel=1e-4)
    assert (
        evaluate_model(model, load_images(Data(data_dir=str(data), img_size=104, workers=0), 0).test, Accelerator(), 6)[
            "n"
        ]
        == 6
    )


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), 12.75])
def test_wrong_noise_is_refused(capsys, wrong):
    with pytest.raises(ValueError, match=r"noise=.*: expected standard deviations from 0 to 1, of pixels in \[0, 1\]"):
        mgd_timm.evaluate("no such model", noise=(0.1, wrong))
    if math.isfinite(wrong):  # others the parser refuses, as for every flag
        assert main(["evaluate", "embedded", "--noise", "0.1", str(wrong)]) == 1
        assert f"noise={wrong}: expected standard deviations from 0 to 1" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [0, -1])
def test_no_noise_seed_is_refused(capsys, wrong):
    with pytest.raises(ValueError, match=f"noise_seeds={wrong}: expected a whole number, 1 or more"):
        mgd_timm.evaluate("no such model", noise=0.1, noise_seeds=wrong)
    assert main(["evaluate", "embedded", "--noise", "0.1", "--noise-seeds", str(wrong)]) == 1
    assert "expected a whole number, 1 or more" in capsys.readouterr().err


def test_a_sigma_that_is_named_twice_counts_once():
    assert check_noise([0.1, 0, 0.1, 1], 1) == (0.1, 0.0, 1.0)
    assert check_noise((), 1) == ()
