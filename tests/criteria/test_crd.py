"""CRD's memory: what is drawn of it, what it becomes, on one process and on two (gloo)."""

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import CLASSES, PAIR
from cases_relational import dot, loop_contrast, loop_linear, unit
from torch import Tensor

from mgd_timm.criteria import CRD
from mgd_timm.features import Batch, Features, Pair, Shapes

SAMPLES = 24
LABELS = torch.tensor([0] * 10 + [1] * 6 + [2] * 5 + [3] * 3)[
    torch.randperm(24, generator=torch.Generator().manual_seed(1))
]
SHAPES = Shapes(CLASSES, 5, ()), Shapes(CLASSES, 7, ())
SMALL = Pair(*SHAPES, num_samples=SAMPLES, labels=LABELS)


def built(seed: int = 0, **hyper) -> CRD:
    torch.manual_seed(seed)
    return CRD(SMALL, **{"dim": 4, **hyper}).double()


def shown(sample_ids: Tensor, shift: float = 0.0) -> tuple[Features, Features, Batch]:
    """What both networks show of these samples: a function of the ids, and of what changes between visits."""
    found = []
    for width, a in ((5, 0.7), (7, 0.9)):
        embedding = torch.sin(a * sample_ids[:, None] * width + torch.arange(width) * 1.3 + shift).double()
        found.append(Features(embedding[:, :1], embedding))
    return found[0], found[1], Batch(torch.zeros(len(sample_ids), 3, 1, 1), LABELS[sample_ids], sample_ids)


def visits(count: int, size: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randperm(SAMPLES, generator=generator)[:size] for _ in range(count)]


def views(criterion: CRD, student: Features, teacher: Features) -> list[list[list[float]]]:
    sides = (criterion.student_embed, student.embedding), (criterion.teacher_embed, teacher.embedding)
    return [[unit(row) for row in loop_linear(*side)] for side in sides]


def test_banks_after_updates_are_those_of_a_loop():
    criterion = built()
    banks = [criterion.student_bank.tolist(), criterion.teacher_bank.tolist()]
    for step, ids in enumerate(visits(7)):
        student, teacher, batch = shown(ids, step)
        criterion(student, teacher, batch)
        for bank, rows in zip(banks, views(criterion, student, teacher), strict=True):
            for n, row in zip(ids.tolist(), rows, strict=True):
                bank[n] = unit([0.5 * old + 0.5 * new for old, new in zip(bank[n], row, strict=True)])
    torch.testing.assert_close(criterion.student_bank, torch.tensor(banks[0], dtype=torch.float64))
    torch.testing.assert_close(criterion.teacher_bank, torch.tensor(banks[1], dtype=torch.float64))


def test_gradient_is_that_before_the_update():
    ids = visits(1)[0]
    grads = []
    for training in (True, False):
        criterion, (student, teacher, batch) = built(), shown(ids)
        torch.manual_seed(2)
        criterion.train(training)(student, teacher, batch).backward()
        grads.append([p.grad for p in criterion.parameters()])
        assert (criterion.partition > 0).all().item() is training  # nothing is remembered in eval mode
    assert all(map(torch.equal, *grads))


def test_z_is_set_once():
    criterion = built()
    assert (criterion.partition == -1).all()
    found = []
    for step, ids in enumerate(visits(3)):
        criterion(*shown(ids, step))
        found.append(criterion.partition.clone())
    assert (found[0] > 0).all()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_negatives_are_of_other_classes_and_drawn_evenly():
    criterion, ids = built(), torch.arange(SAMPLES)
    counts = [Counter() for _ in ids]
    rounds = 300
    for _ in range(rounds):
        drawn = criterion.draw(ids)
        assert torch.equal(drawn[:, 0], ids)
        assert (LABELS[drawn[:, 1:]] != LABELS[:, None]).all()
        for n, row in enumerate(drawn[:, 1:].tolist()):
            counts[n].update(row)
    for n, count in enumerate(counts):
        others = (LABELS[n] != LABELS).nonzero()[:, 0].tolist()
        assert sorted(count) == others  # every one of them
        expected = rounds * criterion.negatives / len(others)
        chi = sum((count[k] - expected) ** 2 / expected for k in others)
        assert chi < len(others) + 5 * math.sqrt(2 * len(others))


