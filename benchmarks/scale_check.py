"""What benchmarks/scale.py predicts, beside what real steps take on this machine: processor time. Memory is in
scale_memory.py.

The rates come from four pairs, a cycle of four networks of which each is once a teacher and once a student: every
operation of their real steps is timed, and per kind of operation a per-FLOP, a per-byte and a per-call time are fitted.
Other pairs are then predicted. One thread, and its processor time, as other programs may use the machine; each
predicted step takes its turns with a step of the cycle, and the prediction is scaled by how much slower or faster that
one is now than when the rates were taken.
"""

import io
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image
from report import markdown
from scale_counts import Case, Counts, Op, Recorder, Step, count
from scale_memory import CHECKED, errors, real
from timm.data import create_transform
from torch import Tensor
from tqdm import tqdm

CYCLE = ("vit_tiny_patch16_224", "resnet18", "mobilenetv2_100", "regnety_004")
Rates = dict[str, tuple[float, float, float]]


def cycle(amp: bool) -> list[Case]:
    """The pairs that the rates come from."""
    return [Case(one, other, 128, 8, amp) for one, other in zip(CYCLE, (*CYCLE[1:], CYCLE[0]), strict=True)]


class Timed(Recorder):
    """As Recorder, on real tensors, with each operation's processor seconds in `seconds`."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        start = time.process_time()
        out = func(*args, **kwargs)
        taken = time.process_time() - start
        if self.note(func, args, kwargs, out):
            self.seconds.append(taken)
        return out


def key(op: Op, amp: bool) -> str:
    """What shares one set of rates."""
    return f"{op.kind}{' backward' if op.phase == 'backward' else ''} {'bf16' if amp else 'fp32'}"


def time_ops(case: Case, rounds: int) -> list[tuple[Op, float]]:
    """The operations of real steps, each with the median of its processor seconds."""
    step, timed = real(case), Timed()
    step.run()
    with timed:
        for _ in range(rounds):
            step.run(timed.enter)
    each = len(timed.ops) // rounds
    seconds = torch.tensor(timed.seconds, dtype=torch.float64).view(rounds, each).median(0).values
    return list(zip(timed.ops[:each], seconds.tolist(), strict=True))


def fitted(work: Tensor, seconds: Tensor) -> tuple[float, float, float]:
    """Rates r >= 0 with work @ r near the seconds: least squares in which an operation's variance is as its time.

    Args:
        work: [n, 3] FLOPs, bytes and calls.
        seconds: [n], positive.
    """
    unit = work.amax(0).clamp_min(1)
    weight = seconds.clamp_min(1e-6).rsqrt()
    left, right = (work / unit) * weight[:, None], seconds * weight
    best, found = float("inf"), [0.0] * 3
    used = [column for column in range(3) if work[:, column].any()]
    for size in range(1, len(used) + 1):  # non-negative by trying every choice of columns
        for columns in map(list, combinations(used, size)):
            solution = torch.linalg.lstsq(left[:, columns], right[:, None], driver="gelsd").solution.flatten()
            error = float((left[:, columns] @ solution - right).square().sum())
            if bool((solution >= 0).all()) and error < best:
                best, found = error, [0.0] * 3
                for column, value in zip(columns, (solution / unit[columns]).tolist(), strict=True):
                    found[column] = value
    return found[0], found[1], found[2]


def rates_of(timed: Iterable[tuple[Op, float]], amp: bool) -> Rates:
    """Seconds per FLOP, byte and call, by kind of operation; those of all that takes no FLOPs as "other"."""
    groups: dict[str, list[tuple[Op, float]]] = defaultdict(list)
    for op, seconds in timed:
        groups[key(op, amp)].append((op, seconds))
        if not op.flops:
            groups[f"other {'bf16' if amp else 'fp32'}"].append((op, seconds))
    rates = {}
    for name, members in groups.items():
        work = torch.tensor([[op.flops, op.bytes, 1] for op, _ in members], dtype=torch.float64)
        rates[name] = fitted(work, torch.tensor([seconds for _, seconds in members], dtype=torch.float64))
    return rates


def predicted_seconds(ops: Iterable[Op], amp: bool, rates: Rates) -> float:
    """Processor seconds of operations; a kind that was not timed is taken as the nearest that was."""
    total = 0.0
    for op in ops:
        known = rates.get(key(op, amp)) or rates.get(key(op._replace(phase="forward"), amp))
        per_flop, per_byte, per_call = known or rates[f"{'conv' if op.flops else 'other'} {'bf16' if amp else 'fp32'}"]
        total += per_flop * op.flops + per_byte * op.bytes + per_call
    return total


def turns(step: Step, reference: Step, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Processor seconds of both, each round first one and then the other; and the first one's wall-clock seconds."""
    found: tuple[list[float], list[float], list[float]] = ([], [], [])
    for run in (step, reference):
        run.run()
    for number in range(rounds):
        for index in (0, 1) if number % 2 else (1, 0):
            start, wall = time.process_time(), time.perf_counter()
            (step, reference)[index].run()
            found[index].append(time.process_time() - start)
            if index == 0:
                found[2].append(time.perf_counter() - wall)
    return found


