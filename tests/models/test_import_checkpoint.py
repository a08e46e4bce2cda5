"""Public checkpoints: every layout that is read, every file that is refused and not executed, and the folder that comes
out."""

import argparse
import json
import os
import warnings
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from public_networks import CIFAR10, NAME, network, same
from safetensors.torch import save_file
from small import call
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

from mgd_timm.cli.import_checkpoint import import_checkpoint
from mgd_timm.cli.main import main
from mgd_timm.models.import_checkpoint import read_public_checkpoint
from mgd_timm.models.load import load_model
from mgd_timm.storage.digests import sha256


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        dict,
        lambda state: {
            "epoch": 240,
            "model": state,
            "accuracy": torch.tensor(0.7),
            "optimizer": {"lr": 0.1, "names": ["a"]},
        },
        lambda state: {"state_dict": state},
        lambda state: {"net": state, "acc": 93.5, "epoch": 199},
        lambda state: {"net": 3, "state_dict": state},
        lambda state: OrderedDict((f"module.{name}", value) for name, value in state.items()),
        lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},  # of a compiled model
        lambda state: {"model_state_dict": state, "optimizer_state_dict": {"lr": 0.1}, "epoch": 3},
        lambda state: {"model_state_dict": dict.fromkeys(state, torch.zeros(1)), "ema_state_dict": state},
        # torchvision's references, whose moving average is torch's AveragedModel of a DataParallel model
        lambda state: {
            "model": dict.fromkeys(state, torch.zeros(1)),
            "model_ema": {
                "n_averaged": torch.tensor(5),
                **{f"module.module.{name}": value for name, value in state.items()},
            },
        },
        lambda state: {
            "pytorch-lightning_version": "2.5.0",
            "callbacks": {},
            "state_dict": {
                "loss.weight": torch.ones(10),
                **{f"model._orig_mod.{name}": value for name, value in state.items()},
            },
        },
        lambda state: {f"timm_model.{name}": value for name, value in state.items()},
        lambda state: {"model": {"state_dict": {f"_orig_mod.module.{name}": value for name, value in state.items()}}},
        lambda state: {
            "model": {f"module.{name}": nn.Parameter(value, requires_grad=False) for name, value in state.items()}
        },
    ],
    ids=[
        "plain",
        "dict",
        "model",
        "state_dict",
        "net",
        "word-before",
        "prefix",
        "compiled",
        "model_state_dict",
        "ema_state_dict",
        "torchvision",
        "lightning",
        "transformers",
        "nested",
        "parameters",
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_layouts(tmp_path, wrap, zipped):
    state = network().state_dict()
    torch.save(wrap(state), tmp_path / "public.pth", _use_new_zipfile_serialization=zipped)
    found = read_public_checkpoint(tmp_path / "public.pth")
    assert same(found, dict(state))
    assert {type(value) for value in found.values()} == {Tensor}


def test_safetensors_whatever_the_name(tmp_path):
    state = dict(network().state_dict())
    for name in ("weights.safetensors", "weights.bin"):
        save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / name)
        assert same(dict(sorted(read_public_checkpoint(tmp_path / name).items())), dict(sorted(state.items())))


def test_a_prefix_is_dropped_from_all_or_none(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(2)}
    torch.save(state, tmp_path / "x.pt")
    assert list(read_public_checkpoint(str(tmp_path / "x.pt"))) == ["module.a", "b"]


