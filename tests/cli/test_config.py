"""Flags and files of flags: what --print_config writes, --config reads."""

import pytest
import yaml
from small import refuse


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
