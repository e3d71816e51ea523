"""The moving average of the weights against the rule written out, and what a run does with it."""

import copy

import pytest
import torch

import models
import runs
import train_pgdat
import train_trades
import utils

TINY = ("--model", "tiny", "--batch-size", 40, "--steps", 2)
SCRIPTS = pytest.mark.parametrize("script_module", [train_pgdat, train_trades])
DECAYS = [1 / 10, 2 / 11, 3 / 12, 0.3, 0.3]  # of the first five updates with --ema 0.3


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def check(average, start, seen, decays):
    """Hold an average against start, followed by the states seen after each step, by a loop over numbers."""
    for key, got in average.state_dict().items():
        if key.endswith("num_batches_tracked"):
            assert got == seen[-1][key]
            continue
        want = start[key].double().flatten().tolist()
        for now, decay in zip(seen, decays, strict=True):
            want = [decay * a + (1 - decay) * v for a, v in zip(want, now[key].double().flatten().tolist())]
        want = torch.tensor(want, dtype=torch.float64)
        torch.testing.assert_close(got.double().flatten(), want, rtol=1e-5, atol=1e-7)


def test_five_updates_by_hand():
    torch.manual_seed(0)
    model = models.build("tiny").double()
    average, seen = copy.deepcopy(model), []
    start, kinds = state(model), {k.rpartition(".")[2] for k in model.state_dict()}
    assert kinds == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    assert [utils.ema_decay(t, 0.3) for t in range(5)] == DECAYS and utils.ema_decay(10**6, 0.999) == 0.999
    for t in range(5):
        for v in model.state_dict().values():
            v.normal_() if v.is_floating_point() else v.add_(3)
        seen.append(state(model))
        utils.update_average(average, model, utils.ema_decay(t, 0.3))
        assert all(torch.equal(v, seen[-1][k]) for k, v in model.state_dict().items())
    check(average, start, seen, DECAYS)


@SCRIPTS
def test_an_epoch_averages_after_every_step_and_counts_on_over_epochs(script_module, small_npz, monkeypatch):
    data, seen = utils.load_dataset(small_npz), []
    monkeypatch.setattr(runs, "share_statistics", lambda m: seen.append(state(m)))  # a step's last act
    args = script_module.parse_args([str(a) for a in (*TINY, "--bn-mode", "train", "--ema", 0.3)])
    torch.manual_seed(0)
    model = models.build("tiny")
    average, start = copy.deepcopy(model), state(model)
    work = (model, model, script_module.make_attack(model, model, args),
            utils.make_optimizer(model, "sgd", 0.1, 5e-4), data.train_images, data.train_labels, args)
    for epoch in range(2):
        script_module.train_epoch(*work, epoch, average)
    assert len(seen) == 6  # 3 steps an epoch; its batch norm counts every forward that moved it
    check(average, start, seen, [*DECAYS, 0.3])
    tracked = average.state_dict()["bn.num_batches_tracked"]
    assert tracked == model.bn.num_batches_tracked > 6


@SCRIPTS
def test_a_run_tests_and_saves_the_average_and_trains_as_without(script_module, script, small_npz, tmp_path):
    argv = (*TINY, "--dataset", small_npz, "--epochs", 2, "--device", "cpu")
    for name, flags in (("plain", ()), ("ema", ("--ema", 0.9))):
        status, _, err = script(script_module, *argv, *flags, "--out", tmp_path / name)
        assert status == 0, err
    plain, ema = (runs.load_checkpoint(tmp_path / name / "last.pt") for name in ("plain", "ema"))
    assert set(plain["others"]) == {"optimizer"} and set(ema["others"]) == {"optimizer", "model"}
    trained, average = ema["others"]["model"], ema["state_dict"]
    assert all(torch.equal(v, trained[k]) for k, v in plain["state_dict"].items())
    assert not torch.equal(average["conv1.weight"], trained["conv1.weight"])
    assert not torch.equal(average["bn.running_mean"], trained["bn.running_mean"])

    model, data = models.build("tiny", normalize=script_module.NORMALIZE), utils.load_dataset(small_npz)
    args = script_module.parse_args([str(a) for a in (*argv, "--ema", 0.9)])
    model.load_state_dict(average)
    tested = script_module.test(model, model, data.test_images, data.test_labels, args, 1, "test")
    assert {k: ema["log"][-1][k] for k in tested} == tested
    best = runs.load_checkpoint(tmp_path / "ema" / "best.pt")
    assert set(best["state_dict"]) == set(average) and "others" not in best


@SCRIPTS
@pytest.mark.parametrize("value", [1, -0.1, 2])
def test_a_decay_that_is_none_is_refused(script_module, script, value):
    status, _, err = script(script_module, "--ema", value)
    assert status == 2 and "--ema" in err
