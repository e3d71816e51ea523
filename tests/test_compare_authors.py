"""tools/compare_authors.py fails where the sides differ; the authors' part is played by the textbook.

With BAG_OF_TRICKS_CLONE (and AT_HE_CLONE) naming clones of their code, the comparison itself runs too: only
that executes their code.
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


@pytest.mark.parametrize("mistake, status", [("", 0), ("--bn-clean-passes 1", 1)])
def test_exit_status_and_figures(script, tmp_path, monkeypatch, mistake, status):
    theirs = partial(textbook, train_pgdat, flags=f"--attack none {mistake}")
    for name, stand_in in {"load": lambda *names: [None], "commit": lambda clone: "c0ffee", "NETWORKS": {},
                           "their_pgdat": lambda script, *problem: theirs(*problem), "ACTIVATIONS": (),
                           "PGDAT": [tool.Setting("standard", "", "--attack none")]}.items():
        monkeypatch.setattr(tool, name, stand_in)
    code, out, _ = script(tool, "clone", "--json", tmp_path / "out.json")
    assert code == status and ("equal" if status == 0 else "DIFFERS") in out
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["settings"][0]["ok"] is (status == 0)
    assert figures["clones"] == {"Bag-of-Tricks-for-AT": "c0ffee"}


@pytest.mark.skipif("BAG_OF_TRICKS_CLONE" not in os.environ, reason="BAG_OF_TRICKS_CLONE names no clone")
def test_the_comparison_itself():
    trades = ["--trades", os.environ["AT_HE_CLONE"]] if "AT_HE_CLONE" in os.environ else []
    done = spawn(sys.executable, "-m", "tools.compare_authors", os.environ["BAG_OF_TRICKS_CLONE"], *trades)
    assert done.returncode == 0, done.stdout + done.stderr
