"""Students on a hub: uploaded by huggingface_hub to a server of this machine, loaded back by timm, and verified."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub_server import TOKEN, serve
from pages import call
from PIL import Image
from safetensors.torch import save_file
from small import environment, refuse
from test_card import exported

import mgd_timm
from mgd_timm.hub.markdown import NONE
from mgd_timm.hub.verify import Check
from mgd_timm.models.load import load_model
from mgd_timm.storage.digests import module_digest

# Takes commands as JSON; prints the exit code of each.
CALL = """
import json, sys
from mgd_timm.cli.main import main
for words in json.loads(sys.argv[1]):
    print("CODE", main(words), flush=True)
    print("END", file=sys.stderr, flush=True)
"""
# Takes cards of students in the current folder: runs the snippets of each, then prints whether timm gives the
# weights and the logits of the files beside it.
LOAD = """
import re, sys
import mgd_timm.models, timm, torch
from safetensors.torch import load_file

for name in sys.argv[1:]:
    text = open(f"{name}.md", encoding="utf-8").read()
    names = {}
    for snippet in re.findall(r"```python\\n(.*?)```", text, re.DOTALL):
        exec(snippet, names)
    found = [*names.get("maps", ()), *([names["last"]] if "last" in names else []), names["embedding"]]
    assert ", ".join(re.findall(r"# (\\(1, .*)", text)) == ", ".join(str(tuple(one.shape)) for one in found)
    images, weights = load_file(f"{name}.images"), load_file(f"{name}.safetensors")
    model = timm.create_model(f"hf-hub:ada/{name}", pretrained=True).eval()
    same = all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        print("LOADED", name, same, torch.equal(model(images["images"]), images["logits"]), flush=True)
"""


@pytest.fixture(scope="module")
def runs(small_data, tmp_path_factory):
    """A student alone and one of MAS."""
    root = tmp_path_factory.mktemp("runs")
    student = timm.create_model("cifar_resnet8x05", num_classes=10)
    (root / "initial.txt").write_text(module_digest(student))
    mgd_timm.train(student, str(small_data), output=root / "alone", epochs=1)
    options = {"epochs": 1, "heads_epochs": 1, "heads_augmentations": 1, "seed": 31}  # whose heads no cache has
    mgd_timm.distill(student="cifar_resnet8x05", data=str(small_data), output=root / "mas", **options)
    return root


@pytest.fixture(scope="module")
def dry(runs):
    """The folder of the student of MAS."""
    folder = runs / "dry"
    options = {"license": "mit", "compare": [runs / "alone"]}
    assert mgd_timm.publish(runs / "mas", "ada/fashion", folder=folder, **options) == str(folder)
    return folder


@pytest.fixture
def copied(dry, tmp_path):
    return shutil.copytree(dry, tmp_path / "copied")


def mgd(*words: object) -> tuple[int, str, str]:
    """`mgd-timm WORDS` in this process; gives exit code, stdout, stderr."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = call([str(word) for word in words])
    return code, out.getvalue(), errors.getvalue()


def table_of(folder: Path) -> dict[str, list[str]]:
    """The rows of a card's results by name."""
    lines = (folder / "README.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.count("|") == 7]
    return {row[0]: row[1:] for row in cells}


def failed(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if check.passed is False}


def test_the_card_has_the_numbers_of_the_runs(runs, dry):
    rows = table_of(dry)
    for label, run, prefix in (
        ("teacher (`cifar_resnet20`)", "mas", "teacher_"),
        ("student alone (`cifar_resnet8x05`)", "alone", ""),
        ("**this student** (`cifar_resnet8x05`)", "mas", ""),
    ):
        summary = json.loads((runs / run / "summary.json").read_text())
        values = summary if prefix else summary["last"]
        assert rows[label][:2] == [f"{values[f'{prefix}top{k}']:.2f}" for k in (1, 5)]
    assert "(13.7x less)" in rows["**this student** (`cifar_resnet8x05`)"][2]
    assert (dry / "model.safetensors").read_bytes() == (runs / "mas" / "export" / "model.safetensors").read_bytes()


def test_a_teacher_of_other_weights_gives_no_size(runs, tmp_path):
    folder = shutil.copytree(runs / "mas" / "export", tmp_path / "moved")
    origin = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({**origin, "teacher_sha256": "0" * 64}))
    said: list[str] = []
    mgd_timm.publish(folder, "ada/moved", license="mit", folder=tmp_path / "out", log=said.append)
    assert "left out of the card: there are other weights under its name now" in said[0]
    assert table_of(tmp_path / "out")["teacher (`cifar_resnet20`)"][2:] == [NONE] * 3


