"""TRADES against a reference written from its paper and from what its authors' code does, in float64, in both
BN modes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import attack_of

import models
import train_trades
import utils
from tests.reference import statistics_by_hand
from tools.textbook import trades_step


def setting(*argv):
    return train_trades.parse_args(["--model", "tiny", "--out", "unused", *map(str, argv)])


def problem(scale=1.0):
    """A tiny model whose logits are blown up by `scale`, and a batch. All in float64."""
    torch.manual_seed(0)
    model = models.build("tiny").double().train()
    model.linear.weight.data *= scale
    return model, torch.rand(8, 3, 32, 32, dtype=torch.float64), torch.randint(10, (8,))


@pytest.mark.parametrize("bn_mode, eps, alpha", [("train", "0.031", "0.007"), ("eval", "8/255", "2/255")])
def test_a_step_is_the_references(bn_mode, eps, alpha):
    """Attack, loss, weights and running statistics."""
    args = setting("--bn-mode", bn_mode, "--eps", eps, "--alpha", alpha, "--beta", 6)
    model, x, y = problem(scale=3)
    ref, before = copy.deepcopy(model), copy.deepcopy(model)
    by_hand, sgd = statistics_by_hand(ref), torch.optim.SGD(ref.parameters(), args.lr, weight_decay=args.wd)
    want_adv, want_loss = trades_step(ref, sgd, x, y, utils.seeded("cpu", 7), args)

    got_adv, attack = [], attack_of(train_trades, model, args)
    optimizer = utils.make_optimizer(model, "sgd", args.lr, args.wd, 0.9)
    loss, logits, clean_logits = train_trades.train_step(
        model, optimizer, lambda *a: got_adv.append(attack(*a)) or got_adv[0], x, y, args.eps, 0,
        utils.seeded("cpu", 7), args)
    torch.testing.assert_close(got_adv[0], want_adv, rtol=0, atol=1e-12)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-9)
    torch.testing.assert_close(logits, before(want_adv))
    torch.testing.assert_close(clean_logits, before(x))
    for p, q in zip(model.parameters(), ref.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m, (mean, var) in zip(norms, by_hand.values(), strict=True):
        torch.testing.assert_close(m.running_mean, mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(m.running_var, var, rtol=1e-9, atol=1e-12)


def test_saturated_logits_stay_finite():
    """Logits so far apart that float32 probabilities underflow to 0: loss and gradients are those of float64,
    not NaN."""
    torch.manual_seed(0)
    natural = (200 * torch.randn(6, 10)).requires_grad_()
    adversarial = (200 * torch.randn(6, 10)).requires_grad_()
    y = torch.randint(10, (6,))
    assert (natural.softmax(1) == 0).any() and (adversarial.softmax(1) == 0).any()
    loss = train_trades.trades_loss(natural, adversarial, y, beta=6)
    grads = torch.autograd.grad(loss, (natural, adversarial))
    exact = [t.detach().double().requires_grad_() for t in (natural, adversarial)]
    log_p, log_q = (t - t.logsumexp(1, keepdim=True) for t in exact)
    want = F.cross_entropy(exact[0], y) + 6 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for g, w in zip(grads, torch.autograd.grad(want, exact)):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)

    model, x, _ = problem(scale=1e4)
    x, args = x.float(), setting()
    start = x + 0.001 * torch.empty_like(x).normal_(generator=utils.seeded("cpu", 0))
    x_adv = train_trades.training_attack(model.float(), args, x, start, args.eps)
    assert x_adv.isfinite().all() and (x_adv - x).abs().max() > 0


def test_defaults_are_table_13s_best_setting_at_8_255():
    want = {"beta": 6, "eps": 8 / 255, "alpha": 2 / 255, "steps": 10, "wd": 5e-4, "bn_mode": "eval",
            "activation": "relu", "lr": 0.1, "epochs": 110}
    assert vars(train_trades.parse_args([])).items() >= want.items()
    assert train_trades.NORMALIZE is None
