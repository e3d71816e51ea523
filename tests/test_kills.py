"""Runs that are killed, at chosen moments and at random ones, and go on: they end as if nothing had happened.

`python -m pytest -m slow tests/test_kills.py` runs the sweep over all moments and 100 kills at random ones.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, spawn
from test_smoke import TINY, same_run, train  # noqa: F401 (fixture)

import eval_aa
import runs
import train_pgdat

PATH = f"{ROOT}:{ROOT / 'tests'}"  # of a process that imports this file


def train_with_signals(tmp_path, *kills):
    """Run train_pgdat.py's main once for each kill, (argv, where, function, number, signal).

    The process gets the signal at that call of that function: before it, half through it, or after it. All
    processes are forks of one that has imported everything, which is much quicker than so many starts.
    Returns [(exit status, output)]; a negative status is the signal that killed it.
    """
    jobs = [([str(a) for a in argv], *rest, str(tmp_path / f"output{i}")) for i,
            (argv, *rest) in enumerate(kills)]
    done = spawn(sys.executable, "-c", f"import test_kills; test_kills.fork_each({jobs!r})", PYTHONPATH=PATH)
    assert done.returncode == 0, done.stderr
    return [(int(s), Path(job[-1]).read_text()) for s, job in zip(done.stdout.split(), jobs, strict=True)]


def fork_each(jobs):
    torch.optim.SGD([torch.zeros(1)], lr=1)  # imports what it needs
    for argv, where, function, number, signal_number, output in jobs:
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = open(output, "w", buffering=1)
            sys.argv = ["train_pgdat.py", *argv]
            signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
            status = 99
            try:
                send_signal_at(where, function, number, signal_number)
                runs.run_script(train_pgdat.main)
                status = 0
            except SystemExit as e:
                status = e.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def send_signal_at(where, function, number, signal_number):
    module = train_pgdat if function in ("train_step", "test") else runs
    original, calls = getattr(module, function), []

    def send():
        os.kill(os.getpid(), signal_number)

    def wrapped(*args, **kwargs):
        calls.append(1)
        due = len(calls) == number
        if due and where == "before":
            send()
        if due and where == "half":  # of write_atomically
            path, data = args
            path.with_name(f".{path.name}.tmp").write_bytes(bytes(data)[: len(data) // 2])
            send()
        result = original(*args, **kwargs)
        if due and where == "after":
            send()
        return result

    setattr(module, function, wrapped)


# In turn, of one run. A process writes args.json first, and best.pt and log.jsonl, which it checks; then, of
# every epoch, last.pt, best.pt if it was the best, and log.jsonl.
KILLS = [
    ("before", "train_step", 2, signal.SIGKILL),       # in the middle of the first epoch: no checkpoint yet
    ("before", "train_step", 4, signal.SIGTERM),       # in the middle of the second
    ("half", "write_atomically", 4, signal.SIGKILL),
    ("after", "test", 1, signal.SIGINT),
    ("after", "write_atomically", 4, signal.SIGTERM),
    ("before", "save_checkpoint", 2, signal.SIGKILL),
    ("before", "train_step", 1, signal.SIGINT),
]
# The sweep: every function at every call that a run of four epochs makes of it, in a run of its own each.
SWEEP = [(where, function, number, signal.SIGKILL)
         for function, calls, wheres in (("train_step", 8, ("before", "after")),
                                         ("test", 8, ("before", "after")),
                                         ("write_atomically", 13, ("before", "half", "after")))
         for number in range(1, calls + 1) for where in wheres]


FLAGS = ("--bn-mode", "eval", "--optimizer", "sgd-gc", "--warmup-lr", 1, "--val", 10, "--steps", 3,
         "--early-stop-pgd", 1, 2, "--ema", 0.9, "--awp", 0.01)


def test_a_run_killed_at_any_moment_ends_bit_identical(train, small_npz, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    status, _, err = train(*FLAGS, out=whole, epochs=8)
    assert status == 0, err
    argv = [*TINY, "--dataset", small_npz, "--epochs", 8, "--out", cut, "--resume", *FLAGS]
    done = train_with_signals(tmp_path, *((argv, *kill[:-1], int(kill[-1])) for kill in KILLS))
    for (status, output), kill in zip(done, KILLS, strict=True):
        assert status == (130 if kill[-1] == signal.SIGINT else -kill[-1]), (kill, output)
        assert "Traceback" not in output
        if kill[-1] == signal.SIGINT:
            command = output.splitlines()[-1].partition("; to go on: ")[2]
            assert command.startswith("python train_pgdat.py --model tiny") and command.count("--resume") == 1
    status, out, err = train(*FLAGS, "--resume", out=cut, epochs=8)
    assert status == 0, err
    same_run(whole, cut)
    before = (cut / "last.pt").read_bytes()
    status, out, err = train(*FLAGS, "--resume", out=cut, epochs=8)  # finished: says so, and trains no more
    assert status == 0 and "has finished" in out and (cut / "last.pt").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("kill", SWEEP, ids=lambda k: "-".join(map(str, k[:3])))
def test_a_sweep_of_kills(train, small_npz, tmp_path_factory, tmp_path, kill):
    whole, cut = tmp_path_factory.getbasetemp() / "sweep", tmp_path / "cut"
    if not whole.exists():
        assert train(*FLAGS, out=whole, epochs=4)[0] == 0
    argv = [*TINY, "--dataset", small_npz, "--epochs", 4, "--out", cut, "--resume", *FLAGS]
    (status, output), = train_with_signals(tmp_path, (argv, *kill[:-1], int(kill[-1])))
    assert status in (-signal.SIGKILL, 0), output  # 0: that epoch was not the best, so the call was not made
    assert train(*FLAGS, "--resume", out=cut, epochs=4)[0] == 0
    same_run(whole, cut)


def kill_at_random(module, argv, seconds, seed):
    """Run a script's main in processes that are killed after up to so many seconds, until one ends; prints
    the kills."""
    moments, kills = random.Random(seed), 0
    torch.optim.SGD([torch.zeros(1)], lr=1)  # imports what it needs
    while True:
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")
            sys.argv = [Path(module.__file__).name, *argv]
            status = 0
            try:
                runs.run_script(module.main)
            except SystemExit as e:
                status = e.code
            os._exit(status)
        deadline, status = time.time() + moments.uniform(0, seconds), None
        while status is None and time.time() < deadline:
            done, code = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if done else None
            time.sleep(0.001)
        if status is not None:
            print(kills, status)
            return
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1


def killed(module, argv, seconds, seed):
    """How often a command was killed before one of its repetitions got to the end."""
    call = f"test_kills.kill_at_random(test_kills.{module}, {[str(a) for a in argv]!r}, {seconds}, {seed})"
    done = spawn(sys.executable, "-c", f"import test_kills; {call}", PYTHONPATH=PATH)
    assert done.returncode == 0, done.stderr
    kills, status = map(int, done.stdout.split())
    assert status == 0
    return kills


@pytest.mark.slow
def test_sixty_kills_of_a_training_run_at_random(train, small_npz, tmp_path):
    assert train(*FLAGS, out=tmp_path / "whole", epochs=4)[0] == 0
    total, i = 0, 0
    while total < 60:
        cut = tmp_path / f"cut{i}"
        argv = [*TINY, "--dataset", small_npz, "--epochs", 4, "--out", cut, "--resume", *FLAGS]
        total, i = total + killed("train_pgdat", argv, 1.5, i), i + 1
        same_run(tmp_path / "whole", cut)


@pytest.mark.slow
def test_thirty_kills_of_an_evaluation_at_random(train, script, small_npz, tmp_path):
    assert train(epochs=1)[0] == 0
    argv = [tmp_path / "run", "--n", 30, "--attacks", "apgd-ce,apgd-t", "--batch-size", 5]
    assert script(eval_aa, *argv)[0] == 0
    whole = json.loads((tmp_path / "run" / "result.json").read_text())
    total, i = 0, 0
    while total < 30:
        out = tmp_path / f"{i}.json"
        total, i = total + killed("eval_aa", [*argv, "--out", out], 4, i), i + 1
        result = json.loads(out.read_text())
        assert all(result[k] == whole[k] for k in ("clean", "pgd10", "pgd10_worst", "quick"))
        assert not out.with_suffix(".state.json").exists()


@pytest.mark.slow
def test_ten_kills_of_preparing_data_at_random(tmp_path):
    shape, moments, total = (20_000, 32, 32, 3), random.Random(0), 0
    data = {"train_images": np.zeros(shape, np.uint8), "train_labels": np.zeros(shape[0], np.uint8)}
    np.savez(tmp_path / "cifar10.npz", **data, test_images=data["train_images"],
             test_labels=data["train_labels"])
    command = [sys.executable, ROOT / "data" / "prepare.py", "head", "--n", "20000", "--data-dir", tmp_path]
    while total < 10:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.1, 0.6))
        process.kill()
        total += process.wait() == -signal.SIGKILL
        (tmp_path / "cifar10_head20000.npz").unlink(missing_ok=True)
    assert spawn(*command).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [".cifar10.lock", "cifar10.npz",
                                                          "cifar10_head20000.npz"]
    with np.load(tmp_path / "cifar10_head20000.npz") as npz:
        assert len(npz["train_labels"]) == 20_000
