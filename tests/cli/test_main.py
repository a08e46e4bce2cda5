"""The command line as a user types it: flags, files of flags, help, and every wrong call with its way out."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small import FAST, ONE_IMAGE, call

import mgd_timm
from mgd_timm.cli.main import guarded, main
from mgd_timm.models.load import load_model
from mgd_timm.training.report import NonFiniteError

SHORT = ["--student", "cifar_resnet8x05", "--epochs", "1", "--heads-epochs", "1", "--heads-augmentations", "1"]


@pytest.fixture
def mgd(capsys, tmp_path, monkeypatch):
    """Call the command line in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = main([str(word) for word in words])
        except SystemExit as end:
            code = int(end.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def refuse(mgd, expected: list[str], *words: str) -> None:
    code, _, errors = mgd(*words)
    assert code in (1, 2), errors
    for text in expected:
        assert text in errors, errors
    assert "Traceback" not in errors


def test_help_version_and_lists(mgd):
    assert mgd("--help")[0] == 0
    assert mgd("--version")[1].strip() == "0.1.0"
    code, out, _ = mgd("list", "criteria")
    assert code == 0
    assert all(
        name in out for name in ("ce", "kd", "fitnet", "at", "1000", "arXiv 1612.03928", "fitting stage", "local batch")
    )
    assert "cifar_resnet8x4" in mgd("list", "models", "--filter", "cifar_*")[1].split()
    assert "Fashion-MNIST" in mgd("list", "data")[1]


def test_print_config_is_read_back_by_config(mgd, tmp_path):
    code, out, _ = mgd(
        "distill", "--lr", "0.3", "--criterion", "at", "kd:0.5", "--mean", "0.5", "0.5", "0.5", "--print_config"
    )
    assert code == 0
    values = yaml.safe_load(out)
    assert (values["lr"], values["criterion"], values["mean"]) == (0.3, ["at", "kd:0.5"], [0.5, 0.5, 0.5])
    (tmp_path / "flags.yaml").write_text(out)
    again = mgd("distill", "--config", tmp_path / "flags.yaml", "--seed", "7", "--print_config")[1]
    assert yaml.safe_load(again) == {**values, "seed": 7}


def test_a_config_may_give_one_value_where_a_list_is_expected(mgd, tmp_path):
    lines = [
        "criterion: at",
        "mean: 0.5",
        "std: 1e-1",
        "decay_milestones: 3",
        "log_with: tensorboard",
        "teacher: embedded",
        "seed: 3",
    ]
    (tmp_path / "flags.yaml").write_text("\n".join(lines))
    code, out, errors = mgd("distill", "--config", tmp_path / "flags.yaml", "--print_config")
    assert code == 0, errors
    values = yaml.safe_load(out)
    assert (values["criterion"], values["mean"], values["std"], values["seed"]) == (["at"], [0.5], [0.1], 3)
    assert (values["decay_milestones"], values["log_with"], values["teacher"]) == ([3], ["tensorboard"], ["embedded"])


def test_a_flag_for_each_teacher_is_given_again(mgd):
    words = [
        "distill",
        "--teacher",
        "a",
        "--teacher-classes",
        "a.txt",
        "--teacher=b",
        "--teacher-classes=auto",
        "--print_config",
    ]
    values = yaml.safe_load(mgd(*words)[1])
    assert (values["teacher"], values["teacher_classes"]) == (["a", "b"], ["a.txt", "auto"])
    assert yaml.safe_load(mgd(*words[:3], *words[3:5], "--print_config")[1])["teacher_classes"] == "a.txt"
    again = ["--teacher-classes", "x", "--teacher-classes", "y"]
    refuse(mgd, ["teacher_classes=['x', 'y']: 2 values for 1 teacher ('embedded')"], "distill", *again)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("criterion: 3", "criterion: 3 in --config: expected a word or a list of words, as in criterion: [a, b]."),
        (
            "teacher: {a: b}",
            "teacher: {'a': 'b'} in --config: expected a word or a list of words, as in teacher: [a, b].",
        ),
        (
            "mean: 0.5 0.5 0.5",
            "mean: '0.5 0.5 0.5' in --config: expected a number or a list of numbers, as in mean: [0.5, 0.5].",
        ),
        (
            "decay_milestones: [1, a]",
            "decay_milestones: [1, 'a'] in --config: expected a number or a list of numbers",
        ),
        ("mean: 0.5", "mean=(0.5,): expected 3 values, one per channel (--in-chans)"),
        (
            "mean: [0.5",
            '--config: invalid YAML: while parsing a flow sequence in "<unicode string>", line 1, column 7 did not',
        ),
        ("", "--config: '': expected flags with values, as in epochs: 20; --print_config writes such a file."),
        ("- 1", "--config: '- 1': expected flags with values"),
    ],
)
def test_a_config_with_a_value_of_another_kind_is_refused(mgd, tmp_path, line, expected):
    (tmp_path / "flags.yaml").write_text(line)
    refuse(mgd, [expected], "distill", "--config", tmp_path / "flags.yaml")


