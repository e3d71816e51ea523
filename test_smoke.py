"""The real command lines, shrunk: every script from end to end on a CPU. The numerics are tested in tests/."""

import json
import os
import re
import signal
import sys
import traceback
from pathlib import Path

from tests.conftest import ROOT, small_npz, script, spawn  # noqa: F401 (fixtures); first: it limits torch's threads

import numpy as np
import pytest
import torch

import eval_aa
import models
import train_pgdat
import utils

TINY = ("--model", "tiny", "--batch-size", 48, "--lr", 0.05)


@pytest.fixture
def train(script, small_npz, tmp_path):
    """train(*argv): two epochs of the tiny network on the small data, into tmp_path/run -> (status, stdout, stderr)."""
    def run(*argv, out=tmp_path / "run", epochs=2):
        return script(train_pgdat, *TINY, "--dataset", small_npz, "--epochs", epochs, "--out", out, *argv)
    return run


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(entries):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in entries]


def test_a_run_and_its_evaluation(train, script, tmp_path):
    status, out, err = train("--bn-mode", "eval", "--ls", 0.1)
    run = tmp_path / "run"
    assert status == 0, err
    assert f"evaluate it with: python eval_aa.py {run}" in out and str(run / "best.pt") in out
    assert {p.name for p in run.iterdir()} == {"args.json", "log.jsonl", "last.pt", "best.pt", ".lock"}

    record = json.loads((run / "args.json").read_text())
    assert record["args"]["ls"] == 0.1 and record["args"]["eps"] == 8 / 255 and record["command"][0] == "train_pgdat.py"
    assert record["data_sha256"] and record["versions"]["torch"] == torch.__version__ and "git_commit" in record
    assert [e["epoch"] for e in log(run)] == [1, 2]
    assert set(log(run)[0]) == {"epoch", "lr", "eps", "train_loss", "train_adv_acc", "train_clean_acc", "test_clean", "test_pgd10", "seconds"}
    best = utils.load_checkpoint(run / "best.pt")
    assert best["log"]["test_pgd10"] == max(e["test_pgd10"] for e in log(run)) and best["args"]["model"] == "tiny"

    status, out, err = script(eval_aa, run, "--n", 12, "--attacks", "apgd-ce,apgd-t", "--pgd-steps", 3, "--restarts", 2, "--loss", "cw")
    assert status == 0, err
    result = json.loads((run / "result.json").read_text())
    assert result["aa"] is None and set(result["quick"]) == {"apgd-ce,apgd-t"} and "not AA" in out.splitlines()[-1]
    assert result["n"] == 12 and result["epoch"] == best["epoch"] and result["pgd10_any"] <= result["pgd10"] <= result["clean"]
    assert "pgd-cw-3x2" in result["attacks"] and set(result["stages"]) == {"pgd10", "pgd-cw-3x2", "apgd-ce,apgd-t"}
    assert result["stages"]["pgd10"]["versions"]["torch"] == torch.__version__

    before = (run / "result.json").read_text()
    for argv, problem in ((("--n", 13), "n was 12, is 13"), (("--n", 12, "--eps", "4/255"), "eps was")):
        status, out, err = script(eval_aa, run, "--attacks", "none", *argv)
        assert status == 2 and problem in err and (run / "result.json").read_text() == before
    status, out, err = script(eval_aa, run, "--n", 12, "--attacks", "none")          # what is there is not done again
    assert status == 0 and json.loads((run / "result.json").read_text())["stages"] == result["stages"]
    status, out, err = script(eval_aa, run, "--n", 13, "--attacks", "none", "--overwrite")
    assert status == 0 and json.loads((run / "result.json").read_text())["n"] == 13
    status, out, err = script(eval_aa, run, "--which", "last", "--attacks", "none")
    last = json.loads((run / "result_last.json").read_text())
    assert status == 0 and last["n"] == 40 and last["checkpoint"] == "last.pt"
    assert re.search(r"clean +\d+\.\d\d / PGD-10 \d+\.\d\d ", out.splitlines()[-1])


@pytest.mark.parametrize("flags", [
    ("--bn-mode", "train", "--bn-clean-passes", 0),
    ("--bn-mode", "eval", "--bn-clean-passes", 1, "--warmup-lr", 1, "--warmup-eps", 1),
    ("--early-stop-pgd", 0.5, 1, "--lr-schedule", "cosine"),
    ("--val", 16, "--lr-schedule", "onecycle", "--optimizer", "nesterov"),
    ("--attack", "none", "--lr-schedule", "linear", "--optimizer", "sgd-gc"),
    ("--optimizer", "adamw", "--activation", "softplus", "--eval-every", 2),
    ("--precision", "bf16", "--eps", "0.031", "--alpha", "0.007", "--steps", 3, "--optimizer", "sgd-gcc"),
], ids=lambda f: "".join(map(str, f)))
def test_every_trick_trains(train, tmp_path, flags):
    status, out, err = train(*flags, epochs=2)
    assert status == 0, err
    entries = log(tmp_path / "run")
    assert len(entries) == 2 and all(np.isfinite(e["train_loss"]) for e in entries)
    if "--val" in flags:
        assert "80 training images (and 16 held out)" in out and "val_pgd10" in entries[0] and "test_pgd10" in entries[0]
        assert utils.load_checkpoint(tmp_path / "run" / "best.pt")["log"]["val_pgd10"] == max(e["val_pgd10"] for e in entries)
    if "none" in flags:
        assert entries[1]["test_pgd10"] is None and entries[1]["train_adv_acc"] is None and entries[1]["train_clean_acc"] > 0
    if "--eval-every" in flags:
        assert "test_clean" not in entries[0] and "test_clean" in entries[1]
    if "--warmup-lr" in flags:
        assert entries[0]["lr"] == pytest.approx(0.05 / 2) and entries[1]["eps"] == pytest.approx(8 / 255)


def test_compiled_training_takes_the_same_steps(train, tmp_path):
    for name, flags in (("eager", ()), ("compiled", ("--compile",))):  # 40 images a batch, as in the test: few graphs to compile
        status, _, err = train(*flags, "--bn-mode", "eval", "--bn-clean-passes", 0, "--val", 56, "--batch-size", 40, out=tmp_path / name, epochs=1)
        assert status == 0, err
    eager, compiled = (log(tmp_path / n)[0] for n in ("eager", "compiled"))
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-3)


@pytest.mark.parametrize("bn_mode", ["train", "eval"])
def test_toggling_modes_compiles_nothing_anew(small_npz, monkeypatch, bn_mode):
    """Whatever an epoch needs (attack, update and clean passes, in batches of 40 and 16; the test) is compiled in it, once."""
    compiled, compile = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=backend, **options))
    torch._dynamo.reset()
    data = utils.load_dataset(small_npz)
    args = train_pgdat.parse_args(["--model", "tiny", "--batch-size", "40", "--bn-mode", bn_mode, "--steps", "2", "--compile"])
    model = models.build("tiny").to(memory_format=torch.channels_last)
    forward = utils.make_forward(model, compile=True)
    compiled.clear()
    attack, optimizer = train_pgdat.make_attack(model, forward, args), utils.make_optimizer(model, "sgd", 0.1, 0)
    assert attack.__closure__ and not any(isinstance(c.cell_contents, utils.Graphed) for c in attack.__closure__)  # no graphs on a CPU
    after = []
    for epoch in range(2):
        train_pgdat.train_epoch(model, forward, attack, optimizer, data.train_images, data.train_labels, args, epoch, utils.Meter("cpu"))
        train_pgdat.test(model, forward, data.test_images, data.test_labels, args, epoch, "test")
        after.append(len(compiled))
    # For both sizes: attack, update, clean passes, and in BN train mode the attack's last forward, without gradient. For the test
    # of 40 images: with and without gradient, the former being the attack's in BN eval mode.
    assert after == [2 * 4 + 2 if bn_mode == "train" else 2 * 3 + 1] * 2


def test_the_training_set_is_learnt(train, tmp_path):
    """A few epochs fit 96 images far beyond chance, on clean and on adversarial images: the loop does learn."""
    status, _, err = train("--epochs", 12, "--bn-mode", "eval", "--eps", "2/255", "--eval-every", 12, "--lr-schedule", "onecycle")
    assert status == 0, err
    assert log(tmp_path / "run")[-1]["train_adv_acc"] > 30


# ---------------------------------------------------------------------------------------------------------------------
# Dry runs and bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_dry_run_shows_the_whole_setting_and_needs_no_data(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = script(train_pgdat, "--wd", "5e-4", "--bn-mode", "eval", "--ls", "0.1", "--dry-run")
    assert status == 0, err
    for flag in vars(train_pgdat.parse_args([])):
        assert f"--{flag.replace('_', '-')} " in out
    for fact in ("--eps               8/255", "--lr                0.1", "--out               runs/pgdat-ls0.1-bn-mode-eval",
                 "50,000 training", "10,000 test", "11,172,170 parameters", "110 epochs of 391: 43,010"):
        assert fact in out, out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv, problem", [
    (("--model", "resnet18"), "argument --model: invalid choice: 'resnet18' (choose from"),
    (("--activation", "swish"), "argument --activation: invalid choice: 'swish'"),
    (("--dataset", "imagenet"), "unknown data set 'imagenet'"),
    (("--dataset", "none.npz"), "no such file"),
    (("--lr-schedule", "step"), "invalid choice: 'step'"),
    (("--eps", "8"), '[0, 1] scale of the images; write "8/255"'),
    (("--eps", "8/0"), "neither a number nor a fraction"),
    (("--alpha", "-1/255"), "out of range"),
    (("--ls", "1"), "1 is not in [0, 1)"),
    (("--wd", "-1e-4"), "-1e-4 is not at least 0"),
    (("--wd", "nan"), "nan is not"),
    (("--bn-clean-passes", "3"), "invalid choice: 3"),
    (("--epochs", "1.5"), "not a whole number"),
    (("--early-stop-pgd", "70", "40"), "rising"),
    (("--val", "96"), "leaves nothing to train on"),
    (("--device", "gpu"), "device 'gpu' is not auto, cpu, cuda or cuda:N"),
    (("--precision", "tf32", "--device", "cpu"), "CUDA only"),
    (("--optimizer", "adam", "--momentum", "0.5"), "--momentum has no effect with --optimizer adam"),
    (("--attack", "none", "--steps", "7"), "--steps has no effect with --attack none"),
    (("--lr-schedule", "cosine", "--lr-decay-epochs", "3"), "--lr-decay-epochs has no effect"),
    (("--steps-per", "7"), "unrecognized arguments"),
])
def test_bad_arguments_get_one_line_and_leave_nothing(train, tmp_path, argv, problem):
    status, _, err = train(*argv)
    assert status == 2 and problem in err and len(err.splitlines()) == 1, err
    assert list(tmp_path.iterdir()) == []


def test_bad_data_file_gets_one_line(script, tmp_path, small_npz):
    (tmp_path / "cut.npz").write_bytes(small_npz.read_bytes()[:5000])
    status, _, err = script(train_pgdat, *TINY, "--dataset", tmp_path / "cut.npz", "--out", tmp_path / "run")
    assert status == 2 and len(err.splitlines()) == 1 and "cut.npz cannot be read" in err
    assert [p.name for p in tmp_path.iterdir()] == ["cut.npz"]


def test_decay_epochs_beyond_the_end_only_warn(train):
    status, out, _ = train("--lr-decay-epochs", 1, 7, epochs=1)
    assert status == 0 and "warning: the learning rate never drops at 1, 7" in out


def test_a_loss_that_is_not_finite_stops_the_run(train, tmp_path, monkeypatch):
    status, _, err = train("--lr", "1e30", "--activation", "elu", "--lr-decay-epochs", 1, "--lr-decay-factor", 1, "--warmup-lr", 0)
    assert status == 1 and re.search(r"not finite at step \d of epoch 1, lr 1e\+30; there is no good checkpoint yet", err)
    assert not (tmp_path / "run" / "last.pt").exists()
    # and later, with a checkpoint to name: the second epoch starts with an absurd rate
    flags = ("--lr", "1e-3", "--lr-decay-epochs", 1, "--activation", "elu", "--momentum", 0)
    monkeypatch.setattr(train_pgdat, "schedule", lambda t, args: (1e-3 if t < 1 else 1e30, args.eps))
    monkeypatch.setattr(utils, "schedule", lambda t, args: (1e30, args.eps))
    status, _, err = train(*flags, out=tmp_path / "later", epochs=2)
    assert status == 1 and re.search(r"at step \d of epoch 2, lr 1e\+30; the last good checkpoint is .*last.pt, of epoch 1", err)
    assert utils.load_checkpoint(tmp_path / "later" / "last.pt")["epoch"] == 1


@pytest.mark.parametrize("argv, problem", [
    (("nowhere",), "no such file: nowhere"),
    ((".",), "holds no best.pt"),
    (("foreign.pt",), "does not name its architecture: give --model"),
    (("foreign.pt", "--model", "wrn-34-10"), "of another architecture: block1.layer.0.bn1.weight missing"),
    (("foreign.pt", "--model", "tiny", "--no-normalize", "--mean", "0", "0", "0", "--std", "1", "1", "1"), "contradicts"),
    (("foreign.pt", "--model", "tiny", "--n", "41"), "there are 40 test images"),
    (("foreign.pt", "--model", "tiny", "--attacks", "apgd-x"), "is not standard, none, or a list"),
    (("foreign.pt", "--model", "tiny", "--out", "result.pt"), "does not end in .json"),
    (("foreign.pt", "--model", "tiny", "--out", "other.json", "--overwrite"), "other.json was not written by this program"),
    (("cut.pt", "--model", "tiny"), "cut.pt"),
    (("nan.pt", "--model", "tiny"), "nan.pt holds NaN or infinite weights"),
])
def test_bad_evaluations_get_one_line_and_leave_nothing(script, tmp_path, small_npz, monkeypatch, argv, problem):
    monkeypatch.chdir(tmp_path)
    torch.save(models.build("tiny").state_dict(), "foreign.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "foreign.pt").read_bytes()[:9999])
    torch.save({k: v * float("nan") if k == "conv1.weight" else v for k, v in models.build("tiny").state_dict().items()}, "nan.pt")
    (tmp_path / "other.json").write_text("{}")
    status, _, err = script(eval_aa, *argv, "--dataset", small_npz)
    assert status == 2 and problem in err and len(err.splitlines()) == 1, err
    assert {p.name for p in tmp_path.iterdir()} <= {"foreign.pt", "cut.pt", "nan.pt", "other.json", ".other.lock"}
    assert (tmp_path / "other.json").read_text() == "{}"


def test_anyones_checkpoint(script, tmp_path, small_npz):
    """A DataParallel state dict, evaluated with and without normalisation, by hand for comparison."""
    torch.manual_seed(3)
    model = models.build("tiny").eval()
    data = utils.load_dataset(small_npz)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "theirs.pt")
    x = utils.to_float(data.test_images)
    for flags, shown in ((("--no-normalize",), x), (("--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.1),
                         (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.2, 0.1]).view(3, 1, 1))):
        status, out, err = script(eval_aa, tmp_path / "theirs.pt", "--model", "tiny", *flags, "--dataset", small_npz, "--attacks", "none",
                                  "--out", tmp_path / f"{len(flags)}.json")
        assert status == 0, err
        result = json.loads((tmp_path / f"{len(flags)}.json").read_text())
        assert result["clean"] == utils.percent(model(shown).argmax(1) == data.test_labels)
        assert result["eps"] == 8 / 255 and result["precision"] == "fp32"


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted runs
# ---------------------------------------------------------------------------------------------------------------------



def train_with_signals(tmp_path, *runs):
    """Runs train_pgdat.py's main once for each of `runs`, (argv, where, function, number, signal): it gets that signal at that
    call of that function, before, half through, or after. Returns [(exit status, output)], a negative status being the signal
    that killed it. All are forks of one process that has imported everything, which is much quicker than so many starts."""
    jobs = [([str(a) for a in argv], *rest, str(tmp_path / f"output{i}")) for i, (argv, *rest) in enumerate(runs)]
    done = spawn(sys.executable, "-c", f"import test_smoke; test_smoke.fork_each({jobs!r})")
    assert done.returncode == 0, done.stderr
    return [(int(status), Path(job[-1]).read_text()) for status, job in zip(done.stdout.split(), jobs, strict=True)]


def fork_each(jobs):
    torch.optim.SGD([torch.zeros(1)], lr=1)  # imports what it needs
    for argv, where, function, number, signal_number, output in jobs:
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = open(output, "w", buffering=1)
            sys.argv = ["train_pgdat.py", *argv]
            status = 99
            try:
                send_signal_at(where, function, number, signal_number)
                utils.run_script(train_pgdat.main)
                status = 0
            except SystemExit as e:
                status = e.code
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def send_signal_at(where, function, number, signal_number):
    module = train_pgdat if function == "train_step" else utils
    original, calls = getattr(module, function), []

    def send():
        os.kill(os.getpid(), signal_number)

    class HalfFile:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            send()

        def __getattr__(self, name):
            return getattr(self.file, name)

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and where == "before":
            send()
        if len(calls) == number and where == "half" and function == "append_log":
            with open(args[0], "a") as f:
                f.write('{"epoch": 9, "lr')
            send()
        if len(calls) == number and where == "half" and function == "save_checkpoint":
            write_atomically = utils.write_atomically
            utils.write_atomically = lambda path, write: write_atomically(path, lambda f: write(HalfFile(f)))
        result = original(*args, **kwargs)
        if len(calls) == number and where == "after":
            send()
        return result

    setattr(module, function, wrapped)


KILLS = [
    ("before", "train_step", 2),        # in the middle of the first epoch: no checkpoint yet
    ("before", "train_step", 4),        # in the middle of the second
    ("half", "save_checkpoint", 1),     # while the first checkpoint of this process is being written
    ("half", "append_log", 1),          # a torn line
    ("after", "append_log", 1),         # the line is there, the checkpoint is not
    ("before", "save_checkpoint", 2),   # between best.pt, if it improved, and last.pt
    ("after", "save_checkpoint", 2),
]


def test_a_run_killed_at_any_moment_ends_bit_identical(train, small_npz, tmp_path):
    flags = ("--bn-mode", "eval", "--optimizer", "sgd-gc", "--warmup-lr", 1, "--val", 10, "--early-stop-pgd", 1, 2, "--steps", 3)
    status, _, err = train(*flags, out=tmp_path / "whole", epochs=4)
    assert status == 0, err
    cut = tmp_path / "cut"
    argv = [*TINY, "--dataset", small_npz, "--epochs", 4, "--out", cut, "--resume", *flags]
    for (status, output), kill in zip(train_with_signals(tmp_path, *((argv, *kill, int(signal.SIGKILL)) for kill in KILLS)), KILLS, strict=True):
        assert status == -signal.SIGKILL, (kill, output)
    status, out, err = train(*flags, "--resume", out=cut, epochs=4)
    assert status == 0, err

    for name in ("last.pt", "best.pt"):
        a, b = (utils.load_checkpoint(tmp_path / d / name) for d in ("whole", "cut"))
        assert a["epoch"] == b["epoch"] and all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert without_times(log(cut)) == without_times(log(tmp_path / "whole"))
    before = (cut / "last.pt").read_bytes()
    status, out, err = train(*flags, "--resume", out=cut, epochs=4)  # finished: says so, and trains no more
    assert status == 0 and "has finished" in out and (cut / "last.pt").read_bytes() == before


def test_a_signal_stops_a_run_at_the_next_step_and_it_goes_on_from_there(train, small_npz, tmp_path):
    flags = ("--bn-mode", "eval", "--warmup-eps", 1, "--steps", 3)
    status, _, err = train(*flags, out=tmp_path / "whole", epochs=3)
    assert status == 0, err
    cut, steps = tmp_path / "cut", 2  # 96 images
    argv = [*TINY, "--dataset", small_npz, "--epochs", 3, "--out", cut, "--resume", *flags]
    first, second, third = train_with_signals(
        tmp_path,
        (argv, "before", "train_step", 1, int(signal.SIGTERM)),  # the step under way is finished
        (argv, "after", "train_step", 2, int(signal.SIGINT)),    # its second: one of the first epoch was left to it
        (argv, "after", "pgd", 1, int(signal.SIGTERM)))          # in the test at the end of the second epoch
    assert first[0] == 143 and "stopped by SIGTERM after 1 steps of epoch 1;" in first[1], first[1]
    assert second[0] == 130 and "stopped by SIGINT after 1 steps of epoch 2;" in second[1], second[1]
    assert third[0] == 143 and f"stopped by SIGTERM after {steps} steps of epoch 2;" in third[1], third[1]
    assert (cut / "interrupted.pt").exists()
    status, out, err = train(*flags, "--resume", out=cut, epochs=3)
    assert status == 0 and f"going on with {cut} after epoch 1, step {steps}" in out, err
    a, b = (utils.load_checkpoint(tmp_path / d / "last.pt") for d in ("whole", "cut"))
    assert all(torch.equal(a["state_dict"][k], b["state_dict"][k]) for k in a["state_dict"])
    assert without_times(log(cut)) == without_times(log(tmp_path / "whole")) and not (cut / "interrupted.pt").exists()


def test_resume_with_other_arguments_is_refused(train, tmp_path):
    assert train("--wd", "1e-4", epochs=1)[0] == 0
    files = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    status, _, err = train("--wd", "2e-4", "--ls", 0.1, "--resume", epochs=1)
    assert status == 2 and "--ls was 0, is 0.1; --wd was 0.0001, is 0.0002" in err and len(err.splitlines()) == 1
    status, _, err = train("--wd", "1e-4", epochs=1)
    assert status == 2 and "already holds a run: add --resume" in err
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == files


def test_folders_and_checkpoints_that_are_not_this_runs_are_refused(train, tmp_path):
    assert train(epochs=1)[0] == 0 and train("--seed", 1, out=tmp_path / "other", epochs=1)[0] == 0
    last = tmp_path / "run" / "last.pt"
    for other in (tmp_path / "other" / "last.pt", tmp_path / "run" / "best.pt"):
        last.write_bytes(other.read_bytes())
        status, _, err = train("--resume", epochs=1)
        assert status == 2 and "last.pt is not a checkpoint of this run" in err
    (tmp_path / "run" / "args.json").write_text('{"lr": 3}')
    status, _, err = train("--resume", epochs=1)
    assert status == 2 and "args.json was not written by this program" in err
    (tmp_path / "run" / "args.json").unlink()
    status, _, err = train("--resume", epochs=1)
    assert status == 2 and "holds last.pt but no args.json" in err
    (tmp_path / "file").write_text("")
    status, _, err = train(out=tmp_path / "file", epochs=1)
    assert status == 2 and "file" in err and len(err.splitlines()) == 1


def test_two_processes_cannot_train_into_one_folder(train, tmp_path):
    with utils.run_folder(tmp_path / "run"):
        status, _, err = train("--resume")
    assert status == 2 and "another process is working in" in err
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]