def test_relaxed_positives_are_of_the_same_class_and_all_of_them_come_up():
    criterion, ids = built(positives="relax"), torch.arange(SAMPLES)
    drawn = torch.cat([criterion.draw(ids)[:, :1] for _ in range(200)], 1)
    assert (LABELS[drawn] == LABELS[:, None]).all()
    for n in range(SAMPLES):
        assert set(drawn[n].tolist()) == set((LABELS[n] == LABELS).nonzero()[:, 0].tolist())


def test_draws_follow_the_global_generator():
    criterion, ids = built(), torch.arange(SAMPLES)
    torch.manual_seed(4)
    one, two = criterion.draw(ids), criterion.draw(ids)
    torch.manual_seed(4)
    assert torch.equal(criterion.draw(ids), one)
    assert not torch.equal(one, two)


def test_no_more_negatives_than_there_are_and_held_out_samples_are_none():
    assert built().negatives == SAMPLES - 10
    assert built(negatives=3).negatives == 3
    labels = LABELS.clone()
    labels[::2] = -1  # not trained on
    criterion = CRD(SMALL._replace(labels=labels))
    drawn = torch.cat([criterion.draw(torch.arange(1, SAMPLES, 2)) for _ in range(50)], 1)
    assert (drawn % 2 == 1).all()
    assert criterion.num_samples == SAMPLES // 2


def test_a_sample_twice_in_a_batch_is_remembered_as_its_last_place_says():
    ids = torch.tensor([4, 9, 4, 2, 9, 4])
    criterion, (student, teacher, batch) = built(), shown(ids)
    student = student._replace(embedding=student.embedding + torch.arange(6)[:, None])  # other views of it
    before = criterion.student_bank.tolist()
    criterion(student, teacher, batch)
    rows = views(criterion, student, teacher)[0]
    for n, place in ((4, 5), (9, 4), (2, 3)):
        expected = unit([0.5 * old + 0.5 * new for old, new in zip(before[n], rows[place], strict=True)])
        assert criterion.student_bank[n].tolist() == pytest.approx(expected)
    rest = [n for n in range(SAMPLES) if n not in (2, 4, 9)]
    assert torch.equal(criterion.student_bank[rest], torch.tensor(before, dtype=torch.float64)[rest])


@pytest.mark.parametrize("length", [4, 6, 8, 17])
def test_queue_keeps_the_latest_samples(length):
    """Shorter than a batch, as long, and of a length that batches do not divide: the oldest entries go first."""
    criterion = built(queue=length)
    student_side, teacher_side = criterion.student_bank.tolist(), criterion.teacher_bank.tolist()
    entries = [(s, t, -1) for s, t in zip(student_side, teacher_side, strict=True)]
    for step, ids in enumerate(visits(9)):
        student, teacher, batch = shown(ids, step)
        criterion(student, teacher, batch)
        one, two = views(criterion, student, teacher)
        entries += list(zip(one, two, LABELS[ids].tolist(), strict=True))
        kept = entries[-length:]
        head = criterion.head.item()
        found = torch.arange(length).roll(-head)  # the oldest first
        assert criterion.queue_labels[found].tolist() == [label for _, _, label in kept]
        for bank, side in ((criterion.student_bank, 0), (criterion.teacher_bank, 1)):
            torch.testing.assert_close(bank[found], torch.tensor([entry[side] for entry in kept], dtype=torch.float64))
    assert "queues 2 x" in criterion.remark()


def test_queue_compares_with_all_entries_of_other_classes():
    length = 11
    criterion = built(queue=length)
    for step, ids in enumerate(visits(3)):
        criterion(*shown(ids, step))
    ids = visits(4)[3]
    student, teacher, batch = shown(ids, 9)
    one, two = views(criterion, student, teacher)
    stored, z = criterion.queue_labels.tolist(), criterion.partition.tolist()
    expected = 0.0
    banks = criterion.teacher_bank.tolist(), criterion.student_bank.tolist()
    for rows, others, bank, scale in zip((one, two), (two, one), banks, z, strict=True):
        for row, other, label in zip(rows, others, LABELS[ids].tolist(), strict=True):
            near = [other, *(entry for entry, its in zip(bank, stored, strict=True) if its != label)]
            assert len(near) < 1 + length
            scores = [math.exp(dot(row, entry) / 0.07) / scale for entry in near]
            expected += loop_contrast([scores], length) / len(ids)
    assert criterion(student, teacher, batch).item() == pytest.approx(expected)


