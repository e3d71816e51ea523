"""The losses against their definitions, class by class."""

import math

import pytest
import torch

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
