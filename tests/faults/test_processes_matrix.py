"""Order, crops and learning rate of every update on 1 to 4 processes with 0 to 4 readers, also resumed on another
number.

Real processes (gloo) and real reader processes, on pictures that timm's transforms crop, flip and colour at random.
"""

import json
from pathlib import Path

import pytest
from small import write_pictures
from traced import launch, recorded

PROCESSES, WORKERS, EPOCHS = (1, 2, 3, 4), (0, 1, 2, 3, 4), 2
# 63 images: two updates of 24 (12 micro-batches of 2 on any number of processes), and one of 15 in 7 micro-batches,
# of which 4 processes want 8.
OPTIONS = {
    "model": "cifar_resnet8x05",
    "img_size": 100,
    "batch_size": 2,
    "global_batch_size": 24,
    "log_interval": 1,
    "epochs": EPOCHS,
}
OPTIONS |= {"aa": "rand-m5", "color_jitter": 0.2, "drop": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("matrix")
    write_pictures(place / "data", count=63, size=104)
    return place


def job(folder: Path, name: str, workers: int, **options) -> dict:
    given = {
        **OPTIONS,
        "data_dir": str(folder / "data"),
        "output": str(folder / f"run {name}"),
        "workers": workers,
        **options,
    }
    return {"record": str(folder / name), "options": given}


@pytest.fixture(scope="module")
def whole(folder):
    """On one process that reads its images itself; then on every other number, and with every number of readers."""
    for processes in PROCESSES:
        launch([job(folder, f"{processes} x {workers}", workers) for workers in WORKERS], processes)
    return recorded(folder / "1 x 0", 1)


def history(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"run {name}" / "metrics.jsonl").read_text().splitlines()]


def test_the_updates_are_what_they_should_be(whole):
    assert [len(seen) for _, seen in whole] == [24, 24, 15] * EPOCHS
    for epoch in range(EPOCHS):
        samples = [sample for _, seen in whole[3 * epoch : 3 * epoch + 3] for sample in seen]
        assert sorted(samples) == list(range(63))
    assert len({rate for rate, _ in whole}) == 3 * EPOCHS
    crops = [set(seen.items()) for _, seen in whole]
    assert not set.union(*crops[:3]) & set.union(*crops[3:])  # every image is shown in another way in the second epoch


@pytest.mark.parametrize("processes", PROCESSES)
@pytest.mark.parametrize("workers", WORKERS)
def test_on_any_number_of_processes_and_readers(folder, whole, processes, workers):
    name = f"{processes} x {workers}"
    assert recorded(folder / name, processes) == whole
    for row, expected in zip(history(folder, name), history(folder, "1 x 0"), strict=True):
        # Micro-batches are the same as well, so losses and BatchNorm are, but for rounding.
        for part in ("train", "eval"):
            assert row[part] == pytest.approx(expected[part], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("counts", [((1, 2), (4, 0), (3, 1)), ((3, 0), (2, 4), (1, 3)), ((2, 1), (1, 0), (4, 2))])
def test_stopped_on_one_number_and_resumed_on_another(folder, whole, counts):
    """Twice: in the midst of the first epoch, and in that of the second."""
    name, found = " then ".join(f"{processes} x {workers}" for processes, workers in counts), []
    for part, (processes, workers) in enumerate(counts):
        one = job(folder, name, workers, resume=part > 0)
        one["stop_after"] = (2, 3, None)[part]
        said = launch([one], processes)
        assert ("its state is saved" in said) == (part < 2)
        found += recorded(folder / name, processes)
    assert found == whole
    for row, expected in zip(history(folder, name), history(folder, "1 x 0"), strict=True):
        for part in ("train", "eval"):
            assert row[part] == pytest.approx(expected[part], rel=1e-3, abs=1e-5)
