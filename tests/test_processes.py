"""torchrun with two processes on the CPU: the work is dealt out, and adds up to that of one process."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Affine, log, spawn

import eval_aa
import models
import train_pgdat
import train_trades
import utils

# What each of the processes does; each leaves a JSON file.
WORKER = """
import json, sys
from pathlib import Path
folder, npz = map(Path, sys.argv[1:])
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, eval_aa, train_pgdat, utils
from conftest import TINY
from test_processes import QUICK, digest, evaluation, gradient

out, save, random_start = {{"seen": []}}, train_pgdat.save, train_pgdat.random_start

def main():
    torch.distributed.init_process_group("gloo")
    torch.distributed.init_process_group = lambda *a, **options: None  # the scripts', three in one process
    out["gradient"] = gradient()
    out["evaluation"] = evaluation(npz)
    for mode in ("train", "eval"):
        sys.argv = ["train_pgdat.py", *map(str, TINY), "--dataset", str(npz), "--epochs", "1", "--steps", "2",
                    "--bn-mode", mode, "--ema", "0.9", "--out", str(folder / mode)]
        train_pgdat.main()
    utils.barrier()
    sys.argv = ["eval_aa.py", str(folder / "eval"), *QUICK]
    eval_aa.main()
    (folder / f"{{utils.rank()}}.json").write_text(json.dumps(out))

def watched_start(x, eps, noise):
    start = random_start(x, eps, noise)
    out["seen"] += [digest(x), noise.initial_seed()]
    return start

def watched_save(path, state, log, about):
    figures = {{k: v for k, v in log[-1].items() if k != "seconds"}}
    out[Path(path).name] = [digest(*state[m].state_dict().values()) for m in ("model", "average")] + [figures]
    save(path, state, log, about)

train_pgdat.random_start, train_pgdat.save = watched_start, watched_save
utils.run_script(main)
"""

# train_pgdat.py, of which one process is killed in the middle of its second epoch.
KILLED = """
import os, signal, sys
sys.path[0] = {root!r}
import train_pgdat, utils
original, calls = train_pgdat.train_step, []

def train_step(*args):
    calls.append(1)
    if len(calls) == 3 and utils.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*args)

train_pgdat.train_step = train_step
utils.run_script(train_pgdat.main)
"""


QUICK = ("--n", "20", "--attacks", "apgd-ce", "--batch-size", "6")  # batches of 6, 6, 6 and 2 images


def digest(*tensors):
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def gradient():
    """Of the mean loss over four images, of which each of two processes has two."""
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Affine()
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    utils.average_gradients(optimizer)
    torch.nn.functional.cross_entropy(model(x[utils.shard()]), torch.arange(4)[utils.shard()]).backward()
    optimizer.step()
    return [p.grad.flatten().tolist() for p in model.parameters()]


def evaluation(npz):
    """Clean and under PGD-3, of 39 images in batches of 7, of a network with weights of its own."""
    torch.manual_seed(3)
    model, images = models.build("tiny"), utils.load_dataset(npz).test_images[:39]
    model.linear.weight.data *= 1000  # so that some images can be moved over a boundary
    labels = model.eval()(utils.to_float(images)).argmax(1)
    labels[:3] += 1
    attack = {"eps": 1 / 255, "alpha": 0.5 / 255, "steps": 3, "batch_size": 7}
    return utils.evaluate(model, images, labels, **attack).tolist()


def torchrun(*argv):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--")
    return spawn(sys.executable, *launcher, *argv)


@pytest.fixture(scope="module")
def both(tmp_path_factory, small_npz):
    """What the two processes of WORKER wrote."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    done = torchrun(folder / "worker.py", folder, small_npz)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_gradients_are_those_of_the_whole_batch(both):
    for one in both[1]:
        for got, want in zip(one["gradient"], gradient(), strict=True):
            assert got == pytest.approx(want, rel=1e-10, abs=1e-12)


def test_images_and_noise_differ_and_weights_statistics_and_figures_do_not(both):
    one, other = both[1]
    assert len(set(one["seen"])) == 2 * 2 and not set(one["seen"]) & set(other["seen"])
    for mode in ("train", "eval"):
        assert one[mode] == other[mode]  # weights, statistics, both averaged, and the log's figures
        assert one[mode][0] != one[mode][1]
    assert one["train"][0] != one["eval"][0]


def test_evaluation_equals_that_of_one_process_image_by_image(both, small_npz, script):
    folder, (one, other) = both
    alone = evaluation(small_npz)
    assert 0 < sum(alone[1]) < sum(alone[0]) == 36
    assert one["evaluation"] == other["evaluation"] == alone
    status, _, err = script(eval_aa, folder / "eval", *QUICK, "--out", folder / "alone.json")
    assert status == 0, err
    with np.load(folder / "eval" / "result.npz") as two, np.load(folder / "alone.npz") as alone:
        for name in ("clean", "pgd10", "apgd-ce", "done"):
            assert (two[name] == alone[name]).all()
        assert two["done"].all() and json.loads(str(two["result"]))["processes"] == 2


def test_the_command_line_a_kill_and_one_process_to_go_on(train, small_npz, tmp_path):
    (tmp_path / "train_pgdat.py").write_text(KILLED.format(root=str(ROOT)))
    run = tmp_path / "run"
    done = torchrun(tmp_path / "train_pgdat.py", *TINY, "--dataset", small_npz, "--epochs", 2, "--steps", 1,
                    "--out", run)
    assert done.returncode != 0 and done.stdout.count("batch norm is not synchronised") == 1, done.stderr
    assert json.loads((run / "args.json").read_text())["processes"] == 2
    status, out, err = train("--steps", 1, "--resume")
    assert status == 0 and f"going on with {run} after epoch 1" in out, err
    assert [e["epoch"] for e in log(run)] == [1, 2]


@pytest.mark.parametrize("module, n, flags, problem", [
    (train_pgdat, 5, ("--batch-size", 42), "5 processes cannot share batches of 42 images"),
    (train_trades, 5, ("--batch-size", 40), "and one of 16 at the end of an epoch"),  # of 96 images
    (train_pgdat, 5, ("--batch-size", 5, "--val", 6, "--early-stop-pgd", 1, 2), "--early-stop-pgd takes one"),
    (train_trades, 2, ("--batch-size", 48, "--awp", 0.01), "--awp takes one process"),
])
def test_what_several_processes_cannot_do(script, small_npz, tmp_path, monkeypatch, module, n, flags,
                                          problem):
    monkeypatch.setattr(utils, "world", lambda: n)
    monkeypatch.setattr(utils.dist, "init_process_group", lambda *a, **options: None)
    out = tmp_path / "run"
    status, _, err = script(module, "--model", "tiny", "--dataset", small_npz, *flags, "--out", out)
    assert status == 2 and problem in err and len(err.splitlines()) == 1 and not out.exists()


def test_a_clusters_RANK_without_torchrun_is_nothing(train, tmp_path, monkeypatch):
    """Errors are printed, files written."""
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    for flag, value in (("--ls", "no"), ("--device", "tpu")):
        status, _, err = train(flag, value)
        assert status == 2 and err.startswith("train_pgdat.py: error: ") and flag in err
    status, out, err = train("--steps", 1, epochs=1)
    assert status == 0 and "best of 1 epochs" in out and len(log(tmp_path / "run")) == 1, err
