"""Does every architecture of the installed timm teach, and learn? All of them by shapes, one of each family by a real
step.

    python benchmarks/any_timm.py                                 all; --resume goes on with a sweep that was stopped
    python benchmarks/any_timm.py --filter 'vit_*' 'swin*' --output /tmp/some.json

By shapes: built for 10 classes at its nominal image size on meta (no values, no memory), tapped as in a run, and joined
with resnet18 by MAS + KD + AT. As teacher: the losses of resnet18. As student: the losses from resnet18 and their
gradients, one for every parameter. Without classifier: its classifier taken off, what it shows then. timm's encoders
(*_enc) never have one: they teach by MAG + AT. Both see "stages", the default: as many maps of each, the deepest, where
one has fewer. A real step: forward, backward and SGD of a small pair on the CPU, random weights and images; losses
finite, a finite gradient for every parameter that trains. Writes benchmarks/results/any_timm.json.
"""

import argparse
import fnmatch
import functools
import gc
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import timm
import torch
from families import ENCODERS, FAMILIES, SLIM
from report import RESULTS, about, markdown, provenance
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from tqdm import tqdm

from mgd_timm.criteria import Objective
from mgd_timm.distiller import Distiller, Teacher
from mgd_timm.features import Batch, Features, FeatureTap, Pair, Shapes, match_number_of_maps
from mgd_timm.granularity import MAG, GranularityHeads
from mgd_timm.models.build import build_model
from mgd_timm.models.checks import check_classifier
from mgd_timm.models.fold_batchnorm import fold_batchnorm
from mgd_timm.objective import build_objective
from mgd_timm.pipeline.plan import terms_of
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.storage.versions import versions

FILE = RESULTS / "any_timm.json"
PARTNER, SMALL, CLASSES, BATCH = "resnet18", "test_resnet", 10, 2
ROLES = ("teacher", "student", "headless")
Row = dict[str, Any]


def architectures() -> list[str]:
    """timm's own names: not those that this package registers beside them."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm.")]


def family(name: str) -> str:
    return str(timm.model_entrypoint(name).__module__.rpartition(".")[2])


def nominal(name: str) -> tuple[int, int, int]:
    config = get_pretrained_cfg(name)
    channels, height, width = config.input_size if config is not None else (3, 224, 224)
    return channels, height, width


def tapped(model: nn.Module, size: tuple[int, int, int]) -> tuple[FeatureTap, int]:
    """The tap of a model, and how many maps it shares with a network of four stages."""
    tap = FeatureTap(model, "stages", input_size=size)
    return tap, len(tap.indices)


@functools.cache
def partner(count: int) -> Shapes:
    with torch.device("meta"):
        shapes = FeatureTap(build_model(PARTNER, (3, 224, 224), CLASSES), "stages", input_size=(3, 224, 224)).shapes(
            224
        )
    return shapes._replace(maps=shapes.maps[-count:])


def objective_of(student: Shapes, teacher: Shapes) -> Objective | MAG:
    """MAS + KD + AT; from a teacher without logits MAG + AT."""
    options: dict[str, Any] = {"method": "mas"} if teacher.num_classes else {"method": "mag", "kd_weight": 0.0}
    recipe = make_recipe(teacher="any", student="any", criterion=("at",), **options)
    pair = Pair(student, teacher, 1000, torch.arange(1000, device="cpu") % CLASSES)
    return build_objective(terms_of(recipe), pair, recipe.method, recipe.heads.granularities)


def shown(shapes: Shapes) -> Features:
    """Features of these shapes that take gradients."""

    def drawn(*size: int) -> Tensor:
        return torch.randn(BATCH, *size, requires_grad=True)

    return Features(drawn(shapes.num_classes), drawn(shapes.embed_dim), tuple(drawn(*size) for size in shapes.maps))


def analysed(features: Features) -> Features:
    """As a Teacher with heads shows them."""
    features = Features(features.logits.detach(), features.embedding.detach(), tuple(m.detach() for m in features.maps))
    heads = GranularityHeads(features.embedding.shape[1], CLASSES)
    codes = heads.encode(features.embedding)
    return features._replace(codes=codes, views=heads.decode(codes))


def pictures(size: tuple[int, int, int]) -> Batch:
    return Batch(torch.randn(BATCH, *size), torch.arange(BATCH) % CLASSES, torch.arange(BATCH))


def summed(terms: dict[str, Tensor], teacher: Shapes) -> Tensor:
    """The sum of the losses; ValueError unless they are those that this teacher gives, and finite."""
    expected = {"task", "at", "abstract", "detailed"} | ({"kd"} if teacher.num_classes else set())
    if set(terms) != expected:
        raise ValueError(f"losses {sorted(terms)}, expected {sorted(expected)}")
    total = torch.stack(list(terms.values())).sum()
    if not total.is_meta and not math.isfinite(total.item()):
        raise ValueError(f"losses that are not finite: { ({name: term.item() for name, term in terms.items()}) }")
    return total


def check_gradients(parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError for what trains and has no gradient, or not a finite one."""
    lacking = [
        name
        for name, p in parameters
        if p.requires_grad and (p.grad is None or not (p.is_meta or bool(torch.isfinite(p.grad).all())))
    ]
    if lacking:
        raise ValueError(f"no gradient for {len(lacking)} parameters: {', '.join(lacking[:3])}")


def teaches(shapes: Shapes, count: int) -> None:
    other = partner(count)
    student = shown(other)
    terms = objective_of(other, shapes)(student, analysed(shown(shapes)), pictures((3, 8, 8)))
    summed(terms, shapes).backward()
    maps = (("a map", m) for m in student.maps)
    check_gradients([("logits", student.logits), ("embedding", student.embedding), *maps])


def learns(tap: FeatureTap, shapes: Shapes, count: int, size: tuple[int, int, int]) -> None:
    check_classifier(tap.model)
    other = partner(count)
    trainee = Distiller(tap, objective_of(shapes, other)).train()
    terms, _ = trainee(pictures(size), analysed(shown(other)))
    summed(terms, other).backward()
    check_gradients(trainee.named_parameters())


def shows_without_classifier(model: Any, shapes: Shapes, size: tuple[int, int, int]) -> None:
    if shapes.num_classes:
        model.reset_classifier(0)
    tap = FeatureTap(model, input_size=size)
    if (tap.num_classes, tap.embed_dim) != (0, shapes.embed_dim):
        raise ValueError(f"an embedding of {tap.embed_dim} dims, of {shapes.embed_dim} with a classifier")


def outcome(check: Callable[[], None]) -> bool | str:
    """True, or why not."""
    try:
        check()
    except Exception as error:  # whatever timm or torch raises is the answer
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return True


def by_shapes(name: str) -> Row:
    """One architecture in every role, on meta; slim on the CPU where its code needs values."""
    size, options, device = nominal(name), {}, "meta"
    row: Row = {"model": name, "family": family(name)}
    if row["family"] == "gemma4_vit":  # its forward asks for a number (Tensor.item), which meta tensors do not have
        size, options, device = (3, 96, 96), {"depth": 4}, "cpu"
        row["how"] = "4 blocks, 96 px, on the CPU"
    connected: list[Any] = []

    def connect() -> None:
        model = build_model(name, size, CLASSES, **options)
        row.update(size=list(size), parameters=sum(p.numel() for p in model.parameters()))
        connected.extend((model, *tapped(model, size)))

    with torch.device(device):
        reason = outcome(connect)
        if reason is not True:
            return row | dict.fromkeys(ROLES, reason)
        model, tap, count = connected
        shapes = tap.shapes(size[1:])
        row |= {"count": count, "maps": [list(m) for m in shapes.maps], "embed_dim": shapes.embed_dim}
        row["teacher"] = outcome(lambda: teaches(shapes, count))
        row["student"] = outcome(lambda: learns(tap, shapes, count, size))
        row["headless"] = outcome(lambda: shows_without_classifier(model, shapes, size))
    return row


def distil_once(student: FeatureTap, teacher: FeatureTap, size: tuple[int, int, int]) -> None:
    """One step of SGD, as a run takes it."""
    shapes = student.shapes(size[1:]), teacher.shapes(size[1:])
    frozen = Teacher(fold_batchnorm(teacher) or teacher, GranularityHeads(teacher.embed_dim, CLASSES))
    trainee = Distiller(student, objective_of(*shapes)).train()
    optimizer = torch.optim.SGD(trainee.parameters(), lr=1e-3)
    batch = pictures(size)
    terms, _ = trainee(batch, frozen(batch.images))
    summed(terms, shapes[1]).backward()
    check_gradients(trainee.named_parameters())
    if any(p.grad is not None for p in frozen.parameters()):
        raise ValueError("a gradient for the teacher")
    optimizer.step()
    if not all(bool(torch.isfinite(p).all()) for p in trainee.parameters()):
        raise ValueError("parameters that are not finite after the step")


