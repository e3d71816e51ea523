"""torchrun with two processes on the CPU: the work is dealt out, and adds up to that of one process."""

import hashlib
import json
import signal
import sys

import pytest
import torch
from conftest import ROOT, spawn
from test_autoattack import staged
from test_autoattack import problem as quadratic  # noqa: F401 (fixture)

import models
import train_pgdat
import utils

# What each of the processes does; each leaves a JSON file. `results` and `npz` are paths.
WORKER = """
import json, sys
from pathlib import Path
results, npz = map(Path, sys.argv[1:])
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch, utils, train_pgdat
from conftest import Affine
from test_processes import ATTACKS, digest, evaluation
from test_autoattack import Quadratic, staged, problem

utils.join_processes(torch.device("cpu"))
data, out = utils.load_dataset(npz), {{}}

# the images of an epoch of 96 in batches of 40, 40, 16, by their index
index = torch.arange(len(data.train_labels))
out["batches"] = [y.tolist() for _, y in utils.batches(data.train_images, index, 40, utils.seeded("cpu", 1), "reflect")]

# the gradient of the mean loss over 5 images, of which one process has 3
x = torch.rand(5, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
y = torch.tensor([0, 1, 2, 3, 0])
model = Affine()
utils.backward(torch.nn.functional.cross_entropy(model(x[utils.rank() :: 2]), y[utils.rank() :: 2]), model, len(y[utils.rank() :: 2]))
out["gradient"] = model.weight.grad.flatten().tolist()

# an epoch of training in each BN mode, the attack stopping early at different steps
original, noises = train_pgdat.random_start, []
train_pgdat.random_start = lambda *a: noises.append(digest(original(*a) - a[0])) or original(*a)
for mode in ("train", "eval"):
    args = train_pgdat.parse_args(["--model", "tiny", "--batch-size", "40", "--bn-mode", mode, "--early-stop-pgd", "0", "1", "--lr", "0.05"])
    torch.manual_seed(0)
    model = utils.split_model(train_pgdat.models.build("tiny"), torch.device("cpu"), 96, 40)
    optimizer, meter = utils.make_optimizer(model, "sgd", 0.05, 5e-4), utils.Meter("cpu")
    attack = train_pgdat.make_attack(model, model, args)
    entry = train_pgdat.train_epoch(model, model, attack, optimizer, data.train_images, data.train_labels, args, 0, meter)
    out[mode] = [digest(*model.state_dict().values()), entry, [g for g in map(float, meter.sums)][3]]
out["noises"] = noises

out["evaluation"] = evaluation(data)
out["autoattack"] = staged(problem.__wrapped__(), results / "state.json", attacks=ATTACKS)["robust"]
(results / f"{{utils.rank()}}.json").write_text(json.dumps(out))
utils.barrier()
"""

# train_pgdat.py, of which one process gets a signal in the middle of its second epoch.
INTERRUPTED = """
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


ATTACKS = ("apgd-ce", "apgd-t")


def digest(*tensors):
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def evaluation(data):
    """PGD-3 on 40 images in batches of 7, over two restarts, of a network with weights of its own."""
    torch.manual_seed(3)
    model = models.build("tiny")
    model.linear.weight.data *= 1000  # so that some images can be moved over a boundary
    with utils.attack_mode(model, "eval"):
        labels = model(utils.to_float(data.test_images)).argmax(1)
        flags = utils.pgd_evaluate(model, data.test_images, labels, eps=1 / 255, alpha=0.5 / 255, steps=3, restarts=2, batch_size=7)
    return [f.tolist() for f in flags]


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


def test_every_image_of_an_epoch_is_seen_once(both, small_npz):
    alone = [y.tolist() for _, y in utils.batches(utils.load_dataset(small_npz).train_images, torch.arange(96), 40, utils.seeded("cpu", 1), "reflect")]
    for batch, first, second in zip(alone, both[0]["batches"], both[1]["batches"], strict=True):
        assert sorted(first + second) == sorted(batch) and abs(len(first) - len(second)) <= 1


def test_gradients_are_those_of_the_whole_batch(both):
    from conftest import Affine
    x = torch.rand(5, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Affine()
    torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3, 0])).backward()
    for one in both:
        torch.testing.assert_close(torch.tensor(one["gradient"], dtype=torch.float64), model.weight.grad.flatten(), rtol=1e-10, atol=1e-12)


def test_noise_differs_and_weights_statistics_and_figures_do_not(both):
    assert len(both[0]["noises"]) == 6 and not set(both[0]["noises"]) & set(both[1]["noises"])
    for mode in ("train", "eval"):
        assert both[0][mode][:2] == both[1][mode][:2]                    # weights, statistics, and the log's figures
        assert both[0][mode][2] + both[1][mode][2] == 96                 # of all images
    assert both[0]["train"][0] != both[0]["eval"][0]


def test_evaluation_equals_that_of_one_process_image_by_image(both, small_npz, quadratic, tmp_path):
    alone = evaluation(utils.load_dataset(small_npz))
    assert 0 < sum(alone[2]) < 40
    assert both[0]["evaluation"] == both[1]["evaluation"] == alone
    assert both[0]["autoattack"] == both[1]["autoattack"] == staged(quadratic, tmp_path / "state.json", attacks=ATTACKS)["robust"]


def test_the_command_line_a_signal_and_one_process_to_go_on(small_npz, tmp_path):
    (tmp_path / "train_pgdat.py").write_text(INTERRUPTED.format(root=str(ROOT)))
    run = tmp_path / "run"
    flags = ["--model", "tiny", "--dataset", small_npz, "--epochs", 2, "--batch-size", 48, "--lr", 0.05, "--bn-mode", "eval", "--out", run]
    done = torchrun(tmp_path / "train_pgdat.py", *flags)
    assert done.returncode != 0 and "stopped by SIGTERM after 1 steps of epoch 2" in done.stdout, done.stderr
    assert done.stdout.count("stopped by") == 1 and "batch norm is not synchronised" in done.stdout
    assert done.stderr.count("exitcode  : 143") >= 1 and (run / "interrupted.pt").exists()
    assert json.loads((run / "args.json").read_text())["processes"] == 2

    done = spawn(sys.executable, ROOT / "train_pgdat.py", *flags, "--resume")
    assert done.returncode == 0 and f"going on with {run} after epoch 1, step 1" in done.stdout, done.stderr
    assert [json.loads(line)["epoch"] for line in (run / "log.jsonl").read_text().splitlines()] == [1, 2]

    done = torchrun("--", ROOT / "eval_aa.py", run, "--n", 20, "--attacks", "apgd-ce", "--batch-size", 6)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    done = spawn(sys.executable, ROOT / "eval_aa.py", run, "--n", 20, "--attacks", "apgd-ce", "--batch-size", 6, "--out", run / "alone.json")
    alone = json.loads((run / "alone.json").read_text())
    assert all(result[k] == alone[k] for k in ("clean", "pgd10", "pgd10_any", "quick"))
    assert result["stages"]["pgd10"]["processes"] == 2


def test_a_batch_smaller_than_the_processes_is_refused(monkeypatch):
    monkeypatch.setattr(utils, "world", lambda: 4)
    with pytest.raises(utils.InputError, match="4 processes cannot share a batch of 3"):
        utils.split_model(models.build("tiny"), torch.device("cpu"), 43, 10)
