"""What a run is: values out of range, of another type or unknown are refused by name."""

import re
from pathlib import Path

import pytest

from mgd_timm.recipe.options import as_dict
from mgd_timm.recipe.recipe import Recipe, flatten, make_recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_batch_size": 0}, "validation_batch_size=0: expected 1 or more (--validation-batch-size)"),
        ({"workers": -1}, "workers=-1: expected 0 or more (--workers)"),
        ({"scale": (0.5, 0.1)}, "scale=(0.5, 0.1): expected two numbers, the smaller one first, as in --scale 0.5 1.0"),
        ({"ratio": (0.0, 1.0)}, "ratio=(0.0, 1.0): expected a positive number in each place (--ratio)"),
        ({"ratio": (1.0,)}, "ratio=(1.0,): expected two"),
        ({"crop_pct": 0.0}, "crop_pct=0.0: expected more than 0 and at most 1 (--crop-pct)"),
        ({"momentum": 1.0}, "momentum=1.0: expected 0 or more and less than 1 (--momentum)"),
        ({"model_ema_decay": -0.1}, "model_ema_decay=-0.1: expected 0 or more and less than 1"),
        ({"weight_decay": float("nan")}, "weight_decay=nan: expected 0 or more"),
        ({"epochs": 3, "warmup_epochs": 4}, "warmup_epochs=4: expected 0 to 3"),
        ({"warmup_epochs": -1}, "warmup_epochs=-1: expected 0 to 20"),
        ({"smoothing": 1.1}, "smoothing=1.1: expected 0 or more and less than 1"),
        ({"heads_weight_decay": -1.0}, "heads_weight_decay=-1.0: expected 0 or more"),
        ({"method": "mass"}, "unknown method 'mass': did you mean mas"),
        ({"heads_protocol": "life"}, "unknown heads_protocol 'life': did you mean live?"),
        ({"amp_dtype": "float64"}, "unknown amp_dtype 'float64': did you mean float16"),
        ({"epochs": "3"}, "epochs='3': expected int, not str"),
        ({"epochs": 3.0}, "epochs=3.0: expected int, not float"),
        ({"epochs": True}, "epochs=True: expected int, not bool"),
        ({"amp": 1}, "amp=1: expected bool, not int"),
        ({"clip_grad": "much"}, "clip_grad='much': expected float | None, not str"),
        ({"mean": 0.5}, "mean=(0.5,): expected 3 values, one per channel (--in-chans)"),
        ({"mean": "much"}, "mean='much': expected tuple[float, ...] | None, not str"),
        ({"scale": 0.5}, "scale=(0.5,): expected two numbers, the smaller one first"),
        ({"scale": (0.5, 2.0)}, "scale=(0.5, 2.0): expected more than 0 and at most 1 in each place"),
        ({"std": (float("nan"),) * 3}, "std=(nan, nan, nan): expected a positive number in each place"),
        ({"decay_epochs": 0.0}, "decay_epochs=0.0: expected a positive number"),
        ({"decay_rate": -1.0}, "decay_rate=-1.0: expected a positive number"),
        ({"warmup_lr": -5.0}, "warmup_lr=-5.0: expected 0 or more"),
        ({"min_lr": float("inf")}, "min_lr=inf: expected 0 or more"),
        ({"drop_path": 2.0}, "drop_path=2.0: expected 0 or more and less than 1"),
        ({"decay_milestones": "a"}, "decay_milestones='a': expected tuple[float, ...] | None, not str"),
        (
            {"sched": "multistep", "decay_milestones": (150, 180)},
            "decay_milestones=(150.0, 180.0): all are after epochs=20, so the learning rate would never decay. Give "
            "smaller ones, or leave --decay-milestones out",
        ),
        (
            {"heads_sched": "multistep", "heads_decay_milestones": (30, 45)},
            "heads_decay_milestones=(30.0, 45.0): all are after heads_epochs=24, so the learning rate would never "
            "decay. Give smaller ones, or leave --heads-decay-milestones out",
        ),
        ({"sched": "rsqrt"}, "on the time scale of its warm-up, and there is none: give --warmup-epochs 1"),
        (
            {"sched": "wsd", "epochs": 2, "warmup_epochs": 2},
            "sched='wsd': warmup_epochs=2 of epochs=2 leaves no epoch for the decay. Lower --warmup-epochs, "
            "or raise --epochs",
        ),
        ({"criterion": 3}, "criterion=3: expected tuple[str, ...], not int"),
        ({"decay_milestones": True}, "decay_milestones=True: expected tuple[float, ...] | None, not bool"),
        ({"decay_milestones": ("a", "b")}, "decay_milestones=('a', 'b'): expected tuple[float, ...] | None, not tuple"),
        ({"method": None}, "method=None: expected Literal['none', 'mag', 'mas'], not NoneType"),
    ],
)
def test_wrong_values_are_named_with_what_was_expected(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_recipe(**options)


def test_one_value_is_a_tuple_of_one_and_lists_numbers_and_paths_are_taken():
    recipe = make_recipe(
        criterion="at", log_with="tensorboard", decay_milestones=[1, 2.5], lr=1, clip_grad=2, data_dir=Path("a") / "b"
    )
    assert (recipe.criterion, recipe.log_with) == (("at",), ("tensorboard",))
    assert (recipe.optim.decay_milestones, recipe.data.data_dir) == ((1.0, 2.5), "a/b")
    grey = make_recipe(in_chans=1, mean=0.5, std=1, decay_milestones=3)
    assert (grey.data.mean, grey.data.std, grey.optim.decay_milestones) == ((0.5,), (1.0,), (3.0,))
    assert (repr(recipe.optim.lr), repr(recipe.optim.clip_grad)) == ("1.0", "2.0")
    for given, each in ((None, [None, None]), ("auto", ["auto", "auto"]), (["f", "none"], ["f", "none"])):
        several = make_recipe(teacher=["a", "b"], teacher_classes=given)
        assert [several.classes_of(place) for place in (0, 1)] == each
    assert make_recipe(clip_grad=None, mean=None).optim.clip_grad is None
    assert make_recipe(**flatten(as_dict(recipe))) == recipe


def test_the_defaults_are_within_their_ranges_and_timms():
    assert make_recipe() == Recipe()
    assert not Recipe().channels_last
