"""Every wrong call is refused in words, with its way out."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from small import SHORT, refuse

import mgd_timm
from mgd_timm.cli.main import guarded
from mgd_timm.models.load import load_model
from mgd_timm.training.report import NonFiniteError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["distil"], ["unknown command 'distil'", "did you mean distill?"]),
        (["distill", "--bach-size", "3"], ["--bach-size", "did you mean --batch-size"]),
        (["distill", "--student", "resnet1O"], ["unknown model 'resnet1O': did you mean resnet"]),
        (["distill", "--teacher", "cifar_resnet2O"], ["unknown model 'cifar_resnet2O'", "cifar_resnet20"]),
        (
            ["distill", "--teacher", "resnet34.a1_in1kk"],
            ["unknown pretrained weights 'resnet34.a1_in1kk'", "resnet34.a1_in1k"],
        ),
        (
            ["train", "--model", "resnet18.nonsense", "--data-dir", "nowhere"],
            ["unknown pretrained weights 'resnet18.nonsense': did you mean resnet18."],
        ),
        (["train", "--model", "cifar_resnet8.mine"], ["'cifar_resnet8.mine': none are published", "'cifar_resnet8'"]),
        (["distill", "--warmup-epochs", "30"], ["warmup_epochs=30: expected 0 to 20"]),
        (
            ["distill", "--teacher", "cifar_resnet20"],
            ["'cifar_resnet20' has no published weights", "--teacher-checkpoint"],
        ),
        (["distill", "--teacher", "local-dir:nowhere"], ["nowhere: no export in it", "mgd-timm export"]),
        (["distill", "--criterion", "fitnat"], ["unknown criterion 'fitnat'", "did you mean fitnet"]),
        (["distill", "--criterion", "at:much"], ["'at:much'", "expected NAME, NAME:WEIGHT or NAME:WEIGHT:EPOCHS"]),
        (["distill", "--criterion", "kd:0.5", "--kd-weight", "0.7"], ["two weights of kd: 0.5", "0.7"]),
        (["distill", "--dataset", "cifar1O0"], ["unknown data set 'cifar1O0'", "did you mean"]),
        (
            ["distill", "--data-dir", "nowhere"],
            ["nowhere: no such folder; expected a folder with images in class folders"],
        ),
        (
            ["distill", "--student", "embedded"],
            ["unknown model 'embedded': expected an architecture of timm", "--student-checkpoint FILE"],
        ),
        (["distill", "--maps", "stage"], ["maps='stage': expected stages, last, mid, all or a number of maps"]),
        (
            ["distill", "--eval-split", "none"],
            ["unknown split 'none': known: test, train. Choose one with --train-split and --eval-split"],
        ),
        (["distill", "--epochs", "1.5"], ["error: --epochs: '1.5': expected a whole number."]),
        (["distill", "--img-size", "big"], ["error: --img-size: 'big': expected a whole number."]),
        (["distill", "--mean", "0.1", "a", "0.3"], ["error: --mean: 'a': expected a number."]),
        (["distill", "--heads-sched", "step"], ["error: --heads-sched: 'step': expected one of cosine, multistep."]),
        (["list", "criterion"], ["error: what: 'criterion': expected one of criteria, models, data."]),
        (["list", "models", "--filter", "resnot*"], ["--filter 'resnot*': no model of this name"]),
        (["evaluate", "embedded", "--batch-size", "8"], ["give --validation-batch-size instead."]),
        (["distill", "--train-split", "trian"], ["unknown split 'trian': did you mean train?"]),
        (["distill", "--input-key", "imge"], ["unknown column 'imge': did you mean image?"]),
        (["distill", "--epochs", "0"], ["epochs=0", "expected 1 or more"]),
        (["distill", "--lr", "fast"], ["lr", "fast"]),
        (["distill", "--batch-size", "1"], ["batch_size=1: expected 2 or more"]),
        (["distill", "--val-split", "validation"], ["val"]),
        (["distill", "--val-split", "0.9"], ["val_split=0.9: expected 0 to 0.5 (--val-split)"]),
        (
            ["distill", "--abstract-temperature", "0"],
            ["abstract_temperature=0.0: expected a positive number (--abstract-temperature)"],
        ),
        (["distill", "--mean", "0.5"], ["mean=(0.5,): expected 3 values"]),
        (["distill", "--log-with", "tensorbord"], ["unknown tracker 'tensorbord': did you mean tensorboard?"]),
        (["distill", "--log-with", "wandb"], ["tracker 'wandb' is not installed: pip install wandb"]),
        (["distill", "--in-chans", "1"], ["the teacher takes 3 channels, the images have 1: --in-chans 3"]),
        (["distill", "--method", "mas", "--kd-weight", "0"], ["without one MAS is MAG", "--kd-weight 1"]),
        (["distill", "--maps", "7", "--criterion", "at"], ["maps='7'", "a number from 1 to 4"]),
        (["train", "--model", "cifar_resnet8", "--opt", "adamv"], ["unknown optimizer 'adamv'", "adam"]),
        (
            ["train", "--model", "vit_tiny_patch16_224", "--initial-checkpoint", "none.safetensors"],
            ["none.safetensors: cannot be read"],
        ),
        (["evaluate", "runs/none"], ["unknown model 'runs/none': there is no such folder"]),
        (["export", "embedded"], ["folder"]),
        (["distill", "--train-only", "classifier"], ["--train-only classifier: only mgd-timm train takes it."]),
        (["distill", "--model", "resnet18"], ["--model", "give --student instead."]),
        (["train", "--student", "resnet18"], ["--student resnet18: give --model instead."]),
        (["train", "--no-fold-teacher"], ["--no-fold-teacher: only mgd-timm distill takes it."]),
        (["train", "--heads-epochs", "3"], ["--heads-epochs 3: only mgd-timm distill takes it."]),
        (["evaluate", "embedded", "--aa", "rand-m9"], ["--aa rand-m9: only training takes it."]),
        (
            ["list", "models", "--teacher", "resnet18"],
            ["--teacher goes with mgd-timm list criteria, not with list models"],
        ),
    ],
)
def test_wrong_calls_name_the_value_and_the_way_out(mgd, tmp_path, words, expected):
    refuse(mgd, expected, *words)
    assert not (tmp_path / "runs").exists()  # nothing half-started is left


def test_a_file_of_weights_beside_a_teacher_that_has_its_own_is_refused_not_left_aside(mgd, tmp_path):
    expected = "teacher_checkpoint='other.safetensors': the teacher 'embedded' has weights of its own. Leave one out"
    refuse(mgd, [expected], "distill", "--teacher-checkpoint", "other.safetensors", "--output", tmp_path / "run")
    with pytest.raises(ValueError, match="has weights of its own"):
        mgd_timm.distill(load_model("embedded"), teacher_checkpoint="other.safetensors", output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_existing_output_folder_is_refused_untouched(mgd, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refuse(mgd, ["mine exists: choose another --output"], "distill", *SHORT, "--output", "mine")
    expected = ["mine holds no run to resume (no recipe.yaml), but other files: choose another --output"]
    refuse(mgd, expected, "distill", *SHORT, "--output", "mine", "--resume")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_damaged_recipe_of_a_run_is_named(mgd, trained, small_data, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    for text in ("student: [", "- 1", "data: 3", "\x00"):
        path.write_text(text)
        refuse(mgd, ["recipe.yaml is corrupt", "restore it"], "distill", *SHORT, "--output", "run", "--resume")
        refuse(mgd, ["recipe.yaml is corrupt"], "evaluate", "run")


def test_class_counts_that_differ_are_refused(mgd, small_data, tmp_path):
    import datasets

    folder = tmp_path / "three"
    folder.mkdir()
    for split in ("train", "test"):
        table = datasets.Dataset.from_parquet(str(small_data / f"{split}.parquet"), cache_dir=str(tmp_path / "cache"))
        table = table.filter(lambda row: row["label"] < 3).cast_column(
            "label", datasets.ClassLabel(names=["a", "b", "c"])
        )
        table.to_parquet(folder / f"{split}.parquet")
    refuse(
        mgd,
        ["has 10 classes, the data 3, and kd reads its logits", "--fit-teacher-head"],
        "distill",
        "--data-dir",
        folder,
    )
    refuse(mgd, ["the model has 10 classes, the data has 3"], "evaluate", "embedded", "--data-dir", folder)


def test_teacher_weights_without_their_classifier_are_refused(mgd, tmp_path):
    import timm

    state = timm.create_model("cifar_resnet8", num_classes=10).state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith("fc.")}, tmp_path / "body.safetensors")
    teacher = ["distill", "--teacher", "cifar_resnet8", "--teacher-checkpoint"]
    refuse(mgd, ["body.safetensors holds no classifier (fc.weight)", "teaches noise"], *teacher, "body.safetensors")
    save_file(state, tmp_path / "eight.safetensors")
    wrong = ["distill", "--teacher", "cifar_resnet14", "--teacher-checkpoint"]
    refuse(mgd, ["does not fit cifar_resnet14: missing ['layer1.1.conv1.weight'"], *wrong, "eight.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    refuse(mgd, ["text.safetensors: cannot be read as safetensors"], *teacher, "text.safetensors")


def test_images_too_small_for_a_student_are_refused(mgd, small_data):
    expected = ["test_convnext cannot be probed with an image of (3, 28, 28)", "Kernel size: (2 x 2)"]
    refuse(mgd, expected, "train", "--model", "test_convnext", "--data-dir", small_data, "--output", "run")


def test_a_run_without_an_export_has_not_finished(mgd, trained, tmp_path):
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "recipe.yaml").write_text((trained / "recipe.yaml").read_text())
    for words in (["evaluate", "started"], ["distill", "--teacher", "started"]):
        refuse(mgd, ["started is a run that has not finished", "Continue it with --resume"], *words)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ([], ["expected an object with an 'architecture'"]),
        ({"architecture": 3}, ["'architecture' is 3, expected a name"]),
        ({"pretrained_cfg": "x"}, ["'pretrained_cfg' is 'x', expected an object"]),
        ({"model_args": ["x"]}, ["'model_args' is ['x'], expected an object"]),
        ({"model_args": {"depths": 3}}, ["its config.json does not describe a timm model"]),
        *(
            (
                {"model_args": {key: True}},
                [f"model_args has {key!r}, which is no argument of an architecture: remove it"],
            )
            for key in (
                "features_only",
                "checkpoint_path",
                "pretrained",
                "pretrained_cfg_overlay",
                "kwargs_filter",
                "no_jit",
            )
        ),
    ],
)
def test_a_config_from_outside_is_checked(mgd, trained, tmp_path, changed, expected):
    shutil.copytree(trained / "export", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (tmp_path / "out" / "config.json").write_text(
        json.dumps({**config, **changed} if isinstance(changed, dict) else changed)
    )
    refuse(mgd, ["out", *expected], "evaluate", "out")
    (tmp_path / "out" / "config.json").write_text("no JSON")
    refuse(mgd, ["config.json: not JSON"], "evaluate", "out")


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, "interrupted; --resume continues from the newest checkpoint"),
        (KeyboardInterrupt("saved"), 130, "saved"),
        (ValueError("lr=-1"), 1, "mgd-timm: error: lr=-1"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 1, "use a smaller --batch-size, or --find-batch-size"),
        (RuntimeError("DataLoader worker (pid 3) is killed"), 1, "a DataLoader worker was killed (out of memory?)"),
        (NonFiniteError("the loss is nan"), 1, "mgd-timm: error: the loss is nan"),
    ],
)
def test_what_ends_a_command_is_printed_in_words(capsys, error, code, expected):
    def stop() -> None:
        raise error

    assert guarded("mgd-timm", stop) == code
    errors = capsys.readouterr().err
    assert expected in errors
    assert "Traceback" not in errors


def test_a_fault_of_mgd_timm_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        guarded("mgd-timm", lambda: print(torch.ones(2, 3) @ torch.ones(2, 3)))
