"""The paper's CIFAR protocol: train the teacher, fit granularity heads, distil the student. A stage of the same recipe
and data is reused.

    accelerate launch recipes/cifar.py --pair resnet32x4-resnet8x4
    accelerate launch recipes/cifar.py --pair wrn_40_2-wrn_16_2 --method mag --criterion at --data-dir cifar100
    accelerate launch recipes/cifar.py --pair vgg13-vgg8 --epochs 30 --amp --compile

The first: MAS+KD, 240 epochs, CIFAR-100 from the hub; the last: an eighth of the schedule. The recipe takes every flag
of `mgd-timm distill` but --peer and --resume, which replaces the protocol's value for the student; --amp, --compile and
--channels-last apply to the teacher too. The same command continues a stopped run.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mgd_timm.cli.list_criteria import Connection
from mgd_timm.cli.main import guarded
from mgd_timm.cli.parser import given_options, run_parser
from mgd_timm.criteria.terms import build_criterion
from mgd_timm.data.dataset import Images
from mgd_timm.distributed.collectives import join
from mgd_timm.models.build import build_model
from mgd_timm.pipeline import cifar_stages as cifar
from mgd_timm.pipeline.plan import terms_of
from mgd_timm.recipe import presets
from mgd_timm.recipe.recipe import Recipe, make_recipe

_WITHOUT = {
    "peer": "these are the paper's pairs of teacher and student; two students that teach each other: mgd-timm distill "
    "--peer",
    "resume": "the same command continues a stopped run, without it",
    "teacher_epochs": "here they are those of the teacher's own training",
}
_OWN = ("pair", "teacher_epochs", "teacher_seed")
_OF_BOTH = (
    "dataset",
    "data_dir",
    "dataset_config",
    "input_key",
    "target_key",
    "train_split",
    "eval_split",
    "val_split",
    "process_timeout",
)
_FAST = ("amp", "amp_dtype", "channels_last", "compile", "validation_batch_size")


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 for a failure, 130 or 143 after a signal."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = run_parser("recipes/cifar.py", distill=True, without=_WITHOUT)
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--pair", type=str, default="resnet32x4-resnet8x4", help=f"teacher and student: {', '.join(presets.PAIRS)}"
    )
    group.add_argument(
        "--teacher-epochs", type=int | None, default=None, help="epochs of the teacher's training; default: --epochs"
    )
    group.add_argument(
        "--teacher-seed", type=int, default=0, help="random seed of the teacher's training; with --val-split: --seed"
    )
    given = given_options(parser, words)
    return guarded("recipes/cifar.py", lambda: print_result(*distil(given)))


def distil(given: dict[str, Any]) -> tuple[str, Path, Path | None]:
    """Run the stages. Return the pair's name, the student's folder, and the teacher's if it was trained here."""
    name = given.get("pair", "resnet32x4-resnet8x4")
    network, student = presets.pair(name)
    student = given.get("student", student)
    root = Path(given.get("output", "runs/cifar"))
    data = {"dataset": presets.DATA_SETS["cifar100"]} | {key: given[key] for key in _OF_BOTH if key in given}
    data["dataset"] = presets.DATA_SETS.get(data["dataset"], data["dataset"])
    images = cifar.images_of(make_recipe(**data))
    classes = images.num_classes
    epochs, seed = given.get("epochs", presets.EPOCHS), given.get("seed", 1)
    teacher, folder = given.get("teacher"), None
    own = {key: value for key, value in given.items() if key not in (*_OWN, *data, "output")}
    _check_criteria(
        make_recipe(**{**presets.distillation_options(), **own, "epochs": epochs, "student": student}), network, images
    )
    if teacher is None:
        options = presets.training_options(network, given.get("teacher_epochs", epochs), classes=classes) | data
        options |= {key: given[key] for key in _FAST if key in given}
        # The validation split depends on the seed: the teacher must not train on the student's validation images.
        own_seed = seed if given.get("val_split") else given.get("teacher_seed", 0)
        folder = cifar.teacher_stage(root, network, {**options, "seed": own_seed})
        teacher = str(folder)
    protocol = presets.training_options(student, epochs, classes=classes) | data
    heads_epochs = given.get("heads_epochs", max(1, presets.HEADS_EPOCHS * epochs // presets.EPOCHS))
    protocol |= presets.distillation_options() | presets.heads_options(heads_epochs)
    if given.get("teacher_store") and not given.get("teacher_top_k"):
        # The heads are fitted on the outputs in the store.
        protocol |= {
            "heads_protocol": "stored",
            "heads_augmentations": min(heads_epochs, given.get("teacher_augmentations", epochs)),
        }
    recipe = make_recipe(**{**protocol, "seed": seed, **own, "student": student, "teacher": teacher})
    title = "-".join([student, recipe.method, *terms_of(recipe).criterion_names(), str(recipe.seed)])
    return name, cifar.stage(root, title, recipe, cifar.made_from(recipe)), folder


def _check_criteria(recipe: Recipe, network: str, images: Images) -> None:
    """Raise ValueError for a criterion that cannot be built for the pair, before the teacher is trained."""
    teacher, student = (build_model(name, images.input_size, images.num_classes) for name in (network, recipe.student))
    connection = Connection(teacher, student, images.input_size, recipe.maps, images.num_samples)
    terms = terms_of(recipe)
    for term in terms.active.values():
        build_criterion(term, connection.pair(term.criterion), standardise_logits=terms.standardise_logits)


def print_result(name: str, student: Path, teacher: Path | None) -> None:
    """Print the accuracies in the main process."""
    summary = json.loads((student / "summary.json").read_text())
    teachers = summary.get("teacher_top1")
    if teacher is not None:
        teachers = json.loads((teacher / "summary.json").read_text())["top1"]
    tops = [
        "without logits" if top1 is None else f"{top1:.2f} %"
        for top1 in (teachers if isinstance(teachers, list) else [teachers])
    ]
    join().print(
        f"\n{name}: teacher {', '.join(tops)}, student {summary['top1']:.2f} % after the last epoch, best "
        f"{summary['best_top1']:.2f} %\nstudent: {student / 'export'}"
    )


if __name__ == "__main__":
    sys.exit(main())
