"""TRADES against a reference written from its paper and from what its authors' code does, in float64, in both
BN modes."""

import copy

import pytest
import torch
import torch.nn.functional as F

import models
import train_trades
import utils


def setting(*argv):
    return train_trades.parse_args(["--model", "tiny", "--out", "unused", *map(str, argv)])


def problem(scale=1.0):
    """A tiny model whose logits are blown up by `scale`, and a batch. All in float64."""
    torch.manual_seed(0)
    model = models.build("tiny").double().train()
    model.linear.weight.data *= scale
    return model, torch.rand(8, 3, 32, 32, dtype=torch.float64), torch.randint(10, (8,))


def kl(z_natural, z_adversarial):
    """sum_i sum_k p_ik (log p_ik - log q_ik), from the logits, row by row; 0 log 0 = 0."""
    total = 0
    for a, b in zip(z_natural, z_adversarial):
        log_p, log_q = a - torch.logsumexp(a, 0), b - torch.logsumexp(b, 0)
        total = total + (log_p.exp() * (log_p - log_q)).sum()
    return total


def reference_step(model, x, y, args, start):
    """One step as the reference makes it: two forwards in every attack step, weight gradients and all; plain
    SGD.

    Returns (x', loss, running statistics kept by hand).
    """
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    stats = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]

    def forward(images, train):
        inputs = []
        hooks = [m.register_forward_pre_hook(lambda m, i: inputs.append(i[0].detach())) for m in norms]
        model.train(train)
        out = model(images)
        for h in hooks:
            h.remove()
        if train:
            for k, v in enumerate(inputs):
                stats[k] = (0.9 * stats[k][0] + 0.1 * v.mean((0, 2, 3)),
                            0.9 * stats[k][1] + 0.1 * v.transpose(0, 1).flatten(1).var(1, unbiased=True))
        return out

    train, x_adv = args.bn_mode == "train", start
    for _ in range(args.steps):
        x_adv = x_adv.detach().requires_grad_()
        adversarial = forward(x_adv, train)
        grad, = torch.autograd.grad(kl(forward(x, train), adversarial), x_adv)
        x_adv = x_adv.detach() + args.alpha * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - args.eps), x + args.eps).clamp(0, 1)
    model.zero_grad()
    natural = forward(x, True)
    loss = F.cross_entropy(natural, y) + args.beta * kl(natural, forward(x_adv, True)) / len(x)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= args.lr * (p.grad + args.wd * p)
    return x_adv, loss, stats


@pytest.mark.parametrize("bn_mode", ["train", "eval"])
@pytest.mark.parametrize("eps, alpha", [("8/255", "2/255"), ("0.031", "0.007")])
def test_a_step_is_the_references(bn_mode, eps, alpha):
    """Attack, loss, weights and running statistics."""
    args = setting("--bn-mode", bn_mode, "--eps", eps, "--alpha", alpha, "--beta", 6)
    model, x, y = problem(scale=3)
    ref = copy.deepcopy(model)
    noise = torch.empty_like(x).normal_(generator=utils.seeded("cpu", 7))
    want_adv, want_loss, stats = reference_step(ref, x, y, args, x + 0.001 * noise)

    attacked = copy.deepcopy(model)
    got_adv = train_trades.make_attack(attacked, attacked, args)(x, args.eps, utils.seeded("cpu", 7))
    torch.testing.assert_close(got_adv, want_adv, rtol=0, atol=1e-12)

    optimizer = utils.make_optimizer(model, "sgd", args.lr, args.wd, 0.9)
    x_adv = train_trades.make_attack(model, model, args)(x, args.eps, utils.seeded("cpu", 7))
    loss, _, _ = train_trades.train_step(model, model, optimizer, x, x_adv, y, args)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-9)
    for p, q in zip(model.parameters(), ref.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)
    for m, (mean, var) in zip((m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)), stats):
        torch.testing.assert_close(m.running_mean, mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(m.running_var, var, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bn_mode, updates, natural_forwards",
                         [("train", 2 * 10 + 2, 10 + 1), ("eval", 2, 1 + 1)])
def test_number_of_forwards_and_of_updates(bn_mode, updates, natural_forwards):
    model, x, y = problem()
    args, natural = setting("--bn-mode", bn_mode), []
    model.register_forward_pre_hook(lambda m, i: natural.append(torch.equal(i[0], x)))
    x_adv = train_trades.make_attack(model, model, args)(x, args.eps, utils.seeded("cpu", 0))
    train_trades.train_step(model, model, utils.make_optimizer(model, "sgd", 0.1, 0), x, x_adv, y, args)
    assert model.bn.num_batches_tracked == updates and sum(natural) == natural_forwards
    assert len(natural) - sum(natural) == 10 + 1
    assert natural[-2:] == [True, False]  # the loss: natural, then adversarial


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
    want = F.cross_entropy(exact[0], y) + 6 * kl(*exact) / 6
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for g, w in zip(grads, torch.autograd.grad(want, exact)):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4)

    model, x, y = problem(scale=1e4)
    model.float()
    args = setting()
    x = x.float()
    x_adv = train_trades.make_attack(model, model, args)(x, args.eps, utils.seeded("cpu", 0))
    assert x_adv.isfinite().all() and (x_adv - x).abs().max() > 0


@pytest.mark.parametrize("flag", ["--ls", "--early-stop-pgd", "--bn-clean-passes", "--attack"])
def test_what_trades_does_not_define_is_not_accepted(flag, capsys):
    with pytest.raises(SystemExit) as e:
        setting(flag, "1")
    assert e.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_defaults_are_table_13s_best_setting_at_8_255():
    args = train_trades.parse_args([])
    assert (args.beta, args.eps, args.alpha, args.steps, args.wd, args.bn_mode, args.activation, args.lr,
            args.epochs) == (
        6, 8 / 255, 2 / 255, 10, 5e-4, "eval", "relu", 0.1, 110)
    assert train_trades.NORMALIZE is None
