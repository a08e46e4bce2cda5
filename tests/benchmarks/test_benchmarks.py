"""The grid of benchmarks/cifar.py: a student in a pass with others ends as it does alone, and what is done is not done
again.

Also what benchmarks/scale.py counts, beside what real tensors hold.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cifar as grid
import criteria as steps
import hosts as each
import scale
import scale_check
import scale_counts as counts
import scale_docs
import scale_memory
import timm
from report import macs
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mgd_timm.models.build import build_model
from mgd_timm.pipeline.run import run
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.storage import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture
def arguments(small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    shown = {
        "data_dir": str(small_data),
        "epochs": 2,
        "lr": 0.1,
        "batch_size": 32,
        "pad": 2,
        "mean": (0.3,) * 3,
        "std": (0.3,) * 3,
    }
    heads = {"heads_epochs": 2, "heads_augmentations": 2}

    def small(args, student, options, seed, classes):  # type: ignore[no-untyped-def]
        return make_recipe(student=student, seed=seed, **shown, **heads, **options)

    monkeypatch.setattr(grid, "recipe_of", small)
    return ["--quick", "--hosts", "kd", "at", "--seeds", "3", "--output", str(tmp_path)]


def test_a_student_in_a_pass_ends_as_it_does_alone(arguments: list[str], tmp_path: Path) -> None:
    grid.main(arguments)
    (folder,) = tmp_path.glob("pass-*")
    state = checkpoint.load_newest(folder / "checkpoints", print)
    assert state is not None
    args = grid.parse(arguments)
    for arm in ("alone", "MAS+KD", "MAG+AT"):
        recipe = grid.recipe_of(args, "cifar_resnet8x05", grid.arms(args.hosts)[arm], 3, 10)
        place = tmp_path / arm
        run(make_recipe(**{**grid.flat(recipe), "output": str(place)}), quiet=True)
        alone = load_file(place / "export" / "model.safetensors")
        for name, tensor in alone.items():
            torch.testing.assert_close(
                state.tensors["trainee"][f"distillers.{arm}.student.model.{name}"], tensor, rtol=0, atol=0
            )
    rows = grid.known_rows(tmp_path / "quick.jsonl")
    assert [row["arm"] for row in rows] == list(grid.arms(["kd", "at"]))
    assert all(row["versions"]["torch"] == torch.__version__.partition("+")[0] and row["noise"] for row in rows)
    summary = json.loads((tmp_path / "MAS+KD" / "summary.json").read_text())
    assert next(row for row in rows if row["arm"] == "MAS+KD")["last"] == round(summary["top1"], 2)


def test_finished_cells_are_not_done_again(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid.main([*arguments, "--arms", "alone", "KD"])
    before = (tmp_path / "quick.jsonl").read_bytes()
    grid.main([*arguments, "--arms", "alone", "KD"])
    assert (tmp_path / "quick.jsonl").read_bytes() == before
    capsys.readouterr()
    grid.main([*arguments, "--arms", "alone", "KD", "AT"])
    assert "seed 3: AT\n" in capsys.readouterr().out
    assert len(grid.known_rows(tmp_path / "quick.jsonl")) == 3


def test_the_table_pairs_seeds_and_keeps_effects_apart() -> None:
    base = {
        "pair": "vgg13-vgg8",
        "teacher": "cifar_vgg13",
        "student": "cifar_vgg8",
        "epochs": 240,
        "teacher_top1": 74.0,
    }
    base |= {"teacher_sha256": "t", "data_sha256": "d", "precision": "bf16"}
    values = {
        "alone": (70, 71),
        "KD": (72, 74),
        "MAS+KD": (73, 74.5),
        "AT": (71, 71),
        "AT+KD": (73, 75),
        "MAG+AT": (74, 75),
    }
    rows = [
        {**base, "arm": arm, "seed": seed, "last": float(last), "best": float(last)}
        for arm, scores in values.items()
        for seed, last in enumerate(scores)
    ]
    split = [[cell.strip() for cell in line.split("|")[1:-1]] for line in grid.table(rows).splitlines() if "|" in line]
    lines = {name: cells for name, *cells in split}
    assert lines["MAS+KD"] == ["73.75 ± 1.06", "73.75 ± 1.06", "+3.25 ± 0.35", "+0.75 ± 0.35", "2", "74.18", ""]
    assert lines["MAG+AT"][3] == "+0.50 ± 0.71"  # over AT+KD, not over AT
    assert lines["AT"][2:4] == ["+0.50 ± 0.71", ""]
    assert lines["KD"][-2:] == ["73.18", "72.98"]


def test_the_table_and_picture_of_step_times(tmp_path: Path) -> None:
    row = {"pair": "cnn", "criterion": "at", "peak_bytes": 3 * 2**20, "kd_peak_bytes": 2**20, "ratio": {"median": 1.5}}
    row["ratio"] = {"median": 1.5, "quartiles": [1.4, 1.6], "n": 5, "steps": 2}  # type: ignore[dict-item]
    rows = [row, {**row, "criterion": "rkd"}, {"pair": "vit", "criterion": "at", "refused": "AT pairs maps"}]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in steps.table(rows).splitlines()[2:]]
    assert lines == [
        ["at", "1.25", "1.50 (1.40 to 1.60)", "+2", "refused", ""],
        ["rkd", "-", "1.50 (1.40 to 1.60)", "+2", "", ""],
    ]
    steps.draw(rows, tmp_path / "times.png")
    assert (tmp_path / "times.png").stat().st_size > 5000


def test_the_table_of_hosts_pairs_seeds() -> None:
    found = {
        ("at", "X"): (80, 81),
        ("at", "X+KD"): (82, 84),
        ("at", "MAS+X"): (83, 83),
        ("dml", "X"): (80,),
        ("dml", "MAG+X"): (81,),
    }
    rows = [
        {"host": h, "arm": a, "seed": s, "top1": float(v)}
        for (h, a), values in found.items()
        for s, v in enumerate(values)
    ]
    lines = {
        cells[0]: cells[1:]
        for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in each.table(rows).splitlines())
    }
    assert lines["at"] == ["80.50 ± 0.71", "83.00 ± 1.41", "83.00 ± 0.00", "+0.00 ± 1.41"]
    assert lines["dml"] == ["80.00", "", "81.00", "+1.00"]


CASE = counts.Case("cifar_resnet8", "cifar_mobilenetv2", 32, 4, classes=10)


@pytest.fixture(scope="module")
def counted() -> counts.Counts:
    return counts.count(CASE)


def test_the_macs_of_a_step_are_those_of_its_networks(counted: counts.Counts) -> None:
    teacher, student = (build_model(name, (3, 32, 32), 10) for name in (CASE.teacher, CASE.student))
    first = next(module for module in student.modules() if isinstance(module, torch.nn.Conv2d))
    widths = {"teacher": (64, 10), "student": (student.head_hidden_size, None)}
    heads = {
        name: sum(d * d + d * c + (c * d + d * k if k else 0) for c in (64, 256)) for name, (d, k) in widths.items()
    }
    assert counted.macs("teacher") == 4 * macs(teacher, (3, 32, 32))
    assert counted.macs("heads") == 4 * heads["teacher"]
    forward = 4 * (macs(student, (3, 32, 32)) + heads["student"])
    assert counted.macs("forward") == forward
    # Both gradients of every layer, also of the depthwise ones, but for the images' own.
    positions = 32 * 32 // (first.stride[0] * first.stride[1])
    assert counted.macs("backward") == 2 * forward - 4 * positions * first.weight.numel()


def test_the_bytes_of_a_step_are_those_of_real_tensors(counted: counts.Counts) -> None:
    step = counts.Step(CASE)
    step.place()
    there = {t.untyped_storage().data_ptr() for t in (*step.trainee.parameters(), *step.trainee.buffers(), *step.batch)}
    shown = step.shown()
    there |= {t.untyped_storage().data_ptr() for t in counts.tree_leaves(shown) if isinstance(t, torch.Tensor)}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = step.trainee(step.batch, shown)
    assert counted.saved == sum(size for pointer, size in kept.items() if pointer not in there)
    del held
    step.run()
    momenta = [state["momentum_buffer"] for state in step.optimizer.state.values()]
    assert counted.optimizer == counted.trained == sum(4 * momentum.numel() for momentum in momenta)
    assert counted.saved < counted.peak - counted.state < 2 * counted.saved + counted.trained
    other = counts.count(dataclasses.replace(CASE, amp=True, stored=True))
    assert other.saved < 0.75 * counted.saved
    assert other.macs("teacher") == 0
    assert other.macs("backward") == counted.macs("backward")


class Marked(TorchDispatchMode):
    """Mark the end of each operation in a profile."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        with torch.profiler.record_function("after an operation"):
            pass
        return out


