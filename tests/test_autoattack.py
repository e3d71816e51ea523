"""The evaluator sends batches through AutoAttack's attacks, one after the other; stopped, it goes on."""

import json
import logging
import random
import re

import numpy as np
import pyautoattack
import pytest
import torch

import eval_aa
import models
import utils

EPS, BATCH = 0.01, 5
QUERIES, ITERATIONS = 500, 20  # of Square and FAB, instead of 5,000 and 100: for the test's time


class Quadratic(torch.nn.Module):
    """A small smooth classifier that thousands of queries of Square cost little on."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w = torch.nn.Parameter(torch.randn(10, 48, generator=g), requires_grad=False)
        self.v = torch.nn.Parameter(torch.randn(10, 48, generator=g), requires_grad=False)

    def forward(self, x):
        x = torch.nn.functional.avg_pool2d(x, 8).view(len(x), -1) - 0.5  # .view refuses channels-last memory
        return x @ self.w.T + 4 * x.square() @ self.v.T


def shortened(aa):
    aa.square.n_queries, aa.fab.n_iter = QUERIES, ITERATIONS
    return aa


def test_flags_are_those_of_autoattacks_own_call_on_the_same_batches(tmp_path, monkeypatch, capsys):
    """With any module; a second call goes on where the first one was stopped."""
    model, size = Quadratic(), (14, 4, 4, 3)
    images = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    images = images.repeat_interleave(8, 1).repeat_interleave(8, 2)
    x = utils.to_float(images).contiguous()
    labels = model(x).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    want = []
    for batch in (slice(0, 5), slice(5, 10), slice(10, 14)):
        theirs = shortened(pyautoattack.AutoAttack(model, eps=EPS, seed=0, version="standard"))
        x_adv, _ = theirs.run_standard_evaluation(x[batch], labels[batch], batch_size=BATCH)
        want += (model(x_adv).argmax(1) == labels[batch]).tolist()
    assert 0 < sum(want) < 13

    make, path = eval_aa.make_autoattack, tmp_path / "mine.json"
    monkeypatch.setattr(eval_aa, "make_autoattack", lambda *args: shortened(make(*args)))
    part = eval_aa.autoattack(model, images, labels, EPS, path, batch_size=BATCH, stop_after=3)
    assert part["n_done"] == 5 and not part["complete"] and part["aa_error"] > 0
    assert re.search(r"apgd-ce took \d+ s for the first 5 images; in all this takes about 0:00:",
                     capsys.readouterr().out)
    result = eval_aa.autoattack(model, images, labels, EPS, path, batch_size=BATCH)
    flags = np.load(path.with_suffix(".npz"))
    assert flags["square"].tolist() == want and flags["done"].all()
    left = [flags[a].sum() for a in eval_aa.STANDARD]
    assert left == sorted(left, reverse=True) and left[0] > left[-1]
    assert result["aa"] == round(100 * sum(want) / 14, 2) and result["aa_error"] == 0 and result["complete"]
    with pytest.raises(utils.InputError, match="mine.json is of another evaluation .data_sha256 was"):
        eval_aa.autoattack(model, images, labels.roll(1), EPS, path, batch_size=BATCH)
    with pytest.raises(utils.InputError, match="images are torch.float32, labels torch.int64: torch.uint8"):
        eval_aa.autoattack(model, images / 255, labels, EPS, path, batch_size=BATCH)


class Few(Quadratic):
    """Quadratic's first K classes."""

    def __init__(self, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return super().forward(x)[:, : self.classes]


@pytest.mark.parametrize("classes", (4, 9))
def test_with_few_classes_the_targeted_attacks_try_all_others(classes, tmp_path, monkeypatch, capsys):
    make, targets = eval_aa.make_autoattack, []

    def spy(*args):
        aa = shortened(make(*args))
        targets.extend((aa.apgd_targeted.n_target_classes, aa.fab.n_target_classes))
        return aa

    monkeypatch.setattr(eval_aa, "make_autoattack", spy)
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    labels = Few(classes)(utils.to_float(images).contiguous()).argmax(1)
    aa = eval_aa.autoattack(Few(classes), images, labels, EPS, tmp_path / "x.json")["aa"]
    assert targets == [classes - 1, classes - 1]
    assert f" / AA, {classes - 1} targets {aa:.2f}\n" in capsys.readouterr().out


@pytest.mark.parametrize("classes, advice", ((2, "apgd-ce,fab,square"), (3, "apgd-ce,apgd-dlr,fab,square")))
def test_with_two_or_three_classes_standard_names_what_works(classes, advice, tmp_path, monkeypatch):
    make, model = eval_aa.make_autoattack, Few(classes)
    monkeypatch.setattr(eval_aa, "make_autoattack", lambda *args: shortened(make(*args)))
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    labels = model(utils.to_float(images).contiguous()).argmax(1)
    with pytest.raises(utils.InputError, match=f"{classes} classes are too few .*: try --attacks {advice}$"):
        eval_aa.autoattack(model, images, labels, EPS, tmp_path / "x.json")
    result = eval_aa.autoattack(model, images, labels, EPS, tmp_path / "x.json", attacks=advice.split(","))
    assert result["complete"] and result["aa"] is None


def test_no_attack_is_called_on_a_batch_without_survivors_and_a_channels_last_model_is_attacked():
    """The package raises on an empty batch, and APGD calls .view on gradients in the model's own layout."""
    torch.manual_seed(0)
    model = models.build("tiny").to(memory_format=torch.channels_last).eval()
    x = utils.to_float(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)).contiguous()
    y = model(x).argmax(1)
    aa = eval_aa.make_autoattack(model, 8 / 255, 0, "cpu")
    assert dict(eval_aa.withstood(aa, ["apgd-ce"], x, y))["apgd-ce"].shape == (4,)
    wrong = dict(eval_aa.withstood(aa, ["apgd-ce", "square"], x, (y + 1) % 10))
    assert not wrong["apgd-ce"].any() and not wrong["square"].any()


