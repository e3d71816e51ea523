"""Checkpoint files: what is read, what is refused, and that a crash leaves the old one."""

import argparse
import json
import math
import os
import re
import statistics
import sys

import pytest
import torch
from conftest import ROOT, spawn

import eval_aa
import models
import train_pgdat
import utils

MINI = ROOT / "data" / "cifar10_mini.npz"


def prefixed(prefix, **more):
    return lambda s: {**more, **{f"{prefix}{k}": v for k, v in s.items()}}


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"net": s, "acc": 1.0},
    lambda s: {"model_state_dict": s, "optimizer": {"state": {0: {"momentum": torch.ones(2)}}}},
    lambda s: {"state_dict": s, "normalize": True, "rng": {"torch": torch.ones(9)}},
    lambda s: dict(sorted(s.items())),
    prefixed("module."), prefixed("1."), prefixed("module.1."), prefixed("_orig_mod."),
    prefixed("module.", n_averaged=torch.tensor(7)), prefixed("model.", mu=torch.ones(1, 3, 1, 1)),
    lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    lambda s: {**s, "sub_block1.layer.0.bn1.weight": torch.ones(3)}])
def test_forms_that_are_read(tmp_path, wrap):
    state = models.build("tiny", num_classes=7).state_dict()
    torch.save(wrap(state), tmp_path / "c.pt")
    model, about, _ = eval_aa.load_model(tmp_path / "c.pt", "tiny")
    loaded = model.state_dict()
    assert list(loaded) == list(state) and all(torch.equal(loaded[k], state[k]) for k in state)
    assert about["num_classes"] == 7


def test_what_no_layer_holds_is_named_and_three_values_are_shown(tmp_path, capsys):
    more = {"mu": torch.tensor([0.5, 0.4, 0.3]), "sd": torch.full((3, 1, 1), 0.25), "n": torch.tensor(9)}
    torch.save(prefixed("1.", **more)(models.build("tiny").state_dict()), tmp_path / "c.pt")
    eval_aa.load_model(tmp_path / "c.pt", "tiny")
    assert capsys.readouterr().out.endswith(
        "c.pt: no layer holds mu, sd, n: ignored. Are these what --mean and --std should be: "
        "mu 0.5 0.4 0.3, sd 0.25 0.25 0.25?\n")


UNEXPECTED, MISSING = "Unexpected key(s) in state_dict: ", "Missing key(s) in state_dict: "


@pytest.mark.parametrize("wrap, problem", [
    (lambda s: {"net": s, "ema": s}, "several state dicts: save one of net, ema in a file of its own"),
    (lambda s: {"optimizer": {"state": s}}, "holds no state dict"),
    (lambda s: {**prefixed("a.")(s), **prefixed("b.")(s)}, f'{UNEXPECTED}"b.conv1.weight'),
    (lambda s: {**s, "layer1.0.shortcut.1.weight": torch.ones(3)}, f'{UNEXPECTED}"layer1.0.shortcut.1'),
    (lambda s: prefixed("a.")({k: v for k, v in s.items() if k != "conv1.weight"}), f'{MISSING}"conv1'),
    (lambda s: {k: v for k, v in s.items() if k != "linear.bias"}, f'{MISSING}"linear.bias'),
    (lambda s: {**s, "conv1.weight": torch.zeros(64, 3, 3, 3)}, "size mismatch for conv1.weight"),
    (lambda s: {**s, "linear.bias": s["linear.bias"] + float("nan")}, "NaN or infinite weights")])
def test_other_forms_and_architectures_are_refused_by_what_differs_first(tmp_path, wrap, problem):
    torch.save(wrap(models.build("tiny").state_dict()), tmp_path / "c.pt")
    with pytest.raises(utils.InputError, match=rf"c\.pt .*{re.escape(problem)}"):
        eval_aa.load_model(tmp_path / "c.pt", "tiny")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of two state dicts after three epochs of standard training: ReLU, Softplus with beta 1."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.ACTIVATIONS, "softplus", torch.nn.Softplus)
        for activation in ("relu", "softplus"):
            argv = ["--model", "tiny", "--dataset", str(MINI), "--n-train", "1000", "--attack", "none",
                    "--epochs", "3", "--batch-size", "50", "--lr-schedule", "onecycle", "--eval-from", "3",
                    "--activation", activation, "--out", str(folder / activation)]
            patch.setattr(sys, "argv", ["train_pgdat.py", *argv])
            train_pgdat.main()
            utils.LOCKS.clear()
            state = utils.load_checkpoint(folder / activation / "last.pt")["state_dict"]
            torch.save(state, folder / f"{activation}.pt")
    return folder


def raw_shortcut(block, x):
    """A pre-activation block whose projection sees its input, not the activated one."""
    shortcut = x if block.shortcut is None else block.shortcut(x)
    out = block.conv1(block.act(block.bn1(x)))
    return block.conv2(block.act(block.bn2(out))) + shortcut


NARROW = "--mean", "0.4914", "0.4822", "0.4465", "--std", "0.2023", "0.1994", "0.2010"
REMEDY = r"; with --mean 0\.4914 0\.4822 0\.4465 --std 0\.2471 0\.2435 0\.2616 it is 0\.0\d"


