"""What keeping freed memory saves on a CPU: a training step's processor time and peak memory, with and without it.

    python benchmarks/allocator.py

Teacher and student forward, student backward, batch 64 at 128 px, each way in a process of its own, in turn. Writes
benchmarks/results/allocator.json.
"""

import argparse
import json
import os
import statistics
from typing import Any

from report import RESULTS, about, last_line, peak_resident, provenance, write_json

FILE = RESULTS / "allocator.json"
TEACHER, STUDENT, SIDE, BATCH = "tf_efficientnet_lite2", "mobilenetv4_conv_small_050", 128, 64


def measure(keep: bool, steps: int) -> dict[str, float]:
    """Processor seconds of a step, the system's part of it, and the process's peak in MiB; after two steps of
    warm-up."""
    import timm
    import torch

    from mgd_timm.distributed.allocator import keep_freed_memory

    torch.set_num_threads(1)
    if keep and not keep_freed_memory():
        raise SystemExit("this C library cannot be told to keep freed memory: measure on Linux with glibc.")
    teacher, student = timm.create_model(TEACHER).eval(), timm.create_model(STUDENT, num_classes=10)
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    before = os.times()
    for step in range(steps + 2):
        if step == 2:
            before = os.times()
        with torch.no_grad():
            teacher(images)
        student(images).sum().backward()
    after = os.times()
    user, system = (after.user - before.user) / steps, (after.system - before.system) / steps
    return {"seconds": user + system, "system": system, "peak_mib": peak_resident() / 2**20}


def section() -> str:
    """The text of docs/results.md."""
    row = json.loads(FILE.read_text())
    given, kept = row["given back"], row["kept"]
    return (
        f"On a CPU with glibc a run keeps the memory that its tensors free. With this, a step of {row['what']}, takes "
        f"{kept['seconds']:.2f} s of processor time; without it {given['seconds']:.2f} s, {given['system']:.2f} s of "
        f"them in the kernel (ratio {row['ratio_seconds']:.2f}). Peak memory is {kept['peak_mib']:,.0f} MiB with it "
        f"and {given['peak_mib']:,.0f} MiB without (ratio {row['ratio_peak_mib']:.2f}); medians of n={row['n']} turns. "
        f"`benchmarks/allocator.py`; {about(row)}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--measure", choices=["kept", "given back"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure == "kept", args.steps)))
        return
    rows: dict[str, list[dict[str, float]]] = {"given back": [], "kept": []}
    for _ in range(args.rounds):
        for name, found in rows.items():
            found.append(json.loads(last_line(__file__, "--measure", name, "--steps", str(args.steps))))
    body: dict[str, Any] = {
        name: {key: round(statistics.median(row[key] for row in found), 3) for key in found[0]}
        for name, found in rows.items()
    }
    for key in ("seconds", "peak_mib"):
        pairs = zip(rows["kept"], rows["given back"], strict=True)
        body[f"ratio_{key}"] = round(statistics.median(one[key] / other[key] for one, other in pairs), 3)
    body |= {"what": f"{TEACHER} -> {STUDENT}, {SIDE} px, batch {BATCH}", "n": args.rounds, "steps": args.steps}
    write_json(FILE, body | provenance())
    print(section())


if __name__ == "__main__":
    main()