def test_the_estimate_and_its_error_cover_the_figure():
    """On flags simulated with the paper's rates (PGD-10 53.58, AA 48.51): unbiased; 95 % intervals hold."""
    rng, n, total = np.random.default_rng(0), 2000, 10_000
    inside, values, plain = 0, [], []
    for _ in range(400):
        u = rng.random(total)
        pgd10, left = u < 0.5358, u < 0.4851
        left ^= rng.random(total) < 0.002  # and a few images that withstand AutoAttack alone
        done = np.zeros(total, dtype=bool)
        done[:n] = True
        value, error = eval_aa.estimate(pgd10, left, done)
        truth = 100 * left.mean()
        values.append(value - truth)
        plain.append(100 * left[:n].mean() - truth)
        inside += abs(value - truth) <= 1.96 * error
    assert 0.92 < inside / 400 < 0.98 and abs(np.mean(values)) < 0.08
    assert np.std(values) < 0.5 * np.std(plain)
    assert eval_aa.estimate(pgd10, left, np.ones(total, dtype=bool)) == (round(100 * left.mean(), 2), 0)
    # By hand: PGD-10 3 of 5; of the three done it is 1, 1, 0 and AutoAttack 1, 0, 0.
    value, error = eval_aa.estimate(np.array([1, 1, 0, 1, 0], bool), np.array([1, 0, 0, 0, 0], bool),
                                    np.array([1, 1, 1, 0, 0], bool))
    assert value == round(60 - 100 / 3, 2) and error == round(100 * (0.4 * (2 / 3 / 2) / 3) ** 0.5, 2)
    # No difference yet, in 4 of 16 images: the error is that of one in four, whose variance is 1 / 4.
    alike, four = np.ones(16, bool), np.arange(16) < 4
    assert eval_aa.estimate(alike, alike, four) == (100, round(100 * (0.75 * 0.25 / 4) ** 0.5, 2))


