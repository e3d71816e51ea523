"""Runs that are killed, at chosen moments and at random ones, and go on: they end as if nothing had happened.
And what --resume refuses.

`python -m pytest -m slow tests/test_kills.py` kills sixty times more.
"""

import argparse
import errno
import fcntl
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, log, same_run, spawn

import eval_aa
import train_pgdat
import utils


def fork_each(argv, kills):
    """Run train_pgdat.py's main once for each of the kills, (where, function, number, signal): the process
    gets the signal at that call of that function, before it, half through it, or after it. In turn a process
    writes last.pt after every epoch, as if an epoch took a minute, and after every third one at least.

    All processes are forks of one that has imported everything, which is much quicker than so many starts.
    """
    torch.optim.SGD([torch.zeros(1)], lr=1)  # imports what it needs
    sys.argv = ["train_pgdat.py", *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    for i, kill in enumerate(kills):
        child, status = os.fork(), 99
        if child == 0:
            try:
                send_signal_at(*kill)
                due = itertools.cycle([math.inf] if i % 2 == 0 else [0, 0, math.inf])
                utils.time = mock.Mock(time=lambda: next(due))
                utils.run_script(train_pgdat.main)
                status = 0
            except SystemExit as e:
                status = e.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        print(f"\nstatus {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)


def send_signal_at(where, function, number, name):
    module = train_pgdat if function == "train_step" else utils
    original, calls = getattr(module, function), []

    def wrapped(*args, **kwargs):
        calls.append(1)
        due = len(calls) == number
        if due and where == "half":  # of write_whole
            path, fill = args
            with open(Path(path).with_name(f".{Path(path).name}.tmp"), "wb") as file:
                fill(file)
                file.truncate(file.tell() // 2)
        if due and where != "after":
            os.kill(os.getpid(), getattr(signal, name))
        result = original(*args, **kwargs)
        if due:
            os.kill(os.getpid(), getattr(signal, name))
        return result

    setattr(module, function, wrapped)


# In turn, of one run. A process writes args.json, when it goes on after best.pt and log.jsonl; then, after an
# epoch for which it is due, last.pt, best.pt if it was the best, and log.jsonl.
CHOSEN = [
    ("before", "train_step", 2, "SIGKILL"),   # in the middle of the first epoch: no checkpoint yet
    ("before", "train_step", 4, "SIGTERM"),   # in the middle of the second
    ("half", "write_whole", 4, "SIGKILL"),
    ("after", "evaluate", 1, "SIGINT"),
    ("after", "write_whole", 4, "SIGTERM"),
    ("before", "train_step", 1, "SIGINT"),
]
MOMENTS = [(where, function, number, "SIGKILL")
           for function, calls, wheres in (("train_step", 4, ("before", "after")),
                                           ("evaluate", 4, ("before", "after")),
                                           ("write_whole", 8, ("before", "half", "after")))
           for number in range(1, calls + 1) for where in wheres]
FLAGS = ("--bn-mode", "eval", "--optimizer", "sgd-gc", "--warmup-lr", 1, "--val", 10, "--steps", 1,
         "--early-stop-pgd", 1, 2, "--ema", 0.9)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 7))])
