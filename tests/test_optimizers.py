"""Table 5's optimisers against their update rules, written out, over five steps in float64."""

import pytest
import torch

import utils

LR, WD, MOMENTUM = 0.1, 5e-2, 0.9


class Net(torch.nn.Module):
    """A parameter of each kind: convolution, BN weight and bias, linear weight and bias."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3), torch.nn.Linear(3, 4)


def centre(g):
    """g minus its mean over all but the first dimension, by loops."""
    out = g.clone()
    for i in range(len(g)):
        out[i] = g[i] - g[i].sum() / g[i].numel()
    return out


def reference(name, params, gradients):
    """Five updates of the parameters by the rules of the optimiser's paper."""
    params = [p.detach().clone() for p in params]
    m, v = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for t, grads in enumerate(gradients, start=1):
        for i, g in enumerate(grads):
            p = params[i]
            if name == "adamw":                     # Loshchilov & Hutter: decay apart from the gradient
                p -= LR * WD * p
            else:
                g = g + WD * p
            if (name == "sgd-gc" and p.dim() > 1) or (name == "sgd-gcc" and p.dim() == 4):
                g = centre(g)
            if name in ("adam", "adamw"):
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g * g
                p -= LR * (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
            else:                                   # v <- mu v + g, without dampening
                v[i] = MOMENTUM * v[i] + g
                p -= LR * (g + MOMENTUM * v[i] if name == "nesterov" else v[i])
    return params


@pytest.mark.parametrize("name", utils.OPTIMIZERS)
def test_five_updates(name):
    torch.manual_seed(0)
    model = Net().double()
    params = list(model.parameters())
    gradients = [[torch.randn_like(p) for p in params] for _ in range(5)]
    want = reference(name, params, gradients)
    optimizer = utils.make_optimizer(model, name, LR, WD, MOMENTUM)
    for grads in gradients:
        for p, g in zip(params, grads):
            p.grad = g.clone()
        optimizer.step()
    for p, w in zip(params, want):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-12)