def test_queue_of_one_class_alone_is_finite():
    same = (LABELS == 0).nonzero()[:, 0]
    criterion = built(queue=4).float()
    for step in range(3):
        student, teacher, batch = shown(same[:5], step)
        both = [f._replace(embedding=f.embedding.float().requires_grad_(True)) for f in (student, teacher)]
        loss = criterion(*both, batch)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in criterion.parameters())


@pytest.mark.parametrize("queue", [None, 8])
def test_a_checkpoint_continues_as_if_nothing_had_been(queue):
    one = built(queue=queue)
    for step, ids in enumerate(visits(3)):
        one(*shown(ids, step))
    two = built(seed=1, queue=queue)
    saved = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    assert set(saved) - set(dict(one.named_parameters())) == {"student_bank", "teacher_bank", "partition"} | (
        {"queue_labels", "head"} if queue else set()
    )
    two.load_state_dict(saved)
    for criterion in (one, two):
        for step, ids in enumerate(visits(6)[3:]):
            torch.manual_seed(step)
            last = criterion(*shown(ids, step))
        criterion.last = last
    assert torch.equal(one.last, two.last)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_the_lowest_temperature_does_not_overflow():
    """Where every entry is the sample's own embedding, or its opposite: the largest scores there are."""
    for sign in (1, -1):
        criterion, (student, teacher, batch) = built(temperature=0.02).float(), shown(visits(1)[0])
        student, teacher = (f._replace(embedding=torch.ones_like(f.embedding).float()) for f in (student, teacher))
        with torch.no_grad():
            for embed, bank in (
                (criterion.student_embed, criterion.teacher_bank),
                (criterion.teacher_embed, criterion.student_bank),
            ):
                own = embed(torch.ones(embed.in_features))
                bank.copy_(sign * torch.nn.functional.normalize(own, dim=0).expand_as(bank))
        loss = criterion(student, teacher, batch)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in criterion.parameters())


def test_every_buffer_is_named_as_synchronised():
    for queue in (None, 4):
        assert {name for name, _ in built(queue=queue).named_buffers()} <= set(CRD.synchronised)


def test_remark_gives_the_size():
    labels = torch.arange(50_000) % 100
    criterion = CRD(Pair(*SHAPES, num_samples=50_000, labels=labels))
    assert criterion.remark() == (
        "memory banks 2 x 50,000 x 128: 51.2 MB, as much again in each step, and 2 x BATCH x 50,000 products"
    )
    assert criterion.negatives == 16384
    assert CRD(Pair(*SHAPES, num_samples=50_000, labels=labels), queue=1000).student_bank.shape == (1000, 128)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CRD(PAIR._replace(num_samples=0)), "num_samples=0 and 16 labels.*'rkd'"),
        (
            lambda: CRD(PAIR._replace(labels=None)),
            r"num_samples=16 and no labels.*Pair\(..., num_samples=len\(labels\)",
        ),
        (lambda: CRD(PAIR._replace(num_samples=17)), "num_samples=17 and 16 labels"),
        (lambda: CRD(PAIR._replace(labels=torch.zeros(16, dtype=torch.int64))), "all samples are of 1 class"),
        (lambda: CRD(PAIR, dim=0), "dim=0: expected 1 or more"),
        (lambda: CRD(PAIR, negatives=0), "negatives=0: expected 1 or more"),
        (lambda: CRD(PAIR, queue=0), "queue=0: expected 1 or more"),
        (lambda: CRD(PAIR, temperature=0.0), "temperature=0.0: expected a positive"),
        (lambda: CRD(PAIR, temperature=0.0199), "temperature=0.0199: expected 0.02 or more, .* overflow float32"),
        (lambda: CRD(PAIR, momentum=1.0), "momentum=1.0: expected 0 or more and below 1"),
        (lambda: CRD(PAIR, momentum=-0.1), "momentum=-0.1"),
        (lambda: CRD(PAIR, positives="relax", queue=8), "positives='relax', queue=8: expected 'exact'"),
    ],
)
def test_what_cannot_work_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


SPLITS = (3, 3), (5, 1), (2, 4), (1, 5), (3, 3)  # of the six samples of each visit, rank by rank


def one_graph(queue: int | None) -> None:
    """No number is fetched from the device: a compiled step has no break. Outside pytest, whose checks of shapes have
    breaks."""
    eager, compiled = built(queue=queue), built(queue=queue)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=False)
    for ids in visits(3):
        for run in (eager, step):
            torch.manual_seed(7)
            run(*shown(ids)).backward()
    for one, two in zip(
        (*eager.buffers(), *eager.parameters()), (*compiled.buffers(), *compiled.parameters()), strict=True
    ):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one.grad, two.grad)