def test_a_run_killed_at_any_moment_ends_bit_identical(train, small_npz, tmp_path, seed):
    moments, epochs = random.Random(seed), 20 if seed else 6
    kills = moments.sample(MOMENTS, 10) if seed else [*CHOSEN, *moments.sample(MOMENTS, 3)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    status, _, err = train(*FLAGS, out=whole, epochs=epochs)
    assert status == 0, err
    argv = (*TINY, "--dataset", small_npz, "--epochs", epochs, "--out", cut, "--resume", *FLAGS)
    argv = [str(a) for a in argv]
    done = spawn(sys.executable, "-c", f"import test_kills; test_kills.fork_each({argv!r}, {kills!r})",
                 PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    statuses = [int(s) for s in re.findall(r"^status (-?\d+)$", done.stdout, re.M)]
    assert len(statuses) == len(kills) and "Traceback" not in done.stderr, done.stderr
    for status, (*moment, name) in zip(statuses, kills):  # 0: the run has ended before that moment came
        assert status in (130 if name == "SIGINT" else -getattr(signal, name), 0), (moment, done.stderr)
    assert done.stderr.count("interrupted: to continue, add --resume") == statuses.count(130)
    assert sum(map(bool, statuses)) > 3
    status, out, err = train(*FLAGS, "--resume", out=cut, epochs=epochs)
    assert status == 0, err
    same_run(whole, cut)
    before = (cut / "last.pt").read_bytes()
    status, out, err = train(*FLAGS, "--resume", out=cut, epochs=epochs)  # says so, and trains no more
    assert status == 0 and "has finished" in out and (cut / "last.pt").read_bytes() == before


def test_last_pt_is_written_when_it_is_due_and_log_jsonl_with_it(tmp_path):
    """After the first epoch, the best so far, and the last one, and when a minute has passed."""
    args, entries, written = argparse.Namespace(out=tmp_path, epochs=9), [], []
    for epoch, pgd10 in enumerate((None, None, 5, 4, 4, None, 6, None, None), 1):
        entries.append({"epoch": epoch, "test_pgd10": pgd10})
        if epoch == 5:
            os.utime(tmp_path / "last.pt", (0, time.time() - 61))
        utils.save(args, {"state_dict": torch.nn.Linear(1, 1)}, entries)
        written.append(utils.load_checkpoint(tmp_path / "last.pt")["epoch"])
        assert log(tmp_path) == entries[: written[-1]]
    assert written == [1, 1, 3, 3, 5, 5, 7, 7, 9]


def test_the_seconds_of_an_epoch_hold_the_writing_before_it(train, tmp_path, monkeypatch):
    clock, save = [0], utils.save
    monkeypatch.setattr(train_pgdat.time, "time", lambda: clock[0])
    monkeypatch.setattr(utils, "save", lambda *args: (save(*args), clock.append(clock.pop() + 100)))
    status, _, err = train("--steps", 1, epochs=3)
    assert status == 0, err
    assert [e["seconds"] for e in log(tmp_path / "run")] == [0, 100, 100]


def test_twenty_fast_epochs_write_last_pt_at_most_four_times_and_can_be_killed(train, tmp_path, monkeypatch):
    flags = ("--attack", "none", "--bn-clean-passes", 0, "--n-train", 48, "--eval-every", 20)  # 20 steps
    written, write = [], utils.write_whole
    with monkeypatch.context() as patch:
        patch.setattr(utils, "write_whole", lambda path, fill: (written.append(path.name), write(path, fill)))
        assert train(*flags, out=tmp_path / "whole", epochs=20)[0] == 0
    assert 2 <= written.count("last.pt") <= 4 and written.count("log.jsonl") == written.count("last.pt")
    moments, step = random.Random(0), train_pgdat.train_step
    for due in (*(moments.randrange(2, 19) for _ in range(5)), None):
        calls = itertools.count()

        def killed(*args):
            if next(calls) == due:
                raise KeyboardInterrupt
            return step(*args)

        monkeypatch.setattr(train_pgdat, "train_step", killed)
        status, _, err = train(*flags, "--resume", out=tmp_path / "cut", epochs=20)
        assert status == (130 if due else 0), err
    same_run(tmp_path / "whole", tmp_path / "cut")
    resumed = json.loads((tmp_path / "cut" / "args.json").read_text())["resumed"]
    assert [(r["epoch"], r["command"][-1]) for r in resumed] == [(1, "--resume")]  # who went on, and saved


def test_the_best_epoch_is_the_first_of_equals_among_those_tested():
    entries = [{"test_clean": v} for v in (1, None, 3, 2, 3)]
    assert utils.best(entries) is entries[2] and utils.best([{}]) is None
    by_pgd10 = {"test_clean": 1, "test_pgd10": 2}
    assert utils.best([*entries, by_pgd10]) is by_pgd10
    held_out = {"val_clean": 1, "val_pgd10": None, "test_clean": 0, "test_pgd10": None}
    assert utils.best([*entries, by_pgd10, held_out]) is held_out


# ---- What is refused ---------------------------------------------------------------------------------------


COMMAND = ("--wd", "1e-4")  # of the fixture `run`, with one epoch


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


def refused(train, folder, culprit, *argv):
    before = contents(folder)
    status, _, err = train(*argv, epochs=1)
    assert status == 2 and culprit in err and err.count("\n") == 1, err
    assert contents(folder) == before


def test_what_is_not_this_run_is_refused_and_nothing_touched(train, run, small_npz, tmp_path):
    mine, others = tmp_path / "mine.npz", tmp_path / "others.npz"
    with np.load(small_npz) as npz:
        arrays = dict(npz)
    np.savez_compressed(mine, **arrays)
    arrays["train_images"][0, 0, 0, 0] ^= 1
    np.savez(others, **arrays)
    refused(train, run, "--wd was 0.0001, is 0.0002", "--resume", "--wd", "2e-4", "--ls", 0.1)
    refused(train, run, "--data was", "--resume", *COMMAND, "--dataset", others)
    with mock.patch.object(train_pgdat, "__file__", "train_mart.py"):  # somebody's copy
        refused(train, run, "--script was train_pgdat.py, is train_mart.py", "--resume", *COMMAND)
    with utils.lock(run):  # somebody else works there
        refused(train, run, str(run), "--resume", *COMMAND)
    status, out, err = train("--resume", *COMMAND, "--dataset", mine, "--test-batch-size", 7, epochs=1)
    assert status == 0 and "has finished" in out, err  # no setting


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "log.jsonl"])
def test_whatever_is_there_of_a_run_is_not_written_over(train, run, finished, name):
    for path in run.iterdir():
        if path.name != name:
            path.unlink()
    refused(train, run, f"{run} ", *COMMAND)
    if name == "last.pt":  # which is the run: the others, which a kill left out, are written again
        status, out, err = train(*COMMAND, "--resume", epochs=1)
        assert status == 0 and "has finished" in out, err
        same_run(finished, run)


