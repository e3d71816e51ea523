"""The moving average of the weights against the rule written out, and what a run does with it."""

import copy
from unittest import mock

import pytest
import torch
from conftest import TINY

import models
import train_pgdat
import train_trades
import utils

SCRIPTS = pytest.mark.parametrize("module", [train_pgdat, train_trades])
DECAYS = [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3]  # of the first updates with --ema 0.3


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def check(average, start, seen, decays):
    """Hold an average against start, followed by the states seen after each step, in float64."""
    for key, got in average.items():
        if key.endswith("num_batches_tracked"):
            assert got == seen[-1][key]
            continue
        want = start[key].double()
        for now, decay in zip(seen, decays, strict=True):
            want = decay * want + (1 - decay) * now[key].double()
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_updates_by_hand():
    torch.manual_seed(0)
    model = models.build("tiny").double()
    average, seen = copy.deepcopy(model), []
    start, kinds = state(model), {k.rpartition(".")[2] for k in model.state_dict()}
    assert kinds == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    for t in range(len(DECAYS)):
        for v in model.state_dict().values():
            v.normal_() if v.is_floating_point() else v.add_(3)
        seen.append(state(model))
        utils.update_average(average, model, 0.3, t)
        assert all(torch.equal(v, seen[-1][k]) for k, v in model.state_dict().items())
    check(average.state_dict(), start, seen, DECAYS)


def test_all_tensors_at_once_are_each_by_itself_bit_for_bit():
    torch.manual_seed(0)
    average, model = models.build("tiny"), models.build("tiny")
    want = [a.lerp(v, 1 - 3 / 12) if a.is_floating_point() else v
            for a, v in zip(average.state_dict().values(), model.state_dict().values())]
    with mock.patch.object(torch, "_foreach_lerp_", wraps=torch._foreach_lerp_) as lerp:
        utils.update_average(average, model, 0.9, 2)
    assert lerp.call_count == 1
    assert all(map(torch.equal, average.state_dict().values(), want))


@SCRIPTS
def test_a_run_tests_and_saves_the_average_and_trains_as_without(module, script, small_npz, tmp_path,
                                                                 monkeypatch):
    """It averages after every step, counts on over epochs, and does not touch the training."""
    seen, step = [], module.train_step
    monkeypatch.setattr(module, "train_step", lambda m, *rest: (step(m, *rest), seen.append(state(m)))[0])
    argv = (*TINY, "--batch-size", 40, "--steps", 2, "--dataset", small_npz, "--epochs", 2)  # of 3 steps
    for name, flags in (("plain", ()), ("ema", ("--ema", 0.3))):
        seen.clear()
        status, _, err = script(module, *argv, *flags, "--out", tmp_path / name)
        assert status == 0, err
    plain, ema = (utils.load_checkpoint(tmp_path / name / "last.pt") for name in ("plain", "ema"))
    assert set(ema) - set(plain) == {"model"}
    trained, average = ema["model"], ema["state_dict"]
    assert all(torch.equal(v, trained[k]) for k, v in plain["state_dict"].items())
    torch.manual_seed(0)
    check(average, models.build("tiny").state_dict(), seen, DECAYS)
    assert average["bn.num_batches_tracked"] > 6  # batch norm counts every forward that moved it

    model, data = models.build("tiny", normalize=module.NORMALIZE), utils.load_dataset(small_npz)
    model.load_state_dict(average)
    clean, robust, _ = utils.evaluate(model, data.test_images, data.test_labels, 8 / 255, seed=(0, 1))
    logged = ema["log"][-1]
    assert (utils.percent(clean), utils.percent(robust)) == (logged["test_clean"], logged["test_pgd10"])
    best = utils.load_checkpoint(tmp_path / "ema" / "best.pt")
    assert set(best["state_dict"]) == set(average) and not {"model", "optimizer"} & set(best)
