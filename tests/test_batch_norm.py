"""Batch norm, the hidden trick: which forwards of a training step move the running statistics, and on which
images.

The counts are those of the authors' released train_cifar.py (github.com/P2333/Bag-of-Tricks-for-AT): 14
updates of the running statistics a step with BN in train mode while attacking, 3 in eval mode.
"""

import copy

import pytest
import torch
from conftest import attack_of

import models
import train_pgdat
import utils
from tests.reference import statistics_by_hand
from tools.textbook import pgdat_step


def setting(*argv):
    return train_pgdat.parse_args(["--model", "tiny", "--out", "unused", *map(str, argv)])


def problem():
    """A tiny model and a batch, in float64."""
    torch.manual_seed(0)
    model = models.build("tiny", normalize=models.CIFAR_NORMALIZE).double().train()
    return model, torch.rand(8, 3, 32, 32, dtype=torch.float64), torch.randint(10, (8,))


def step(model, args, x, y, epoch=0):
    optimizer = utils.make_optimizer(model, args.optimizer, args.lr, args.wd, args.momentum)
    attack, rng = attack_of(train_pgdat, model, args), utils.seeded("cpu", 0)
    return train_pgdat.train_step(model, optimizer, attack, x, y, args.eps, epoch, rng, args)


def watch(model):
    """A list that receives the input of the model for every forward of the first batch norm in train mode."""
    seen, current = [], []
    model.register_forward_pre_hook(lambda m, inputs: current.append(inputs[0].detach().clone()))
    model.layer1[0].bn1.register_forward_hook(
        lambda m, i, o: seen.append(current[-1]) if m.training else None)
    return seen


@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize("flags, adversarial, clean", [
    ("--bn-mode train", 10 + 1 + 1, 0), ("--bn-mode eval", 1, 0), ("--attack none", 0, 1)])
def test_number_and_kind_of_updates(flags, adversarial, clean, passes):
    model, x, y = problem()
    seen = watch(model)
    step(model, setting(*flags.split(), "--bn-clean-passes", passes), x, y)
    assert [torch.equal(s, x) for s in seen] == [False] * adversarial + [True] * (clean + passes)
    assert model.bn.num_batches_tracked == len(seen)
    distance = [(s - x).abs().max().item() for s in seen[:adversarial]]
    assert all(0 < d <= 8 / 255 + 1e-12 for d in distance)
    if adversarial > 10:  # the attack's last forward and the robust one see the same, final images
        assert torch.equal(seen[10], seen[11]) and not torch.equal(seen[9], seen[10])


def test_early_stopped_attack_makes_as_many_forwards_as_it_takes_steps():
    """All images are misclassified, so a tolerance of 1, 2, 3 is used up by as many looks."""
    args = setting("--early-stop-pgd", 40, 70, "--bn-clean-passes", 0)
    for epoch, looks in ((0, 1), (39, 1), (40, 2), (69, 2), (70, 3)):
        model, x, y = problem()
        model.linear.weight.data.zero_()
        model.linear.bias.data = torch.eye(10, dtype=torch.float64)[0]  # says class 0 to everything
        seen = watch(model)
        step(model, args, x, torch.ones_like(y), epoch)
        assert len(seen) == looks + 1 + 1


@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize("bn_mode", ["train", "eval"])
def test_statistics_and_weights_after_a_step_equal_a_sequential_simulation(bn_mode, passes):
    """The step written out flatly, and statistics kept by hand."""
    model, x, y = problem()
    args = setting("--bn-mode", bn_mode, "--bn-clean-passes", passes, "--ls", 0.1)
    ref = copy.deepcopy(model)
    by_hand, sgd = statistics_by_hand(ref), torch.optim.SGD(ref.parameters(), args.lr, weight_decay=args.wd)
    _, want_loss = pgdat_step(ref, sgd, x, y, utils.seeded("cpu", 0), args)

    loss, _, _ = step(model, args, x, y)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-9)
    for p, q in zip(model.parameters(), ref.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m, (mean, var) in zip(norms, by_hand.values(), strict=True):
        torch.testing.assert_close(m.running_mean, mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(m.running_var, var, rtol=1e-9, atol=1e-12)
