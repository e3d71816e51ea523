"""Adversarial weight perturbation against plain loops, and against its authors' procedure, in float64.

The procedure is that of github.com/csdongxian/AWP: a copy of the model takes one step of plain SGD up the
loss; its difference from the model, scaled to the norm of each weight, is added to the model, which takes its
own step there; then the difference is subtracted.
"""

import contextlib
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Affine

import models
import train_pgdat
import train_trades
import utils

SCRIPTS = pytest.mark.parametrize("module", [train_pgdat, train_trades])


def step(module, model, optimizer, x, x_adv, y, *argv):
    """A training step under these flags whose attack finds x_adv."""
    args = module.parse_args([str(a) for a in argv])
    module.train_step(model, optimizer, lambda *a: x_adv, x, y, args.eps, 0, utils.seeded("cpu"), args)


def problem():
    torch.manual_seed(0)
    x = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    x_adv = (x + 0.03 * torch.rand_like(x)).clamp(0, 1)
    return models.build("tiny").double().train(), x, x_adv, torch.randint(10, (8,))


def loss_of(module, model, x, x_adv, y):
    """PGD-AT's or TRADES's loss, in torch's own words, and the forwards in the order of the scripts."""
    if module is train_pgdat:
        return F.cross_entropy(model(x_adv), y)
    natural, adversarial = model(x), model(x_adv)
    kl = F.kl_div(adversarial.log_softmax(1), natural.log_softmax(1), reduction="batchmean", log_target=True)
    return F.cross_entropy(natural, y) + 6 * kl


def gradient_by_loops(weight, bias, x, y):
    """Of the mean cross-entropy of a linear classifier, by the weight (K, D) and by the bias (K,)."""
    by_weight, by_bias = np.zeros_like(weight), np.zeros_like(bias)
    for image, label in zip(x, y):
        z = weight @ image + bias
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        for k in range(len(bias)):
            residual = (p[k] - (k == label)) / len(x)
            by_bias[k] += residual
            for d in range(len(image)):
                by_weight[k, d] += residual * image[d]
    return by_weight, by_bias


def test_perturbation_and_the_gradient_there_by_loops():
    gamma, x, y = 0.05, torch.rand(5, 3, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1])
    model = Affine()
    model.weight.data *= 0.05
    w, b, images = model.weight.detach().numpy().copy(), model.bias.detach().numpy(), x.flatten(1).numpy()
    g, _ = gradient_by_loops(w, b, images, y.tolist())
    length_w, length_g = (sum(v * v for v in t.ravel()) ** 0.5 for t in (w, g))
    moved = w + gamma * length_w / length_g * g
    by_weight, by_bias = gradient_by_loops(moved, b, images, y.tolist())

    with utils.perturbed_weights(model, lambda: F.cross_entropy(model(x), y), gamma):
        np.testing.assert_allclose(model.weight.detach().numpy(), moved, rtol=0, atol=1e-14)
        assert abs(np.linalg.norm(model.weight.detach().numpy() - w) / length_w - gamma) < 1e-12
    assert (model.weight.detach().numpy() == w).all() and model.weight.grad is None  # back, bit for bit

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(train_pgdat, model, optimizer, x, x, y, "--awp", gamma)
    np.testing.assert_allclose(model.weight.grad.numpy(), by_weight, rtol=0, atol=1e-14)
    np.testing.assert_allclose(model.bias.grad.numpy(), by_bias, rtol=0, atol=1e-14)
    np.testing.assert_allclose(model.weight.detach().numpy(), w - 0.1 * by_weight, rtol=0, atol=1e-14)


@SCRIPTS
def test_two_steps_are_those_of_the_authors_procedure(module):
    """Weights and running statistics. Without weight decay, which they take of the perturbed weights."""
    gamma = 0.01
    model, x, x_adv, y = problem()
    flags = ("--bn-clean-passes", 1, "--bn-mode", "eval") if module is train_pgdat else ()
    ref, proxy = copy.deepcopy(model), copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, ref)]
    for _ in range(2):
        step(module, model, optimizers[0], x, x_adv, y, "--awp", gamma, *flags)

        proxy.load_state_dict(ref.state_dict())
        up = torch.optim.SGD(proxy.parameters(), lr=0.01)
        up.zero_grad()
        (-loss_of(module, proxy, x, x_adv, y)).backward()
        up.step()
        difference = {name: (q - p).detach()
                      for (name, p), q in zip(ref.named_parameters(), proxy.parameters())}
        moved = {name: gamma * p.norm() / (difference[name].norm() + 1e-20) * difference[name]
                 for name, p in ref.named_parameters() if p.dim() > 1 and "weight" in name}
        assert len(moved) > 10
        with torch.no_grad():
            [p.add_(moved[name]) for name, p in ref.named_parameters() if name in moved]
        optimizers[1].zero_grad()
        loss_of(module, ref, x, x_adv, y).backward()
        optimizers[1].step()
        with torch.no_grad():
            [p.sub_(moved[name]) for name, p in ref.named_parameters() if name in moved]
            if module is train_pgdat:
                ref(x)
    for (name, value), want in zip(model.state_dict().items(), ref.state_dict().values()):
        torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-10, msg=name)


@SCRIPTS
def test_it_starts_after_the_warm_up(module, script, small_npz, tmp_path, monkeypatch):
    seen, step = [], module.train_step
    monkeypatch.setattr(module, "train_step", lambda *a: seen.append("step") or step(*a))
    monkeypatch.setattr(module, "perturbed_weights",
                        lambda model, loss, gamma: contextlib.nullcontext(seen.append(gamma)))
    status, _, err = script(module, *TINY, "--dataset", small_npz, "--steps", 1, "--epochs", 3, "--eval-from",
                            3, "--awp", 0.005, "--awp-warmup", 2, "--out", tmp_path / "run")
    assert status == 0 and seen == [*["step"] * 4, "step", 0.005, "step", 0.005], err
