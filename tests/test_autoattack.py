"""The evaluator runs AutoAttack a batch at a time, to be interruptible; its figures are those of one
AutoAttack call."""

import contextlib

import numpy as np
import pyautoattack
import pytest
import torch

import eval_aa
import models
import runs
import utils


class Quadratic(torch.nn.Module):
    """A small smooth classifier that thousands of queries of Square cost little on."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.w = torch.nn.Parameter(torch.randn(10, 48, generator=g), requires_grad=False)
        self.v = torch.nn.Parameter(torch.randn(10, 48, generator=g), requires_grad=False)

    def forward(self, x):
        x = torch.nn.functional.avg_pool2d(x, 8).flatten(1) - 0.5
        return x @ self.w.T + 4 * x.square() @ self.v.T


@pytest.fixture(scope="module")
def problem():
    model = Quadratic()
    images = torch.randint(0, 256, (14, 4, 4, 3), generator=torch.Generator().manual_seed(1),
                           dtype=torch.uint8)
    images = images.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels = model(utils.to_float(images)).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    return model, images, labels


EPS, BATCH = 0.01, 5
QUERIES, ITERATIONS = 500, 20  # of Square and FAB, instead of 5,000 and 100: for the test's time


def staged(problem, state_path, watch=None, attacks=eval_aa.STANDARD, adversarial=None):
    model, images, labels = problem
    aa = eval_aa.AutoAttack(model, EPS, 0, "cpu")
    aa.aa.square.n_queries, aa.aa.fab.n_iter = QUERIES, ITERATIONS
    if watch is not None:
        aa.fools = watch(aa.fools)
    with torch.no_grad():
        clean = model(utils.to_float(images)).argmax(1) == labels
    fresh = {"identity": {"who": "me"}, "robust": clean.int().tolist(), "left": {}, "todo": None,
             "seconds": {}}
    state = eval_aa.open_state(state_path, {"who": "me"}, overwrite=False) or fresh
    flags = {}
    work = (attacks, BATCH, state, state_path, flags.__setitem__, adversarial)
    eval_aa.run_autoattack(aa, images, labels, *work)
    return {**state, "flags": flags}


def test_equals_one_call_of_autoattack_even_when_interrupted(problem, tmp_path):
    model, images, labels = problem
    whole = pyautoattack.AutoAttack(model, eps=EPS, seed=0, version="standard")
    whole.square.n_queries, whole.fab.n_iter = QUERIES, ITERATIONS
    x_adv, _ = whole.run_standard_evaluation(utils.to_float(images).contiguous(), labels, batch_size=BATCH)
    robust = (model(x_adv).argmax(1) == labels).int().tolist()
    adversarial = eval_aa.open_adversarial(tmp_path / "adv.npy", images, fresh=True)
    state = staged(problem, tmp_path / "whole.json", adversarial=adversarial)
    assert state["robust"] == robust and np.array_equal(adversarial, x_adv.numpy())
    assert {a: utils.percent(f) for a, f in state["flags"].items()} == state["left"]
    assert state["left"]["square"] == utils.percent(torch.tensor(robust).bool())
    left = [state["left"][a] for a in eval_aa.STANDARD]
    assert left == sorted(left, reverse=True) and 100 * 13 / 14 > left[0] > left[-1] > 0

    calls = []

    def dying(fools):
        def call(*args):
            calls.append(args)
            if len(calls) in (2, 4, 7):
                raise KeyboardInterrupt
            return fools(*args)
        return call

    for attempt in range(4):
        adversarial = eval_aa.open_adversarial(tmp_path / "cut.npy", images, fresh=attempt == 0)
        with pytest.raises(KeyboardInterrupt) if attempt < 3 else contextlib.nullcontext():
            resumed = staged(problem, tmp_path / "cut.json", dying, adversarial=adversarial)
        del adversarial  # as the end of a process does
    assert resumed["robust"] == robust and resumed["left"] == state["left"]
    assert np.array_equal(np.load(tmp_path / "cut.npy"), x_adv.numpy())


def test_the_state_of_another_evaluation_is_refused(tmp_path):
    path = tmp_path / "s.json"
    assert eval_aa.open_state(path, {"n": 3, "eps": 0.1}, overwrite=False) is None
    runs.write_json(path, {"identity": {"n": 3, "eps": 0.1}, "robust": [1, 1, 0], "left": {}, "todo": None,
                           "seconds": {}})
    assert eval_aa.open_state(path, {"n": 3, "eps": 0.1}, overwrite=False)["robust"] == [1, 1, 0]
    with pytest.raises(utils.InputError, match="another eps"):
        eval_aa.open_state(path, {"n": 3, "eps": 0.2}, overwrite=False)
    assert eval_aa.open_state(path, {"n": 3, "eps": 0.2}, overwrite=True) is None
    path.write_text("[]")
    with pytest.raises(utils.InputError, match="not written by this program"):
        eval_aa.open_state(path, {"n": 3}, overwrite=False)


def test_a_channels_last_model_is_attacked_without_a_stride_error():
    """APGD calls .view on gradients, which channels-last convolutions hand back in their own layout."""
    torch.manual_seed(0)
    model = models.build("tiny").to(memory_format=torch.channels_last).eval()
    x = utils.to_float(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8))
    assert not x.is_contiguous()
    y = model(x).argmax(1)
    assert eval_aa.AutoAttack(model, 8 / 255, 0, "cpu").fools("apgd-ce", x, y)[1].shape == (4,)


def test_the_github_package_serves_as_well(monkeypatch):
    """`autoattack` has another signature: norm, eps, verbose ... and bs, and returns the images alone."""
    import sys
    import types

    seen = {}

    class AutoAttack:
        def __init__(self, model, norm="Linf", eps=0.3, seed=None, verbose=True, attacks_to_run=[],
                     version="standard",
                     is_tf_model=False, device="cuda", log_path=None):
            seen.update(norm=norm, eps=eps, seed=seed, verbose=verbose, version=version, device=device)

        def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
            seen.update(attacks=self.attacks_to_run, bs=bs)
            return 1 - x_orig

    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    monkeypatch.setitem(sys.modules, "autoattack", types.SimpleNamespace(AutoAttack=AutoAttack))
    aa = eval_aa.AutoAttack(lambda x: x.mean((2, 3)), 0.1, 7, "cpu")
    x = torch.rand(3, 3, 32, 32)
    x[0] = 0.5
    y = x.mean((2, 3)).argmax(1)
    assert aa.fools("square", x, y)[1].tolist() == [False, True, True]
    assert seen == {"norm": "Linf", "eps": 0.1, "seed": 7, "verbose": False, "version": "standard",
                    "device": "cpu",
                    "attacks": ["square"], "bs": 3} and aa.name.startswith("autoattack")
    monkeypatch.setitem(sys.modules, "autoattack", None)
    with pytest.raises(utils.InputError, match="pip install pyautoattack==0.2.0"):
        eval_aa.AutoAttack(lambda x: x, 0.1, 0, "cpu")
