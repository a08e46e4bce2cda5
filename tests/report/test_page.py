"""The page of `mgd-timm report`: whole, self-contained, and safe with names that would break it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import datasets
import pytest
from PIL import Image
from small import SHORT

from mgd_timm.cli.main import main
from mgd_timm.features import FeatureTap
from mgd_timm.report.cka import cka_table
from mgd_timm.report.comparisons import cka_section
from mgd_timm.report.measure import pooled_maps
from mgd_timm.report.write import find

HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "\N{RIGHT-TO-LEFT OVERRIDE}مرحبا",
    "wörd" * 60,
    "</title></style></svg>",
    "&amp; &lt;",
    "javascript:alert(3)",
    "]]>-->",
    "tab\there",
    "猫",
]
VOID = {"meta", "link", "img", "br", "line", "rect", "circle"}
KNOWN = {
    *("html", "head", "title", "style", "body", "main", "h1", "h2", "h3", "p", "div", "b", "span", "nav", "a", "bdi"),
    *("section", "table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "ul", "li", "svg", "text"),
    *("polyline", "pre", "code", "details", "summary"),
}
SECTIONS = [
    *(
        "accuracy",
        "costs",
        "curves",
        "classes",
        "agreement",
        "calibration",
        "complexity",
        "heads",
        "cka",
        "learnt",
        "recipes",
    )
]


class Page(HTMLParser):
    """Elements, attributes and text of a page. Refuses tags that do not match, and unknown ones."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if (tag, "svg" in self.open) != ("title", True):
            assert tag in KNOWN | VOID, tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID or (self.open and self.open[-1] == tag):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.fixture(scope="module")
def runs(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student alone, and one that it teaches, of hostile class names."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    for split in ("train", "test"):
        table = datasets.Dataset.from_parquet(str(small_data / f"{split}.parquet"), cache_dir=str(folder / "cache"))
        features = table.features.copy()
        features["label"] = datasets.ClassLabel(names=HOSTILE)
        table.cast(features).to_parquet(folder / "data" / f"{split}.parquet")
    data = ["--data-dir", str(folder / "data")]
    alone = ["train", "--model", "cifar_resnet8x05", "--epochs", "2", *data]
    taught = ["distill", *SHORT, "--teacher", str(folder / "alone"), *data]
    assert main([*alone, "--output", str(folder / "alone")]) == 0
    assert main([*taught, "--output", str(folder / "<b>\"mas'")]) == 0
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    place = runs / "report.html"
    assert main(["report", str(runs / "<b>\"mas'"), str(runs / "alone"), "--output", str(place)]) == 0
    return place.read_text(encoding="utf-8")


pytestmark = pytest.mark.slow


def test_the_page_is_well_formed_and_loads_nothing(page: str) -> None:
    read = Page(page)
    ids = [value for _, name, value in read.attributes if name == "id"]
    assert ids == SECTIONS
    links = [value for tag, name, value in read.attributes if (tag, name) == ("a", "href")]
    assert links == [f"#{one}" for one in SECTIONS]
    sources = [value for tag, name, value in read.attributes if name in ("src", "href") and tag != "a"]
    assert sources
    assert all(one.startswith("data:") for one in sources)
    assert not re.search(r"https?:|url\(|@import", page)
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]


def test_names_are_escaped_and_isolated(page: str) -> None:
    shown = "".join(Page(page).text["bdi"])
    for name in HOSTILE:
        assert name.replace("\t", "\N{REPLACEMENT CHARACTER}") in shown, name
    assert "<b>\"mas'" in shown
    assert "<script" not in page
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in re.sub(r"<bdi>.*?</bdi>|<pre>.*?</pre>|alt=\"[^\"]*\"", "", page)


def test_the_numbers_are_those_of_the_runs(page: str, runs: Path) -> None:
    for name in ("alone", "<b>\"mas'"):
        summary = json.loads((runs / name / "summary.json").read_text())
        assert f"<td>{summary['last']['top1']:.2f}</td><td>{summary['last']['top5']:.2f}</td>" in page
    for title in ("task, training", "kd, training", "abstract, training", "detailed, training", "top-1, evaluation"):
        assert f"<bdi>{title}</bdi>" in page
    provenance = json.loads((runs / "alone" / "export" / "recipe.json").read_text())
    assert provenance["model_sha256"][:16] in page
    assert str(runs) not in page  # no paths of the machine


