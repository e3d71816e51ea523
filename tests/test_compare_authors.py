"""tools/compare_authors.py fails where the sides differ; the authors' part is played by a textbook PGD-AT.

With BAG_OF_TRICKS_CLONE (and AT_HE_CLONE) naming clones of their code, the comparison itself runs too.
"""

import json
import math
import os
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import spawn

import models
import train_pgdat
import utils
from tools import compare_authors as tool


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    monkeypatch.setattr(tool, "STEPS", 2)  # enough to see a mistake
    with tool.float64_on_cpu():
        yield


def other_classes(logits, y, s):
    """Cross-entropy with target 1 - s on the label and s / 9 on each of the nine other classes."""
    target = torch.full_like(logits, s / 9)
    target[range(len(y)), y] = 1 - s
    return -(target * logits.log_softmax(1)).sum(1).mean()


def all_classes(logits, y, s):
    return F.cross_entropy(logits, y, label_smoothing=s)


def textbook(setting, state, batches, bn_mode="train", smoothing=0.0, loss=other_classes, clean_passes=2,
             attacked=True):
    """PGD-AT with SGD; besides the usual forward passes, one ends the attack and two see clean images."""
    model, images = tool.our_model(setting.network, normalize=models.CIFAR_NORMALIZE), {}
    model.load_state_dict(state)
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    for i, (x, y) in enumerate(batches):
        torch.manual_seed(tool.NOISE + i)
        delta = torch.zeros_like(x).uniform_(-8 / 255, 8 / 255) if attacked else 0
        model.train(bn_mode == "train")
        for _ in range(10 if attacked else 0):
            x_adv = (x + delta).clamp(0, 1).requires_grad_()
            gradient, = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
            delta = (x_adv.detach() - x + 2 / 255 * gradient.sign()).clamp(-8 / 255, 8 / 255)
        images[i] = (x + delta).clamp(0, 1)
        if attacked:
            model(images[i])
        model.train().zero_grad()
        loss(model(images[i]), y, smoothing).backward()
        if clean_passes == 2:
            model(x)
        with torch.no_grad():
            for p, m in zip(model.parameters(), momentum):
                p -= 0.1 * m.mul_(0.9).add_(p.grad + 5e-4 * p)
        if clean_passes:
            model(x)
    lr = dict.fromkeys(images, torch.tensor(0.1))
    return {"lr": lr, "eps": {}, "images": images, **tool.tensors(model)}


def row(flags="", expect="equal", **mistake):
    setting = tool.Setting("", "", flags, expect=expect)
    return tool.compare_steps(setting, partial(textbook, **mistake), partial(tool.our_steps, train_pgdat))


@pytest.mark.parametrize("flags, same", [
    ("", {}),
    ("--bn-mode eval --ls 0.1", {"bn_mode": "eval", "smoothing": 0.1}),
    ("--attack none", {"attacked": False}),
])
def test_equal_steps_pass(flags, same):
    result = row(flags, **same)
    assert result["ok"] and result["verdict"] == "equal" and result["eps"] is None
    assert max(result[part] for part in ("lr", "images", "weights", "statistics")) < 1e-12


@pytest.mark.parametrize("flags, mistake, first", [
    ("--ls 0.1", {"smoothing": 0.1, "loss": all_classes}, "weights"),
    ("", {"clean_passes": 1}, "statistics"),
    ("--attack none", {"attacked": False, "clean_passes": 1}, "statistics"),
    ("--attack none --wd 4.999e-4", {"attacked": False}, "weights"),
    ("--attack none --lr 0.2", {"attacked": False}, "lr"),
])
def test_a_planted_deviation_fails(flags, mistake, first):
    result = row(flags, **mistake)
    assert not result["ok"] and result["verdict"] == "DIFFERS"
    assert result[first] > tool.TOLERANCE
    if first == "statistics":  # which do not enter training here
        assert result["images"] < 1e-12 and result["weights"] < 1e-12


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


@pytest.mark.parametrize("mistake, status", [({}, 0), ({"clean_passes": 1}, 1)])
def test_exit_status_and_figures(clone, script, tmp_path, monkeypatch, mistake, status):
    theirs = partial(textbook, attacked=False, **mistake)
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
