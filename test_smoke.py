"""The real command lines, shrunk: every script end to end on a CPU. The numerics are tested in tests/."""

import json
import shutil
import sys
from unittest import mock

# First, because conftest limits torch's threads.
from tests.conftest import ROOT, TINY, log, needs_bf16, script, small_npz, spawn, train  # noqa: F401

import numpy as np
import pytest
import torch

import eval_aa
import train_pgdat
import train_trades
import utils


def result(folder, name="result.json"):
    return json.loads((folder / name).read_text())


def test_a_run_and_its_evaluation(train, script, tmp_path):
    status, out, err = train("--bn-mode", "eval", "--ls", 0.1)
    run = tmp_path / "run"
    assert status == 0, err
    assert "device cpu" in out and f"evaluate it with: python eval_aa.py {run}" in out
    assert {p.name for p in run.iterdir()} == {"args.json", "log.jsonl", "last.pt", "best.pt", ".lock"}
    record = json.loads((run / "args.json").read_text())
    assert record["args"]["ls"] == 0.1 and record["args"]["eps"] == 8 / 255
    assert record["command"][0] == "train_pgdat.py" and record["versions"]["torch"] == torch.__version__
    assert record["data_sha256"] and "git_commit" in record
    assert [e["epoch"] for e in log(run)] == [1, 2]
    assert set(log(run)[0]) == {"epoch", "lr", "eps", "train_loss", "train_adv_acc", "train_clean_acc",
                                "test_clean", "test_pgd10", "seconds"}
    best = utils.load_checkpoint(run / "best.pt")
    assert best["log"][-1]["test_pgd10"] == max(e["test_pgd10"] for e in log(run))
    status, out, _ = train("--bn-mode", "eval", "--ls", 0.1, "--resume")
    assert status == 0 and f"{run} has finished" in out

    quick = ("--n", 12, "--attacks", "apgd-ce,apgd-t", "--batch-size", 4)
    status, out, err = script(eval_aa, run, *quick, "--stop-after", 5)
    assert status == 0 and "8 of 12 images" in out, err
    assert not result(run)["complete"] and result(run)["n_done"] == 8
    status, out, err = script(eval_aa, run, *quick)
    whole = result(run)
    assert status == 0 and whole["complete"] and whole["aa"] is None and "apgd-ce,apgd-t (not AA)" in out, err
    assert whole["epoch"] == best["epoch"] and whole["left"]["apgd-t"][1] == 0
    assert whole["left"]["apgd-t"][0] <= whole["pgd10"] <= whole["clean"]
    with np.load(run / "result.npz") as npz:
        assert {k for k in npz} == {"result", "clean", "pgd10", "apgd-ce", "apgd-t", "done"}
        assert 100 * npz["apgd-t"].mean() == pytest.approx(whole["left"]["apgd-t"][0], abs=0.005)
    status, _, err = script(eval_aa, run, "--which", "last", "--attacks", "none")
    assert status == 0 and result(run, "result_last.json")["n"] == 40, err
    assert result(run, "result_last.json")["checkpoint"] == "last.pt"