def test_a_published_folder_is_one_that_is_loaded_here(dry, runs, small_data):
    expected = json.loads((runs / "mas" / "summary.json").read_text())["last"]
    assert mgd_timm.evaluate(dry, str(small_data))["top1"] == expected["top1"]
    with pytest.raises(ValueError, match="give --data-dir"):
        mgd_timm.evaluate(dry)


def test_the_chain_of_digests_is_found(dry, runs):
    for place in (dry, runs / "mas", runs / "mas" / "export"):
        checks = mgd_timm.verify(place, teacher="embedded")
        assert failed(checks) == {}
        passed = {check.name for check in checks if check.passed}
        assert {"teacher", "granularity heads", "model.safetensors is the file that was exported"} <= passed
    assert "teacher" in failed(mgd_timm.verify(dry, teacher=str(runs / "alone")))
    assert failed(mgd_timm.verify("embedded")) == {}


def test_the_digest_of_the_starting_weights_is_that_of_the_module(runs):
    origins = [json.loads((runs / run / "export" / "recipe.json").read_text()) for run in ("alone", "mas")]
    assert origins[0]["initial_sha256"] == (runs / "initial.txt").read_text()
    assert origins[1]["initial_sha256"] != origins[0]["initial_sha256"]
    assert not {"teacher_sha256", "heads_sha256"} & set(origins[0])


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


MUTATIONS = {
    "a byte of the weights": lambda folder: flip(folder / "model.safetensors", -1),
    "a byte of the header": lambda folder: flip(folder / "model.safetensors", 40),
    "weights cut off": lambda folder: (folder / "model.safetensors").write_bytes(b"\x08"),
    "another accuracy in the recipe": lambda folder: edit(folder / "recipe.json", '"top1":', '"top1": 99.0, "was":'),
    "another seed in the recipe": lambda folder: edit(folder / "recipe.json", '"seed": 31', '"seed": 43'),
    "another digest of the teacher": lambda folder: edit(
        folder / "recipe.json", '"teacher_sha256": "', '"teacher_sha256": "0'
    ),
    "another digest of the heads": lambda folder: edit(
        folder / "recipe.json", '"heads_sha256": "', '"heads_sha256": "0'
    ),
    "a key more in the recipe": lambda folder: edit(folder / "recipe.json", "{", '{"best": true,'),
    "a recipe that is no JSON": lambda folder: (folder / "recipe.json").write_text("{"),
    "a recipe that is a list": lambda folder: (folder / "recipe.json").write_text("[]"),
    "another accuracy in the card": lambda folder: edit(
        folder / "README.md", "  - type: accuracy\n      value: ", "  - type: accuracy\n      value: 9"
    ),
    "a word of the card": lambda folder: edit(folder / "README.md", "## Limits", "## No limits"),
    "an empty card": lambda folder: (folder / "README.md").write_text(""),
    "another licence": lambda folder: edit(folder / "README.md", "license: mit", "license: apache-2.0"),
    "another normalisation": lambda folder: edit(folder / "config.json", '"std": [', '"std": [0.5,'),
    "another network": lambda folder: edit(folder / "config.json", "cifar_resnet8x05", "cifar_resnet20"),
    "a config that is no JSON": lambda folder: (folder / "config.json").write_bytes(b"\xff"),
    "other names of classes": lambda folder: edit(folder / "config.json", "Sandal", "Boot"),
    "other options in recipe.yaml": lambda folder: edit(folder / "recipe.yaml", "seed: 31", "seed: 1"),
    "a pickle": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
    **{
        f"no {name}": lambda folder, name=name: (folder / name).unlink()
        for name in ("README.md", "config.json", "model.safetensors", "recipe.json", "recipe.yaml")
    },
}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_of_a_published_folder_is_found(copied, mutation):
    MUTATIONS[mutation](copied)
    assert failed(mgd_timm.verify(copied))


