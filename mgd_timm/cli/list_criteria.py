"""Describe the criteria by their docstrings: the table of `mgd-timm list criteria`, and docs/methods.md."""

import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models import get_model_input_config, get_pretrained_cfg
from torch import nn

from mgd_timm.criteria import CRITERIA, Criterion, EntropyWeight
from mgd_timm.criteria.base import Need
from mgd_timm.criteria.standardisation import Standardised
from mgd_timm.criteria.terms import hyper_parameters
from mgd_timm.distiller import TaughtPeers
from mgd_timm.features import FeatureTap, Pair, match_number_of_maps
from mgd_timm.granularity import MAG, MAS
from mgd_timm.models.build import build_model
from mgd_timm.models.checks import check_classifier
from mgd_timm.models.load import check_model_name, load_model
from mgd_timm.recipe.options import flag, plain_architecture
from mgd_timm.teachers.channel_matching import ChannelMatching
from mgd_timm.teachers.student_friendly import StudentFriendly


def paragraphs(kind: type) -> list[str]:
    """Return the paragraphs of a class's docstring, each in one line except for "Args:" and "Raises:"."""
    blocks = re.split(r"\n\s*\n", inspect.getdoc(kind) or "")
    return [block if block.startswith(("Args:", "Raises:")) else " ".join(block.split()) for block in blocks]


def labelled(kind: type, label: str) -> str:
    """Return the paragraph of a docstring that begins with "LABEL: ", without the label, or ""."""
    return next((text.removeprefix(f"{label}: ") for text in paragraphs(kind) if text.startswith(f"{label}: ")), "")


def paper(kind: type[Criterion]) -> str:
    """Return the authors of a method's paper, with its arXiv number or venue."""
    reference = labelled(kind, "Reference")
    authors, _, rest = reference.partition(' "')
    names = [name for name in authors.rstrip(",").split(", ") if name]
    place = re.search(r"arXiv[: ]\d{4}\.\d{4,5}", rest) or re.search(r"(?<=\" \()[^)]+", rest)
    who = ", ".join(names) if len(names) < 3 else f"{names[0]} et al."
    return f"{who} ({place[0]})" if place else who


def requirements(kind: type[Criterion]) -> list[str]:
    """Return the inputs and fitting that a method needs besides the student's logits, in words."""
    words = {"maps": "maps before their activation" if kind.preact else "maps", "cams": "class activation maps"}
    found = [words.get(part, part) for part in sorted(kind.needs)] or ["labels"]
    found += [f"the student's {part}" for part in sorted(kind.student_needs)]
    found += {"teacher": ["fitting stage"], "student": ["fitting stage of the student"]}.get(kind.fits or "", [])
    found += ["rotated images"] if kind.rotates else []
    found += ["local batch"] if kind.relational else []
    found += ["step of its own"] if kind.own_step else []
    return [*found, "peer"] if kind.peers else found