class Command:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["alone", "beside", "within", "name"])
def test_code_in_a_file_is_not_run(tmp_path, zipped, place):
    state, marker = dict(network().state_dict()), tmp_path / "ran"
    evil = Command(marker)
    content = {
        "alone": evil,
        "beside": {"model": state, "opt": evil},
        "within": {"model": {**state, "x": evil}},
        "name": {"model": state, (evil,): 1},
    }[place]
    torch.save(content, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    for attempt in (
        lambda: read_public_checkpoint(tmp_path / "evil.pt"),
        lambda: import_checkpoint(tmp_path / "evil.pt", NAME, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"evil.pt holds more than tensors: \w+\.mkdir.* nothing of it was run"):
            attempt()
    assert not marker.exists()
    assert not (tmp_path / "out").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)  # it would have
    assert marker.is_dir()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_of_timms_train_script_is_read_and_code_in_its_options_is_not_run(tmp_path, zipped):
    model = network()
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        args=argparse.Namespace(model=NAME, lr=0.1),
        checkpoint_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=1.0)
    read = read_public_checkpoint(tmp_path / "model_best.pth.tar")
    assert all(torch.equal(read[name], tensor) for name, tensor in model.state_dict().items())
    averaged = network()
    with torch.no_grad():
        averaged.fc.bias += 1
    saver.model_ema = ModelEmaV3(averaged)
    saver.save_checkpoint(1, metric=2.0)
    assert torch.equal(
        read_public_checkpoint(tmp_path / "model_best.pth.tar")["fc.bias"], averaged.fc.bias
    )  # as timm's own loader reads it
    for options in (argparse.Namespace(evil=Command(tmp_path / "ran")), Fraction(1, 2)):
        content = {"state_dict": model.state_dict(), "args": options}
        torch.save(content, tmp_path / "last.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"last\.pth holds more than tensors: .*write its weights alone"):
            read_public_checkpoint(tmp_path / "last.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files(tmp_path, kind):
    path = tmp_path / "public.pth"
    if kind == "safetensors":
        save_file(dict(network().state_dict()), path)
    else:
        torch.save(network().state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (1, 8, 9, 64, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"public.pth: cannot be read as .*: download it again"):
            read_public_checkpoint(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty: download it again"):
        read_public_checkpoint(path)
    path.write_bytes(whole)
    assert len(read_public_checkpoint(path)) == len(network().state_dict())


@pytest.mark.parametrize(
    "text", [b"404: Not Found\n", b"<!DOCTYPE html><html></html>", b"version https://git-lfs", b'{"a": 1, "b": {}}']
)
def test_what_is_no_checkpoint(tmp_path, text):
    (tmp_path / "x.pth").write_bytes(text)
    with pytest.raises(ValueError, match=r"x.pth: cannot be read as a checkpoint"):
        read_public_checkpoint(tmp_path / "x.pth")


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_public_checkpoint(path)


def test_a_program_is_no_checkpoint(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="is a TorchScript program, not weights"):
        read_public_checkpoint(tmp_path / "x.pt")


_HOLDS_ITSELF: dict = {}
_HOLDS_ITSELF["model"] = _HOLDS_ITSELF


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_HOLDS_ITSELF, "'model' is of type dict, expected dense real tensors"),
        ([torch.ones(1)], "holds a list, expected tensors by name"),
        (torch.ones(1), "holds a Tensor, expected tensors by name"),
        ({}, "holds no tensors"),
        ({"model": {}}, "holds no tensors"),
        ({"epoch": 3, "weights": {"a": torch.ones(1)}}, "'epoch' is of type int, expected dense real tensors"),
        ({"model": {"a": torch.ones(1), "b": [1]}}, "'b' is of type list"),
        ({3: torch.ones(1)}, "3 is a torch.strided torch.float32 tensor"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' is a torch.sparse_coo torch.float32 tensor"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "'a' is a torch.strided torch.complex64 tensor"),
    ],
)
def test_what_holds_no_tensors_by_name(tmp_path, content, expected):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=expected):
        read_public_checkpoint(tmp_path / "x.pt")


# Ours, and how public files of the family call the beginning of a name.
PUBLIC = {
    "cifar_resnet14": {},
    "cifar_resnet20x0375": {},
    "cifar_wrn_16_1": {},
    "cifar_vgg8": {},
    "cifar_mobilenetv2": {"classifier": "classifier.0"},
    "cifar_shufflev1": {"fc": "linear"},
    "cifar_shufflev2": {"fc": "linear"},
    "cifar_resnet50": {"fc": "linear"},
    "test_resnet": {},
}


def public_state(model: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    state = {}
    for key, value in model.state_dict().items():
        first, _, rest = key.partition(".")
        state[f"{names.get(first, first)}.{rest}"] = value
    return state


@pytest.mark.parametrize("name", PUBLIC)
def test_families(tmp_path, name):
    model = network(name, classes=12)
    state = public_state(model, PUBLIC[name])
    assert (set(state) == set(model.state_dict())) is (not PUBLIC[name])
    torch.save(
        {"epoch": 240, "model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "public.pth"
    )
    folder = import_checkpoint(tmp_path / "public.pth", name, tmp_path / "out", **CIFAR10, license="mit")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert same(loaded.state_dict(), model.state_dict())
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        assert torch.equal(loaded.eval()(x), model(x))
    config = json.loads((folder / "config.json").read_text())
    known = config["pretrained_cfg"]
    assert (tuple(known["mean"]), tuple(known["std"])) == tuple(CIFAR10.values())
    assert (config["architecture"], config["num_classes"], known["license"], known["tag"]) == (
        name,
        12,
        "mit",
        "imported",
    )
    assert config["label_names"] == [str(i) for i in range(12)]
    if name == "cifar_mobilenetv2":  # other repositories call it as we do
        torch.save(model.state_dict(), tmp_path / "ours.pth")
        again = import_checkpoint(tmp_path / "ours.pth", name, tmp_path / "again")
        assert same(timm.create_model(f"local-dir:{again}", pretrained=True).state_dict(), model.state_dict())
        torch.save({**state, **model.state_dict()}, tmp_path / "both.pth")
        with pytest.raises(ValueError, match="under both names of a pair"):
            import_checkpoint(tmp_path / "both.pth", name, tmp_path / "no")


def test_what_comes_out_teaches_and_says_where_it_is_from(tmp_path):
    model = network(classes=3, in_chans=1)
    path = tmp_path / "public.safetensors"
    save_file(dict(model.state_dict()), path)
    names = ("cat", "dog", "hen")
    folder = import_checkpoint(
        path, NAME, str(tmp_path / "out"), num_classes=3, mean=[0.3], std=[0.4], class_names=names
    )
    teacher = load_model(str(folder))
    assert same(teacher.state_dict(), model.state_dict())
    assert tuple(teacher.pretrained_cfg["label_names"]) == names
    assert tuple(teacher.pretrained_cfg["input_size"]) == (1, 32, 32)
    origin = json.loads((folder / "recipe.json").read_text())
    assert origin["imported"] == {"file": "public.safetensors", "sha256": sha256(path)}
    assert origin["architecture"] == NAME


def test_the_architectures_mean_and_std_unless_given(tmp_path):
    torch.save(network().state_dict(), tmp_path / "x.pt")
    known = load_model(str(import_checkpoint(tmp_path / "x.pt", NAME, tmp_path / "out"))).pretrained_cfg
    assert tuple(known["mean"]) == (0.5071, 0.4867, 0.4408)
    assert tuple(known["std"]) == (0.2675, 0.2565, 0.2761)


def test_old_files_have_no_counters_and_half_precision_is_widened(tmp_path):
    model = network()
    state = {
        name: value.half() for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    torch.save({"net": state}, tmp_path / "old.t7")
    loaded = load_model(str(import_checkpoint(tmp_path / "old.t7", NAME, tmp_path / "out"))).state_dict()
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert loaded[name] == 0
        else:
            assert loaded[name].dtype == torch.float32
            assert torch.equal(loaded[name], value.half().float())


def test_a_folder_is_kept_unless_told(tmp_path):
    torch.save(network().state_dict(), tmp_path / "x.pt")
    torch.save(network(classes=4).state_dict(), tmp_path / "y.pt")
    folder = import_checkpoint(tmp_path / "x.pt", NAME, tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists: choose another folder"):
        import_checkpoint(tmp_path / "y.pt", NAME, folder)
    assert load_model(str(folder)).num_classes == 10
    import_checkpoint(tmp_path / "y.pt", NAME, folder, overwrite=True)
    assert load_model(str(folder)).num_classes == 4


def test_only_an_export_is_replaced(tmp_path):
    place = tmp_path / "mine"
    place.mkdir()
    torch.save(network().state_dict(), tmp_path / "x.pt")
    (place / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is no export: thesis.txt is in it, and would be lost"):
        import_checkpoint(tmp_path / "x.pt", NAME, place, overwrite=True)
    with pytest.raises(FileExistsError, match=r"x\.pt is a file"):
        import_checkpoint(tmp_path / "x.pt", NAME, tmp_path / "x.pt", overwrite=True)
    (place / "thesis.txt").rename(place / "recipe.yaml")
    torch.save(network().state_dict(), place / "model.safetensors")
    with pytest.raises(FileExistsError, match=r"holds the checkpoint model.safetensors itself"):
        import_checkpoint(place / "model.safetensors", NAME, place, overwrite=True)
    folder = import_checkpoint(tmp_path / "x.pt", NAME, tmp_path / "real")
    (tmp_path / "link").symlink_to(folder)
    import_checkpoint(tmp_path / "x.pt", NAME, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine", "real", "x.pt"]


def test_the_command(tmp_path, capsys):
    torch.save({"state_dict": network().state_dict()}, tmp_path / "x.pt")
    words = ["import", str(tmp_path / "x.pt"), str(tmp_path / "out"), "--model", NAME]
    values = ["--mean", "0.4914", "0.4822", "0.4465", "--std", "0.2023", "0.1994", "0.2010", "--license", "mit"]
    assert main([*words, *values, "--num-classes", "10", "--class-names", *"abcdefghij"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    known = load_model(str(tmp_path / "out")).pretrained_cfg
    assert (tuple(known["mean"]), tuple(known["std"])) == tuple(CIFAR10.values())
    assert (known["license"], "".join(known["label_names"])) == ("mit", "abcdefghij")
    assert main([*words, "--overwrite"]) == 0
    assert "normalised by mean [0.5071, 0.4867, 0.4408] and std [0.2675," in capsys.readouterr().out
    assert main(words) == 1
    assert "exists: choose another folder" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    for wrong, code, expected in (
        ([*words[:-1], "cifar_resnet14", "--overwrite"], 1, "does not fit cifar_resnet14: missing"),
        (["import", str(tmp_path / "no.pt"), str(tmp_path / "o"), "--model", NAME], 1, "no.pt: no such file"),
        (words[:-2], 2, "model"),
        ([*words, "--licence", "mit"], 2, "did you mean --license"),
    ):
        if code == 2:  # the parser's
            with pytest.raises(SystemExit, match="2"):
                main(wrong)
        else:
            assert main(wrong) == code
        assert expected in capsys.readouterr().err
    assert load_model(str(tmp_path / "out")).pretrained_cfg["license"] == "other"  # what failed replaced nothing


@pytest.mark.slow
def test_a_real_process_imports_what_is_evaluated(tmp_path, small_data, capsys):
    """A public file, module prefix and all, as a model of the embedded images."""
    model = network(in_chans=1)
    torch.save({"net": {f"module.{name}": value for name, value in model.state_dict().items()}}, tmp_path / "x.pth")
    done = call(
        "import", str(tmp_path / "x.pth"), str(tmp_path / "out"), "--model", NAME, "--mean", "0.3", "--std", "0.35"
    )
    assert done.returncode == 0, done.stderr
    assert main(["evaluate", str(tmp_path / "out"), "--data-dir", str(small_data), "--in-chans", "1"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["n"] == 100
    assert 0 <= found["top1"] <= found["top5"] <= 100
