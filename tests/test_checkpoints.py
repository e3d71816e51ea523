"""Checkpoint files: what is read, what is refused, and that a crash leaves the old one."""

import os

import pytest
import torch

import models
import runs
import utils


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s},
                                  lambda s: {"state_dict": s, "epoch": 3},
                                  lambda s: {f"module.{k}": v for k, v in s.items()}])
def test_forms_that_are_read(tmp_path, wrap):
    state = models.build("tiny").state_dict()
    torch.save(wrap(state), tmp_path / "c.pt")
    loaded = runs.load_checkpoint(tmp_path / "c.pt")["state_dict"]
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
        with pytest.raises(utils.InputError, match=f"{name} is refused"):
            runs.load_checkpoint(tmp_path / name)
    assert not (tmp_path / "x").exists()


def test_damaged_and_alien_files_are_refused(tmp_path):
    torch.save(models.build("tiny").state_dict(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for keep in (0, 100, len(whole) // 2, len(whole) - 20):
        (tmp_path / "cut.pt").write_bytes(whole[:keep])
        with pytest.raises(utils.InputError, match="cut.pt"):
            runs.load_checkpoint(tmp_path / "cut.pt")
    (tmp_path / "text.pt").write_text("hello, world")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"epoch": 1}, tmp_path / "dict.pt")
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    for name in ("text.pt", "list.pt", "dict.pt", "none.pt", "folder.pt", "fifo.pt", "loop.pt"):
        with pytest.raises(utils.InputError, match=name):
            runs.load_checkpoint(tmp_path / name)


def test_another_architecture_is_refused_by_its_first_keys():
    wrn = {"conv1.weight": torch.zeros(16, 3, 3, 3), "fc.bias": torch.zeros(10)}
    with pytest.raises(utils.InputError, match=r'x.pt is of another architecture: .*"layer1.0.bn1.weight'):
        runs.load_weights(models.build("tiny"), wrn, "x.pt")
    state = models.build("tiny", num_classes=100).state_dict()
    with pytest.raises(utils.InputError, match=r"size mismatch for linear.weight: .*\[100, 128\]"):
        runs.load_weights(models.build("tiny"), state, "x.pt")


def test_weights_that_are_not_finite_are_refused_and_old_checkpoints_are_not():
    state = models.build("tiny").state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}  # as before torch 0.4.1
    runs.load_weights(models.build("tiny"), old, "x.pt")
    state["linear.bias"] = state["linear.bias"] + float("nan")
    with pytest.raises(utils.InputError, match="NaN or infinite weights: linear.bias"):
        runs.load_weights(models.build("tiny"), state, "x.pt")


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    runs.save_checkpoint(path, {"state_dict": {"w": torch.ones(1)}})

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: '.*c.pt'"):
        runs.save_checkpoint(path, {"state_dict": {"w": torch.zeros(1)}})
    assert list(tmp_path.iterdir()) == [path]
    assert runs.load_checkpoint(path)["state_dict"]["w"].item() == 1


def test_a_flipped_bit_is_seen(tmp_path):
    """In weights as in an optimiser's state; torch.load checks no checksum."""
    path, weights = tmp_path / "c.pt", torch.arange(1000.0)
    momentum = torch.arange(1000.0, 2000.0)
    runs.save_checkpoint(path, {"state_dict": {"w": weights},
                                "optimizer": {"state": {0: {"momentum": momentum}}}})
    whole = path.read_bytes()
    for tensor in (weights, momentum):
        at = whole.index(tensor.numpy().tobytes()) + 2001
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(utils.InputError, match="c.pt is damaged: its contents are not what was written"):
            runs.load_checkpoint(path)
    path.write_bytes(whole)
    assert torch.equal(runs.load_checkpoint(path)["state_dict"]["w"], weights)


@pytest.mark.parametrize("value, form, fit", [
    ({"a": 1, "b": 2}, {"a": int}, True), ({"b": 2}, {"a": int}, False), ({"a": "1"}, {"a": (int, float)},
                                                                          False),
    ([{"a": 1}], [{"a": int}], True), ([{"a": 1}, 3], [{"a": int}], False), ({"a": {"b": None}},
                                                                             {"a": {"b": int}}, False),
])
def test_the_form_of_what_is_read(value, form, fit):
    assert runs.fits(value, form) == fit
