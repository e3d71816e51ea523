"""PGD against loops written from Eq. 1, on a model whose input gradient is known in closed form."""

import numpy as np
import pytest
import torch
from conftest import Affine

import models
import utils


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def reference_step(model, x0, x, label, eps, alpha):
    """One step of Eq. 1 for one image: d CE / dx = W^T (softmax(Wx + b) - onehot)."""
    w, b = model.weight.detach().numpy(), model.bias.detach().numpy()
    p = softmax(w @ x.ravel() + b)
    p[label] -= 1
    x = x + alpha * np.sign((w.T @ p).reshape(x.shape))
    return np.clip(np.minimum(np.maximum(x, x0 - eps), x0 + eps), 0, 1)


@pytest.fixture
def problem():
    g = torch.Generator().manual_seed(1)
    x = torch.rand(5, 3, 6, 6, generator=g, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 3, 1])
    model = Affine()
    model.weight.data *= 0.05  # logits close together, so that labels flip in the course of an attack
    return model, x, y, utils.random_start(x, 8 / 255, g)


@pytest.mark.parametrize("steps", [1, 10])
def test_iterates_are_those_of_equation_1(problem, steps):
    model, x, y, start = problem
    eps, alpha = 8 / 255, 2 / 255
    result = utils.pgd(model, x, y, start, eps, alpha, steps)
    for i in range(len(x)):
        want = start[i].numpy()
        for _ in range(steps):
            want = reference_step(model, x[i].numpy(), want, y[i].item(), eps, alpha)
        np.testing.assert_allclose(result[i].numpy(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tolerance", [1, 2, 3])
def test_early_stopped_attack_moves_an_image_until_it_has_been_misclassified_often_enough(problem, tolerance):
    model, x, y, start = problem
    w, b = model.weight.detach().numpy(), model.bias.detach().numpy()
    forwards = []

    def counting(x):
        forwards.append(1)
        return model(x)

    result = utils.pgd(counting, x, y, start, 0.4, 0.02, 20, tolerance=tolerance)
    taken = []
    for i in range(len(x)):
        want, left, steps = start[i].numpy(), tolerance, 0
        for _ in range(20):
            if (w @ want.ravel() + b).argmax() != y[i]:
                left -= 1
                if left == 0:
                    break
            want = reference_step(model, x[i].numpy(), want, y[i].item(), 0.4, 0.02)
            steps += 1
        np.testing.assert_allclose(result[i].numpy(), want, rtol=0, atol=1e-12)
        taken.append(steps)
    assert len(set(taken)) > 1, "the problem should stop some images earlier than others"
    assert len(forwards) == max(taken) + 1 < 20  # the attack ends as soon as every image has stopped


@pytest.mark.parametrize("eps", [0.0, 0.031, 8 / 255, 1.0])
@pytest.mark.parametrize("alpha", [2 / 255, 0.5])
def test_stays_in_the_ball_and_in_the_box(eps, alpha):
    torch.manual_seed(0)
    model, x = models.build("tiny", normalize=models.CIFAR_NORMALIZE), torch.rand(4, 3, 32, 32)
    x[0], x[1] = 0, 1
    start = utils.random_start(x, eps, torch.Generator().manual_seed(0))
    for x_adv in (start, utils.pgd(model, x, torch.arange(4), start, eps, alpha, 3)):
        assert (x_adv.double() - x.double()).abs().max() <= eps + 1e-7
        assert x_adv.min() >= 0 and x_adv.max() <= 1


def test_random_start_is_uniform_in_the_ball():
    x = torch.full((20, 3, 32, 32), 0.5)
    noise = (utils.random_start(x, 0.1, torch.Generator().manual_seed(0)) - x).flatten()
    assert abs(noise.mean()) < 1e-3 and abs(noise.std() - 0.1 / 3**0.5) < 1e-3 and noise.abs().max() > 0.099


@pytest.mark.parametrize("bn_mode", ["train", "eval"])
def test_attack_mode_freezes_and_restores(bn_mode):
    model = models.build("tiny").train()
    model.layer2.eval()
    model.conv1.weight.requires_grad_(False)
    modes = {n: m.training for n, m in model.named_modules()}
    with pytest.raises(RuntimeError, match="inside"):
        with utils.attack_mode(model, bn_mode):
            assert all(m.training == (bn_mode == "train") for m in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            x = torch.rand(2, 3, 32, 32)
            utils.pgd(model, x, torch.tensor([0, 1]), x, 0.1, 0.1, 2)
            raise RuntimeError("inside")  # restored even so
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]


def test_the_attack_computes_no_weight_gradient(monkeypatch):
    """In the backward of a convolution, no gradient of the weight is asked for."""
    model = models.build("tiny")
    wanted = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "convolution_backward" in str(func):
                wanted.append(args[-1])
            return func(*args, **(kwargs or {}))

    x = torch.rand(2, 3, 32, 32)
    with utils.attack_mode(model, "eval"), Spy():
        utils.pgd(model, x, torch.tensor([0, 1]), x, 0.1, 0.1, 1)
    assert wanted and all(mask[0] and not mask[1] for mask in wanted)


@pytest.mark.parametrize("steps", [0, 4])
def test_evaluation_image_by_image(steps):
    """Clean, and under the last iterate of one uniform start, against a loop over images and iterates."""
    g = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (60, 6, 6, 3), dtype=torch.uint8, generator=g)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(108, 50),
                                torch.nn.Tanh(), torch.nn.Linear(50, 4)).eval()
    model[2].weight.data *= 20  # so crooked that an attack can lose what it had gained
    labels = model(utils.to_float(images)).argmax(1)
    labels[:3] = (labels[:3] + 1) % 4  # some misclassified without attack
    eps, alpha = 0.03, 0.06
    noise = torch.empty(images.shape).uniform_(-eps, eps, generator=utils.seeded("cpu", 5, "evaluation", 0))
    want, lost_on_the_way = [], 0
    for i, y in enumerate(labels.tolist()):
        x, target = utils.to_float(images[i : i + 1]), labels[i : i + 1]
        it, margins = (x + noise[i : i + 1].permute(0, 3, 1, 2)).clamp(0, 1), []
        for step in range(steps + 1):
            it = (it if steps else x).detach().requires_grad_()
            z = model(it)[0].tolist()
            margins.append(z[y] - max(v for k, v in enumerate(z) if k != y))
            grad, = torch.autograd.grad(torch.nn.functional.cross_entropy(model(it), target), it)
            it = torch.max(torch.min(it + alpha * grad.sign(), x + eps), x - eps).clamp(0, 1)
        want.append((model(x).argmax(1).item() == y, margins[-1] > 0, margins[-1]))
        lost_on_the_way += min(margins) < 0 < margins[-1]
    clean, robust, margin = (torch.tensor(values) for values in zip(*want))
    assert not steps or (0 < robust.sum() < clean.sum() < 60 and lost_on_the_way)

    def check(got):
        assert torch.equal(got[0], clean) and torch.equal(got[1], robust)
        torch.testing.assert_close(got[2], margin, rtol=1e-4, atol=1e-4)

    model.train()  # an evaluation is in eval mode whatever the model's
    measure = {"eps": eps, "alpha": alpha, "steps": steps, "seed": 5}
    for batch_size in (8, 60):
        check(utils.evaluate(model, images, labels, batch_size=batch_size, **measure))
    assert model.training
    parts = [utils.evaluate(model, images, labels, batch_size=7, shard=slice(rank, None, 2), **measure)
             for rank in (0, 1)]
    check([one + other for one, other in zip(*parts)])
    assert not any(t[1 - rank :: 2].any() for rank, part in enumerate(parts) for t in part)


def test_evaluation_is_pgd10_unless_told_otherwise(monkeypatch):
    calls = []
    monkeypatch.setattr(utils, "pgd", lambda model, x, y, start, *rest: calls.append(rest) or start)
    utils.evaluate(models.build("tiny"), torch.zeros(3, 32, 32, 3, dtype=torch.uint8), torch.arange(3), 0.1)
    assert calls == [(0.1, 2 / 255, 10)]


def test_logits_that_are_not_finite_are_never_right_and_have_the_least_margin():
    logits = torch.tensor([[1.0, 0, 0.5], [1, 0, torch.nan], [torch.inf, 0, 0], [1, -torch.inf, 0]])
    model = torch.nn.Identity()
    model.forward = lambda x: logits
    images, labels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.long)
    clean, robust, margin = utils.evaluate(model, images, labels, 0.1, steps=0)
    assert clean.tolist() == robust.tolist() == [True, False, False, False]
    assert margin.tolist() == [0.5, *3 * [-torch.inf]]
