"""Checkpoint files: what is read, what is refused, and that a crash leaves the old one."""

import os
import sys

import pytest
import torch
from conftest import spawn

import eval_aa
import models
import utils


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s},
                                  lambda s: {"state_dict": s, "epoch": 3},
                                  lambda s: {f"module.{k}": v for k, v in s.items()}])
def test_forms_that_are_read(tmp_path, wrap):
    state = models.build("tiny").state_dict()
    torch.save(wrap(state), tmp_path / "c.pt")
    loaded = eval_aa.open_checkpoint(tmp_path / "c.pt")["state_dict"]
    assert list(loaded) == list(state) and all(torch.equal(loaded[k], state[k]) for k in state)


class Malicious:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


def test_a_malicious_pickle_is_refused_and_not_run(tmp_path):
    for name, value in (("bare.pt", Malicious(tmp_path / "x")),
                        ("inside.pt", {"state_dict": {}, "args": Malicious(tmp_path / "x")})):
        torch.save(value, tmp_path / name)
        with pytest.raises(utils.InputError, match=f"{name} cannot be read"):
            utils.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "x").exists()


def test_damaged_and_alien_files_are_refused(tmp_path):
    torch.save(models.build("tiny").state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 20):
        (tmp_path / f"cut{keep}.pt").write_bytes(whole[:keep])
    (tmp_path / "text.pt").write_text("hello, world")
    (tmp_path / "folder.pt").mkdir()
    for i, value in enumerate(([1, 2], None, {}, {"epoch": 1}, {"state_dict": {"epoch": 1}})):
        torch.save(value, tmp_path / f"alien{i}.pt")
    (tmp_path / "whole.pt").unlink()
    for path in (*tmp_path.iterdir(), tmp_path / "missing.pt"):
        with pytest.raises(utils.InputError, match=path.name):
            eval_aa.open_checkpoint(path)


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


def test_weights_of_another_architecture_or_not_finite_are_refused_by_their_first_key():
    """That old checkpoints, as before torch 0.4.1, count no batches is no difference."""
    state = models.build("tiny").state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    eval_aa.load_weights(models.build("tiny"), old, "x.pt")
    wrn = {"conv1.weight": torch.zeros(16, 3, 3, 3), "fc.bias": torch.zeros(10)}
    nan = {**state, "linear.bias": state["linear.bias"] + float("nan")}
    for other, problem in ((wrn, r'another architecture: .*"layer1.0.bn1.weight'), (nan, "NaN or infinite"),
                           (models.build("tiny", 100).state_dict(), r"mismatch for linear.weight.*\[100, ")):
        with pytest.raises(utils.InputError, match=f"x.pt .*{problem}"):
            eval_aa.load_weights(models.build("tiny"), other, "x.pt")
