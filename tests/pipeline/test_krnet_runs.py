"""A run with KRNet, whose nets have an optimizer of their own: killed and continued, exported, and refused."""

import signal

import pytest
import timm
from small import SHORT, call, digest, end_at

from mgd_timm.pipeline.checks import check_recipe
from mgd_timm.pipeline.plan import terms_of
from mgd_timm.recipe.recipe import make_recipe
from mgd_timm.storage import checkpoint

WORDS = ["distill", *SHORT, "--method", "none", "--criterion", "krnet", "--criterion-options", "krnet.interval=2"]
WORDS += ["--batch-size", "64", "--checkpoint-interval", "1", "--drop", "0.2"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits_and_exports_no_trace(small_data, tmp_path):
    for name in ("whole", "killed"):
        words = [*WORDS, "--data-dir", str(small_data), "--output", str(tmp_path / name)]
        if name == "killed":
            code, errors = end_at(3, tmp_path / name / "checkpoints", signal.SIGKILL, *words)
            assert code == -signal.SIGKILL, errors
            words.append("--resume")
        done = call(*words)
        assert done.returncode == 0, done.stderr
    assert "resumed after update" in done.stdout
    states = [checkpoint.load_newest(tmp_path / name / "checkpoints", print) for name in ("whole", "killed")]
    for group in ("trainee", "own_step"):
        assert states[0].tensors[group].keys() == states[1].tensors[group].keys() != set()
        for key, value in states[0].tensors[group].items():
            assert value.equal(states[1].tensors[group][key]), key
    exports = [tmp_path / name / "export" for name in ("whole", "killed")]
    assert len({digest(place / "model.safetensors") for place in exports}) == 1
    model = timm.create_model(f"local-dir:{exports[0]}", pretrained=True)
    assert set(model.state_dict()) == set(timm.create_model("cifar_resnet8x05", num_classes=10).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"find_batch_size": True}, "'krnet' with find_batch_size: .* give a --batch-size"),
        ({"amp": True, "amp_dtype": "float16"}, "'krnet' with amp_dtype='float16': .* give --amp-dtype bfloat16"),
        ({"qat": True}, "'krnet' with qat: .* leave --qat out"),
        ({"teacher": ["embedded"] * 2}, "'krnet' with several teachers: .* name one --teacher"),
        ({"teacher_store": "store"}, "'krnet' reads the teacher's maps, and a teacher store"),
        ({"peer": "cifar_resnet8", "criterion": ("dml", "krnet")}, "krnet takes a virtual step of one student"),
        ({"task_weight": 0.0}, "krnet learns from the student's loss of the labels, which has weight 0"),
    ],
)
def test_what_it_does_not_go_with_is_refused(options, message):
    recipe = make_recipe(**{"criterion": ("krnet",), **options})
    with pytest.raises(ValueError, match=message):
        check_recipe(recipe, terms_of(recipe))


def test_fsdp_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    recipe = make_recipe(criterion=("krnet",))
    with pytest.raises(ValueError, match=r"'krnet' with FSDP: .* launch without FSDP"):
        check_recipe(recipe, terms_of(recipe))