@pytest.fixture
def checkpoint(tmp_path, small_npz, monkeypatch):
    """A folder with tiny.pt, a state dict, and small.npz; the working directory is in it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    model = models.build("tiny")
    for m in model.modules():
        m.momentum = 1.0  # one forward fills in batch norm's statistics: predictions are not all alike
    model(utils.to_float(utils.load_dataset(small_npz).test_images))
    torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, "tiny.pt")
    (tmp_path / "small.npz").write_bytes(small_npz.read_bytes())
    return tmp_path


TINY = ("tiny.pt", "--model", "tiny", "--dataset", "small.npz")


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".lock" and p.is_file()}


def test_an_interruption_at_any_moment_changes_no_flag(script, checkpoint, monkeypatch):
    argv = [*TINY, "--eps", "1/255", "--attacks", "apgd-ce", "--n", 12, "--batch-size", 2]
    status, _, err = script(eval_aa, *argv)
    assert status == 0, err
    whole, write = dict(np.load("tiny_result.npz")), utils.write_whole
    moments, interrupted = random.Random(1), 0

    def dying(path, fill):
        moment = moments.choice(("before", "after", "", ""))
        if moment == "before":
            raise KeyboardInterrupt
        write(path, fill)
        if moment == "after":
            raise KeyboardInterrupt

    monkeypatch.setattr(utils, "write_whole", dying)
    while (status := script(eval_aa, *argv, "--out", "cut.json")[0]) == 130:
        interrupted += 1
    cut = dict(np.load("cut.npz"))
    assert status == 0 and interrupted > 3 and json.loads((checkpoint / "cut.json").read_text())["complete"]
    assert whole.keys() == cut.keys() and all((whole[k] == cut[k]).all() for k in whole if k != "result")


@pytest.mark.parametrize("argv, problem", [
    (("--out", "small.json"), "small.npz says nothing of it"),  # it is the data set
    (("--out", "other.json"), "other.npz says nothing of it"),
    (("--out", "result.npz"), "does not end in .json"),
    (("--eps", "4/255"), "eps was"),
    (("--batch-size", 7), "batch_size was 250, is 7"),
    (("--activation", "elu"), "activation was relu, is elu"),
    (("--dataset", "nine.npz"), "tiny.pt knows 10 classes, but the data set has 9"),
    (("--dataset", "eleven.npz"), "tiny.pt knows 10 classes, but the data set has 11"),
    (("--n", "39"), "n was 40, is 39"),
    (("--n", "41"), "there are 40 test images"),
    (("--attacks", "apgd-x"), "is not standard, none, or a list"),
    (("--no-normalize", "--mean", "0", "0", "0", "--std", "1", "1", "1"), "contradicts"),
    (("--model", "wrn-34-10"), "of another architecture: Missing key(s)"),
    (("--which", "last"), "--which chooses in a run's folder"),
    (("--seed", 2**63), "is not at least 0 and below 9223372036854775808"),
    (("--stop-after", "3"), "--stop-after has no effect with --attacks none"),
])
def test_what_is_refused_leaves_everything_as_it_was(script, checkpoint, argv, problem):
    assert script(eval_aa, *TINY, "--attacks", "none")[0] == 0
    (checkpoint / "other.json").write_text('{"clean": 3}')
    arrays = dict(np.load("small.npz"))
    for name, last in (("nine", 8), ("eleven", 10)):
        train, test = (np.where(arrays[f"{part}_labels"] == 9, last, arrays[f"{part}_labels"])
                       for part in ("train", "test"))
        train[0] = min(9, last)
        np.savez(f"{name}.npz", **{**arrays, "train_labels": train, "test_labels": test})
    before = files(checkpoint)
    status, _, err = script(eval_aa, *TINY, "--attacks", "none", *argv)
    assert status == 2 and problem in err and len(err.splitlines()) == 1, err
    assert files(checkpoint) == before


def test_an_evaluation_in_progress_is_not_joined(script, checkpoint):
    with utils.lock(checkpoint, ".tiny_result.lock"):
        status, _, err = script(eval_aa, *TINY, "--attacks", "none")
    assert status == 2 and "another process is working in" in err


def test_other_weights_are_refused_until_the_result_is_deleted(script, checkpoint):
    argv = (*TINY, "--attacks", "none")
    assert script(eval_aa, *argv)[0] == 0
    torch.save(models.build("tiny").state_dict(), "tiny.pt")
    status, _, err = script(eval_aa, *argv)
    assert status == 2 and "weights_sha256 was" in err
    for name in ("tiny_result.json", "tiny_result.npz"):
        assert name in err
        (checkpoint / name).unlink()
    assert script(eval_aa, *argv)[0] == 0 and script(eval_aa, *argv)[0] == 0
    status, _, err = script(eval_aa, "tiny.pt", "--dataset", "small.npz")
    assert status == 2 and "does not name its architecture: give --model" in err
    status, _, err = script(eval_aa, ".")
    assert status == 2 and "best.pt cannot be read: No such file" in err


def test_anyones_checkpoint_is_normalised_as_the_flags_say(script, checkpoint):
    data = utils.load_dataset("small.npz")
    x = utils.to_float(data.test_images)
    model, _, _ = eval_aa.load_model("tiny.pt", "tiny")
    model.normalize = torch.nn.Identity()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.1])
    normalised = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for i, (flags, shown) in enumerate([
            (("--no-normalize",), x), (("--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.1), normalised)]):
        status, _, err = script(eval_aa, *TINY, *flags, "--attacks", "none", "--out", f"{i}.json")
        assert status == 0, err
        result = json.loads((checkpoint / f"{i}.json").read_text())
        assert result["clean"] == utils.percent(model(shown).argmax(1) == data.test_labels)
        assert result["eps"] == 8 / 255 and result["precision"] == "fp32"


def test_the_forecast_by_hand(capsys):
    """Two batches; 200 passes take 5 s, and half of the images go through the other 9,500."""
    eval_aa.forecast(eval_aa.STANDARD, 5, 60, 0.5, 2)  # 2 * 5 * (1 + 0.5 * 47.5) = 247.5
    assert capsys.readouterr().out.endswith("5 s for the first 60 images; in all this takes about 0:04:08\n")


def test_images_that_only_fab_and_square_break_are_named(capsys):
    flags = {"apgd-t": np.ones(300, bool), "square": np.ones(300, bool), "done": np.ones(300, bool)}
    flags["square"][7] = False
    eval_aa.show_late(flags)
    assert capsys.readouterr().out == "fab-t and square alone break 1 of the images (0.33 %) [7]\n"
    flags["square"][9] = False
    eval_aa.show_late(flags)
    assert "warning: that is many: are gradients masked?" in capsys.readouterr().out


def test_autoattacks_warnings_are_heard_once_an_evaluation(caplog):
    for evaluations in (1, 2):
        eval_aa.make_autoattack(Quadratic(), EPS, 0, "cpu")
        for _ in range(3):
            logging.getLogger("auto-attack").warning("there are zero gradients")
        assert caplog.text.count("zero gradients") == evaluations
