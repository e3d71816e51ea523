"""The real command lines, shrunk: every script end to end on a CPU. The numerics are tested in tests/."""

import json
import math
import shutil
import sys

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
    assert torch.backends.cpu.get_cpu_capability() in record["device"]  # on which the last digits depend
    assert [e["epoch"] for e in log(run)] == [1, 2]
    assert set(log(run)[0]) == {"epoch", "lr", "eps", "train_loss", "train_adv_acc", "train_clean_acc",
                                "test_clean", "test_pgd10", "seconds"}
    best = utils.load_checkpoint(run / "best.pt")
    assert best["log"][-1]["test_pgd10"] == max(e["test_pgd10"] for e in log(run))

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
        assert {k for k in npz} == {"result", "clean", "pgd10", "margin", "apgd-ce", "apgd-t", "done"}
        assert 100 * npz["apgd-t"].mean() == pytest.approx(whole["left"]["apgd-t"][0], abs=0.005)
    status, _, err = script(eval_aa, run, "--which", "last", "--attacks", "none")
    last = result(run, "result_last.json")
    assert status == 0 and (last["n"], last["checkpoint"]) == (40, "last.pt"), err
    assert "note:" not in out
    other = ("--dataset", ROOT / "data" / "cifar10_mini.npz", "--n", 4, "--out", tmp_path / "other.json")
    status, out, err = script(eval_aa, run, *other, "--attacks", "none")
    assert status == 0 and "note: " in out, err  # these are not the data of its training


@pytest.mark.parametrize("module, flags", [
    (train_pgdat, "--early-stop-pgd 0.5 1 --optimizer adamw --activation softplus --lr-schedule cosine"),
    (train_pgdat, "--val 16 --bn-clean-passes 0 --optimizer nesterov --lr-schedule onecycle --warmup-eps 1"),
    (train_pgdat, "--attack none --optimizer sgd-gc"),
    pytest.param(train_pgdat, "--precision bf16 --optimizer sgd-gcc --warmup-lr 1", marks=needs_bf16),
    (train_trades, "--bn-mode train --eps 0.031 --alpha 0.007 --ema 0.9"),
    (train_trades, "--bn-mode eval --awp 0.005 --awp-warmup 1"),
], ids=lambda v: getattr(v, "__name__", v))
def test_every_trick_trains(script, small_npz, tmp_path, module, flags):
    run, flags = tmp_path / "run", flags.split() + ([] if "none" in flags else ["--steps", 2])
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


def test_the_training_set_is_learnt_and_tested_when_the_flags_say(train, tmp_path):
    """A few epochs fit 96 images far beyond chance, on adversarial images too: the loop does learn."""
    status, _, err = train("--bn-mode", "eval", "--eps", "2/255", "--steps", 2, "--lr-schedule", "onecycle",
                           "--eval-from", 5, "--eval-every", 4, epochs=11)
    assert status == 0, err
    entries = log(tmp_path / "run")
    assert entries[-1]["train_adv_acc"] > 30
    assert [e["epoch"] for e in entries if "test_pgd10" in e] == [8, 11]


def test_dry_run_shows_what_differs_from_the_defaults_and_needs_no_data(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = "--wd 5e-4 --bn-mode eval --dataset my/data.npz --epochs 30 --dry-run".split()
    status, out, err = script(train_pgdat, *argv)
    assert status == 0 and "--out runs/pgdat-dataset-my-data.npz-epochs30-bn-mode-eval" in out, err
    assert "--wd" not in out and "warning" in out  # the run ends before the learning rate decays
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv, culprit", [
    ("--model resnet18", "resnet18"),
    ("--dataset none.npz", "none.npz"),
    ("--eps 1", "8/255"),  # what to write instead
    ("--lr-decay-epochs 1 2 3 --lr-decay-factor 0.1 0.2", "--lr-decay-factor"),
    ("--val 96", "--val 96"),
    ("--device gpu", "--device gpu"),
    ("--optimizer adam --momentum 0.5", "--momentum"),
    ("--attack none --steps 7", "--steps"),
    ("--awp-warmup 3", "--awp-warmup"),
    ("--step 7", "--step 7"),  # no abbreviations
])
def test_bad_arguments_get_one_line_and_leave_nothing(train, tmp_path, argv, culprit):
    status, _, err = train(*argv.split())
    assert status == 2 and culprit in err and len(err.splitlines()) == 1, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", [train_pgdat, train_trades, eval_aa], ids=lambda module: module.__name__)
def test_every_numeric_flag_has_bounds_and_is_refused_beyond_them(module, monkeypatch, capfd):
    parsers, parse = [], utils.Parser.parse_args
    monkeypatch.setattr(utils.Parser, "parse_args", lambda p, *argv: parsers.append(p) or parse(p, *argv))
    target = ["x.pt"] * (module is eval_aa)
    module.parse_args(target)
    flags = [a for a in parsers[0]._actions if a.type in (int, float, utils.fraction) and not a.choices]
    assert len(flags) > 5
    for flag in flags:
        (low, high), = [bounds for bounds, names in utils.BOUNDS.items() if flag.dest in names.split()]
        for value in (low - 1, high, math.nan):
            values = [str(value)] * (flag.nargs if isinstance(flag.nargs, int) else 1)
            with pytest.raises(SystemExit, match="2"):
                module.parse_args([*target, *flag.option_strings, *values])
            assert flag.option_strings[0] in capfd.readouterr().err


def test_three_copied_names_train_on_data_of_ones_own(tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "models")
    for name in ("train_pgdat.py", "utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(24) % 3
    np.savez(tmp_path / "mine.npz", train_images=images, train_labels=labels, test_images=images[:9],
             test_labels=labels[:9])
    command = ("train_pgdat.py", *TINY, "--epochs", 1, "--dataset", "mine.npz", "--out", "run")
    done = spawn(sys.executable, *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert utils.load_checkpoint(tmp_path / "run" / "best.pt")["num_classes"] == 3
