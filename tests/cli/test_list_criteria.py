"""What is labelled of the criteria: the list for a pair, and docs/methods.md."""

from pathlib import Path

import pytest

from mgd_timm.cli.list_criteria import Connection, connect, labelled, markdown, paper, paragraphs, table
from mgd_timm.criteria import CRITERIA
from mgd_timm.criteria.terms import hyper_parameters
from mgd_timm.models.build import build_model

METHODS = Path(__file__).parents[2] / "docs" / "methods.md"


def connection(teacher: str, student: str, side: int, maps: str) -> Connection:
    size = (3, side, side)
    return Connection(build_model(teacher, size, 10), build_model(student, size, 10), size, maps, 1000)


def test_the_docs_are_current():
    assert METHODS.read_text() == markdown(), "run: mgd-timm list criteria --markdown > docs/methods.md"


@pytest.mark.parametrize("name", CRITERIA)
def test_every_docstring_says_what_the_list_needs(name):
    kind = CRITERIA[name]
    assert ":" in paragraphs(kind)[0]
    assert float(labelled(kind, "Weight").split()[0].rstrip(",.;")) == kind.weight
    assert paper(kind) or name == "ce"
    section = markdown().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert [line.split("`")[1] for line in section.splitlines() if line.startswith("- `")] == list(
        hyper_parameters(kind)
    )
    assert not any(line.endswith("): ") for line in section.splitlines()), "an option without words"


def test_the_list_is_for_a_pair():
    lines = list(table(connection("cifar_resnet14", "cifar_resnet8x05", 32, "stages")))
    rows = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    assert list(rows) == ["name", *CRITERIA]
    assert "arXiv 1612.03928" in rows["at"]
    assert f"{(32 + 64 + 2) * 128:,}" in rows["crd"]
    assert any("memory banks 2 x 1,000 x 128: 1.0 MB" in line for line in lines)
    assert not any("refused" in line for line in lines)


def test_what_a_pair_cannot_do_is_said_once_with_the_reason():
    lines = list(table(connection("vit_tiny_patch16_224", "resnet10t", 64, "4")))
    refused = {line.split()[0] for line in lines if "refused [" in line}
    assert refused == {"ab", "catkd"}
    text = " ".join(" ".join(lines).split())
    assert "cannot return its maps before their activation" in text
    assert "has no class activation maps" in text
    stages = " ".join(" ".join(table(connection("cifar_resnet8", "cifar_vgg8", 32, "stages"))).split())
    assert "pairs maps one to one" not in stages  # of networks of different numbers of stages, as many are shown
    more = " ".join(" ".join(table(connection("cifar_resnet8", "cifar_vgg8", 32, "all"))).split())
    assert more.count("refused [1]") > 3
    assert more.count("pairs maps one to one") == 1
    with pytest.raises(ValueError, match="maps='foo': expected 'stages'"):
        connection("cifar_resnet8", "cifar_vgg8", 32, "foo")


def test_a_teacher_of_fixed_size_is_seen_in_its_own_size_as_in_a_run():
    rows = {
        line.split()[0]: line
        for line in table(connect("vit_tiny_patch16_224", "cifar_resnet8", maps="3", num_samples=100))
    }
    assert "refused" not in rows["at"]
    assert "refused" not in rows["nst"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes=1: expected 2 or more"),
        ({"num_samples": 0}, "num_samples=0: expected 1 or more"),
        ({"img_size": -4}, "img_size=-4: expected 1 or more"),
        ({"teacher": "embedded", "num_classes": 5}, r"num_classes=5: the networks were trained for \[10\] classes"),
        ({"teacher": "cifar_resnet9"}, "unknown model 'cifar_resnet9'"),
    ],
)
def test_wrong_pairs(options, message):
    with pytest.raises(ValueError, match=message):
        connect(
            **{"teacher": "cifar_resnet8", "student": "cifar_resnet8", "maps": "stages", "num_samples": 100, **options}
        )


def test_what_is_not_the_papers_own_is_said(monkeypatch):
    monkeypatch.setattr(CRITERIA["at"], "note", "inspired by a paper; constants ours")
    lines = list(table(connection("cifar_resnet8", "cifar_resnet8x05", 32, "stages")))
    at = next(number for number, line in enumerate(lines) if line.startswith("at "))
    assert lines[at + 1].strip() == "inspired by a paper; constants ours"
    assert "**Note:** inspired by a paper; constants ours" in markdown()
