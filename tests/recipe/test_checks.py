"""Every option is refused outside its range, and every contradiction of options is named with the flags to change."""

import dataclasses
import math
import re

import pytest

from mgd_timm.recipe.data import Data
from mgd_timm.recipe.heads import Heads
from mgd_timm.recipe.optim import Optim
from mgd_timm.recipe.options import Range, flag
from mgd_timm.recipe.recipe import Recipe, make_recipe

FIELDS = {field.name: field for kind in (Recipe, Data, Optim, Heads) for field in dataclasses.fields(kind)}
RANGES = {
    name: field.metadata["range"] for name, field in FIELDS.items() if field.metadata.get("range", Range()) != Range()
}


def just_outside(name: str) -> list[float]:
    """Numbers of the field's type that its range leaves out at each of its bounds."""
    step = 1 if "int" in str(FIELDS[name].type) else 1e-6
    bounds = RANGES[name]
    found = [bounds.minimum - step, bounds.above, bounds.maximum + step, bounds.below]
    return [type(step)(number) for number in found if math.isfinite(number)]


@pytest.mark.parametrize("name", RANGES)
def test_an_option_is_refused_at_the_bounds_of_its_range(name):
    values = [*just_outside(name), *([] if "int" in str(FIELDS[name].type) else [math.nan, math.inf])]
    assert values
    for value in values:
        given = (value,) * 3 if "tuple" in str(FIELDS[name].type) else value
        beside = {"streaming": True} if name in ("num_samples", "num_classes") else {}
        with pytest.raises(ValueError, match=re.escape(f"{name}=") + r".*expected .*" + re.escape(f"({flag(name)}).")):
            make_recipe(**{name: given}, **beside)


@pytest.mark.parametrize(
    ("bounds", "inside", "words"),
    [
        (Range(), [-1e9, 0], "a finite number"),
        (Range(above=0), [1e-9, 5], "a positive number"),
        (Range(minimum=2), [2, 3], "2 or more"),
        (Range(minimum=0, maximum=0.5), [0, 0.5], "0 to 0.5"),
        (Range(minimum=0, below=1), [0, 0.999], "0 or more and less than 1"),
        (Range(above=0, maximum=1), [0.001, 1], "more than 0 and at most 1"),
    ],
)
def test_a_range_holds_its_numbers_and_says_so(bounds, inside, words):
    assert str(bounds) == words
    assert all(number in bounds for number in inside)
    assert not any(number in bounds for number in (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5, 0.5)}, "mean=(0.5, 0.5): expected 3 values, one per channel (--in-chans)"),
        ({"mean": (125, 125, 120)}, "Divide those of pixels in 0 to 255 by 255: --mean 0.4902 0.4902 0.4706."),
        ({"std": (60, 60, 60)}, "std=(60.0, 60.0, 60.0): expected 1 at most, of pixels in [0, 1]. Divide"),
        ({"num_samples": 100}, "num_samples=100: it is for streamed images only"),
        ({"streaming": True, "val_split": 0.1}, "Leave --val-split out, or leave --streaming out"),
        ({"maps": "0"}, "maps='0': expected stages, last, mid, all or a number of maps, 1 or more (--maps)"),
        ({"teacher": None, "adapt_batchnorm": True}, "Give --train-only classifier"),
        ({"train_only": "classifier"}, "train_only='classifier' with the teacher 'embedded'"),
        ({"train_only": "classifier", "peer": "test_vit"}, "train_only='classifier' with the peer 'test_vit'"),
        (
            {"train_only": "classifier", "teacher": None, "drop": 0.1},
            "has no dropout. Leave --drop out",
        ),
        ({"peer": "test_vit", "teacher_checkpoint": "f"}, "Leave --teacher-checkpoint out"),
        ({"peer_pretrained": True}, "peer_pretrained=True: there is no peer. Leave --peer-pretrained out, or name"),
        ({"peer_checkpoint": "f"}, "Leave --peer-checkpoint out"),
        ({"peer_lr_scale": 0.1}, "Leave --peer-lr-scale out"),
        ({"peer": "test_vit", "method": "mas"}, "Choose --method mag (with dml: MGD-DML) or none"),
        ({"teacher": ()}, "name one with --teacher"),
        ({"teacher": None, "teacher_store": "s"}, "Leave --teacher-store out"),
        ({"teacher": None, "teacher_img_size": 32}, "teacher_img_size=32: there is no teacher"),
        ({"teacher": None, "teacher_resize": "positions"}, "Leave --teacher-resize out"),
        ({"teacher_weights": (1.0,)}, "Leave --teacher-weights out"),
        ({"teacher": ("a", "b"), "teacher_weights": (1.0,)}, "for each of the teachers ['a', 'b']"),
        ({"teacher": ("a", "b"), "teacher_classes": ("x", "y", "z")}, "3 values for 2 teachers ('a', 'b')"),
        ({"teacher_classes": "none", "fit_teacher_head": "probe"}, "Leave --teacher-classes or --fit-teacher-head out"),
        ({"teacher": ("a", "b"), "teacher_store": "s"}, "and there are 2. Leave --teacher-store out"),
        ({"teacher_top_k": 3}, "Leave --teacher-top-k out, or give --teacher-store FOLDER"),
        ({"teacher": None, "shard_teacher": True}, "Leave --shard-teacher out"),
        (
            {"teacher_store": "s", "shard_teacher": True},
            "teacher_store='s' replaces the teacher in memory",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_recipe(**options)