def main(folder: Path) -> None:
    """One of several processes: updates with batches of unequal size, and what is remembered of them."""
    if os.environ["RANK"] == "0":  # one of them is enough
        for queue in (None, 8):
            one_graph(queue)
            (folder / f"one graph {queue}").touch()
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for queue in (None, 8):
        criterion = built(queue=queue)
        losses = []
        for step, (ids, sizes) in enumerate(zip(visits(len(SPLITS)), SPLITS, strict=True)):
            torch.manual_seed(100 * step + rank)  # each process draws for itself
            losses.append(criterion(*shown(ids.split(list(sizes))[rank], step)).detach())
        torch.save((dict(criterion.named_buffers()), torch.stack(losses)), folder / f"{queue}-{rank}.pt")
    compiled, eager = built(), built()  # with breaks, where processes meet
    for run in (torch.compile(compiled, backend="aot_eager", dynamic=False), eager):
        for step, ids in enumerate(visits(2)):
            torch.manual_seed(100 * step + rank)
            run(*shown(ids.chunk(2)[rank], step)).backward()
    for one, two in zip(
        (*compiled.buffers(), *compiled.parameters()), (*eager.buffers(), *eager.parameters()), strict=True
    ):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one.grad, two.grad)
    criterion = built()
    criterion(*shown(torch.tensor([7, 3 + rank]), rank))  # sample 7 on both, in another view
    torch.save(dict(criterion.named_buffers()), folder / f"twice-{rank}.pt")
    for queue in (None, 8):
        criterion = built(queue=queue)
        torch.manual_seed(0)
        criterion(*shown(visits(1)[0]))  # the same on both, as where the second has nothing
        torch.save(dict(criterion.named_buffers()), folder / f"idle-{queue}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
    ]
    helpers = str(Path(__file__).parents[1] / "helpers")
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": helpers}
    words = [sys.executable, *launch, __file__, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, env=one_thread, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("queue", [None, 8])
def test_a_compiled_step_has_no_break(launched, queue):
    assert (launched / f"one graph {queue}").exists()


@pytest.mark.slow
@pytest.mark.parametrize("queue", [None, 8])
def test_two_processes_remember_the_same(launched, queue):
    (one, losses), (two, others) = (torch.load(launched / f"{queue}-{rank}.pt") for rank in (0, 1))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)  # bit for bit
    assert not torch.equal(losses, others)
    alone = built(queue=queue)  # the same samples in batches of one process
    for step, ids in enumerate(visits(len(SPLITS))):
        alone(*shown(ids, step))
    for name, tensor in alone.named_buffers():
        if name != "partition":  # it depends on what was drawn
            torch.testing.assert_close(one[name], tensor)


@pytest.mark.slow
@pytest.mark.parametrize("queue", [None, 8])
def test_z_is_the_mean_over_processes(launched, queue):
    found = []
    for rank, ids in enumerate(visits(1)[0].split(list(SPLITS[0]))):
        alone = built(queue=queue)
        torch.manual_seed(rank)
        alone(*shown(ids))
        found.append(alone.partition)
    state, _ = torch.load(launched / f"{queue}-0.pt")
    torch.testing.assert_close(state["partition"], torch.stack(found).mean(0))


@pytest.mark.slow
@pytest.mark.parametrize("queue", [None, 8])
def test_a_process_without_samples_which_is_shown_the_first_ones_adds_nothing(launched, queue):
    alone = built(queue=queue)
    torch.manual_seed(0)
    alone(*shown(visits(1)[0]))
    for rank in (0, 1):
        found = torch.load(launched / f"idle-{queue}-{rank}.pt")
        for name, tensor in alone.named_buffers():
            torch.testing.assert_close(found[name], tensor)


@pytest.mark.slow
def test_a_sample_on_both_processes_is_remembered_as_the_last_one_says(launched):
    one, two = (torch.load(launched / f"twice-{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    alone = built()
    student, teacher, _ = shown(torch.tensor([7]), 1)
    row = views(alone, student, teacher)[0][0]
    expected = unit([0.5 * old + 0.5 * new for old, new in zip(alone.student_bank[7].tolist(), row, strict=True)])
    assert one["student_bank"][7].tolist() == pytest.approx(expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
