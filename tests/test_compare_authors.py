"""tools/compare_authors.py fails where the sides differ; the authors' part is played by the textbook.

With BAG_OF_TRICKS_CLONE (and AT_HE_CLONE) naming clones of their code, the comparison itself runs too.
"""

import json
import math
import os
import sys
from functools import partial

import pytest
import torch
from conftest import spawn

import models
import train_pgdat
import train_trades
import utils
from tests.reference import pgdat_step, trades_step
from tools import compare_authors as tool


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    monkeypatch.setattr(tool, "STEPS", 2)  # enough to see a mistake
    with tool.float64_on_cpu():
        yield


def textbook(script, setting, state, batches, flags):
    """What tests/reference.py does under the flags of our script: the part of the authors."""
    args = script.parse_args(flags.split())
    model = tool.our_model(setting.network, normalize=script.NORMALIZE)
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.wd)
    step, images = pgdat_step if script is train_pgdat else trades_step, {}
    for i, (x, y) in enumerate(batches):
        torch.manual_seed(tool.NOISE + i)
        images[i], _ = step(model, optimizer, x, y, None, args)
    return {"lr": dict.fromkeys(images, torch.tensor(args.lr)), "eps": {}, "images": images,
            **tool.tensors(model)}


def row(ours, theirs, script=train_pgdat):
    """The row of our step under some flags beside the textbook's under others."""
    both = partial(textbook, script, flags=theirs), partial(tool.our_steps, script)
    return tool.compare_steps(tool.Setting("", "", ours), *both)


@pytest.mark.parametrize("script, flags", [
    (train_pgdat, ""), (train_pgdat, "--bn-mode eval --ls 0.1"), (train_pgdat, "--attack none"),
    (train_trades, "--bn-mode train"), (train_trades, "--eps 0.031 --alpha 0.007"),
])
def test_equal_steps_pass(script, flags):
    result = row(flags, flags, script)
    assert result["ok"] and result["verdict"] == "equal" and result["eps"] is None
    assert (result["images"] is None) == (flags == "--attack none")  # recorded where an attack is made
    assert max(result[part] or 0 for part in ("lr", "images", "weights", "statistics")) < 1e-12


@pytest.mark.parametrize("ours, theirs, first", [
    ("--ls 0.1", "--ls 0.09", "weights"),  # 0.1 over all ten classes is 0.09 over the others
    ("--alpha 2/255", "--alpha 0.0078", "images"),
    ("", "--bn-clean-passes 1", "statistics"),
    ("--attack none", "--attack none --bn-clean-passes 1", "statistics"),
    ("--attack none --wd 4.999e-4", "--attack none", "weights"),
    ("--attack none --lr 0.2", "--attack none", "lr"),
])
def test_a_planted_deviation_fails(ours, theirs, first):
    result = row(ours, theirs)
    assert not result["ok"] and result["verdict"] == "DIFFERS"
    assert result[first] > tool.TOLERANCE
    if first == "statistics":  # which do not enter training here
        assert (result["images"] or 0) < 1e-12 and result["weights"] < 1e-12


def test_what_a_row_expects():
    values = (torch.tensor(v) for v in (0.0, 1.0, math.nan))
    zero, one, nan = ({"lr": {0: v}, "images": {0: v}} for v in values)
    step = {"lr": one["lr"], "images": zero["images"]}

    def verdict(theirs, ours, expect="equal", **about):
        result = tool.judged(about, theirs, ours, expect)
        return result["ok"], result["verdict"]

    assert verdict(zero, zero) == (True, "equal")
    assert verdict(zero, nan) == (False, "DIFFERS")
    assert verdict(zero, step) == (False, "DIFFERS")
    assert verdict(zero, step, "on purpose") == (True, "on purpose")
    assert verdict(zero, one, "on purpose") == (False, "DIFFERS")
    assert verdict(zero, one, "planted") == (True, "planted, seen")
    assert verdict(zero, zero, "planted") == (False, "NOT SEEN")
    assert verdict(zero, zero, headroom=1e-6) == (False, "SATURATED")


def test_networks_that_differ_fail():
    build = partial(models.build, "tiny")
    assert tool.compare_networks("tiny", "ReLU", build(), build())["ok"]
    other = tool.compare_networks("tiny", "ELU", build(activation="celu"), build(activation="elu"))
    assert other["verdict"] == "DIFFERS" and other["eval"] > tool.TOLERANCE
    with pytest.raises(utils.InputError, match="different layers"):
        tool.compare_networks("wrn", "ReLU", tool.our_model("wrn-16-1"), tool.our_model("wrn-10-1"))