class Connection:
    """The shapes that each criterion gets of a teacher and a student.

    Args:
        teacher: A model with any weights. One with a fixed input size gets images of that size, as in a run.
        student: A model with as many classes.
        input_size: (channels, height, width) of the images.
        maps: Which maps: stages, last, mid, all, or a number of them.
        num_samples: Number of training images, which sets the size of CRD's memory banks.

    Raises:
        ValueError: A network that cannot be tapped, a student without a classifier, or unknown `maps`.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, input_size: tuple[int, int, int], maps: str, num_samples: int
    ) -> None:
        config = get_model_input_config(teacher)
        theirs = tuple(config["input_size"]) if config["fixed_input_size"] else input_size
        self.ends = ((student, input_size), (teacher, theirs))
        self.maps, self.num_samples = maps, num_samples
        check_classifier(student)
        self._seen: dict[Any, FeatureTap] = {}
        for model, size in self.ends:
            self._tap(model, size, frozenset({"maps"}), preact=False)

    def _tap(self, model: nn.Module, size: tuple[int, int, int], read: frozenset[Need], *, preact: bool) -> FeatureTap:
        key = (model, "maps" in read, preact, "cams" in read)
        if key not in self._seen:
            self._seen[key] = FeatureTap(
                model, self.maps if key[1] else None, input_size=size, preact=preact, cam=key[3]
            )
        return self._seen[key]

    def pair(self, name: str) -> Pair:
        """Return the shapes that a criterion is built from.

        Raises:
            ValueError: A network does not have the outputs that the criterion reads.
        """
        kind = CRITERIA[name]
        reads = (kind.needs | kind.student_needs, kind.needs)
        taps = [self._tap(*end, read, preact=kind.preact) for end, read in zip(self.ends, reads, strict=True)]
        match_number_of_maps(self.maps, *taps)
        student, teacher = (tap.shapes(size[1:]) for tap, (_, size) in zip(taps, self.ends, strict=True))
        labels = torch.arange(self.num_samples) % student.num_classes
        return Pair(student, teacher, self.num_samples, labels, taps[1].classifier)

    def build(self, name: str) -> Criterion:
        """Build a criterion for this pair.

        Raises:
            ValueError: The criterion cannot be built for this pair.
        """
        return CRITERIA[name](self.pair(name))


def connect(
    teacher: str,
    student: str,
    *,
    maps: str,
    num_samples: int,
    img_size: int | None = None,
    in_chans: int | None = None,
    num_classes: int | None = None,
) -> Connection:
    """Connect a teacher and a student by name, with random weights or those of a run or an export.

    The other values default to those of trained networks, else to 100 classes and the student's nominal input size.

    Args:
        teacher: A timm name, or a model as `load_model` takes it.
        student: As `teacher`.
        maps: As for `Connection`.
        num_samples: As for `Connection`.
        img_size: Side of the images in pixels.
        in_chans: Channels of the images.
        num_classes: Number of classes of the data.

    Raises:
        ValueError: An unknown name, a number out of range, or networks that were trained for other classes.
    """
    sizes = {"img_size": img_size, "in_chans": in_chans, "num_classes": num_classes, "num_samples": num_samples}
    for option, value in sizes.items():
        smallest = 2 if option == "num_classes" else 1
        if value is not None and value < smallest:
            raise ValueError(f"{option}={value}: expected {smallest} or more ({flag(option)}).")
    teacher, student = plain_architecture(teacher), plain_architecture(student)
    trained = {name: load_model(name, verify=False) for name in (teacher, student) if _is_trained(name)}
    counts = {int(getattr(model, "num_classes", 0)) for model in trained.values()} - {0}
    if len(counts | ({num_classes} - {None})) > 1:
        raise ValueError(
            f"num_classes={num_classes}: the networks were trained for {sorted(counts)} classes, expected one number."
        )
    classes = num_classes or next(iter(counts), 100)
    (own, _), (theirs, fixed) = (_nominal_input(name, trained.get(name)) for name in (student, teacher))
    channels = in_chans or next((_nominal_input(name, model)[0][0] for name, model in trained.items()), own[0])
    size = (channels, img_size or own[1], img_size or own[2])
    teacher_size = (channels, *theirs[1:]) if fixed else size
    built = [
        trained[name] if name in trained else build_model(name, input_size, classes)
        for name, input_size in ((teacher, teacher_size), (student, size))
    ]
    return Connection(built[0], built[1], size, maps, num_samples)


def _is_trained(name: str) -> bool:
    return name == "embedded" or Path(name).exists() or ":" in name


def _nominal_input(name: str, model: nn.Module | None) -> tuple[tuple[int, int, int], bool]:
    """Return the input size of a model or an architecture, and whether it takes no other."""
    if model is not None:
        known = get_model_input_config(model)
        return known["input_size"], known["fixed_input_size"]
    check_model_name(name)
    config = get_pretrained_cfg(name)
    return (config.input_size, config.fixed_input_size) if config is not None else ((3, 224, 224), False)


def table(connection: Connection) -> Iterator[str]:
    """Yield the lines of `mgd-timm list criteria`: the criteria with their remarks, then the reasons of refusals."""
    width = max(map(len, CRITERIA))
    needed = max(len(", ".join(requirements(kind))) for kind in CRITERIA.values())
    yield f"{'name':{width}} {'weight':>8}  {'extra parameters':>16}  {'needs':{needed}}  paper"
    reasons: dict[str, int] = {}
    for name, kind in CRITERIA.items():
        remark = None
        try:
            built = connection.build(name)
            count, remark = f"{sum(p.numel() for p in built.parameters()):,}", built.remark()
        except ValueError as error:
            first, _, rest = str(error).partition(" ")
            same = "".join(filter(str.isalnum, first)).lower() == name.replace("_", "")
            count = f"refused [{reasons.setdefault(rest if same else str(error), len(reasons) + 1)}]"
        needs = ", ".join(requirements(kind))
        yield f"{name:{width}} {kind.weight:8g}  {count:>16}  {needs:{needed}}  {paper(kind)}".rstrip()
        for line in filter(None, (remark, kind.note)):
            yield f"{'':{width}} {line}"
    for reason, number in reasons.items():
        yield textwrap.fill(f"[{number}] {reason}", 128, subsequent_indent="    ")


_HEAD = """# Methods

