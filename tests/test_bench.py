"""tools/bench.py: the textbook's steps, which it times, are ours. (test_cuda.py runs the whole script.)
What a row costs: its own setting is timed, and the sums are right."""

import argparse
import json
import re

import pytest
import torch

import train_pgdat
import train_trades
from tools import bench, report


@pytest.mark.parametrize("bn_mode", ["train", "eval"])
@pytest.mark.parametrize("script", [train_pgdat, train_trades])
def test_the_textbook_takes_our_steps_and_no_others(script, bn_mode):
    args = script.parse_args(["--bn-mode", bn_mode])
    assert bench.largest_difference(script, args) < bench.TOLERANCE
    if script is train_pgdat:
        args.bn_clean_passes = 0
        assert bench.largest_difference(script, args) > 1e-3


@pytest.fixture(scope="module")
def rows():
    return report.manifest()


@pytest.fixture
def fast(monkeypatch):
    """A clock by which every image that is timed takes a second, and a network of any name is tiny."""
    build = bench.models.build
    monkeypatch.setattr(bench.models, "build", lambda name, *args, **kwargs: build("tiny", *args, **kwargs))
    monkeypatch.setattr(bench, "seconds_per_image", lambda take, n, device: (take(2), (1.0, n))[1])
    return argparse.Namespace(precision=None, compile=None, row=None, json=None)


CPU = torch.device("cpu")


def test_a_row_costs_its_steps_and_its_tests(rows, fast):
    """A second an image: 50,000 a training epoch, 10,000 a test."""
    cost = bench.training_cost(rows["t2-base"], fast, CPU)
    assert cost["step_s"] == 128 and cost["steps"] == 391 and cost["epoch_s"] == 50_000
    assert cost["test_batch_s"] == 250 and cost["test_s"] == 10_000 and cost["row_s"] == 110 * 60_000
    row = rows["t2-base"]._replace(setting=rows["t2-base"].setting | {"eval_every": 20, "val": 1000})
    cost = bench.training_cost(row, fast, CPU)
    assert cost["tests"] == 6 and cost["row_s"] == 110 * 49_000 + 6 * 11_000  # 20, 40 ... 100, 110


def test_autoattack_is_made_of_forwards_and_gradients(rows, fast):
    """A second a forward and a gradient of an image: 100 + 900 + 1,800 + 5,000 of every image."""
    cost = bench.evaluation_cost(rows["t2-base"], 10_000, CPU)
    assert cost["aa_s"] == pytest.approx(100 * (82.52 * 100 + 53.58 * 900 + 48.51 * 6800))
    assert not cost["assumed"]
    cost = bench.evaluation_cost(rows["quickstart"], 500, CPU)  # it evaluates 100 images
    assert cost["aa_s"] == pytest.approx(85 * 100 + 54 * 900 + 50 * 6800) and cost["assumed"]


MEAN = next(name for name in bench.models.build("tiny").state_dict() if name.endswith("running_mean"))


@pytest.mark.parametrize("row, attack, after", [  # forwards in train mode are T, others e
    ("t2-base", 11 * "T", "TTT"), ("t7-r18-bneval", 10 * "e", "TTT"), ("x-r18-bneval-clean0", 10 * "e", "T"),
    ("t12-r18-wd5e-4-relu-bneval", 11 * "e", "TT"), ("t12-r18-wd5e-4-softplus-bntrain", 20 * "T", "TT"),
    ("f4-wd1e-4", "", "TTT"), ("t2-early-stop-40-70", 11 * "T", "TTT"), ("t5-adam", 11 * "T", "TTT"),
    ("s1-wong2020", 11 * "T", "TTT"), ("x-r18-ema", 11 * "T", "TTT"), ("x-r18-awp", 11 * "T", "TTTT"),
    ("x-trades-r18-awp", 11 * "e", "TTTT"),
])
def test_what_is_timed_is_the_rows_own_step(rows, row, attack, after):
    """The forwards of the row's attack at full length, of the update and of the clean passes."""
    args = argparse.Namespace(**{**rows[row].setting, "model": "tiny", "precision": "fp32"})
    work = bench.Work(report.SCRIPTS[args.script], args, 10, CPU)
    modes = []
    work.model.register_forward_pre_hook(lambda model, x: modes.append("T" if model.training else "e"))
    work.train(2)
    if args.ema:  # running statistics are averaged too, and start at 0
        assert work.average.state_dict()[MEAN].any()
    assert "".join(modes) == attack + after
    assert type(work.optimizer) is (torch.optim.Adam if row == "t5-adam" else torch.optim.SGD)
    softplus = any(isinstance(m, torch.nn.Softplus) for m in work.model.modules())
    assert softplus == (args.activation == "softplus")


def test_cost_of_rows(script, fast, tmp_path):
    """A row, the same run under another name, a checkpoint, standard training, an attack that stops early."""
    rows = "t2-base", "t4-r18-ls0@1", "t13-eps8-wrn20-released", "f4-wd1e-4", "t2-early-stop-40-70"
    status, out, err = script(bench, "--row", *rows, "--json", tmp_path / "cost.json")
    base, same, released, standard, early = (" ".join(b.split())
                                             for b in re.split(r"\n(?=\S)", out)[1:])
    assert status == 0 and err == ""
    assert base.startswith("t2-base: train_pgdat.py, ResNet-18 step 128.000 s 128 images test batch 250.0")
    assert "epoch 13:53:20 391 steps test 2:46:40 10,000 images the row 1833:20:00 110 epochs, 110" in base
    assert same == base.replace("t2-base", "t4-r18-ls0@1") and "upper bound" not in base
    assert "the row" not in released and "accuracies are 86.43 / 54.39 / 54.39 (the paper's)" in released
    assert "AutoAttack" not in standard and "upper bound" in early
    assert json.loads((tmp_path / "cost.json").read_text())["rows"].keys() == set(rows)


@pytest.mark.parametrize("argv, problem", [
    (["--json", "nowhere/cost.json"], "--json nowhere/cost.json: there is no such folder"),
    (["--row", "t99"], "run_all.sh has no row t99"),
    (["--row", "t2-base", "--model", "tiny"], "--model has no effect with --row"),
    (["--row", "t2-base", "--bn-mode", "eval"], "--bn-mode has no effect with --row"),
])
def test_bad_arguments(script, monkeypatch, argv, problem):
    monkeypatch.setattr(bench, "timed", None)  # nothing is timed before
    status, out, err = script(bench, *argv)
    assert status == 2 and problem in err and len(err.splitlines()) == 1
