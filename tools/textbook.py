"""A training step of PGD-AT and one of TRADES, written from the papers and from what the public code does.

Plain torch, and nothing of this project: the baseline that tools/bench.py times, and the reference that tests
hold our steps against. x (B, 3, 32, 32) in [0, 1], y (B,); rng: the generator of the attack's start, None
for torch's global one; args: the values of our scripts' flags. Both return x' (B, 3, 32, 32) and the loss ().
"""

import torch
import torch.nn.functional as F


def pgdat_step(model, optimizer, x, y, rng, args):
    """PGD-AT (Madry et al., 2018) as in the train_cifar.py of Pang et al.; standard training without attack.

    37 forwards an image with --bn-mode eval: every attack step computes weight gradients too, the attack ends
    with its final loss, and one of the two clean passes that serve the log has an input gradient.
    """
    delta = torch.zeros_like(x)
    if args.attack == "pgd":
        model.train(args.bn_mode == "train")
        delta = torch.empty_like(x).uniform_(-args.eps, args.eps, generator=rng)
        delta = (x + delta).clamp(0, 1) - x
        for _ in range(args.steps):
            delta.requires_grad_()
            F.cross_entropy(model(x + delta), y).backward()
            delta = (delta.detach() + args.alpha * delta.grad.sign()).clamp(-args.eps, args.eps)
            delta = (x + delta).clamp(0, 1) - x
        F.cross_entropy(model(x + delta), y).detach()

    model.train()
    logits = model(x + delta)
    target = torch.full_like(logits, args.ls / (logits.shape[1] - 1)).scatter_(1, y[:, None], 1 - args.ls)
    loss = F.cross_entropy(logits, target)
    if args.bn_clean_passes == 2:
        clean = x.clone().requires_grad_()
        clean_loss = F.cross_entropy(model(clean), y)
    optimizer.zero_grad()
    loss.backward()
    if args.bn_clean_passes == 2:
        torch.autograd.grad(clean_loss, clean)
    optimizer.step()
    if args.bn_clean_passes >= 1:
        F.cross_entropy(model(x), y)
    return x + delta, loss.detach()


def trades_step(model, optimizer, x, y, rng, args):
    """TRADES (Zhang et al., 2019) as in AT_HE, with two passes in the loss.

    36 forwards an image: every attack step repeats the natural one.
    """
    def divergence(natural, adversarial, reduction):
        return F.kl_div(F.log_softmax(adversarial, dim=1), F.softmax(natural, dim=1), reduction=reduction)

    model.train(args.bn_mode == "train")
    x_adv = x + 0.001 * torch.empty_like(x).normal_(generator=rng)
    for _ in range(args.steps):
        x_adv.requires_grad_()
        adversarial = model(x_adv)
        grad, = torch.autograd.grad(divergence(model(x), adversarial, "sum"), x_adv)
        x_adv = x_adv.detach() + args.alpha * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - args.eps), x + args.eps).clamp(0, 1)

    model.train()
    natural = model(x)
    loss = F.cross_entropy(natural, y) + args.beta * divergence(natural, model(x_adv), "batchmean")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return x_adv, loss.detach()