def loader_rate(seconds: float = 4.0) -> dict[str, Any]:
    """Images per second that one core decodes and augments: a JPEG of 500 x 375 px to 224 px with timm's training
    transform."""
    generator = np.random.default_rng(0)
    coarse = Image.fromarray(generator.integers(0, 256, (47, 63, 3), dtype=np.uint8)).resize(
        (500, 375), Image.Resampling.BICUBIC
    )
    grain = generator.normal(0, 10, (375, 500, 3))
    picture = Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))
    kept = io.BytesIO()
    picture.save(kept, "JPEG", quality=90)
    found: dict[str, Any] = {"jpeg_bytes": kept.tell()}
    for name, policy in (("plain", None), ("randaugment", "rand-m9-mstd0.5")):
        transform: Any = create_transform(224, is_training=True, auto_augment=policy, color_jitter=0.0)
        start, done = time.process_time(), 0
        while time.process_time() - start < seconds:
            transform(Image.open(io.BytesIO(kept.getvalue())).convert("RGB"))
            done += 1
        found[name] = done / (time.process_time() - start)
    return found


def measure_row(case: Case, counts: Counts, rates: Rates, reference: Step, usual: float, rounds: int) -> dict[str, Any]:
    """A prediction beside what was measured."""
    own, other, wall = turns(real(case), reference, rounds)
    pace = [now / usual for now in other]
    ratios = [
        predicted_seconds(counts.ops, case.amp, rates) * speed / taken for speed, taken in zip(pace, own, strict=True)
    ]
    return {
        **case.words,
        "seconds": {
            "predicted": predicted_seconds(counts.ops, case.amp, rates),
            "pace": statistics.median(pace),
            "measured": statistics.median(own),
            "wall": statistics.median(wall),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        },
    }


def check(rounds: int, checked: Sequence[tuple[str, str, int, int]] = CHECKED) -> dict[str, Any]:
    """Take the rates, predict, measure: rows, rates, and the errors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rates: Rates = {}
    rows = []
    with tqdm(total=2 * (len(CYCLE) + len(checked)), desc="check", unit="pair") as bar:
        for amp in (False, True):
            timed = []
            for case in cycle(amp):
                timed += time_ops(case, rounds)
                bar.update()
            rates |= rates_of(timed, amp)
            reference = real(cycle(amp)[0])
            usual = statistics.median(turns(reference, reference, rounds)[0])
            for names in checked:
                case = Case(*names, amp)
                rows.append(measure_row(case, count(case), rates, reference, usual, rounds))
                bar.update()
    torch.set_num_threads(threads)
    return {
        "rows": rows,
        "rates": rates,
        "loader": loader_rate(),
        "rounds": rounds,
        "cycle": [case.words for case in cycle(False)],
    }


def summary(found: dict[str, Any]) -> str:
    """The rows and the errors, as a table."""
    cells = []
    for row in found["rows"]:
        seconds = row["seconds"]
        low, _, high = statistics.quantiles(seconds["ratios"], n=4)
        cells.append(
            [
                row["pair"],
                f"{row['img_size']} px, {row['batch_size']}, {row['precision']}",
                f"{seconds['predicted'] * seconds['pace']:.2f}",
                f"{seconds['measured']:.2f}",
                f"{seconds['ratio']:.2f} ({low:.2f} to {high:.2f})",
            ]
        )
    header = ["pair", "size, batch", "predicted s", "measured s", "ratio (quartiles)"]
    off = errors(found["rows"], "seconds")
    return (
        f"{markdown(header, cells)}\n\nTime is off by {off['median']:.0%} in the median and "
        f"{off['worst']:.0%} at worst."
    )