def test_a_random_byte_of_any_file_is_found(copied, dry):
    generator = np.random.default_rng(0)
    for name in ("README.md", "config.json", "model.safetensors", "recipe.json", "recipe.yaml"):
        content = (dry / name).read_bytes()
        for place in generator.integers(0, len(content), 6).tolist():
            changed = bytearray(content)
            changed[place] ^= 1 << int(generator.integers(0, 8))
            (copied / name).write_bytes(bytes(changed))
            blank = bytes(changed).split() == content.split()  # of JSON, which says the same
            assert failed(mgd_timm.verify(copied)) or (name == "recipe.json" and blank), (name, place)
        (copied / name).write_bytes(content)
    assert failed(mgd_timm.verify(copied)) == {}


def test_edits_of_a_run_folder_are_found(runs, tmp_path):
    run = shutil.copytree(runs / "mas", tmp_path / "run")
    assert failed(mgd_timm.verify(run)) == {}
    edit(run / "summary.json", '"top1":', '"top1": 99.0, "was":')
    assert failed(mgd_timm.verify(run)).keys() == {"recipe.json is that of the run"}
    shutil.copy(runs / "mas" / "summary.json", run)
    edit(run / "export" / "recipe.json", '"lr": 0.05', '"lr": 0.5')
    assert "lr" in failed(mgd_timm.verify(run))["recipe.json is that of the run"]
    shutil.copy(runs / "mas" / "export" / "recipe.json", run / "export")
    shutil.copy(runs / "mas" / "export" / "recipe.json", run / "export")
    edit(run / "export" / "recipe.json", '"heads_sha256": "', '"heads_sha256": "0')
    assert "those in the run folder have" in failed(mgd_timm.verify(run))["granularity heads"]


def test_the_command_prints_a_line_per_check_and_names_what_fails(copied):
    code, text, _ = mgd("verify", copied)
    assert code == 0
    assert len(text.splitlines()) == 11
    flip(copied / "model.safetensors", -1)
    code, text, errors = mgd("verify", copied)
    assert code == 1
    assert "FAILED  model.safetensors is the file that was exported: its sha256 is" in text
    assert re.search(r"2 of 11 checks failed: model\.safetensors is the file", errors)
    refuse(mgd, ["nowhere: no such folder"], "verify", "nowhere")


