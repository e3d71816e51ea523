"""Batch norm, the hidden trick: which forwards of a training step move the running statistics, and on which
images.

The counts are those of the authors' released train_cifar.py (github.com/P2333/Bag-of-Tricks-for-AT): 14
updates of the running statistics a step with BN in train mode while attacking, 3 in eval mode.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

import models
import train_pgdat
import utils


def setting(*argv):
    return train_pgdat.parse_args(["--model", "tiny", "--out", "unused", *map(str, argv)])


def problem(seed=0):
    torch.manual_seed(seed)
    model = models.build("tiny", normalize=models.CIFAR_NORMALIZE).train()
    return model, torch.rand(8, 3, 32, 32), torch.randint(10, (8,))


def step(model, args, x, y, epoch=0):
    optimizer = utils.make_optimizer(model, args.optimizer, args.lr, args.wd, args.momentum)
    x_adv = train_pgdat.make_attack(model, model, args)(x, y, args.eps, epoch, utils.seeded("cpu", 0))
    return train_pgdat.train_step(model, model, optimizer, x, x_adv, y, args)


def watch(model):
    """A list that receives, for every forward in train mode of the first batch norm, the input of the
    model."""
    seen, current = [], []
    model.register_forward_pre_hook(lambda m, inputs: current.append(inputs[0].detach().clone()))
    model.layer1[0].bn1.register_forward_hook(lambda m, i,
                                              o: seen.append(current[-1]) if m.training else None)
    return seen


@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize("bn_mode, adversarial", [("train", 10 + 1 + 1), ("eval", 1)])
def test_number_and_kind_of_updates(bn_mode, adversarial, passes):
    model, x, y = problem()
    seen = watch(model)
    step(model, setting("--bn-mode", bn_mode, "--bn-clean-passes", passes), x, y)
    clean = [torch.equal(s, x) for s in seen]
    assert clean == [False] * adversarial + [True] * passes
    assert model.bn.num_batches_tracked == adversarial + passes
    distance = [(s - x).abs().max().item() for s in seen[:adversarial]]
    assert all(0 < d <= 8 / 255 + 1e-7 for d in distance)
    if bn_mode == "train":  # the attack's last forward and the robust one see the same, final images
        assert torch.equal(seen[10], seen[11]) and not torch.equal(seen[9], seen[10])


def test_early_stopped_attack_makes_as_many_forwards_as_it_takes_steps():
    model, x, y = problem()
    seen = watch(model)
    args = setting("--early-stop-pgd", 40, 70, "--bn-clean-passes", 0)
    wrong = (model.eval()(x).argmax(1) + 1) % 10
    # all misclassified: tolerance 1 is used up by the first look
    step(model.train(), args, x, wrong, epoch=0)
    assert len(seen) == 1 + 1 + 1
    for epoch, looks in ((39, 1), (40, 2), (69, 2), (70, 3)):
        model, x, y = problem()
        model.linear.weight.data.zero_()
        model.linear.bias.data = torch.eye(10)[0]  # says class 0 to everything
        seen = watch(model)
        step(model, args, x, torch.ones_like(y), epoch)
        assert len(seen) == looks + 1 + 1


@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize("bn_mode", ["train", "eval"])
def test_statistics_and_weights_after_a_step_equal_a_sequential_simulation(bn_mode, passes):
    """The step written out flatly, with plain autograd, plain SGD and statistics kept by hand."""
    model, x, y = problem()
    args = setting("--bn-mode", bn_mode, "--bn-clean-passes", passes, "--ls", 0.1)
    ref = copy.deepcopy(model)
    norms = [m for m in ref.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    stats = [(m.running_mean.clone().double(), m.running_var.clone().double()) for m in norms]

    def forward(images, train):
        """Logits; in train mode the statistics kept by hand move by a tenth towards the batch's (unbiased
        variance)."""
        inputs = []
        hooks = [m.register_forward_pre_hook(lambda m,
                                             i: inputs.append(i[0].detach().double())) for m in norms]
        ref.train(train)
        out = ref(images)
        for h in hooks:
            h.remove()
        if train:
            for k, v in enumerate(inputs):
                mean, var = v.mean((0, 2, 3)), v.transpose(0, 1).flatten(1).var(1, unbiased=True)
                stats[k] = (0.9 * stats[k][0] + 0.1 * mean, 0.9 * stats[k][1] + 0.1 * var)
        return out

    x_adv = utils.random_start(x, args.eps, utils.seeded("cpu", 0))
    for _ in range(10):
        x_adv = x_adv.detach().requires_grad_()
        F.cross_entropy(forward(x_adv, bn_mode == "train"), y).backward()
        x_adv = x_adv.detach() + args.alpha * x_adv.grad.sign()
        x_adv = torch.max(torch.min(x_adv, x + args.eps), x - args.eps).clamp(0, 1)
    if bn_mode == "train":
        forward(x_adv, True)
    ref.zero_grad()
    target = torch.full((8, 10), 0.1 / 9).scatter_(1, y[:, None], 0.9)
    loss = -(target * F.log_softmax(forward(x_adv, True), 1)).sum(1).mean()
    loss.backward()
    if passes == 2:
        forward(x, True)
    with torch.no_grad():
        for p in ref.parameters():
            p -= args.lr * (p.grad + args.wd * p)
    if passes >= 1:
        forward(x, True)

    got_loss, _, _ = step(model, args, x, y)
    assert got_loss.item() == pytest.approx(loss.item(), rel=1e-5)
    for p, q in zip(model.parameters(), ref.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    own = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m, (mean, var) in zip(own, stats):
        torch.testing.assert_close(m.running_mean.double(), mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(m.running_var.double(), var, rtol=1e-4, atol=1e-6)


def two_epochs(small_npz, *argv):
    data = utils.load_dataset(small_npz)
    args = setting("--batch-size", 40, *argv)
    model, _, _ = problem()
    optimizer = utils.make_optimizer(model, args.optimizer, args.lr, args.wd, args.momentum)
    attack = train_pgdat.make_attack(model, model, args)
    for epoch in range(2):
        train_pgdat.train_epoch(model, model, attack, optimizer, data.train_images, data.train_labels, args,
                                epoch)
    return model


def test_clean_passes_change_no_weight_in_train_mode_but_do_in_eval_mode(small_npz):
    train = [two_epochs(small_npz, "--bn-mode", "train", "--bn-clean-passes", n) for n in (0, 1, 2)]
    for other in train[1:]:
        assert all(torch.equal(p, q) for p, q in zip(train[0].parameters(), other.parameters()))
        assert not torch.equal(train[0].bn.running_mean, other.bn.running_mean)
    evals = [two_epochs(small_npz, "--bn-mode", "eval", "--bn-clean-passes", n) for n in (0, 2)]
    assert not torch.equal(evals[0].conv1.weight, evals[1].conv1.weight)


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_standard_training_makes_the_clean_passes_too(passes):
    """The authors' script makes three forwards in train mode a step there as well, all of the same images."""
    model, x, y = problem()
    seen = watch(model)
    step(model, setting("--attack", "none", "--bn-clean-passes", passes), x, y)
    assert len(seen) == 1 + passes and all(torch.equal(s, x) for s in seen)
