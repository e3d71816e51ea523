"""The losses against their definitions, class by class."""

import datetime
import math
import types

import pytest
import torch

import train_pgdat
import utils


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4, 0.95])
@pytest.mark.parametrize("classes", [10, 3])
def test_smoothing_is_spread_over_the_other_classes(smoothing, classes):
    torch.manual_seed(0)
    logits, y = 3 * torch.randn(7, classes, dtype=torch.float64), torch.randint(classes, (7,))
    want = []
    for z, label in zip(logits.tolist(), y.tolist()):
        log_sum = math.log(sum(math.exp(v) for v in z))
        target = [1 - smoothing if k == label else smoothing / (classes - 1) for k in range(classes)]
        want.append(-sum(t * (v - log_sum) for t, v in zip(target, z)))
    assert utils.smoothed_cross_entropy(logits, y, smoothing).item() == pytest.approx(sum(want) / 7,
                                                                                      abs=1e-12)


def test_smoothed_loss_agrees_with_torch_at_the_converted_smoothing():
    torch.manual_seed(0)
    logits, y = torch.randn(7, 10, dtype=torch.float64), torch.randint(10, (7,))
    want = torch.nn.functional.cross_entropy(logits, y, label_smoothing=0.3 * 10 / 9)
    assert utils.smoothed_cross_entropy(logits, y, 0.3).item() == pytest.approx(want.item(), abs=1e-12)


def test_the_logs_figures_are_means_over_images_not_over_batches():
    meter, right, wrong = utils.Meter("cpu"), torch.eye(4), torch.eye(4).flip(1)
    meter.add(torch.tensor(2.0), torch.arange(3), right[:3], wrong[:3])
    meter.add(torch.tensor(6.0), torch.arange(1), wrong[:1], right[:1])
    assert list(meter.read().values()) == [3.0, 75.0, 25.0]
    meter.add(torch.tensor(1.0), torch.arange(2), right[:2], None)  # no clean pass
    assert meter.read() == {"train_loss": 2.33333, "train_adv_acc": 83.33, "train_clean_acc": None}
    meter.add(torch.tensor(math.inf), torch.arange(1), right[:1], None)
    with pytest.raises(FloatingPointError, match="not finite"):
        meter.read()


def test_the_time_left_is_from_the_mean_of_tested_and_untested_epochs(capsys):
    """Epochs 3 and 6 of 6 are tested; the epochs before have taken these seconds."""
    args, log = train_pgdat.parse_args(["--epochs", "6", "--eval-every", "3", "--eval-from", "2"]), []
    lefts = [f"0:00:{5 * 10} left, tests not counted", f"0:00:{4 * 11} left, tests not counted",
             f"0:00:{2 * 11 + 30} left", f"0:00:{12 + 30} left", "0:00:30 left", "0:00:00 left"]
    for epoch, seconds in enumerate((10, 12, 30, 14, 12, 50), 1):
        log.append({"epoch": epoch, "lr": 0.1, "train_loss": 2.0, "seconds": seconds,
                    "test_pgd10": 30 if epoch in (3, 6) else None})
        utils.show_epoch(args, log)
        assert f"{seconds} s, {lefts[epoch - 1]}\n" in capsys.readouterr().out


@pytest.mark.parametrize("steps, line", [
    # 31 s for 23 steps: at 3:51 three epochs of 50 have 125 steps to go, which take 168 s
    ((100, 100, *[2] * 8, *[1] * 40), "a step takes 1.35 s: the run ends on 2021-05-03 at 12:06"),
    # 160 s for eight: at 2:46 there are 140 to go, 2,800 s
    ((3, 3, 40, 40, *[10] * 4, *[20] * 42), "a step takes 20 s: the run ends on 2021-05-03 at 12:49")])
def test_a_line_says_once_when_the_run_ends(monkeypatch, capsys, steps, line):
    """After ten steps and half a minute; the first two do not count."""
    now = datetime.datetime(2021, 5, 3, 12)
    clock = types.SimpleNamespace(now=lambda: now)
    monkeypatch.setattr(utils, "datetime", types.SimpleNamespace(datetime=clock,
                                                                 timedelta=datetime.timedelta))
    for estimate in (True, False):
        for seconds in utils.steps(steps, types.SimpleNamespace(epochs=3), 0, len(steps), estimate):
            now += datetime.timedelta(seconds=seconds)
        assert capsys.readouterr().out == (f"{line}, tests not counted\n" if estimate else "")