@pytest.mark.parametrize("module, flags", [
    (train_pgdat, ("--bn-clean-passes", 0, "--warmup-lr", 1, "--warmup-eps", 1)),
    (train_pgdat, ("--early-stop-pgd", 0.5, 1, "--lr-schedule", "cosine", "--n-train", 48)),
    (train_pgdat, ("--val", 16, "--lr-schedule", "onecycle", "--optimizer", "nesterov")),
    (train_pgdat, ("--attack", "none", "--optimizer", "sgd-gc")),
    (train_pgdat, ("--optimizer", "adamw", "--activation", "softplus")),
    pytest.param(train_pgdat, ("--precision", "bf16", "--optimizer", "sgd-gcc"), marks=needs_bf16),
    (train_trades, ("--bn-mode", "train", "--eps", "0.031", "--alpha", "0.007", "--ema", 0.9)),
    (train_trades, ("--bn-mode", "eval", "--awp", 0.005, "--awp-warmup", 1)),
], ids=lambda v: v.__name__ if hasattr(v, "__name__") else "".join(map(str, v)))
def test_every_trick_trains(script, small_npz, tmp_path, module, flags):
    run = tmp_path / "run"
    status, out, err = script(module, *TINY, "--dataset", small_npz, "--epochs", 2, "--out", run, *flags)
    assert status == 0, err
    entries = log(run)
    assert len(entries) == 2 and all(np.isfinite(e["train_loss"]) for e in entries)
    if "--val" in flags:
        best = utils.load_checkpoint(run / "best.pt")["log"][-1]
        assert "80 images" in out and best["val_pgd10"] == max(e["val_pgd10"] for e in entries)
    if "none" in flags:
        assert entries[1]["test_pgd10"] is entries[1]["train_adv_acc"] is None
        assert entries[1]["train_clean_acc"] > 0
    if "--warmup-lr" in flags:
        assert entries[0]["lr"] == pytest.approx(0.05 / 2) and entries[1]["eps"] == pytest.approx(8 / 255)


@pytest.mark.parametrize("module", [train_pgdat, train_trades], ids=lambda module: module.__name__)
def test_which_epochs_are_tested_and_which_estimate_the_end(script, small_npz, tmp_path, monkeypatch, module):
    argv = (*TINY, "--dataset", small_npz, "--n-train", 48, "--steps", 1, "--epochs", 7, "--eval-from", 3,
            "--eval-every", 2, "--out", tmp_path / "run", "--resume")
    seen, steps = [], utils.steps
    monkeypatch.setattr(utils, "steps", lambda *args: seen.append(args[-1]) or steps(*args))
    with monkeypatch.context() as patch:
        patch.setattr(utils, "show_epoch", mock.Mock(side_effect=[None, KeyboardInterrupt]))  # two epochs
        assert script(module, *argv)[0] == 130
    status, _, err = script(module, *argv)
    assert status == 0 and seen == [True, False, True, False, False, False, False], err
    entries = log(tmp_path / "run")
    assert [e["epoch"] for e in entries if "test_pgd10" in e] == [4, 6, 7]
    best = utils.load_checkpoint(tmp_path / "run" / "best.pt")["log"][-1]
    assert best["test_pgd10"] == max(e.get("test_pgd10", 0) for e in entries)


def test_the_training_set_is_learnt(train, tmp_path):
    """A few epochs fit 96 images far beyond chance, on adversarial images too: the loop does learn."""
    status, _, err = train("--epochs", 12, "--bn-mode", "eval", "--eps", "2/255", "--eval-every", 12,
                           "--lr-schedule", "onecycle")
    assert status == 0, err
    assert log(tmp_path / "run")[-1]["train_adv_acc"] > 30


