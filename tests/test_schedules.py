"""Learning rate and eps at the epochs where something happens; expected values worked out by hand."""

import pytest

import utils


def lr(t, **kwargs):
    return pytest.approx(utils.lr_at(t, 0.1, **kwargs), rel=1e-12)


def test_piecewise_is_the_papers_and_drops_at_the_start_of_the_epoch():
    assert [0.1, 0.1, 0.01, 0.01, 0.001, 0.001] == [lr(t) for t in (0, 99 + 390 / 391, 100, 104.99, 105,
                                                                    109.99)]
    assert 0.05 == lr(40, decay_epochs=[40, 45], decay_factor=0.5)
    own = {"decay_epochs": [51, 77, 102], "decay_factor": [0.3, 1 / 3, 0.3]}  # Ding et al., 2020
    got = [utils.lr_at(t, 0.3, **own) for t in (50.9, 51, 77, 102)]
    assert got == pytest.approx([0.3, 0.09, 0.03, 0.009])


def test_cosine_onecycle_and_linear():
    assert [0.1, 0.05, 0.0] == [pytest.approx(utils.lr_at(t, 0.1, "cosine", epochs=100),
                                              abs=1e-15) for t in (0, 50, 100)]
    assert 0.1 * (1 + 3**0.5 / 2) / 2 == lr(100 / 6, schedule="cosine", epochs=100)
    assert [0.0, 0.05, 0.1, 0.05] == [lr(t, schedule="onecycle", epochs=30) for t in (0, 7.5, 15, 22.5)]
    assert [0.1, 0.075, 0.025] == [lr(t, schedule="linear", epochs=40) for t in (0, 10, 30)]
    with pytest.raises(ValueError, match="unknown schedule"):
        utils.lr_at(0, 0.1, "triangle")


@pytest.mark.parametrize("warmup", [10, 15, 20])
def test_warm_ups_rise_linearly_from_zero_and_never_overshoot(warmup):
    assert [0.0, 0.05, 0.1, 0.1] == [lr(t, warmup=warmup) for t in (0, warmup / 2, warmup, warmup + 0.5)]
    assert lr(100, warmup=warmup) == 0.01
    assert max(utils.lr_at(t / 50, 0.1, warmup=warmup) for t in range(50 * 30)) == 0.1
    eps = 8 / 255
    assert [0, eps / 2, eps, eps] == [pytest.approx(utils.eps_at(t, eps, warmup)) for t in (0, warmup / 2,
                                                                                            warmup, 109)]
    assert utils.eps_at(0, eps) == eps
