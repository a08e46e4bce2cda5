"""A part of benchmarks/any_timm.py: a sample of timm's architectures in every role, and what the sweep would notice."""

import json
from pathlib import Path

import any_timm as sweep
import pytest
import timm
import torch
from families import ENCODERS, FAMILIES
from torch import nn

from mgd_timm.models.build import build_model

pytestmark = pytest.mark.slow

EVERY = sweep.architectures()


def test_the_sweep_is_of_all_of_timm() -> None:
    assert len(EVERY) >= 1371
    assert {sweep.family(name) for name in EVERY} == set(FAMILIES)
    assert {name for name in EVERY if name.endswith("_enc")} == set(ENCODERS)


@pytest.mark.parametrize("name", EVERY[7::97])
def test_an_architecture_teaches_and_learns_by_shapes(name: str) -> None:
    row = sweep.by_shapes(name)
    assert {role: row[role] for role in sweep.ROLES} == dict.fromkeys(sweep.ROLES, True)
    assert row["maps"]
    assert row["parameters"] > 0


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_teaches_and_does_not_learn(name: str) -> None:
    row = sweep.by_shapes(name)
    assert (row["teacher"], row["headless"]) == (True, True)
    assert "has no classifier" in row["student"]


@pytest.mark.parametrize(("name", "learns"), [("test_vit", True), ("qwen3_vit_88m_enc", False)])
def test_a_real_step(name: str, learns: bool) -> None:
    row = sweep.by_steps(name, 64, {"depth": 1})
    assert row["teacher"] is True
    assert (row["student"] is True) is learns


def test_a_side_is_doubled_until_the_last_maps_have_two_positions() -> None:
    assert sweep.by_steps("test_resnet", 16, {})["side"] == 64


class Idle(nn.Linear):
    """Has a parameter that nothing reads."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features)
        self.unread = nn.Parameter(torch.zeros(1))


def test_a_parameter_without_a_gradient_is_noticed() -> None:
    size = (3, 64, 64)
    with torch.device("meta"):
        model = build_model("test_resnet", size, 10)
        model.fc = Idle(model.fc)
        tap, count = sweep.tapped(model, size)
        with pytest.raises(ValueError, match=r"no gradient for 1 parameters: student\.model\.fc\.unread"):
            sweep.learns(tap, tap.shapes(64), count, size)


def test_losses_that_are_not_finite_are_noticed() -> None:
    shapes = sweep.partner(4)
    terms = dict.fromkeys(("task", "kd", "at", "abstract", "detailed"), torch.tensor(1.0))
    assert sweep.summed(terms, shapes) == 5
    with pytest.raises(ValueError, match="not finite"):
        sweep.summed({**terms, "at": torch.tensor(float("nan"))}, shapes)
    with pytest.raises(ValueError, match=r"expected .*'kd'"):
        sweep.summed({name: term for name, term in terms.items() if name != "kd"}, shapes)


def test_an_architecture_that_cannot_be_built_has_its_reason() -> None:
    row = sweep.by_shapes("test_resnet") | {"commit": "c"}
    refused = {
        "model": "some_net",
        "family": "resnet",
        "commit": "c",
        **dict.fromkeys(sweep.ROLES, "ValueError: some_net: no"),
    }
    body = sweep.body_of({"architectures": {r["model"]: r for r in (row, refused)}, "steps": {}}, "what")
    assert body["counts"] == {"architectures": 2, "families": 1, "teacher": 1, "student": 1, "headless": 1}
    assert "- student: some_net: ValueError: NAME: no" in sweep.reasons(body)
    assert "1 of 2" in sweep.summary(body)


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    rows = {
        "architectures": {"resnet18": {"model": "resnet18", "family": "resnet", "commit": "c", "teacher": True}},
        "steps": {},
    }
    rows["architectures"]["resnet18"] |= dict.fromkeys(sweep.ROLES, True)
    body = sweep.body_of(rows, "what")
    sweep.write(path, body)
    assert json.loads(path.read_text()) == body
    assert sweep.known(path) == rows
    sweep.write(path, {**body, "versions": {**body["versions"], "timm": "0"}})
    assert sweep.known(path) == {"architectures": {}, "steps": {}}


def test_a_part_does_not_replace_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.parse(["--filter", "vit_*"])
    assert "--output" in capsys.readouterr().err


@pytest.mark.skipif(not sweep.FILE.is_file(), reason="not measured yet")
def test_the_results_are_of_all_architectures() -> None:
    body = json.loads(sweep.FILE.read_text())
    if body["versions"]["timm"] == timm.__version__:
        assert [row["model"] for row in body["architectures"]] == sorted(EVERY)