def test_everything_is_there_but_the_gain_over_kd(page: str) -> None:
    left_out = re.findall(r'class="missing">(.*?)</p>', page)
    kd = "Left out: the gain over KD: name a run of mgd-timm distill --method none as well."
    nothing = "Left out: the images: there is none."
    assert left_out in ([kd], [kd, nothing])
    if nothing not in left_out:
        captions = ("image", "distilled: logits", "alone: logits", "teacher: logits", "teacher: abstract view")
        for what in (*captions, "teacher: detailed view"):
            assert f"<figcaption>{what}</figcaption>" in page


def test_what_a_run_alone_lacks_is_named_and_the_page_is_in_its_folder(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(runs / "alone")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {runs / 'alone' / 'report.html'}"
    text = (runs / "alone" / "report.html").read_text(encoding="utf-8")
    assert Page(text)
    assert text.count("no run here has a teacher") == 7
    assert "the heads: no run here has any" in text


def test_a_teacher_and_heads_that_are_gone_are_left_out(runs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "mas"
    shutil.copytree(runs / "<b>\"mas'", moved)
    shutil.rmtree(moved / "heads" / "checkpoints")
    place = tmp_path / "page.html"
    assert main(["report", str(moved), str(runs / "alone"), "--output", str(place)]) == 0
    assert "took its heads from the cache" in place.read_text(encoding="utf-8")
    recipe = moved / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(runs / "alone"), "/nowhere/else"))
    assert main(["report", str(moved), str(runs / "alone"), "--output", str(place)]) == 0
    text = place.read_text(encoding="utf-8")
    assert "Left out: the teacher: the teacher cannot be loaded" in text
    assert Page(text)


def test_each_network_sees_the_images_as_its_own_run_showed_them(runs: Path, tmp_path: Path) -> None:
    """The teacher's images are those of the run that it taught in, not those of the student beside it."""
    other = tmp_path / "alone"
    shutil.copytree(runs / "alone", other)
    recipe = other / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("  img_size: null", "  img_size: 32"))
    taught = runs / "<b>\"mas'"
    found = find([other, taught], {}, lambda _: None)
    assert not isinstance(found.teacher, str)
    students = [found.students[folder] for folder in (other, taught)]
    shown = [student.some(100)[0] for student in students]
    assert [images.shape[2] for images in shown] == [32, 28]
    tap = FeatureTap(students[0].model, "stages", input_size=(3, 32, 32)).eval()
    theirs, ours = pooled_maps(found.teacher.teacher, shown[1], 100), pooled_maps(tap, shown[0], 100)
    shades = "".join(f'fill-opacity="{value:.3f}"' for row in cka_table(theirs, ours) for value in row)
    assert "".join(re.findall(r'fill-opacity="[\d.]+"', cka_section(found))).startswith(shades)


def test_refusals_name_the_run(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["report", *words]) == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "holds no run (no recipe.yaml)" in refused(str(tmp_path))
    assert "expected a file such as" in refused(str(runs / "alone"), "--output", str(tmp_path))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(runs / "alone", unfinished)
    (unfinished / "summary.json").unlink()
    assert "has not finished: continue it with --resume" in refused(str(unfinished))
    shutil.copytree(runs / "data", tmp_path / "data")
    shutil.copy(tmp_path / "data" / "train.parquet", tmp_path / "data" / "test.parquet")
    shutil.copytree(runs / "alone", tmp_path / "other")
    recipe = tmp_path / "other" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(runs / "data"), str(tmp_path / "data")))
    assert "are evaluated on different images or classes" in refused(str(runs / "alone"), str(tmp_path / "other"))


@pytest.fixture
def chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium")
    return found


def test_a_browser_shows_it_without_a_complaint(chromium: str, page: str, runs: Path, tmp_path: Path) -> None:
    shot, address = tmp_path / "shot.png", (runs / "report.html").as_uri()
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=500,1400", f"--screenshot={shot}"]
    done = subprocess.run([chromium, *words, address], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    with Image.open(shot) as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 20  # it is not blank