def test_dry_run_shows_the_setting_and_needs_no_data(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = script(train_pgdat, "--wd", "5e-4", "--bn-mode", "eval", "--ls", "0.1", "--dry-run")
    assert status == 0 and "runs/pgdat-ls0.1-bn-mode-eval" in out, err
    assert all(f"--{flag.replace('_', '-')} " in out for flag in vars(train_pgdat.parse_args([])))
    assert list(tmp_path.iterdir()) == []


def test_default_folder_is_a_file_name_whatever_the_flags():
    flags = ["--dataset", "x" * 300 + ".npz", "--lr-decay-epochs", *map(str, range(90))]
    long, other = (train_pgdat.parse_args([*flags, "--seed", seed]).out for seed in "12")
    assert len(long) < 255
    assert long != other


@pytest.mark.parametrize("argv, problem", [
    (("--model", "resnet18"), "argument --model: invalid choice: 'resnet18'"),
    (("--dataset", "imagenet"), "unknown data set 'imagenet'"),
    (("--dataset", "none.npz"), "no such file"),
    (("--eps", "8"), '[0, 1] scale of the images: write "8/255"'),
    (("--eps", "1"), '[0, 1] scale of the images: write "8/255"'),
    (("--alpha", "1"), '[0, 1] scale of the images: write "8/255"'),
    (("--lr-decay-epochs", "50", "25"), "takes epochs that rise"),
    (("--eps", "8/0"), '[0, 1] scale of the images: write "8/255"'),
    (("--optimizer", "nesterov", "--momentum", "0"), "needs a --momentum above 0"),
    (("--ls", "1"), "1 is not at least 0 and below 1"),
    (("--wd", "nan"), "nan is not at least 0"),
    (("--epochs", "1.5"), "invalid int value: '1.5'"),
    (("--early-stop-pgd", "70", "40"), "of which the second is later"),
    (("--val", "96"), "leaves nothing to train on"),
    (("--n-train", "97"), "there are 96 training images"),
    (("--device", "gpu"), "gpu is not auto, cpu, cuda or cuda:N"),
    (("--precision", "tf32", "--device", "cpu"), "CUDA only"),
    (("--optimizer", "adam", "--momentum", "0.5"), "--momentum has no effect with --optimizer adam"),
    (("--attack", "none", "--steps", "7"), "--steps has no effect with --attack none"),
    (("--awp-warmup", "3"), "--awp-warmup has no effect with --awp 0"),
    (("--lr-schedule", "cosine", "--lr-decay-epochs", "3"), "--lr-decay-epochs has no effect"),
    (("--lr-decay-epochs", "1", "2", "3", "--lr-decay-factor", "0.1", "0.2"), "one for each of --lr-decay"),
    (("--step", "7"), "unrecognized arguments"),
])
def test_bad_arguments_get_one_line_and_leave_nothing(train, tmp_path, argv, problem):
    status, _, err = train(*argv)
    assert status == 2 and problem in err and len(err.splitlines()) == 1, err
    assert list(tmp_path.iterdir()) == []


def three_classes(path):
    images = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(24) % 3
    np.savez(path, train_images=images, train_labels=labels, test_images=images[:9], test_labels=labels[:9])


OWN_LOOP = """
import torch, models
from utils import attack_mode, batches, load_dataset, make_optimizer, pgd, random_start, seeded
from utils import smoothed_cross_entropy

data = load_dataset("mine.npz")
model = models.build("tiny", data.num_classes, normalize=models.CIFAR_NORMALIZE)
optimizer, noise = make_optimizer(model, "sgd", lr=0.05, wd=5e-4), seeded("cpu", "noise")
for x, y in batches(data.train_images, data.train_labels, 8, seeded("cpu", "order"), padding="reflect"):
    with attack_mode(model, "eval"):
        x_adv = pgd(model, x, y, random_start(x, 8 / 255, noise), eps=8 / 255, alpha=2 / 255, steps=10)
    optimizer.zero_grad()
    smoothed_cross_entropy(model(x_adv), y, smoothing=0.1).backward()
    optimizer.step()
"""


def test_three_copied_names_train_and_resume_on_data_of_ones_own_and_serve_a_loop_of_ones_own(tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "models")
    for name in ("train_pgdat.py", "utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    three_classes(tmp_path / "mine.npz")
    (tmp_path / "mine.py").write_text(OWN_LOOP)
    assert spawn(sys.executable, "mine.py", cwd=tmp_path).returncode == 0
    command = [sys.executable, "train_pgdat.py", *TINY, "--epochs", 1, "--out", "run", "--resume"]
    for _ in range(2):
        done = spawn(*command, "--dataset", "mine.npz", cwd=tmp_path)
        assert done.returncode == 0 and "eval_aa" not in done.stdout, done.stderr
    assert utils.load_checkpoint(tmp_path / "run" / "best.pt")["num_classes"] == 3
    done = spawn(*command, cwd=tmp_path)  # of CIFAR-10, which data/prepare.py would fetch
    assert done.returncode == 2 and "there is no data/cifar10.npz; --dataset takes" in done.stderr
    assert "prepare" not in done.stderr and len(done.stderr.splitlines()) == 1
