"""Checkpoint files: what is read, what is refused, and that a crash leaves the old one."""

import argparse
import os
import re
import sys

import pytest
import torch
from conftest import spawn

import eval_aa
import models
import utils


def load(path, model="tiny"):
    return eval_aa.load_model(eval_aa.parse_args([str(path), "--model", model]), path)


def prefixed(prefix, **more):
    return lambda s: {**more, **{f"{prefix}{k}": v for k, v in s.items()}}


@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"net": s, "acc": 1.0},
    lambda s: {"model_state_dict": s, "optimizer": {"state": {0: {"momentum": torch.ones(2)}}}},
    lambda s: {"state_dict": s, "normalize": True}, lambda s: dict(sorted(s.items())),
    prefixed("module."), prefixed("1."), prefixed("module.1."), prefixed("_orig_mod."),
    prefixed("module.", n_averaged=torch.tensor(7)), prefixed("model.", mu=torch.ones(1, 3, 1, 1)),
    lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    lambda s: {**s, "sub_block1.layer.0.bn1.weight": torch.ones(3)}])
def test_forms_that_are_read(tmp_path, wrap):
    state = models.build("tiny", num_classes=7).state_dict()
    torch.save(wrap(state), tmp_path / "c.pt")
    model, about, _ = load(tmp_path / "c.pt")
    loaded = model.state_dict()
    assert list(loaded) == list(state) and all(torch.equal(loaded[k], state[k]) for k in state)
    assert about["num_classes"] == 7


def test_what_no_layer_holds_is_named_and_three_values_are_shown(tmp_path, capsys):
    more = {"mu": torch.tensor([0.5, 0.4, 0.3]), "sd": torch.full((3, 1, 1), 0.25), "n": torch.tensor(9)}
    torch.save(prefixed("1.", **more)(models.build("tiny").state_dict()), tmp_path / "c.pt")
    load(tmp_path / "c.pt")
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
        load(tmp_path / "c.pt")


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
                         "cut": "it is damaged", "zeros": "it is damaged", "folder": "Is a directory",
                         "missing": "No such file"}.items():
        with pytest.raises(utils.InputError, match=rf"{name}\.pt cannot be read.* {reason}") as e:
            utils.load_checkpoint(tmp_path / f"{name}.pt")
        assert len(str(e.value).splitlines()) == 1 and "weights_only" not in str(e.value)


@pytest.mark.parametrize("value", ([1, 2], None, {}, {"epoch": 1}, {"state_dict": {"epoch": 1}}))
def test_a_file_of_something_else_is_refused(tmp_path, value):
    torch.save(value, tmp_path / "alien.pt")
    with pytest.raises(utils.InputError, match="alien.pt holds no state dict"):
        load(tmp_path / "alien.pt")


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