def by_steps(name: str, side: int, options: dict[str, Any]) -> Row:
    """One architecture as teacher and as student of test_resnet, with values, at a side where its last map has two
    positions."""
    row: Row = {"model": name, "family": family(name), "options": options, "teacher": "", "student": ""}
    for role in ROLES[:2]:

        def step(role: str = role) -> None:
            torch.manual_seed(0)
            size = (3, row["side"], row["side"])
            own, _ = tapped(build_model(name, size, CLASSES, **options), size)
            if role == "student":
                check_classifier(own.model)
            other = FeatureTap(build_model(SMALL, size, CLASSES), "stages", input_size=size)
            match_number_of_maps("stages", own, other)
            distil_once(*((own, other) if role == "student" else (other, own)), size)

        for row["side"] in (side, 2 * side, 4 * side):
            start = time.process_time()
            row[role] = outcome(step)
            row[f"{role}_s"] = round(time.process_time() - start, 2)
            if row[role] is True or "position" not in row[role]:
                break
    return row


def job(words: tuple[str, str, int, dict[str, Any]]) -> tuple[str, Row]:
    kind, name, side, options = words
    row = by_shapes(name) if kind == "architectures" else by_steps(name, side, options)
    gc.collect()
    return kind, row | {"commit": str(versions().get("commit"))[:10]}


def quietly() -> None:
    """A worker's start: one thread each, and timm's remarks about its own code left unsaid."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def jobs(names: Sequence[str], *, real: bool) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """What there is to do: the real steps first, which take longest."""
    if real:
        small = {name: (side, SLIM.get(module, {})) for module, (name, side) in FAMILIES.items()} | ENCODERS
        yield from (("steps", name, *small[name]) for name in names if name in small)
    yield from (("architectures", name, 0, {}) for name in names)


def body_of(rows: dict[str, dict[str, Row]], what: str) -> dict[str, Any]:
    every, steps = ([rows[kind][name] for name in sorted(rows[kind])] for kind in ("architectures", "steps"))
    counts = {role: sum(row[role] is True for row in every) for role in ROLES}
    return {
        "what": what,
        "partner": {"shapes": PARTNER, "steps": SMALL},
        "counts": {"architectures": len(every), "families": len({row["family"] for row in every}), **counts},
        "map_counts": dict(Counter(str(row["count"]) for row in every if "count" in row).most_common()),
        "real": {"models": len(steps), **{role: sum(row[role] is True for row in steps) for role in ROLES[:2]}},
        **provenance(),
        "versions": packages(),
        "architectures": every,
        "steps": steps,
    }


def write(path: Path, body: dict[str, Any]) -> None:
    """JSON with a line per row."""
    head = {key: value for key, value in body.items() if key not in ("architectures", "steps")}
    lists = [
        f' "{kind}": [\n' + ",\n".join(map(json.dumps, body[kind])) + "\n ]" for kind in ("architectures", "steps")
    ]
    path.write_text(",\n".join([json.dumps(head, indent=1)[:-2], *lists]) + "\n}\n")


def known(path: Path) -> dict[str, dict[str, Row]]:
    """Rows of an earlier sweep by the same versions of everything else; those of others are measured anew."""
    rows: dict[str, dict[str, Row]] = {"architectures": {}, "steps": {}}
    before = json.loads(path.read_text()) if path.is_file() else {}
    if before.get("versions") == packages():
        for kind, found in rows.items():
            found.update((row["model"], row) for row in before[kind])
    return rows


def packages() -> dict[str, str | None]:
    return {name: version for name, version in versions().items() if name != "commit"}


def summary(body: dict[str, Any]) -> str:
    """Counts: of all architectures by shapes, and of the real steps."""
    counts, real = body["counts"], body["real"]
    words = {
        "teacher": "teaches resnet18 by MAS + KD + AT (an encoder without a classifier: MAG + AT)",
        "student": "learns from resnet18 by MAS + KD + AT, a gradient for every parameter",
        "headless": "is tapped without its classifier",
    }
    rows = [[words[role], f"{counts[role]} of {counts['architectures']}"] for role in ROLES]
    for role, verb in (("teacher", "teaches"), ("student", "learns from")):
        what = f"{verb} test_resnet in a real step (each family's smallest, encoders)"
        rows.append([what, f"{real[role]} of {real['models']}"])
    return markdown([f"architecture of timm {body['versions']['timm']}", "holds for"], rows)


def reasons(body: dict[str, Any]) -> str:
    """What does not hold: models by role and reason, its own name left out."""
    found: dict[tuple[str, str], list[str]] = {}
    for kind in ("architectures", "steps"):
        for row in body[kind]:
            for role in ROLES:
                if isinstance(row.get(role), str):
                    where = f"{role}{', real step' if kind == 'steps' else ''}"
                    found.setdefault((where, row[role].replace(row["model"], "NAME")), []).append(row["model"])
    return "\n".join(f"- {where}: {', '.join(names)}: {why}" for (where, why), names in found.items()) or "Nothing."


def families(body: dict[str, Any]) -> str:
    """A line per family: how many architectures hold in each role, and its real step."""
    steps = {row["family"]: row for row in reversed(body["steps"]) if row["model"] not in ENCODERS}
    lines = []
    for name in sorted({row["family"] for row in body["architectures"]}):
        rows = [row for row in body["architectures"] if row["family"] == name]
        line = [name, str(len(rows)), *(str(sum(row[role] is True for row in rows)) for role in ROLES)]
        step = steps.get(name)
        if step is not None:
            slim = "".join(f", {key} {value:g}" for key, value in step["options"].items())
            line += [f"{step['model']}{slim}", str(step["side"])]
            line += [f"{step[f'{role}_s']:.1f}" if step[role] is True else "no" for role in ROLES[:2]]
        lines.append([*line, *[""] * (9 - len(line))])
    header = ["family", "architectures", "teach", "learn", "without classifier"]
    return markdown([*header, "real step of", "px", "teaches, CPU s", "learns, CPU s"], lines)


def section() -> str:
    """The table of docs/results.md and docs/any_timm.md."""
    body = json.loads(FILE.read_text())
    commits = {row["commit"] for row in (*body["architectures"], *body["steps"])}
    ran = ({**body, "versions": {**body["versions"], "commit": commit}} for commit in commits)
    return f"{summary(body)}\n\n`benchmarks/any_timm.py`; {about(*ran)}."


def section_reasons() -> str:
    """What does not hold, for docs/any_timm.md."""
    return reasons(json.loads(FILE.read_text()))


def section_families() -> str:
    """The table of families of docs/any_timm.md."""
    body = json.loads(FILE.read_text())
    counted = ", ".join(f"{count} with {number}" for number, count in body["map_counts"].items())
    return f"{families(body)}\n\nArchitectures by their number of maps with `--maps stages`: {counted}."


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", nargs="+", default=["*"], help="names to sweep, with wildcards")
    parser.add_argument("--real", action=argparse.BooleanOptionalAction, default=True, help="the real steps too")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep what the output file has of the same versions")
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args(arguments)
    if args.filter != ["*"] and args.output == FILE:
        parser.error("--filter is part of a sweep: name another file with --output.")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    names = [name for name in architectures() if any(fnmatch.fnmatch(name, pattern) for pattern in args.filter)]
    rows = known(args.output) if args.resume else {"architectures": {}, "steps": {}}
    todo = [words for words in jobs(names, real=args.real) if words[1] not in rows[words[0]]]
    what = "python benchmarks/any_timm.py" + ("" if args.real else " --no-real")
    # Spawned anew now and then: what timm and torch cache does not pile up.
    with get_context("spawn").Pool(args.processes, quietly, maxtasksperchild=300) as pool:
        for number, (kind, row) in enumerate(
            tqdm(pool.imap_unordered(job, todo), total=len(todo), unit="model", desc="sweep"), 1
        ):
            rows[kind][row["model"]] = row
            if number % 50 == 0:
                write(args.output, body_of(rows, what))
    body = body_of(rows, what)
    write(args.output, body)
    print(f"{summary(body)}\n\n{reasons(body)}\nwrote {args.output}")


if __name__ == "__main__":
    main()