def test_what_cannot_be_published_is_refused_before_anything_is_written(runs, copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = sorted(tmp_path.rglob("*"))
    run, other = runs / "mas", tmp_path / "other"
    refuse(mgd, ["no token of the hub", "HF_TOKEN", "--dry-run"], "publish", run, "ada/fashion", "--license", "mit")
    refuse(mgd, ["'fashion': expected user/name"], "publish", run, "fashion", "--license", "mit")
    refuse(mgd, ["names no licence", "--license mit"], "publish", run, "ada/fashion", "--dry-run")
    refuse(mgd, ["--output", "give --dry-run"], "publish", run, "ada/fashion", "--output", "x")
    refuse(mgd, ["--create-pr"], "publish", run, "ada/x", "--create-pr", "--revision", "b", "--license", "mit")
    refuse(mgd, ["nowhere"], "publish", "nowhere", "ada/fashion", "--dry-run", "--license", "mit")
    words = ("publish", run, "ada/fashion", "--dry-run", "--license", "mit")
    refuse(mgd, ["nowhere holds no run"], *words, "--compare", "nowhere")
    refuse(mgd, ["--output names the current folder"], *words, "--output", ".")
    refuse(mgd, ["--license ''"], *words[:-1], "")
    assert sorted(tmp_path.rglob("*")) == before
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    refuse(mgd, ["is no published folder", "mine.txt"], *words, "--output", other)
    flip(copied / "model.safetensors", -1)
    refuse(mgd, ["is not the file that was exported"], "publish", copied, "ada/x", "--dry-run", "--license", "mit")
    assert mgd(*words)[0] == 0
    assert mgd(*words)[0] == 0  # an earlier dry run is replaced
    (tmp_path / "link").symlink_to(tmp_path / "hub" / "ada" / "fashion")
    assert mgd(*words, "--output", tmp_path / "link")[0] == 0  # what it names is replaced
    assert (tmp_path / "hub" / "ada" / "fashion" / "README.md").is_file()


@pytest.mark.slow
def test_students_are_uploaded_loaded_by_timm_and_their_snippets_run(runs, tmp_path):
    names = ("cat", "dog", "Größe <b>")
    folders = {"fashion": runs / "mas", "vit": exported(tmp_path / "vit", names=names)}
    folders["grey"] = exported(tmp_path / "grey", names=names, architecture="test_resnet", channels=1)
    folders["four"] = exported(tmp_path / "four", names=names, architecture="test_mambaout", channels=4)
    (folders["vit"] / "pytorch_model.bin").write_bytes(b"pickle")
    mit = ["--license", "mit"]
    commands = [["publish", str(folder), f"ada/{name}", *mit] for name, folder in folders.items()]
    commands += [
        ["publish", str(runs / "mas"), "ada/fashion", *mit, "--revision", "next"],
        ["publish", str(runs / "mas"), "ada/fashion", *mit, "--create-pr"],
        ["publish", str(runs / "mas"), "bob/fashion", *mit],
        ["publish", str(runs / "mas"), "ada/secret", "--license", "nonsense"],
        ["publish", str(runs / "mas"), "ada/secret", *mit, "--private"],
        ["verify", "hf-hub:ada/fashion"],
        ["verify", "hf-hub:ada/nothing"],
        ["publish", str(runs / "mas"), "ada/late", *mit],
    ]
    (tmp_path / "server").mkdir()
    with serve(tmp_path / "server", full="ada/late") as hub:
        hub.root.joinpath("ada", "vit", "main", "onnx").mkdir(parents=True)
        hub.root.joinpath("ada", "vit", "main", "onnx", "model.onnx").write_bytes(b"of an earlier student")
        hub.root.joinpath("ada", "vit", "main", "notes.txt").write_bytes(b"mine")
        online = {**environment(), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1"}
        online |= {"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf")}

        def python(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-c", *words], capture_output=True, text=True, env=online, cwd=tmp_path, check=False
            )

        done = python(CALL, json.dumps(commands))
        codes = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("CODE")]
        assert codes == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1], done.stderr
        errors = done.stderr.split("END\n")
        assert "ada/vit exists: a commit is added" in errors[1]
        assert "nothing was uploaded (HfHubHTTPError: 403" in errors[6]
        assert "nothing was uploaded (ValueError" in errors[7]
        assert "hf-hub:ada/nothing cannot be fetched (RepositoryNotFoundError" in errors[10]
        assert "Traceback" not in done.stderr

        repository = hub.root / "ada"
        files = {"README.md", "config.json", "model.safetensors", "recipe.json", "recipe.yaml"}
        for branch in ("main", "next", "pr_1"):
            assert {path.name for path in (repository / "fashion" / branch).iterdir()} == files
        assert {path.name for path in (repository / "vit" / "main").rglob("*.*")} == {*files, "notes.txt"}
        assert not (hub.root / "bob").exists()
        assert (repository / "secret" / "private").read_text() in ("True", "private")

        assert "publishing ada/late failed, ada/late is there, and its files were not changed" in errors[11]
        assert not list((repository / "late" / "main").iterdir())

        Image.new("RGB", (80, 60), (200, 30, 90)).save(tmp_path / "image.jpg")
        for name, folder in folders.items():
            model = load_model(str(folder)).eval()
            images = torch.randn(2, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                save_file({"images": images, "logits": model(images)}, tmp_path / f"{name}.images")
            place = folder / "export" if name == "fashion" else folder
            shutil.copy(place / "model.safetensors", tmp_path / f"{name}.safetensors")
            shutil.copy(repository / name / "main" / "README.md", tmp_path / f"{name}.md")
        done = python(LOAD, *folders)
        found = [line for line in done.stdout.splitlines() if line.startswith("LOADED")]
        assert found == [f"LOADED {name} True True" for name in folders], done.stderr
