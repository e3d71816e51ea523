"""Learning rate and eps at the epochs where something happens; expected values worked out by hand."""

import pytest
import torch

import train_pgdat
import train_trades
import utils

SCRIPTS = pytest.mark.parametrize("module", [train_pgdat, train_trades])


def lr(t, **kwargs):
    return pytest.approx(utils.lr_at(t, 0.1, **kwargs), rel=1e-12)


def test_piecewise_is_the_papers_and_drops_at_the_start_of_the_epoch():
    times = (0, 99 + 390 / 391, 100, 104.99, 105, 109.99)
    assert [0.1, 0.1, 0.01, 0.01, 0.001, 0.001] == [lr(t) for t in times]
    assert 0.05 == lr(40, decay_epochs=[40, 45], decay_factor=0.5)
    own = {"decay_epochs": [51, 77, 102], "decay_factor": [0.3, 1 / 3, 0.3]}  # Ding et al., 2020
    got = [utils.lr_at(t, 0.3, **own) for t in (50.9, 51, 77, 102)]
    assert got == pytest.approx([0.3, 0.09, 0.03, 0.009])


def test_cosine_and_onecycle():
    assert [0.1, 0.05] == [lr(t, schedule="cosine", epochs=100) for t in (0, 50)]
    assert 0.1 * (1 + 3**0.5 / 2) / 2 == lr(100 / 6, schedule="cosine", epochs=100)
    assert abs(utils.lr_at(100, 0.1, "cosine", epochs=100)) < 1e-15
    assert [0.0, 0.05, 0.1, 0.05] == [lr(t, schedule="onecycle", epochs=30) for t in (0, 7.5, 15, 22.5)]
    with pytest.raises(ValueError, match="unknown schedule"):
        utils.lr_at(0, 0.1, "triangle")


def test_warm_ups_rise_linearly_from_zero_and_never_overshoot():
    assert [utils.warmup(t, 15) for t in (0, 7.5, 15, 15.5, 109)] == [0, 0.5, 1, 1, 1]
    assert utils.warmup(0, 0) == 1


@SCRIPTS
def test_training_follows_them_step_by_step(module, script, small_npz, tmp_path, monkeypatch):
    seen = []

    def train_step(model, optimizer, attack, x, y, eps, epoch, rng, args):
        seen.append((optimizer.param_groups[0]["lr"], eps, epoch))
        return torch.ones(()), torch.zeros(len(y), 10), None

    monkeypatch.setattr(module, "train_step", train_step)
    status, _, err = script(module, "--model", "tiny", "--dataset", small_npz, "--batch-size", 24, "--out",
                            tmp_path / "run", "--epochs", 3, "--lr", 0.8, "--warmup-lr", 1, "--warmup-eps", 2,
                            "--eps", 0.1, "--lr-decay-epochs", 1.5, 2, "--lr-decay-factor", 0.5, 0.25)
    assert status == 0, err
    lr, eps, epoch = zip(*seen)
    assert lr == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.4, 0.4, 0.1, 0.1, 0.1, 0.1])
    assert eps == pytest.approx([0.1 * min(1, step / 8) for step in range(12)])
    assert epoch == (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)


# ---- --time-scale ------------------------------------------------------------------------------------------


def parsed(module, *argv):
    return vars(module.parse_args([str(a) for a in argv]))


@SCRIPTS
def test_time_scale_multiplies_every_number_of_epochs_of_the_recipe(module):
    recipe = ("--warmup-lr", 15, "--warmup-eps", 15, "--awp", 0.01, "--awp-warmup", 10, "--eval-every", 5,
              "--eval-from", 100)
    want = {"epochs": 44, "lr_decay_epochs": [40, 42], "warmup_lr": 6, "warmup_eps": 6, "awp_warmup": 4}
    if module is train_pgdat:
        recipe, want = (*recipe, "--early-stop-pgd", 40, 70), want | {"early_stop_pgd": [16, 28]}
    plain, scaled = parsed(module, *recipe), parsed(module, *recipe, "--time-scale", 0.4)
    changed = {k: v for k, v in scaled.items() if v != plain[k]}
    assert changed.pop("out") and changed == want | {"time_scale": 0.4}
    assert (scaled["eval_every"], scaled["eval_from"]) == (5, 100)
    got = parsed(module, "--lr-schedule", "cosine", "--epochs", 5, "--time-scale", 0.5)
    assert got["epochs"] == 3  # halves up; decays set by nobody are not refused


@pytest.mark.parametrize("argv, culprit", [
    ("--warmup-eps 2 --time-scale 0.2", "--time-scale"),  # nothing is left of the warm-up
    ("--time-scale 0.05", "--lr-decay-epochs"),           # 100 and 105: both at 5
])
def test_time_scale_leaves_something_of_everything_and_decays_apart(argv, culprit, capfd):
    with pytest.raises(SystemExit, match="2"):
        parsed(train_pgdat, *argv.split())
    err = capfd.readouterr().err
    assert culprit in err and err.count("\n") == 1