@pytest.mark.parametrize("name, flags, expected", [
    ("relu", (), None), ("relu", NARROW, REMEDY), ("relu", ("--no-normalize",), REMEDY),
    ("relu", ("--activation", "leakyrelu"), ""), ("softplus", ("--activation", "softplus"), ""),
    ("relu", "raw", "")])
def test_batch_norm_tells_of_another_function_on_named_data(
        trained, tmp_path, script, monkeypatch, name, flags, expected):
    data = utils.load_dataset(str(MINI))
    monkeypatch.setattr(eval_aa, "load_dataset", lambda *args: data)
    if flags == "raw":
        flags = ()
        monkeypatch.setattr(models.PreActBlock, "forward", raw_shortcut)
    argv = trained / f"{name}.pt", "--model", "tiny", *flags, "--attacks", "none", "--n", 10
    status, out, err = script(eval_aa, *argv, "--out", tmp_path / "r.json")
    value = json.loads((tmp_path / "r.json").read_text())["misfit"]
    assert status == 0 and (value > 0.25 if expected is not None else value < 0.15), (value, err)
    assert ("warning" in out) == (expected is not None)
    if expected is not None:
        assert re.search(rf"do not fit: misfit {value:.2f}, expected below 0\.2{expected}\n", out)
    out = script(eval_aa, *argv, "--dataset", MINI, "--out", tmp_path / "npz.json")[1]
    assert "warning" not in out and json.loads((tmp_path / "npz.json").read_text())["misfit"] == value


def test_the_misfit_by_hand(monkeypatch):
    """Of two batches, and without the layer that has seen none."""
    monkeypatch.setattr(torch.Tensor, "split", lambda x, n: x.chunk(2))
    used, unused = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
    used.running_var.copy_(torch.tensor([0.05, 0.2, 0.04]))
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    values = [abs(math.log((batch[:, c].var().item() + 1e-5) / (v + 1e-5)))
              for batch in utils.to_float(images).chunk(2) for c, v in enumerate((0.05, 0.2, 0.04))]
    want = statistics.mean(statistics.median(part) for part in (values[:3], values[3:]))
    model = torch.nn.Sequential(used, unused).eval()
    assert eval_aa.misfit(model, images) == pytest.approx(want, abs=6e-4) and want > 0.1
    assert eval_aa.misfit(unused.eval(), images) is None


class Malicious:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    for name, value in (("bare.pt", Malicious(tmp_path / "x")),
                        ("inside.pt", {"state_dict": {}, "args": Malicious(tmp_path / "x")})):
        torch.save(value, tmp_path / name)
        with pytest.raises(utils.InputError, match=f"{name} cannot be read as a checkpoint: .*mkdir"):
            utils.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "x").exists()


def test_a_file_that_cannot_be_read_says_why_in_a_line(tmp_path):
    torch.save({"state_dict": models.build("tiny").state_dict(), "args": argparse.Namespace(lr=1)},
               tmp_path / "namespace.pt")
    torch.save(models.build("tiny").state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    hole = len(whole) // 2
    contents = {"empty": b"", "page": b"\n<!DOCTYPE html>", "text": b"hello, world", "cut": whole[:-20],
                "zeros": whole[:hole] + bytes(200) + whole[hole + 200:]}
    for name, content in contents.items():
        (tmp_path / f"{name}.pt").write_bytes(content)
    (tmp_path / "folder.pt").mkdir()
    for name, reason in {"namespace": "holds an object of argparse.Namespace, .* save the state dict alone",
                         "empty": "it is empty", "page": "it is a web page", "text": "it is damaged, or no",
                         "cut": "it is damaged", "zeros": "the checksum of .* is wrong",
                         "folder": "Is a directory",
                         "missing": "No such file"}.items():
        with pytest.raises(utils.InputError, match=rf"{name}\.pt cannot be read.* {reason}") as e:
            utils.load_checkpoint(tmp_path / f"{name}.pt")
        assert len(str(e.value).splitlines()) == 1 and "weights_only" not in str(e.value)


@pytest.mark.parametrize("value", ([1, 2], None, {}, {"epoch": 1}, {"state_dict": {"epoch": 1}}))
def test_a_file_of_something_else_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "alien.pt")
    with pytest.raises(utils.InputError, match="alien.pt holds no state dict"):
        eval_aa.load_model(tmp_path / "alien.pt", "tiny")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "c.json"
    utils.write_json(path, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(utils.os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            utils.write_json(path, 2)
    monkeypatch.setattr(utils, "RANK", 1)  # of several processes only the first writes
    utils.write_json(path, 3)
    assert path.read_text() == "1\n"
    monkeypatch.undo()
    os.link(path, tmp_path / "old.json")
    utils.write_json(path, 2)  # renamed, not written over
    assert [p.read_text() for p in (path, tmp_path / "old.json")] == ["2\n", "1\n"]


def test_a_full_disk_ends_in_one_line(tmp_path, small_npz):
    train = f"{sys.executable} train_pgdat.py --model tiny --dataset {small_npz} --steps 1 --epochs 1"
    done = spawn("bash", "-c", f"ulimit -f 600; {train} --out {tmp_path}/run")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("File too large"), done.stderr
    assert not (tmp_path / "run" / "last.pt").exists()