# A script with the interface, and no more, of the authors': its attack is noise, its model a linear one.
SCRIPT = """
import argparse, logging, os, sys
import torch
from torch import nn
from torch.optim.optimizer import required
from models import WideResNet, PreActResNet18
from utils import attack_pgd, cifar10, Batches

one = torch.ones(1).cuda()
SGD_GCC = None

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--lr-max", type=float)
    args = parser.parse_args()
    os.makedirs("left_behind")
    logging.basicConfig(handlers=[logging.FileHandler("left_behind/log")])
    print("not to be seen")
    model = nn.DataParallel(WideResNet(34, 10, widen_factor=10)).cuda()
    data = cifar10("nowhere")
    train = Batches(data["train"], 8, shuffle=True)
    test = Batches(data["test"], 8, shuffle=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for epoch in range(0, 110):
        for i, batch in enumerate(train):
            optimizer.param_groups[0]["lr"] = args.lr_max * epoch
            delta, _ = attack_pgd(model, batch["input"], batch["target"], 0.25)
            optimizer.zero_grad()
            model(batch["input"] + delta).sum().backward()
            optimizer.step()
        for i, batch in enumerate(test):
            sys.exit("no test is wanted")
"""
MODELS = """
import torch
def PreActResNet18():
    pass
class WideResNet(torch.nn.Module):
    def __init__(self, depth=34, num_classes=10, widen_factor=10):
        super().__init__()
        self.fc = torch.nn.Linear(3 * 32 * 32, depth + widen_factor)
        self.sub_block1 = torch.nn.Linear(1, 1)
    def forward(self, x):
        return self.fc(x.flatten(1))
"""
UTILS = "import torchvision\ncifar10 = Batches = None\n" \
        "def attack_pgd(model, x, y, epsilon):\n    return torch.rand_like(x), 0\nimport torch\n"


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if ".git" not in path.parts)


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "models").mkdir()
    for name, text in {"train_cifar.py": SCRIPT, "models/__init__.py": MODELS, "utils.py": UTILS}.items():
        (tmp_path / name).write_text(text)
    commit = ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]
    for command in (["init", "-q"], ["add", "."], commit):
        assert spawn("git", *command, cwd=tmp_path).returncode == 0
    return tmp_path


def test_their_script_runs_as_it_is(clone, capfd, monkeypatch):
    monkeypatch.chdir(clone)
    before, x = files(clone), torch.rand(2, 3, 32, 32)
    script, = tool.load(clone, "train_cifar")
    assert sys.modules["utils"] is utils and sys.modules["models"] is models
    assert script.one.dtype == torch.float64
    state = {"fc.weight": torch.zeros(11, 3072), "fc.bias": torch.zeros(11)}
    setting = tool.Setting("", "--lr-max 0.5", "", "wrn-10-1", epoch=3)
    seen = tool.their_pgdat(script, setting, state, [(x, torch.zeros(2))] * 2)
    torch.manual_seed(tool.NOISE + 1)
    assert torch.equal(seen["images"][1], x + torch.rand_like(x))
    assert [lr.item() for lr in seen["lr"].values()] == [1.5, 1.5] and seen["eps"][0].item() == 0.25
    assert torch.allclose(seen["weights"]["fc.bias"], torch.full((11,), -1.5 * 2 * 2))
    assert files(clone) == before and capfd.readouterr().out == ""


@pytest.mark.parametrize("mistake, status", [("", 0), ("--bn-clean-passes 1", 1)])
def test_exit_status_and_figures(clone, script, tmp_path, monkeypatch, mistake, status):
    theirs = partial(textbook, train_pgdat, flags=f"--attack none {mistake}")
    monkeypatch.setattr(tool, "their_pgdat", lambda script, *problem: theirs(*problem))
    monkeypatch.setattr(tool, "PGDAT", [tool.Setting("standard", "", "--attack none")])
    monkeypatch.setattr(tool, "NETWORKS", {})
    monkeypatch.setattr(tool, "ACTIVATIONS", ())
    code, out, err = script(tool, clone, "--json", tmp_path / "out.json")
    assert (code, err) == (status, "")
    assert ("equal" if status == 0 else "DIFFERS") in out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["settings"][0]["ok"] is (status == 0)
    commit = spawn("git", "rev-parse", "HEAD", cwd=clone).stdout.strip()
    assert figures["clones"] == {"Bag-of-Tricks-for-AT": commit}


def test_bad_paths_are_one_line(clone, script, tmp_path):
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    for argv, words in (([clone / "nowhere"], "is not a git clone"),
                        ([tmp_path / "empty"], "is not a git clone"),
                        ([clone, "--json", tmp_path / "no" / "out.json"], "no such folder"),
                        ([clone, "--trades", tmp_path / "models"], "is not a git clone"),
                        ([clone, "--trades", clone], "cannot import losses")):
        code, out, err = script(tool, *argv)
        assert code == 2 and err.count("\n") == 1 and words in err, err


@pytest.mark.skipif("BAG_OF_TRICKS_CLONE" not in os.environ, reason="BAG_OF_TRICKS_CLONE names no clone")
def test_the_comparison_itself():
    trades = ["--trades", os.environ["AT_HE_CLONE"]] if "AT_HE_CLONE" in os.environ else []
    done = spawn(sys.executable, "-m", "tools.compare_authors", os.environ["BAG_OF_TRICKS_CLONE"], *trades)
    assert done.returncode == 0, done.stdout + done.stderr
