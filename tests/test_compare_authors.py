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
from tools import compare_authors as tool
from tools.textbook import pgdat_step, trades_step


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    monkeypatch.setattr(tool, "STEPS", 2)  # enough to see a mistake
    with tool.float64_on_cpu():
        yield


def textbook(script, setting, state, batches, flags):
    """What tools/textbook.py does under the flags of our script: the part of the authors."""
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


@pytest.mark.parametrize("script, theirs, ours, part", [
    (train_pgdat, "--bn-mode eval --ls 0.1", "--bn-mode eval --ls 0.1", None),
    (train_trades, "--eps 0.031", "--eps 0.031", None),
    (train_pgdat, "--attack none", "--attack none", None),
    (train_pgdat, "--alpha 2/255", "--alpha 0.0078", "images"),
    (train_pgdat, "--ls 0.1", "--ls 0.09", "weights"),
    (train_pgdat, "--attack none", "--attack none --bn-clean-passes 1", "statistics"),
    (train_pgdat, "--attack none", "--attack none --lr 0.2", "lr"),
])
def test_row_of_two_steps(script, theirs, ours, part):
    """Of equal ones, and of some that differ in one part first."""
    both = partial(textbook, script, flags=theirs), partial(tool.our_steps, script)
    row = tool.compare_steps(tool.Setting("", "", ours), *both)
    assert (row["ok"], row["verdict"]) == ((False, "DIFFERS") if part else (True, "equal"))
    assert (row["images"] is None) == ("none" in ours)  # recorded where an attack is made
    found = {p: row[p] or 0 for p in ("lr", "images", "weights", "statistics")}
    assert found[part] > tool.TOLERANCE if part else max(found.values()) < 1e-12


@pytest.mark.parametrize("lr, images, expect, ok, verdict", [
    (0, 0, "equal", True, "equal"), (0, 0, "planted", False, "NOT SEEN"),
    (1, 0, "on purpose", True, "on purpose"), (1, 1, "planted", True, "planted, seen"),
    (1, 1, "on purpose", False, "DIFFERS"), (0, math.nan, "equal", False, "DIFFERS"),
])
def test_verdict(lr, images, expect, ok, verdict):
    """Where they have 0 and we have these numbers."""
    theirs = {"lr": {0: torch.tensor(0.0)}, "images": {0: torch.tensor(0.0)}}
    ours = {"lr": {0: torch.tensor(lr)}, "images": {0: torch.tensor(images)}}
    row = tool.judged({}, theirs, ours, expect)
    assert (row["ok"], row["verdict"]) == (ok, verdict)


def test_networks_that_differ_fail():
    build = partial(models.build, "tiny")
    assert tool.compare_networks("tiny", "ReLU", build(), build())["ok"]
    other = tool.compare_networks("tiny", "ELU", build(activation="celu"), build(activation="elu"))
    assert other["verdict"] == "DIFFERS" and other["eval"] > tool.TOLERANCE
    with pytest.raises(RuntimeError, match="Missing key"):
        tool.compare_networks("wrn", "ReLU", tool.our_model("wrn-16-1"), tool.our_model("wrn-10-1"))


# Files with the interface, and no more, of the authors': the attack is noise, the model a linear one.
FILES = {"train_cifar.py": """
import os, sys
import torch
from models import WideResNet, PreActResNet18
from utils import attack_pgd, cifar10, Batches

def main():
    os.makedirs("left_behind")
    print("not to be seen")
    model = torch.nn.DataParallel(WideResNet(34, 10, widen_factor=10)).cuda()
    data = cifar10("nowhere")
    train, test = (Batches(data[part], 8, shuffle=part == "train") for part in ("train", "test"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for epoch in range(0, 110):
        for batch in train:
            optimizer.param_groups[0]["lr"] = float(sys.argv[-1]) * epoch
            delta, _ = attack_pgd(model, batch["input"], batch["target"], 0.25)
            optimizer.zero_grad()
            model(batch["input"] + delta).sum().backward()
            optimizer.step()
        next(iter(test))
        raise RuntimeError("no test is wanted")
""", "models.py": """
import torch
PreActResNet18 = None
class WideResNet(torch.nn.Module):
    def __init__(self, depth=34, num_classes=10, widen_factor=10):
        super().__init__()
        self.fc = torch.nn.Linear(3 * 32 * 32, depth + widen_factor)
        self.sub_block1 = torch.nn.Linear(1, 1)
    def forward(self, x):
        return self.fc(x.flatten(1))
""", "utils.py": """
import torch, torchvision
cifar10 = Batches = None
def attack_pgd(model, x, y, epsilon):
    return torch.rand_like(x), 0
"""}


@pytest.fixture
def clone(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    assert spawn("bash", "-c", "git init -q && git add . && git -c user.name=a -c user.email=a@b commit -qm a",
                 cwd=tmp_path).returncode == 0
    return tmp_path


def test_their_script_runs_as_it_is(clone, capfd, monkeypatch):
    monkeypatch.chdir(clone)
    before, x = set(clone.rglob("*")), torch.rand(2, 3, 32, 32)
    script, = tool.load(clone, "train_cifar")
    assert sys.modules["utils"] is utils and sys.modules["models"] is models
    state = {"fc.weight": torch.zeros(11, 3072), "fc.bias": torch.zeros(11)}
    setting = tool.Setting("", "0.5", "", "wrn-10-1", epoch=3)
    seen = tool.their_pgdat(script, setting, state, [(x, torch.zeros(2))] * 2)
    torch.manual_seed(tool.NOISE + 1)
    assert torch.equal(seen["images"][1], x + torch.rand_like(x))
    assert [lr.item() for lr in seen["lr"].values()] == [1.5, 1.5] and seen["eps"][0].item() == 0.25
    assert torch.allclose(seen["weights"]["fc.bias"], torch.full((11,), -1.5 * 2 * 2))
    assert set(clone.rglob("*")) == before and capfd.readouterr().out == ""


@pytest.mark.parametrize("mistake, status", [("", 0), ("--bn-clean-passes 1", 1)])
def test_exit_status_and_figures(clone, script, tmp_path, monkeypatch, mistake, status):
    theirs = partial(textbook, train_pgdat, flags=f"--attack none {mistake}")
    monkeypatch.setattr(tool, "their_pgdat", lambda script, *problem: theirs(*problem))
    monkeypatch.setattr(tool, "PGDAT", [tool.Setting("standard", "", "--attack none")])
    monkeypatch.setattr(tool, "NETWORKS", {})
    monkeypatch.setattr(tool, "ACTIVATIONS", ())
    code, out, _ = script(tool, clone, "--json", tmp_path / "out.json")
    assert code == status and ("equal" if status == 0 else "DIFFERS") in out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["settings"][0]["ok"] is (status == 0)
    commit = spawn("git", "rev-parse", "HEAD", cwd=clone).stdout.strip()
    assert figures["clones"] == {"Bag-of-Tricks-for-AT": commit}


@pytest.mark.skipif("BAG_OF_TRICKS_CLONE" not in os.environ, reason="BAG_OF_TRICKS_CLONE names no clone")
def test_the_comparison_itself():
    trades = ["--trades", os.environ["AT_HE_CLONE"]] if "AT_HE_CLONE" in os.environ else []
    done = spawn(sys.executable, "-m", "tools.compare_authors", os.environ["BAG_OF_TRICKS_CLONE"], *trades)
    assert done.returncode == 0, done.stdout + done.stderr
