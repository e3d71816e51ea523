"""torchrun with two processes on the CPU: the work is dealt out, and adds up to that of one process."""

import hashlib
import json
import runpy
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Affine, spawn

import eval_aa
import train_pgdat
import utils

# What each of the processes does; each leaves a JSON file.
WORKER = """
import json, sys
from pathlib import Path
folder, npz = map(Path, sys.argv[1:])
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, eval_aa, train_pgdat, train_trades, utils
from conftest import TINY
from test_processes import QUICK, digest, gradient

out, save, seeded = {{}}, utils.save, utils.seeded

def main():
    torch.distributed.init_process_group("gloo")
    torch.distributed.init_process_group = lambda *a, **options: None  # the scripts', three in one process
    out["gradient"] = gradient(utils.SHARD)
    for script in (train_pgdat, train_trades):
        sys.argv = [script.__name__ + ".py", *map(str, TINY), "--dataset", str(npz), "--epochs", "1",
                    "--steps", "2", "--ema", "0.9", "--out", str(folder / script.__name__)]
        script.train_step, script.train_step_alone = watched(script), script.train_step
        script.main()
    utils.sum_over_processes(torch.zeros(1))
    sys.argv = ["eval_aa.py", str(folder / "train_pgdat"), *QUICK]
    eval_aa.main()
    (folder / f"{{utils.RANK}}.json").write_text(json.dumps(out))

def watched(script):
    def step(model, optimizer, attack, x, y, eps, epoch, rng, args):
        out.setdefault("seen", []).extend([digest(x), rng.initial_seed()])
        return script.train_step_alone(model, optimizer, attack, x, y, eps, epoch, rng, args)
    return step

def watched_save(args, state, log):
    figures = {{k: v for k, v in log[-1].items() if k != "seconds"}}
    out[Path(args.out).name] = [digest(*state[m].state_dict().values()) for m in ("model", "state_dict")]
    out[Path(args.out).name].append(figures)
    save(args, state, log)

utils.save = watched_save
utils.run_script(main)
"""

QUICK = ("--n", "20", "--attacks", "apgd-ce", "--batch-size", "6")  # batches of 6, 6, 6 and 2 images


def digest(*tensors):
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def gradient(shard):
    """Of the mean loss over four images, of which each of two processes has two."""
    x = torch.rand(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Affine()
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    utils.share_training(model, optimizer, train_pgdat.parse_args(["--batch-size", "4"]), 4)
    torch.nn.functional.cross_entropy(model(x[shard]), torch.arange(4)[shard]).backward()
    optimizer.step()
    return [p.grad.flatten().tolist() for p in model.parameters()]


@pytest.fixture(scope="module")
def both(tmp_path_factory, small_npz):
    """What the two processes of WORKER wrote."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--")
    done = spawn(sys.executable, *launcher, folder / "worker.py", folder, small_npz)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_gradients_are_those_of_the_whole_batch(both):
    for one in both[1]:
        for got, want in zip(one["gradient"], gradient(slice(None)), strict=True):
            assert got == pytest.approx(want, rel=1e-10, abs=1e-12)


def test_images_and_noise_differ_and_weights_statistics_and_figures_do_not(both):
    one, other = both[1]  # of two steps of two scripts, whose noise is seeded alike
    assert len(set(one["seen"])) == 2 + 2 * 2 and not set(one["seen"]) & set(other["seen"])
    for script in ("train_pgdat", "train_trades"):
        assert one[script] == other[script]  # weights, statistics, both averaged, and the log's figures
        assert one[script][0] != one[script][1]


def test_evaluation_equals_that_of_one_process_image_by_image(both, script):
    folder, _ = both
    status, _, err = script(eval_aa, folder / "train_pgdat", *QUICK, "--out", folder / "alone.json")
    assert status == 0, err
    with np.load(folder / "train_pgdat" / "result.npz") as two, np.load(folder / "alone.npz") as alone:
        for name in ("clean", "pgd10", "apgd-ce", "done"):
            assert (two[name] == alone[name]).all()
        assert two["margin"] == pytest.approx(alone["margin"], abs=1e-4)
        assert two["done"].all() and json.loads(str(two["result"]))["processes"] == 2


def test_one_process_may_go_on(both, script, small_npz):
    folder, _ = both
    argv = (*TINY, "--dataset", small_npz, "--epochs", 1, "--steps", 2, "--ema", 0.9)
    status, out, err = script(train_pgdat, *argv, "--out", folder / "train_pgdat", "--resume")
    assert status == 0 and "has finished" in out, err
    assert json.loads((folder / "train_pgdat" / "args.json").read_text())["processes"] == 2


@pytest.mark.parametrize("n, flags, culprit", [
    (5, "--batch-size 42", "42"),
    (5, "--batch-size 40", "96"),  # images, of which the last batch has 16
    (2, "--batch-size 48 --awp 0.01", "--awp"),
    (2, "--batch-size 48 --early-stop-pgd 1 2", "--early-stop-pgd"),
])
def test_what_several_processes_cannot_do(script, small_npz, tmp_path, monkeypatch, n, flags, culprit):
    monkeypatch.setattr(utils, "WORLD", n)
    monkeypatch.setattr(utils.dist, "init_process_group", lambda *a, **options: None)
    status, _, err = script(train_pgdat, "--model", "tiny", "--dataset", small_npz, *flags.split(), "--out",
                            tmp_path / "run")
    assert status == 2 and culprit in err and err.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_clusters_RANK_without_torchrun_is_nothing(monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    alone = runpy.run_path(utils.__file__)
    assert (alone["RANK"], alone["WORLD"], alone["SHARD"]) == (0, 1, slice(0, None, 1))