After this page you can choose a method, its weight and its options. `mgd-timm list criteria --markdown` writes this
page from the docstrings.

`mgd-timm list criteria --teacher NAME --student NAME` lists for your pair what each method needs, and why one is
refused:

```bash
mgd-timm list criteria --teacher resnet34 --student mobilenetv3_small_050 --img-size 64
```

`--criterion` takes several methods, each with an optional weight and a warm-up over which the weight rises from 0 (here
20 epochs). `--criterion-options` sets their options:

<!-- not run: takes minutes -->
```bash
mgd-timm distill --teacher runs/teacher --student resnet10t --data-dir photos --criterion at:1000,crd:0.8,dkd:1:20 \\
    --criterion-options crd.queue=65536 dkd.beta=2
```

Each criterion can be combined with `--method none`, `mag` or `mas`, except: `dml` needs a second student
(`--peer NAME`), and [without a teacher](#two-students-and-a-teacher) takes `none` or `mag`; `ekd` takes `none` alone,
and so does `selfkd` without a teacher. The task's loss is always added (`--task-weight`). With other criteria, `mag`
and `mas` also add logit KD of weight 1, as the MGD authors' scripts do (`--kd-weight 0` leaves it out under `mag`).
`sskd` has weights of its own for both, 0.1 and 0.9. Other default weights are in the table. A term has a warm-up only
if `:EPOCHS` is given.

A method with a **Note** is inspired by its paper and does not reproduce it. **Differs** says what is not as in the
paper or code that it names; "(there: ...)" is what is done there. RepDistiller is the CRD authors' repository,
mdistiller the DKD authors'; "the MGD authors" are those of Multi-Granularity Distillation.

`sskd` also reads each image rotated by 90, 180 and 270 degrees, so a step costs four times as much. It goes with one
class per image, square images and one teacher, not with mixup, cutmix, repeated augmentation, `--teacher-store` or a
peer. Its head on the teacher is fitted on stored outputs, which the heads of MAG and MAS share: 4 images through the
teacher for each of the `--heads-augmentations`. With `--heads-protocol live`, as in the authors' code, the teacher sees
4 images for each image in each of the `--fitting-epochs`:

```bash
mgd-timm distill --teacher runs/teacher --student cifar_resnet8x05 --data-dir photos --criterion sskd --method none \\
    --fitting-epochs 2 --epochs 1 --output runs/sskd
```

`selfkd` has no teacher: the student learns from heads on its own stages, which are not exported. `--teacher` and
`--method` are none by default then; with `--teacher NAME`, or beside other criteria, it is one more term.

```bash
mgd-timm distill --criterion selfkd --student cifar_resnet8x05 --data-dir photos --epochs 1 --output runs/self
```

`--match-channels N` re-orders the channels of the teacher's maps to the student's, for criteria that compare channel by
channel. It is described at the end of this page, and needs scipy (`pip install 'mgd-timm[match]'`):

```bash
mgd-timm distill --teacher runs/teacher --student cifar_resnet8x05 --data-dir photos --epochs 1 --method none \\
    --criterion fitnet --criterion-options fitnet.adapter=false --match-channels 100 --output runs/matched
```

`krnet` takes a step of its own before every fifth update (`krnet.interval`), in which it differentiates through a step
of the student. It goes with one student and one teacher, not with `--find-batch-size`, `--qat`, `--amp-dtype float16`,
FSDP or `--teacher-store`; `--compile` leaves that step as it is. The paper is about super-resolution; only a form for
classification is implemented.

```bash
mgd-timm distill --teacher runs/teacher --student cifar_resnet8x05 --data-dir photos --criterion krnet --method none \\
    --criterion-options krnet.interval=10 krnet.first_order=true --epochs 1 --output runs/krnet
```

`ekd` has no frozen teacher: its teacher trains in the same run, and is named with `--peer` in place of `--teacher`. It
takes `--method none`, and can be combined with other criteria, except `dml`. The teacher starts from the seed, or from
`--peer-pretrained` or `--peer-checkpoint FILE`, usually with a lower rate (`--peer-lr-scale 0.1`). It is evaluated,
saved and exported (`export_peer`) as a peer is; `--model-ema` averages the student alone. A step costs the backward
pass of both networks:

```bash
mgd-timm distill --peer cifar_resnet8 --student cifar_resnet8x05 --data-dir photos --criterion ekd,at:100 --epochs 1 \\
    --output runs/ekd
```

"Local batch": the method compares the samples of a batch; with several processes, each compares its own samples only.
"Fitting stage": it is fitted for `--fitting-epochs` before the run, and the result is stored in the cache; `ab` and
`fsp` fit the student's backbone and add no loss to the run. Maps: `--maps stages | last | mid | all | N`;
RepDistiller's pairing on `cifar_*` networks is `mid`, which `recipes/cifar.py` uses; `stages` adds the stem's map if it
has a resolution of its own.

| name | method | paper | weight | needs |
|---|---|---|---|---|
"""


_PER_SAMPLE = ", ".join(f"`{name}`" for name, kind in CRITERIA.items() if kind.per_sample)

_WEIGHTED = f"""
Criteria with a loss per sample: {_PER_SAMPLE}. With balance divergence ([`kd`](#kd)), also of the codes:

```bash
mgd-timm distill --teacher runs/teacher --student cifar_resnet8x05 --data-dir photos --epochs 1 --method mag \\
    --sample-weight entropy --code-divergence bdd --criterion-options kd.divergence=bdd kd.reverse_temperature=2 \\
    --heads-epochs 1 --output runs/weighted
```
"""

_TAUGHT_PEERS = """
```bash
mgd-timm distill --teacher runs/teacher --student cifar_resnet8x05 --peer cifar_resnet8 --data-dir photos --epochs 1 \\
    --criterion kd,dml:0.5 --sample-weight entropy --output runs/peers
```
"""


def markdown() -> str:
    """Return the text of docs/methods.md."""
    rows = "".join(
        f"| [`{name}`](#{name}) | {paragraphs(kind)[0].split(':')[0]} | {paper(kind)} | "
        f"{kind.weight:g} | {', '.join(requirements(kind))} |\n"
        for name, kind in CRITERIA.items()
    )
    parts = [_HEAD + rows]
    ours = (("mag", MAG), ("mas", MAS))
    parts += [f"## Multi-Granularity Distillation: `--method {name}`\n\n{_section(kind)}" for name, kind in ours]
    parts += [f"## {name}\n\n{_section(kind)}" for name, kind in CRITERIA.items()]
    parts.append(f"## Standardised logits: `--standardise-logits`\n\n{_section(Standardised)}")
    parts.append(f"## Weighted samples\n\nChosen by `--sample-weight entropy`.\n\n{_section(EntropyWeight)}{_WEIGHTED}")
    peers = f"Chosen by `--peer` beside `--teacher`.\n\n{_section(TaughtPeers)}{_TAUGHT_PEERS}"
    parts.append(f"## Two students and a teacher\n\n{peers}")
    parts.append(f"## Matched channels: `--match-channels N`\n\n{_section(ChannelMatching)}")
    parts.append(f"## A teacher for its student: `mgd-timm train --for-student NAME`\n\n{_section(StudentFriendly)}")
    return "\n".join(parts)


def _plain(text: str) -> str:
    """Escape text so that Markdown shows formulas as they are."""
    return re.sub(r"(?<!\w)_|_(?!\w)|\*", r"\\\g<0>", text).replace("<", "&lt;")


def _section(kind: type) -> str:
    parts = []
    for text in map(_plain, paragraphs(kind)):
        if not text.startswith(("Args:", "Raises:")):
            word = re.match(r"(Reference|Weight|Differs): ", text)
            parts.append(f"**{word[1]}:** {text[word.end() :]}" if word else text)
    if issubclass(kind, Criterion) and kind.note is not None:
        parts.append(f"**Note:** {_plain(kind.note)}")
    if issubclass(kind, Criterion) and hyper_parameters(kind):
        parts.append("Options:\n\n" + "\n".join(_options(kind)))
    return "\n\n".join(textwrap.fill(text, 132) if not text.startswith("Options:") else text for text in parts) + "\n"


def _options(kind: type[Criterion]) -> Iterator[str]:
    """Yield a line per hyper-parameter: its name, default and description."""
    words: dict[str, str] = {}
    block = next((text for text in paragraphs(kind) if text.startswith("Args:")), "")
    for names, about in re.findall(r"^    (\w[\w, ]*): (.*(?:\n {8,}.*)*)", block, re.MULTILINE):
        words |= {name.strip(): " ".join(about.split()) for name in names.split(",")}
    for name, parameter in hyper_parameters(kind).items():
        yield f"- `{name}` ({parameter.default}): {_plain(words.get(name, ''))}"
