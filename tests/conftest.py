"""Shared by the tests: the scripts are imported from the top of the repository, and run small."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

# A second thread gains nothing on such small tensors, and waits on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_pgdat
import utils


def attack_of(module, model, args):
    """The training attack as main makes it."""
    return functools.partial(module.training_attack, model, args)


TINY = ("--model", "tiny", "--batch-size", 48, "--lr", 0.05)
needs_bf16 = pytest.mark.skipif("bf16" not in utils.cpu_info() or
                                torch.backends.cpu.get_cpu_capability() == "AVX2",  # played, for example
                                reason="this CPU has no bf16 instructions")


@pytest.fixture(scope="session")
def small_npz(tmp_path_factory):
    """96 training and 40 test images of CIFAR-10, ten classes, as a data set file."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    with np.load(ROOT / "data" / "cifar10_mini.npz") as npz:
        sizes = {"train_images": 96, "train_labels": 96, "test_images": 40, "test_labels": 40}
        np.savez(path, **{k: npz[k][:n] for k, n in sizes.items()})
    return path


@pytest.fixture
def script(monkeypatch, capfd):
    """script(module, *argv): runs its main as from the command line -> (exit status, stdout, stderr)."""
    def run(module, *argv):
        monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, argv)])
        capfd.readouterr()
        status = 0
        try:
            utils.run_script(module.main)
        except SystemExit as e:
            status = e.code
        out, err = capfd.readouterr()
        return status, out, err
    return run


@pytest.fixture
def train(script, small_npz, tmp_path):
    """train(*argv): two epochs of the tiny network, into tmp_path/run -> (status, stdout, stderr)."""
    def run(*argv, out=tmp_path / "run", epochs=2):
        return script(train_pgdat, *TINY, "--dataset", small_npz, "--epochs", epochs, "--out", out, *argv)
    return run


@pytest.fixture(scope="session")
def finished(small_npz, tmp_path_factory):
    """The folder of a run of one epoch. Whoever changes it changes a copy: the fixture `run`."""
    out = tmp_path_factory.mktemp("finished")
    with mock.patch.object(sys, "argv", ["train_pgdat.py", *map(str, TINY), "--dataset", str(small_npz),
                                         "--epochs", "1", "--wd", "1e-4", "--out", str(out)]):
        utils.run_script(train_pgdat.main)
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, in tmp_path/run. train("--wd", "1e-4", epochs=1) is its command."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def log(folder):
    """The entries of a run's log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def same_run(a, b):
    """Check that two folders hold the same weights in best.pt and last.pt, and, but for times, one log."""
    for name in ("last.pt", "best.pt"):
        one, other = (utils.load_checkpoint(folder / name) for folder in (a, b))
        assert one["epoch"] == other["epoch"]
        assert all(torch.equal(one["state_dict"][k], other["state_dict"][k]) for k in one["state_dict"])
    assert [{**e, "seconds": 0} for e in log(a)] == [{**e, "seconds": 0} for e in log(b)]


def spawn(*argv, cwd=ROOT, **env):
    """A command in a process of its own -> CompletedProcess with its output as text."""
    return subprocess.run([str(a) for a in argv], cwd=cwd, env={**os.environ, **env}, capture_output=True,
                          text=True)


class Affine(torch.nn.Module):
    """A linear classifier in float64: its input gradient can be written by hand."""

    def __init__(self, classes=4, size=6, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(classes, 3 * size * size, generator=g,
                                                     dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.randn(classes, generator=g, dtype=torch.float64))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias
