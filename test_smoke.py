"""The real command lines, shrunk: every script end to end on a CPU. The numerics are tested in tests/."""

import itertools
import json
import re
import shutil
import sys

# First, because conftest limits torch's threads.
from tests.conftest import ROOT, script, small_npz, spawn  # noqa: F401 (fixtures)

import numpy as np
import pytest
import torch

import eval_aa
import models
import runs
import train_pgdat
import utils

TINY = ("--model", "tiny", "--batch-size", 48, "--lr", 0.05)


@pytest.fixture
def train(script, small_npz, tmp_path):
    """train(*argv): two epochs of the tiny network, into tmp_path/run -> (status, stdout, stderr)."""
    def run(*argv, out=tmp_path / "run", epochs=2):
        return script(train_pgdat, *TINY, "--dataset", small_npz, "--epochs", epochs, "--out", out, *argv)
    return run


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(entries):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in entries]


def same_run(a, b):
    """Whether two folders hold the same weights in best.pt and last.pt, and the same log."""
    for name in ("last.pt", "best.pt"):
        one, other = (runs.load_checkpoint(folder / name) for folder in (a, b))
        assert one["epoch"] == other["epoch"]
        assert all(torch.equal(one["state_dict"][k], other["state_dict"][k]) for k in one["state_dict"])
    assert without_times(log(a)) == without_times(log(b))


def test_a_run_and_its_evaluation(train, script, tmp_path):
    status, out, err = train("--bn-mode", "eval", "--ls", 0.1)
    run = tmp_path / "run"
    assert status == 0, err
    assert f"evaluate it with: python eval_aa.py {run}" in out and str(run / "best.pt") in out
    assert {p.name for p in run.iterdir()} == {"args.json", "log.jsonl", "last.pt", "best.pt", ".lock"}

    record = json.loads((run / "args.json").read_text())
    assert record["args"]["ls"] == 0.1 and record["args"]["eps"] == 8 / 255
    assert record["command"][0] == "train_pgdat.py"
    assert record["git_diff"] is None or record["git_dirty"]
    assert record["data_sha256"] and record["versions"]["torch"] == torch.__version__
    assert "git_commit" in record
    assert [e["epoch"] for e in log(run)] == [1, 2]
    assert set(log(run)[0]) == {"epoch", "lr", "eps", "train_loss", "train_adv_acc", "train_clean_acc",
                                "test_clean", "test_pgd10", "seconds"}
    best = runs.load_checkpoint(run / "best.pt")
    assert best["log"][-1]["test_pgd10"] == max(e["test_pgd10"] for e in log(run))
    assert best["args"]["model"] == "tiny"

    status, out, err = script(eval_aa, run, "--n", 12, "--attacks", "apgd-ce,apgd-t", "--pgd-steps", 3,
                              "--restarts", 2, "--loss", "cw")
    assert status == 0, err
    result = json.loads((run / "result.json").read_text())
    assert result["aa"] is None and set(result["quick"]) == {"apgd-ce,apgd-t"}
    assert "not AA" in out.splitlines()[-1]
    assert result["n"] == 12 and result["epoch"] == best["epoch"]
    assert result["pgd10_worst"] <= result["pgd10"] <= result["clean"]
    assert "pgd-cw-3x2" in result["attacks"]
    assert set(result["stages"]) == {"pgd10", "pgd-cw-3x2", "apgd-ce,apgd-t"}
    assert result["stages"]["pgd10"]["versions"]["torch"] == torch.__version__
    with np.load(run / "result.npz") as npz:
        flags = {k: utils.percent(torch.from_numpy(npz[k])) for k in npz}
    assert flags == {"clean": result["clean"], "pgd10": result["pgd10"], "pgd10_worst": result["pgd10_worst"],
                     "pgd-cw-3x2": result["attacks"]["pgd-cw-3x2"], **result["quick"]["apgd-ce,apgd-t"]}
    assert re.search(r"PGD-10 \S+ / pgd-cw-3x2 \S+ / apgd-ce,apgd-t", out.splitlines()[-1])

    before = (run / "result.json").read_text()
    for argv, problem in ((("--n", 13), "n was 12, is 13"), (("--n", 12, "--eps", "4/255"), "eps was")):
        status, out, err = script(eval_aa, run, "--attacks", "none", *argv)
        assert status == 2 and problem in err and (run / "result.json").read_text() == before
    # what is there is not done again
    status, out, err = script(eval_aa, run, "--n", 12, "--attacks", "none")
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
        assert "80 training images (and 16 held out)" in out and "val_pgd10" in entries[0]
        assert "test_pgd10" in entries[0]
        best = runs.load_checkpoint(tmp_path / "run" / "best.pt")["log"][-1]
        assert best["val_pgd10"] == max(e["val_pgd10"] for e in entries)
    if "none" in flags:
        assert entries[1]["test_pgd10"] is None and entries[1]["train_adv_acc"] is None
        assert entries[1]["train_clean_acc"] > 0
    if "--eval-every" in flags:
        assert "test_clean" not in entries[0] and "test_clean" in entries[1]
    if "--warmup-lr" in flags:
        assert entries[0]["lr"] == pytest.approx(0.05 / 2) and entries[1]["eps"] == pytest.approx(8 / 255)


def test_compiled_training_takes_the_same_steps(train, tmp_path):
    # 40 images a batch, as in the test: few graphs to compile
    for name, flags in (("eager", ()), ("compiled", ("--compile",))):
        status, _, err = train(*flags, "--bn-mode", "eval", "--bn-clean-passes", 0, "--val", 56,
                               "--batch-size", 40, out=tmp_path / name, epochs=1)
        assert status == 0, err
    eager, compiled = (log(tmp_path / n)[0] for n in ("eager", "compiled"))
    assert compiled["train_loss"] == pytest.approx(eager["train_loss"], rel=1e-3)


@pytest.mark.parametrize("bn_mode", ["train", "eval"])
def test_toggling_modes_compiles_nothing_anew(small_npz, monkeypatch, bn_mode):
    """Whatever an epoch needs, of batches of 40 and 16 images and a test of 40, is compiled in it, once."""
    compiled, compile = [], torch.compile

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=backend, **options))
    torch._dynamo.reset()
    data = utils.load_dataset(small_npz)
    flags = ("--model", "tiny", "--batch-size", "40", "--bn-mode", bn_mode, "--steps", "2", "--compile")
    args = train_pgdat.parse_args(flags)
    model = models.build("tiny").to(memory_format=torch.channels_last)
    forward = runs.make_forward(model, compile=True)
    compiled.clear()
    optimizer = utils.make_optimizer(model, "sgd", 0.1, 0)
    work = (model, forward, train_pgdat.make_attack(model, forward, args), optimizer)
    after = []
    for epoch in range(2):
        train_pgdat.train_epoch(*work, data.train_images, data.train_labels, args, epoch)
        train_pgdat.test(model, forward, data.test_images, data.test_labels, args, epoch, "test")
        after.append(len(compiled))
    # For both sizes: attack, update, clean passes, and in BN train mode the attack's last forward, which
    # needs no gradient. For the test of 40 images: with and without gradient, the former being the attack's
    # in BN eval mode.
    # torch 2.11 tells two fewer apart in BN train mode.
    assert after[0] == after[1] and after[0] in ((2 * 4 + 2, 2 * 4) if bn_mode == "train" else (2 * 3 + 1,))


def test_the_training_set_is_learnt(train, tmp_path):
    """A few epochs fit 96 images far beyond chance, on clean and on adversarial images: the loop does
    learn."""
    status, _, err = train("--epochs", 12, "--bn-mode", "eval", "--eps", "2/255", "--eval-every", 12,
                           "--lr-schedule", "onecycle")
    assert status == 0, err
    assert log(tmp_path / "run")[-1]["train_adv_acc"] > 30


# ---- Dry runs and bad input --------------------------------------------------------------------------------


def test_dry_run_shows_the_whole_setting_and_needs_no_data(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = script(train_pgdat, "--wd", "5e-4", "--bn-mode", "eval", "--ls", "0.1", "--dry-run")
    assert status == 0, err
    for flag in vars(train_pgdat.parse_args([])):
        assert f"--{flag.replace('_', '-')} " in out
    for fact in ("--eps               8/255", "--lr                0.1",
                 "--out               runs/pgdat-ls0.1-bn-mode-eval",
                 "50,000 training", "10,000 test", "11,172,170 parameters", "110 epochs of 391: 43,010"):
        assert fact in out, out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv, problem", [
    (("--model", "resnet18"), "argument --model: invalid choice: 'resnet18' (choose from"),
    (("--activation", "swish"), "argument --activation: invalid choice: 'swish'"),
    (("--dataset", "imagenet"), "unknown data set 'imagenet'"),
    (("--dataset", "none.npz"), "no such file"),
    (("--dataset", "data/cifar10_head77.npz"), "python data/prepare.py head --n 77 makes it"),
    (("--lr-schedule", "step"), "invalid choice: 'step'"),
    (("--eps", "8"), '[0, 1] scale of the images; write "8/255"'),
    (("--eps", "8/0"), "neither a number nor a fraction"),
    (("--alpha", "1.5"), "out of range"),
    (("--ls", "1"), "1 is not in [0, 1)"),
    (("--wd", "-1"), "-1 is not at least 0"),
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
    (("--lr-decay-epochs", "1", "2", "3", "--lr-decay-factor", "0.1", "0.2"), "one for each of --lr-decay"),
    (("--steps-per", "7"), "unrecognized arguments"),
])
def test_bad_arguments_get_one_line_and_leave_nothing(train, tmp_path, argv, problem):
    status, _, err = train(*argv)
    assert status == 2 and problem in err and len(err.splitlines()) == 1, err
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_does_not_pass_as_cifar10(script, tmp_path, small_npz):
    shutil.copy(small_npz, tmp_path / "cifar10.npz")
    status, _, err = script(train_pgdat, *TINY, "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert status == 2 and "cifar10.npz is not cifar10: it holds 96 training and 40 test images" in err


def test_bad_data_file_gets_one_line(script, tmp_path, small_npz):
    (tmp_path / "cut.npz").write_bytes(small_npz.read_bytes()[:5000])
    status, _, err = script(train_pgdat, *TINY, "--dataset", tmp_path / "cut.npz", "--out", tmp_path / "run")
    assert status == 2 and len(err.splitlines()) == 1 and "cut.npz cannot be read" in err
    assert [p.name for p in tmp_path.iterdir()] == ["cut.npz"]


def test_decay_epochs_beyond_the_end_only_warn(train):
    status, out, _ = train("--lr-decay-epochs", 1, 7, epochs=1)
    assert status == 0 and "warning: the learning rate never drops at 1, 7" in out


def test_a_loss_that_is_not_finite_stops_the_run(train, tmp_path, monkeypatch):
    status, _, err = train("--lr", "1e30", "--activation", "elu", "--lr-decay-epochs", 1, "--lr-decay-factor",
                           1)
    assert status == 1 and len(err.splitlines()) == 1
    assert re.search(r"stopped: .* not finite at .* of epoch 1; there is no good checkpoint yet", err)
    assert not (tmp_path / "run" / "last.pt").exists()
    # And later, with a checkpoint to name: the second epoch starts with an absurd rate.
    monkeypatch.setattr(train_pgdat, "schedule", lambda t, args: (1e-3 if t < 1 else 1e30, args.eps))
    status, _, err = train("--activation", "elu", "--momentum", 0, out=tmp_path / "later")
    assert status == 1
    assert re.search(r"of epoch 2; the last good checkpoint is .*last.pt, of epoch 1", err)
    assert runs.load_checkpoint(tmp_path / "later" / "last.pt")["epoch"] == 1


def test_weights_that_are_not_finite_are_never_saved(train, tmp_path, monkeypatch):
    original = train_pgdat.test

    def spoil(model, *args):
        with torch.no_grad():
            model.linear.bias[0] = float("nan")
        return original(model, *args)

    monkeypatch.setattr(train_pgdat, "test", spoil)
    status, _, err = train()
    assert status == 1 and "a weight is not finite at the end of epoch 1" in err
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize("argv, problem", [
    (("nowhere",), "no such file: nowhere"),
    (("checkpoints/wide.pt", "--model", "tiny"), "its row in run_all.sh says where it is from"),
    ((".",), "holds no best.pt"),
    (("foreign.pt",), "does not name its architecture: give --model"),
    (("foreign.pt", "--model", "wrn-34-10"), "of another architecture: Missing key(s)"),
    (("foreign.pt", "--model", "tiny", "--no-normalize", "--mean", "0", "0", "0", "--std", "1", "1", "1"),
     "contradicts"),
    (("foreign.pt", "--model", "tiny", "--n", "41"), "there are 40 test images"),
    (("foreign.pt", "--model", "tiny", "--attacks", "apgd-x"), "is not standard, none, or a list"),
    (("two.pt", "--model", "tiny", "--attacks", "apgd-dlr", "--dataset", "two.npz"),
     "apgd-dlr needs 3 classes"),
    (("foreign.pt", "--model", "tiny", "--out", "odd.json"), "odd.json was not written by this program"),
    (("foreign.pt", "--model", "tiny", "--out", "result.pt"), "does not end in .json"),
    (("foreign.pt", "--model", "tiny", "--out", "other.json", "--overwrite"),
     "other.json was not written by this program"),
    (("cut.pt", "--model", "tiny"), "cut.pt"),
    (("nan.pt", "--model", "tiny"), "nan.pt holds NaN or infinite weights"),
])
def test_bad_evaluations_get_one_line_and_leave_nothing(script, tmp_path, small_npz, monkeypatch, argv,
                                                        problem):
    monkeypatch.chdir(tmp_path)
    torch.save(models.build("tiny").state_dict(), "foreign.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "foreign.pt").read_bytes()[:9999])
    state = models.build("tiny").state_dict()
    torch.save({**state, "conv1.weight": state["conv1.weight"] * float("nan")}, "nan.pt")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "odd.json").write_text(json.dumps(dict.fromkeys(eval_aa.RESULT, "high")))
    three_classes("two.npz", 2)
    torch.save(models.build("tiny", 2).state_dict(), "two.pt")
    before = {p.name for p in tmp_path.iterdir()}
    status, _, err = script(eval_aa, *([] if "two.npz" in argv else ["--dataset", small_npz]), *argv)
    assert status == 2 and problem in err and len(err.splitlines()) == 1, err
    assert {p.name for p in tmp_path.iterdir()} - before <= {".other.lock", ".odd.lock"}
    assert (tmp_path / "other.json").read_text() == "{}"


def test_adversarial_images_are_saved(train, script, tmp_path, small_npz):
    assert train(epochs=1)[0] == 0
    run, file, data = tmp_path / "run", tmp_path / "adv.npz", utils.load_dataset(small_npz)
    argv = (run, "--n", 12, "--attacks", "apgd-ce", "--save-adv", file)
    status, _, err = script(eval_aa, *argv)
    assert status == 0, err
    with np.load(file) as npz:
        moved = torch.from_numpy(npz["images"]) - utils.to_float(data.test_images[:12])
        assert npz["labels"].tolist() == data.test_labels[:12].tolist()
        assert moved.abs().max() <= 8 / 255 + 1e-6 and not moved[torch.from_numpy(npz["robust"])].any()
    assert not list(run.glob("*.npy"))
    status, _, err = script(eval_aa, *argv)
    assert status == 2 and "is there already, add --overwrite" in err
    status, _, err = script(eval_aa, *argv[:-1], run / "result.npz", "--overwrite")
    assert status == 2 and "which images withstood what" in err


def test_results_of_a_checkpoint_that_has_changed_since_are_refused(train, script, tmp_path):
    assert train(epochs=1)[0] == 0 and script(eval_aa, tmp_path / "run", "--attacks", "none")[0] == 0
    state = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    del state["digest"]
    state["state_dict"]["linear.bias"][0] += 1
    torch.save(state, tmp_path / "run" / "best.pt")
    status, _, err = script(eval_aa, tmp_path / "run", "--attacks", "none")
    assert status == 2 and "the checkpoint has changed since. --overwrite evaluates it anew" in err


def test_anyones_checkpoint(script, tmp_path, small_npz):
    """A DataParallel state dict, evaluated with and without normalisation, by hand for comparison."""
    torch.manual_seed(3)
    model = models.build("tiny").eval()
    data = utils.load_dataset(small_npz)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
               tmp_path / "theirs.pt")
    x = utils.to_float(data.test_images)
    for flags, shown in ((("--no-normalize",), x), (("--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.1),
                         (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.2, 0.2,
                                                                                           0.1]).view(3, 1,
                                                                                                      1))):
        status, out, err = script(eval_aa, tmp_path / "theirs.pt", "--model", "tiny", *flags, "--dataset",
                                  small_npz, "--attacks", "none",
                                  "--out", tmp_path / f"{len(flags)}.json")
        assert status == 0, err
        result = json.loads((tmp_path / f"{len(flags)}.json").read_text())
        assert result["clean"] == utils.percent(model(shown).argmax(1) == data.test_labels)
        assert result["eps"] == 8 / 255 and result["precision"] == "fp32"


# ---- Interrupted runs --------------------------------------------------------------------------------------


def test_resume_with_other_arguments_is_refused(train, tmp_path):
    assert train("--wd", "1e-4", epochs=1)[0] == 0
    files = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    status, _, err = train("--wd", "2e-4", "--ls", 0.1, "--resume", epochs=1)
    assert status == 2 and "--ls was 0, is 0.1; --wd was 0.0001, is 0.0002" in err
    assert len(err.splitlines()) == 1
    status, _, err = train("--wd", "1e-4", epochs=1)
    assert status == 2 and "already holds a run: --resume" in err
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


@pytest.fixture
def half(train, tmp_path, monkeypatch):
    """The folder of a run of four epochs that was stopped after two, the first of which was the better."""
    def stop(epoch):
        def schedule(t, args):
            if t >= epoch:
                raise KeyboardInterrupt
            return utils.schedule(t, args)
        return schedule

    figures = itertools.cycle([20.0, 10.0])
    monkeypatch.setattr(train_pgdat, "test", lambda *a: {"test_clean": 50.0, "test_pgd10": next(figures)})
    with monkeypatch.context() as patch:
        patch.setattr(train_pgdat, "schedule", stop(2))
        assert train("--steps", 1, epochs=4)[0] == 130
    return tmp_path / "run"


def go_on(train):
    return train("--steps", 1, "--resume", epochs=4)


@pytest.mark.parametrize("name, damage, problem", [
    ("last.pt", lambda p: p.unlink(), "holds a run without its last.pt"),
    ("last.pt", lambda p: p.write_bytes(p.read_bytes()[:-5000]), "last.pt cannot be read"),
    ("best.pt", lambda p: p.unlink(),
     "best.pt is not the checkpoint of epoch 1, the best, and"),
    ("best.pt", lambda p: p.write_bytes(p.read_bytes()[:999]), "best.pt is not the checkpoint of epoch 1"),
    ("best.pt", lambda p: p.write_bytes((p.parent / "last.pt").read_bytes()),
     "best.pt is not the checkpoint of epoch 1"),
    ("args.json", lambda p: p.write_text(p.read_text().replace('"epochs": 4', '"epochs": "4"')),
     "args.json was not"),
    ("args.json", lambda p: p.write_bytes(b"\xff\xfe"), "args.json cannot be read"),
])
def test_a_damaged_run_is_refused_in_one_line(train, half, name, damage, problem):
    damage(half / name)
    before = {p: p.read_bytes() for p in half.iterdir()}
    status, _, err = go_on(train)
    assert status == 2 and re.search(problem, err) and len(err.splitlines()) == 1, err
    assert {p: p.read_bytes() for p in half.iterdir()} == before


@pytest.mark.parametrize("damage, said", [
    (lambda p: p.unlink(), True), (lambda p: p.write_text(""), True), (lambda p: p.write_bytes(b"\xff\n{}"),
                                                                       True),
    (lambda p: p.write_text(p.read_text()[:40]), True),
    (lambda p: p.write_text(p.read_text().splitlines()[0] + "\n"), False),  # killed before it was written
    (lambda p: p.write_text(p.read_text() + '{"epoch": 3, "l'), False),
])
def test_a_damaged_log_is_restored_from_the_checkpoint(train, half, damage, said):
    before = log(half)
    damage(half / "log.jsonl")
    status, out, err = go_on(train)
    assert status == 0 and ("was damaged and is restored" in out) == said, err
    assert log(half)[:2] == before and [e["epoch"] for e in log(half)] == [1, 2, 3, 4]


def test_a_kill_in_the_first_epoch_starts_over_whatever_the_log_says(train, half):
    for name in ("last.pt", "best.pt"):
        (half / name).unlink()
    (half / "log.jsonl").write_text('{"epoch": 1, "l')
    status, out, _ = go_on(train)
    assert status == 0 and "going on" not in out and [e["epoch"] for e in log(half)] == [1, 2, 3, 4]


def test_a_finished_run_without_its_checkpoints_is_not_started_over(train, script, tmp_path):
    assert train()[0] == 0
    run = tmp_path / "run"
    assert script(eval_aa, run, "--attacks", "none")[0] == 0
    for gone in ("last.pt", "best.pt"):
        (run / gone).unlink()
        before = {p: p.read_bytes() for p in run.iterdir()}
        status, out, err = train("--resume")
        assert status == 0 and f"{run} has finished" in out and "best of 2 epochs" in out, err
        status, out, err = script(eval_aa, run, "--attacks", "none")
        assert status == 0 and f"({run / 'result.json'})" in out.splitlines()[-1], err
        assert {p: p.read_bytes() for p in run.iterdir()} == before or gone == "last.pt"
    assert "best.pt is gone, but has been evaluated: clean" in out


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_once_there_is_room(train, tmp_path, monkeypatch):
    status, _, err = train(out=tmp_path / "whole", epochs=2)
    assert status == 0, err
    real, writes = runs.os.fsync, []

    def fsync(descriptor):
        writes.append(descriptor)
        if len(writes) in (5, 6):  # args.json, last.pt, best.pt, log.jsonl; last.pt
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(runs.os, "fsync", fsync)
    status, _, err = train(epochs=2)
    run = tmp_path / "run"
    assert status == 2 and err == f"train_pgdat.py: error: {run / 'last.pt'}: No space left on device\n"
    assert runs.load_checkpoint(run / "last.pt")["epoch"] == 1 and not list(run.glob(".*.tmp"))
    status, _, err = train("--resume", epochs=2)
    assert status == 2 and err == f"train_pgdat.py: error: {run / 'log.jsonl'}: No space left on device\n"
    assert train("--resume", epochs=2)[0] == 0
    same_run(tmp_path / "whole", run)


def test_standard_output_may_be_closed(tmp_path, small_npz):
    command = [sys.executable, ROOT / "train_pgdat.py", *TINY, "--dataset", small_npz, "--dry-run"]
    done = spawn("sh", "-c", 'exec "$@" >&-', "sh", *command)
    assert done.returncode == 0 and done.stderr == ""


def test_settings_that_an_older_run_does_not_know_have_their_defaults(train, tmp_path):
    """An args.json and checkpoints written before --ls existed go on where --ls is 0, and only there."""
    assert train(epochs=1)[0] == 0
    run = tmp_path / "run"
    record = json.loads((run / "args.json").read_text())
    del record["args"]["ls"]
    (run / "args.json").write_text(json.dumps(record))
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    del checkpoint["args"]["ls"]
    del checkpoint["digest"]
    torch.save(checkpoint, run / "last.pt")
    status, _, err = train("--resume", epochs=1)
    assert status == 0, err
    status, _, err = train("--resume", "--ls", 0.1, epochs=1)
    assert status == 2 and "--ls was 0, is 0.1" in err


def test_two_processes_cannot_train_into_one_folder(train, tmp_path):
    with runs.locked_folder(tmp_path / "run"):
        status, _, err = train("--resume")
    assert status == 2 and "another process is working in" in err
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_file_system_without_locks_is_no_obstacle(train, monkeypatch):
    def flock(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(runs.fcntl, "flock", flock)
    status, out, _ = train(epochs=1)
    assert status == 0 and out.count("cannot be locked (Operation not supported)") == 1


# ---- A researcher's copy -----------------------------------------------------------------------------------


def three_classes(path, classes=3):
    rng = np.random.default_rng(0)
    sizes = {"train": 24, "test": 9}
    np.savez(path, **{f"{s}_images": rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8) for s,
                      n in sizes.items()},
             **{f"{s}_labels": np.arange(n) % classes for s, n in sizes.items()})


def test_four_copied_names_train_on_data_of_ones_own(tmp_path):
    for name in ("train_pgdat.py", "utils.py", "runs.py", "models"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    three_classes(tmp_path / "mine.npz")
    done = spawn(sys.executable, "train_pgdat.py", *TINY, "--dataset", "mine.npz", "--epochs", 1, "--out",
                 "run",
                 cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert runs.load_checkpoint(tmp_path / "run" / "best.pt")["num_classes"] == 3


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


def test_utils_and_models_alone_serve_a_loop_of_ones_own(tmp_path):
    shutil.copytree(ROOT / "models", tmp_path / "models")
    shutil.copy(ROOT / "utils.py", tmp_path)
    three_classes(tmp_path / "mine.npz")
    (tmp_path / "mine.py").write_text(OWN_LOOP + "import sys; assert 'runs' not in sys.modules\n")
    done = spawn(sys.executable, "mine.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_science_knows_no_machinery():
    imports = re.findall(r"^(?:import|from) (\w+)", (ROOT / "utils.py").read_text(), re.M)
    assert set(imports) <= {"contextlib", "hashlib", "math", "pathlib", "typing", "numpy", "torch"}
    assert not re.search(r"\b(rank|world|argv|distributed)\b", (ROOT / "utils.py").read_text())