def test_a_run_whose_last_pt_was_deleted_is_refused_even_if_it_had_finished(train, run):
    (run / "last.pt").unlink()
    refused(train, run, "last.pt", *COMMAND, "--resume")


def test_a_folder_that_is_a_broken_link_is_refused_and_its_target_named(train, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "scratch" / "gone")
    status, _, err = train()
    assert status == 2 and str(tmp_path / "scratch" / "gone") in err and err.count("\n") == 1


def test_a_setting_that_an_older_run_does_not_know_has_its_default(train, run):
    last = torch.load(run / "last.pt", weights_only=True)
    del last["args"]["ls"]
    torch.save(last, run / "last.pt")
    refused(train, run, "--ls was 0, is 0.1", *COMMAND, "--resume", "--ls", 0.1)
    status, _, err = train(*COMMAND, "--resume", epochs=1)
    assert status == 0, err


@pytest.mark.parametrize("batch, problem", [(48, "the loss is not finite"), (96, "a weight is not finite")])
def test_a_run_that_diverges_ends_and_keeps_its_last_good_epoch(train, tmp_path, batch, problem):
    explodes = ("--batch-size", batch, "--lr-decay-epochs", 1, "--lr-decay-factor", 1e38, "--steps", 1)
    for argv in ((), ("--resume",)):
        status, _, err = train(*explodes, *argv)
        assert status == 1 and problem in err and err.count("\n") == 1
        assert utils.load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == len(log(tmp_path / "run")) == 1


def test_where_a_file_system_has_no_locks_nobody_is_stopped(train, script, tmp_path, monkeypatch):
    """As on many clusters."""
    def flock(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert train("--attack", "none", epochs=1)[0] == 0
    assert script(eval_aa, tmp_path / "run", "--attacks", "none")[0] == 0