@pytest.fixture(scope="module")
def trained(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(["distill", *SHORT, "--data-dir", str(small_data), "--output", str(folder), "--license", "mit"]) == 0
    return folder


def test_a_run_folder_holds_what_the_run_was(trained):
    recipe = yaml.safe_load((trained / "recipe.yaml").read_text())
    assert recipe["method"] == "mas"
    assert recipe["optim"]["epochs"] == 1
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert set(rows[-1]["train"]) == {"task", "kd", "abstract", "detailed", "top1"}
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["top1"] == rows[-1]["eval"]["top1"]
    assert {"abstract", "detailed", "teacher", "top1"} <= set(summary["heads"])
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    origin = json.loads((trained / "export" / "recipe.json").read_text())
    assert {"recipe", "teacher_sha256", "data_sha256", "model_sha256", "versions", "metrics"} <= set(origin)


def test_evaluate_gives_the_accuracy_of_the_run(mgd, trained):
    code, out, _ = mgd("evaluate", trained)
    assert code == 0
    found = json.loads(out.strip().splitlines()[-1])
    top1 = json.loads((trained / "summary.json").read_text())["top1"]
    assert found["top1"] == pytest.approx(top1, abs=ONE_IMAGE)
    assert found["n"] == 100
    assert found["data"] == yaml.safe_load((trained / "recipe.yaml").read_text())["data"]["data_dir"]


@pytest.mark.slow
def test_evaluate_takes_other_data_than_the_run(mgd, trained):
    found = json.loads(mgd("evaluate", trained, "--dataset", "embedded")[1].strip().splitlines()[-1])
    assert (found["data"], found["n"]) == ("embedded", 4_000)


def test_export_copies_the_student_under_a_licence(mgd, trained, tmp_path):
    assert mgd("export", trained, tmp_path / "out", "--license", "apache-2.0", "--tag", "mine")[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["pretrained_cfg"]["license"], config["pretrained_cfg"]["tag"]) == ("apache-2.0", "mine")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", trained / "export"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    refuse(mgd, ["exists: choose another folder"], "export", trained, tmp_path / "out")


def test_a_run_folder_teaches(mgd, trained, small_data, tmp_path):
    words = [
        "distill",
        *SHORT,
        "--method",
        "none",
        "--teacher",
        trained,
        "--data-dir",
        small_data,
        "--output",
        tmp_path / "next",
    ]
    code, out, _ = mgd(*words)
    assert code == 0
    said = re.search(r"teacher cifar_resnet8x05: top-1 ([\d.]+) %", out)
    assert said is not None
    top1 = json.loads((trained / "summary.json").read_text())["top1"]
    assert float(said[1]) == pytest.approx(top1, abs=ONE_IMAGE)


def test_val_split_is_evaluated_each_epoch_and_the_test_split_at_the_end(mgd, small_data, tmp_path):
    words = ["train", "--model", "cifar_resnet8x05", "--epochs", "1", "--val-split", "0.25", "--data-dir", small_data]
    assert mgd(*words, "--output", tmp_path / "run")[0] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["last"]["n"] == 80
    assert summary["test"]["n"] == 100
    assert summary["top1"] == summary["test"]["top1"]
    assert summary["val_top1"] == summary["last"]["top1"]


def test_trackers_are_written(mgd, small_data, tmp_path):
    words = [
        "train",
        "--model",
        "cifar_resnet8x05",
        "--epochs",
        "1",
        "--data-dir",
        small_data,
        "--output",
        tmp_path / "run",
    ]
    assert mgd(*words, "--log-with", "tensorboard")[0] == 0
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


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


def test_a_config_with_an_unknown_key_is_refused(mgd, tmp_path):
    (tmp_path / "flags.yaml").write_text("epoch: 3\n")
    refuse(mgd, ["'epoch'", "did you mean --epochs"], "distill", "--config", tmp_path / "flags.yaml")
    (tmp_path / "flags.yaml").write_text("train_only: classifier\n")
    refuse(
        mgd,
        ["'train_only' is not accepted: only mgd-timm train takes it."],
        "distill",
        "--config",
        tmp_path / "flags.yaml",
    )


def test_the_recipe_of_a_run_is_no_config(mgd, trained):
    refuse(
        mgd,
        ["'data.dataset' is not accepted: give --config a file that --print_config wrote, not a recipe.yaml"],
        "distill",
        "--config",
        trained / "recipe.yaml",
    )


def test_an_existing_output_folder_is_refused_untouched(mgd, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refuse(mgd, ["mine exists: choose another --output"], "distill", *SHORT, "--output", "mine")
    expected = ["mine holds no run to resume (no recipe.yaml), but other files: choose another --output"]
    refuse(mgd, expected, "distill", *SHORT, "--output", "mine", "--resume")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_resume_starts_what_is_not_there_yet(mgd, small_data, tmp_path):
    """Whoever restarts a run that may be killed at any moment, at once too, gives one command."""
    (tmp_path / "run" / ".writing-abc").mkdir(parents=True)  # killed while its first file was written
    words = [
        "train",
        "--model",
        "cifar_resnet8x05",
        "--epochs",
        "1",
        "--data-dir",
        small_data,
        "--output",
        "run",
        "--resume",
    ]
    code, out, _ = mgd(*words)
    assert code == 0
    assert "run: nothing to resume, a new run starts" in out
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["resume"] is False
    (tmp_path / "run" / "versions.json").unlink()  # killed before it was written
    code, out, _ = mgd(*words)
    assert code == 0
    assert "nothing to resume" not in out
    assert "resumed after update 5" in out
    assert not list((tmp_path / "run").glob(".writing-*"))
    assert (tmp_path / "run" / "versions.json").is_file()


def test_the_command_of_the_start_is_repeated_where_other_steps_make_its_global_batch(mgd, small_data, tmp_path):
    words = [
        "train",
        "--model",
        "cifar_resnet8x05",
        "--epochs",
        "1",
        "--data-dir",
        small_data,
        "--output",
        "run",
        "--resume",
    ]
    batch = ["--batch-size", "32", "--grad-accum-steps", "2"]
    out = mgd(*words, *batch)[1]
    assert "64 images per update in 2 steps" in out
    assert "is of the run's start" not in out
    out = mgd(*words, "--batch-size", "16", "--grad-accum-steps", "2")[
        1
    ]  # half of a step, as on half as many processes
    assert "grad_accum_steps=2 is of the run's start: its 64 images per update stay, in 4 steps now." in out
    assert "resumed after update 5" in out
    for steps in ("1", "3", "4"):
        said = f"grad_accum_steps={steps} contradicts global_batch_size=64"
        refuse(mgd, [said, "expected 2 micro-batches"], *words, "--batch-size", "32", "--grad-accum-steps", steps)
    refuse(mgd, ["optim.global_batch_size: 64 -> 32"], *words, *batch, "--global-batch-size", "32")


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


def test_a_teacher_near_chance_is_warned_of(mgd, small_data, tmp_path):
    import timm

    torch.manual_seed(0)
    save_file(timm.create_model("cifar_resnet8", num_classes=10).state_dict(), tmp_path / "random.safetensors")
    words = [
        "distill",
        *SHORT,
        "--method",
        "none",
        "--teacher",
        "cifar_resnet8",
        "--teacher-checkpoint",
        "random.safetensors",
    ]
    code, out, _ = mgd(*words, "--data-dir", small_data, "--output", "run")
    assert code == 0
    assert "warning: the teacher is near chance (10.00 %)" in out


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


@pytest.mark.slow
def test_a_compiled_run_ends_where_an_eager_one_does(small_data, tmp_path):
    """Teacher, heads, MAS over AT, an average of weights, and a last batch of another size, which is not compiled.

    In processes of their own: the checks of shapes that tests put around every function cannot be compiled.
    """
    words = [
        *FAST,
        "--data-dir",
        str(small_data),
        "--criterion",
        "at",
        "--epochs",
        "1",
        "--lr",
        "0.001",
        "--batch-size",
        "48",
    ]
    words += ["--model-ema", "--model-ema-decay", "0.5", "--heads-protocol", "live", "--heads-epochs", "1"]
    students = []
    for flag in ("--no-compile", "--compile"):
        done = call("distill", *words, flag, "--output", str(tmp_path / flag))
        assert done.returncode == 0, done.stderr
        students.append(load_file(tmp_path / flag / "export" / "model.safetensors"))
    for name, tensor in students[0].items():
        torch.testing.assert_close(students[1][name], tensor, rtol=1e-2, atol=1e-3)
