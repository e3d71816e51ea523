"""torchrun with two processes on the CPU: the work is dealt out, and adds up to that of one process."""

import hashlib
import json
import sys

import pytest
import torch
from conftest import ROOT, spawn
from test_autoattack import problem as quadratic  # noqa: F401 (fixture)
from test_autoattack import staged

import models
import runs
import train_pgdat
import utils

# What each of the processes does; each leaves a JSON file.
WORKER = """
import copy, json, sys
from pathlib import Path
results, npz = map(Path, sys.argv[1:])
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, runs, train_pgdat, utils
from conftest import Affine
from test_processes import ATTACKS, SHARED, digest, evaluation
from test_autoattack import staged, problem

runs.join_processes(torch.device("cpu"))
data, out = utils.load_dataset(npz), {{}}

# The gradient of the mean loss over four images, of which each process has two.
x = torch.rand(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[runs.share()]
model = Affine()
optimizer = torch.optim.SGD(model.parameters(), lr=1)
runs.average_gradients(optimizer)
torch.nn.functional.cross_entropy(model(x), torch.arange(4)[runs.share()]).backward()
optimizer.step()
out["gradient"] = model.weight.grad.flatten().tolist()

# An epoch of training in each BN mode.
original, noises = train_pgdat.random_start, []
train_pgdat.random_start = lambda *a: noises.append(digest(original(*a) - a[0])) or original(*a)
for mode in ("train", "eval"):
    args = train_pgdat.parse_args([*SHARED, "--bn-mode", mode, "--ema", "0.9"])
    torch.manual_seed(0)
    model = runs.sync_batch_norm(train_pgdat.models.build("tiny"), torch.device("cpu"))
    optimizer = utils.make_optimizer(model, "sgd", 0.05, 5e-4)
    runs.average_gradients(optimizer)
    attack = train_pgdat.make_attack(model, model, args)
    average = copy.deepcopy(model)
    work = (data.train_images, data.train_labels, args, 0, average)
    entry = train_pgdat.train_epoch(model, model, attack, optimizer, *work)
    out[mode] = [digest(*m.state_dict().values()) for m in (model, average)] + [entry]
out["noises"] = noises

out["evaluation"] = evaluation(data)
out["autoattack"] = staged(problem.__wrapped__(), results / "state.json", attacks=ATTACKS)["robust"]
(results / f"{{runs.rank()}}.json").write_text(json.dumps(out))
runs.barrier()
"""

# train_pgdat.py, of which one process is killed in the middle of its second epoch.
KILLED = """
import os, signal, sys
sys.path[0] = {root!r}
import runs, train_pgdat
original, calls = train_pgdat.train_step, []

def train_step(*args):
    calls.append(1)
    if len(calls) == 3 and runs.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*args)

train_pgdat.train_step = train_step
runs.run_script(train_pgdat.main)
"""

ATTACKS = ("apgd-ce", "apgd-t")
SHARED = ("--model", "tiny", "--batch-size", "40", "--steps", "3")


def digest(*tensors):
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def evaluation(data):
    """PGD-3 on 40 images in batches of 7, over two restarts, of a network with weights of its own."""
    torch.manual_seed(3)
    model = models.build("tiny")
    model.linear.weight.data *= 1000  # so that some images can be moved over a boundary
    attack = {"eps": 1 / 255, "alpha": 0.5 / 255, "steps": 3, "restarts": 2, "batch_size": 7}
    with utils.attack_mode(model, "eval"):
        labels = model(utils.to_float(data.test_images)).argmax(1)
        flags = utils.pgd_evaluate(model, data.test_images, labels, share=runs.share(), **attack)
    return runs.sum_over_processes(flags).tolist()


def torchrun(*argv):
    return spawn(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *argv)


@pytest.fixture(scope="module")
def both(tmp_path_factory, small_npz):
    """What the two processes of WORKER wrote."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    done = torchrun(folder / "worker.py", folder, small_npz)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_gradients_are_those_of_the_whole_batch(both):
    from conftest import Affine

    x = torch.rand(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Affine()
    torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    for one in both:
        got = torch.tensor(one["gradient"], dtype=torch.float64)
        torch.testing.assert_close(got, model.weight.grad.flatten(), rtol=1e-10, atol=1e-12)


def test_noise_differs_and_weights_statistics_and_figures_do_not(both):
    assert len(both[0]["noises"]) == 6 and not set(both[0]["noises"]) & set(both[1]["noises"])
    for mode in ("train", "eval"):
        assert both[0][mode] == both[1][mode]  # weights, statistics, both averaged, and the log's figures
        assert both[0][mode][0] != both[0][mode][1]
    assert both[0]["train"][0] != both[0]["eval"][0]


def test_evaluation_equals_that_of_one_process_image_by_image(both, small_npz, quadratic, tmp_path):
    alone = evaluation(utils.load_dataset(small_npz))
    assert 0 < sum(alone[2]) < 40
    assert both[0]["evaluation"] == both[1]["evaluation"] == alone
    robust = staged(quadratic, tmp_path / "state.json", attacks=ATTACKS)["robust"]
    assert both[0]["autoattack"] == both[1]["autoattack"] == robust


def test_the_command_line_a_kill_and_one_process_to_go_on(small_npz, tmp_path):
    (tmp_path / "train_pgdat.py").write_text(KILLED.format(root=str(ROOT)))
    run = tmp_path / "run"
    flags = [*SHARED, "--dataset", small_npz, "--epochs", 2, "--batch-size", 48, "--bn-mode", "eval", "--out",
             run]
    done = torchrun(tmp_path / "train_pgdat.py", *flags)
    assert done.returncode != 0 and "batch norm is not synchronised" in done.stdout, done.stderr
    assert json.loads((run / "args.json").read_text())["processes"] == 2

    done = spawn(sys.executable, ROOT / "train_pgdat.py", *flags, "--resume")
    assert done.returncode == 0 and f"going on with {run} after epoch 1" in done.stdout, done.stderr
    assert [json.loads(line)["epoch"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2]

    quick = ("--n", 20, "--attacks", "apgd-ce", "--batch-size", 6)
    done = torchrun("--", ROOT / "eval_aa.py", run, *quick)
    assert done.returncode == 0, done.stderr
    done = spawn(sys.executable, ROOT / "eval_aa.py", run, *quick, "--out", run / "alone.json")
    result, alone = (json.loads((run / name).read_text()) for name in ("result.json", "alone.json"))
    assert all(result[k] == alone[k] for k in ("clean", "pgd10", "pgd10_worst", "quick"))
    assert result["stages"]["pgd10"]["processes"] == 2


@pytest.mark.parametrize("n, flags, problem", [
    (5, ("--batch-size", 42), "5 processes cannot share a batch of 42 images"),
    (5, ("--batch-size", 40), "5 processes cannot share a batch of 16"),  # the last one of 96 images
    (2, ("--batch-size", 48, "--early-stop-pgd", 1, 2), "--early-stop-pgd takes one process"),
    (2, ("--batch-size", 48, "--awp", 0.01), "--awp takes one process"),
])
def test_what_several_processes_cannot_do(script, small_npz, tmp_path, monkeypatch, n, flags, problem):
    monkeypatch.setattr(runs, "world", lambda: n)
    out = tmp_path / "run"
    status, _, err = script(train_pgdat, "--model", "tiny", "--dataset", small_npz, *flags, "--out", out)
    assert status == 2 and problem in err and len(err.splitlines()) == 1 and not out.exists()