@pytest.mark.parametrize("student", ["cifar_resnet8x4", "test_vit"])
def test_the_predicted_peak_is_what_the_allocator_hands_out(student: str) -> None:
    """Between operations: the workspace that kernels take meanwhile is another one on every processor."""
    case = counts.Case("cifar_resnet14", student, 32, 16, amp=True, classes=10)
    predicted = counts.count(case)
    steps: list[counts.Step] = []

    def build() -> None:
        steps.append(scale_memory.real(case))
        steps[0].run()  # makes the optimizer's state

    def run() -> None:
        with Marked():
            steps[0].run()

    state, _ = scale_memory.allocated(build)
    _, peak = scale_memory.allocated(run, at="after an operation")
    assert predicted.state == state
    assert predicted.peak - state == pytest.approx(peak, rel=1e-3)


def test_what_is_kept_on_a_gpu_is_what_its_autocast_keeps() -> None:
    def kept(device: str, casts: bool) -> int:
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor

        held: list[torch.Tensor] = []
        with torch.device("meta"):
            network = timm.create_model("test_convnext").train()
        # What torch.autocast does, which refuses where there is no driver.
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=False):
            network._apply(lambda tensor: torch.empty(tensor.shape, device=device))
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
            try:
                hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
                with hooks, counts.GpuCasts() if casts else contextlib.nullcontext():
                    loss = network(torch.empty(8, 3, 64, 64, device=device)).softmax(-1).pow(2).sum()
            finally:
                torch.set_autocast_enabled(device, False)
                torch.clear_autocast_cache()
        assert loss.dtype == (torch.float32 if casts or device == "cuda" else torch.bfloat16)
        return sum(found.values())

    plain, cast, gpu = kept("cpu", False), kept("cpu", True), kept("cuda", False)
    assert cast == gpu > 1.02 * plain


def test_what_is_allocated_is_followed() -> None:
    with counts.Recorder() as recorder:
        one = torch.ones(1000)
        two = one.view(10, 100).t() + 1
        assert recorder.now == 8000
        two.mul_(2)
        assert recorder.peak == 8000
        del one
        assert recorder.now == 4000
        assert two.reshape(-1).numel() == 1000
        assert (recorder.now, recorder.peak) == (4000, 8000)
    # A view costs nothing, and the reshape of what is transposed is a copy.
    assert [(op.kind, op.bytes) for op in recorder.ops] == [
        ("ones", 4000),
        ("add", 8000),
        ("mul_", 8000),
        ("clone", 8000),
    ]


def test_rates_are_found_and_never_negative() -> None:
    work = torch.tensor(
        [[float(i**2), float(j), 1.0] for i in range(1, 5) for j in (1e3, 5e3, 4e4)], dtype=torch.float64
    )
    known = torch.tensor([2e-3, 3e-6, 5e-4], dtype=torch.float64)
    assert scale_check.fitted(work, work @ known) == pytest.approx(known.tolist(), rel=1e-6)
    falling = scale_check.fitted(work, 1 / work[:, 0])
    assert min(falling) >= 0
    assert sum(falling) > 0


def test_what_is_said_of_many_gpus(counted: counts.Counts) -> None:
    device = scale.device_of("1e12+1e11")
    plan = scale.Plan(CASE, gpus=4, images=1000, epochs=2)
    seconds = scale.step_seconds(counted, device, plan, 0.5)
    assert seconds["step"] == pytest.approx(sum(seconds[name] for name in (*counts.PHASES, "exchange")))
    assert scale.communication(counted, plan) == 2 * 3 / 4 * counted.trained / scale.LINK["node"]
    assert scale.communication(counted, dataclasses.replace(plan, gpus=1)) == 0
    alone, copied, sharded = (
        scale.memory(counted, dataclasses.replace(plan, gpus=gpus, fsdp=fsdp, ema=True))
        for gpus, fsdp in ((1, False), (4, False), (4, True))
    )
    assert copied["total"] - alone["total"] == pytest.approx(1.1 * counted.trained)
    assert copied["tensors"] - sharded["tensors"] == 0.75 * 2 * counted.trained
    assert sharded["buckets"] == counted.rest + 3 * counted.unit < copied["buckets"]
    found = scale.predict(plan, counted, device, 100.0)
    assert found["store_bytes"] == 10 * 1000 * 2 * (64 + 10)
    assert found["loader_hours"] == pytest.approx(2 * 1000 / (4 * 16 * 100) / 3600)
    assert found["hours"][1] == pytest.approx(
        2 * 1000 / 16 * scale.step_seconds(counted, device, plan, 0.4)["step"] / 3600
    )
    assert "PREDICTED, not measured" in scale.said(found)
    for word in ("h300", "1e12", "0+1e9", "1e12+"):
        with pytest.raises(ValueError, match="expected h200, a100, cpu, or FLOP/s"):
            scale.device_of(word)
    with pytest.raises(ValueError, match="gpus=0: expected 1 or more"):
        scale.Plan(CASE, gpus=0)


def test_the_document_of_scaling_is_current() -> None:
    text = scale_docs.DOCS.read_text()
    assert scale_docs.filled(text) == text, "run: python benchmarks/scale.py --markdown"
