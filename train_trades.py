"""TRADES (Zhang et al., 2019) on CIFAR-10, with the training settings that Pang et al. (2021) study.

    python train_trades.py                       Table 12, eval, ReLU; the paper's 81.45 / 53.51 / 49.06
    python train_trades.py --model wrn-34-20     Table 9, the best at 8/255; 86.43 / 57.91 / 54.39
    python train_trades.py --model wrn-34-10 --wd 2e-4 --eps 0.031 --alpha 0.007
                                                 Table 9, as the original TRADES; 85.17 / 55.10 / 51.85

Figures are clean / PGD-10 / AutoAttack accuracy in per cent. Every step minimises CE(f(x), y) + beta *
KL(f(x) || f(x')), where x' maximises that divergence in the eps-ball around x. No input normalisation, zero
padding, two passes (natural, adversarial) in the loss, as in the authors' TRADES code. Beta 6, and the step
of 2/255 at 8/255, are not in the paper: assumptions. A run leaves the files that train_pgdat.py leaves, and
`python eval_aa.py FOLDER` evaluates it.

Cost: with --bn-mode eval 27 forwards an image and epoch (a backward by inputs or by weights counts as one),
of which the attack takes 21; 110 epochs.
"""

import copy
import math

import torch
import torch.nn.functional as F

import models
import runs
from utils import (OPTIMIZERS, SCHEDULES, InputError, attack_mode, batches, ema_decay, hold_out, linf_step,
                   make_optimizer, percent, perturb_weights, pgd_evaluate, restore_weights, schedule, seeded,
                   update_average)

NORMALIZE = None  # TRADES takes images in [0, 1] as they are


def make_parser():
    p = runs.Parser(description=__doc__)
    g = p.add_argument_group("model and data")
    g.add_argument("--model", choices=models.MODELS, default="preactresnet-18", metavar="NAME",
                   help=f"{', '.join(models.MODELS)} (default: preactresnet-18, the paper's ResNet-18)")
    g.add_argument("--activation", choices=models.ACTIVATIONS, default="relu", metavar="NAME",
                   help=f"activation function: {', '.join(models.ACTIVATIONS)}")
    g.add_argument("--dataset", default="cifar10", help="data set: cifar10, cifar100 or the path of an .npz")
    g.add_argument("--val", type=runs.integer(0), default=0, metavar="N",
                   help="hold out N training images to choose the best checkpoint on, not on the test set")

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=runs.integer(1), default=110, help="passes over the training images")
    g.add_argument("--batch-size", type=runs.integer(1), default=128, help="images a step")
    g.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="one of Table 5's optimisers")
    g.add_argument("--lr", type=runs.number(0), help="learning rate (default: 0.1; adam and adamw: 1e-4)")
    g.add_argument("--momentum", type=runs.number(0, 1, open_high=True), default=0.9,
                   help="momentum of the SGD family")
    g.add_argument("--wd", type=runs.number(0), default=5e-4, help="weight decay, on all parameters")
    g.add_argument("--lr-schedule", choices=SCHEDULES, default="piecewise", help="learning rate schedule")
    g.add_argument("--lr-decay-epochs", type=runs.number(0), nargs="+", default=[100, 105], metavar="EPOCH",
                   help="epochs at which the piecewise schedule decays (default: 100 105)")
    g.add_argument("--lr-decay-factor", type=runs.number(0, 1), nargs="+", default=0.1, metavar="FACTOR",
                   help="factor of every such decay, or a factor for each")
    g.add_argument("--warmup-lr", type=runs.number(0), default=0, metavar="EPOCHS",
                   help="epochs over which the learning rate first rises linearly from 0")

    g = p.add_argument_group("TRADES")
    g.add_argument("--beta", type=runs.number(0), default=6.0, help="weight of the robust term of the loss")
    g.add_argument("--eps", type=runs.fraction, default=8 / 255,
                   help="L-inf radius, in training and in the test, on the [0, 1] scale (default: 8/255)")
    g.add_argument("--alpha", type=runs.fraction, default=2 / 255,
                   help="step size of the training attack, on the [0, 1] scale (default: 2/255)")
    g.add_argument("--steps", type=runs.integer(1), default=10, help="steps of the training attack")
    g.add_argument("--warmup-eps", type=runs.number(0), default=0, metavar="EPOCHS",
                   help="epochs over which eps first rises linearly from 0")
    g.add_argument("--bn-mode", choices=("train", "eval"), default="eval",
                   help="mode of batch norm while the training attack runs")

    g = p.add_argument_group("tricks since the paper")
    g.add_argument("--ema", type=runs.number(0, 1, open_high=True), default=0, metavar="DECAY",
                   help="test and save an exponential moving average of the weights; its decay is this, or "
                        "(1 + t) / (10 + t) at update t (from 0) while that is smaller (default: 0, off)")
    g.add_argument("--awp", type=runs.number(0), default=0, metavar="GAMMA",
                   help="adversarial weight perturbation: take the gradient at weights one step up the loss, "
                        "each tensor moved by GAMMA of its norm; its authors use 0.01 for PGD-AT and 0.005 "
                        "for TRADES; it costs one more pass forward and backward (default: 0, off)")
    g.add_argument("--awp-warmup", type=runs.integer(0), default=0, metavar="EPOCHS",
                   help="epochs before that starts; its authors use 0 for PGD-AT and 10 for TRADES")
    runs.add_flags(p)
    return p


def parse_args(argv=None):
    """The resolved setting of a command line; a flag without effect is refused with exit status 2."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.awp == 0:
        runs.without_effect(p, args, "--awp 0", "awp_warmup")
    return runs.resolve(p, args, "trades")


def divergence(log_p, log_q):
    """KL(p || q) summed over the batch, of log-probabilities (B, K). Log-softmax on both sides stays finite
    where a probability underflows, as the log of a softmax does not."""
    return (log_p.exp() * (log_p - log_q)).sum()


def trades_attack(model, forward, x, start, eps, args):
    """x' (B, 3, 32, 32): steps of alpha from `start` up the gradient of KL(f(x) || f(x')).

    f(x) does not change meanwhile, so with --bn-mode eval it is computed once. The reference makes a natural
    forward at every step, after the adversarial one; with --bn-mode train these move the running statistics,
    and are kept for that.
    """
    x_adv = start
    with attack_mode(model, args.bn_mode):
        with torch.no_grad():
            log_p = F.log_softmax(forward(x), dim=1) if args.bn_mode == "eval" else None
        for _ in range(args.steps):
            x_adv = x_adv.detach().requires_grad_()
            log_q = F.log_softmax(forward(x_adv), dim=1)
            if args.bn_mode == "train":
                with torch.no_grad():
                    log_p = F.log_softmax(forward(x), dim=1)
            grad, = torch.autograd.grad(divergence(log_p, log_q), x_adv)
            with torch.no_grad():
                x_adv = linf_step(x, x_adv, grad, eps, args.alpha)
    return x_adv


def make_attack(model, forward, args):
    """attack(x, eps, generator): trades_attack from x + 0.001 N(0, 1)."""
    def iterate(x, start, eps):
        return trades_attack(model, forward, x, start, eps, args)

    replay = runs.graphed(iterate, model, args.compile)

    def attack(x, eps, generator):
        return replay(x, x + 0.001 * torch.empty_like(x).normal_(generator=generator), eps)
    return attack


def trades_loss(natural, adversarial, y, beta):
    """CE(f(x), y) + beta * mean KL(f(x) || f(x')) of logits (B, K), with gradients through both (Eq. 5)."""
    robust = divergence(F.log_softmax(natural, dim=1), F.log_softmax(adversarial, dim=1)) / len(y)
    return F.cross_entropy(natural, y) + beta * robust


def train_step(model, forward, optimizer, x, x_adv, y, args, gamma=0):
    """One update. Returns the loss () and the logits (B, K) of the adversarial and of the natural images."""
    moved = perturb_weights(model, lambda: trades_loss(forward(x), forward(x_adv), y, args.beta), gamma)
    natural, adversarial = forward(x), forward(x_adv)  # in this order: both move the running statistics
    loss = trades_loss(natural, adversarial, y, args.beta)
    optimizer.zero_grad()
    loss.backward()
    restore_weights(moved)
    optimizer.step()
    return loss.detach(), adversarial.detach(), natural.detach()


def train_epoch(model, forward, attack, optimizer, images, labels, args, epoch, average=None):
    """One pass over the training images (N, 32, 32, 3) uint8. Returns the epoch's part of its log line."""
    device, steps = images.device, math.ceil(len(labels) / args.batch_size)
    gamma = args.awp if epoch >= args.awp_warmup else 0
    meter, generator = runs.Meter(device), seeded(device, args.seed, "data", epoch)
    stream = batches(images, labels, args.batch_size, generator, padding="zero", share=runs.share())
    model.train()
    shown = runs.progress(stream, len(labels), f"epoch {epoch + 1}/{args.epochs}", meter)
    for step, (x, y) in enumerate(shown):
        lr, eps = schedule(epoch + step / steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x_adv = attack(x, eps, seeded(device, args.seed, "attack", epoch, step, runs.rank()))
        loss, logits, clean_logits = train_step(model, forward, optimizer, x, x_adv, y, args, gamma)
        meter.add(loss, y, logits, clean_logits)
        runs.share_statistics(model)
        if average is not None:
            update_average(average, model, ema_decay(epoch * steps + step, args.ema))
    mean_loss, adv_acc, clean_acc = meter.read()
    return {"lr": lr, "eps": eps,
            "train_loss": mean_loss, "train_adv_acc": adv_acc, "train_clean_acc": clean_acc}


def test(model, forward, images, labels, args, epoch, split):
    """{SPLIT_clean, SPLIT_pgd10}: accuracies in per cent. PGD-10 steps by 2/255, whatever --alpha is."""
    with attack_mode(model, "eval"):
        flags = pgd_evaluate(forward, images, labels, eps=args.eps, seed=(args.seed, epoch),
                             batch_size=args.test_batch_size, share=runs.share())
    clean, robust, _ = runs.sum_over_processes(flags)
    return {f"{split}_clean": percent(clean), f"{split}_pgd10": percent(robust)}


def main():
    args = parse_args()
    device = runs.start(args)
    runs.check_folder(args, make_parser())
    data = runs.load(args, device)
    runs.check_split(args, len(data.train_labels) - args.val, device)
    if args.awp and runs.world() > 1:
        raise InputError("--awp takes one process: each of several would perturb the weights in its own way")
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):  # initialised on the CPU, so alike on every device
        model = models.build(args.model, data.num_classes, args.activation, NORMALIZE)
    runs.show_setting(args, model, data)
    if args.dry_run:
        return

    train, val = hold_out(data.train_images, data.train_labels, args.val)
    splits = {"test": (data.test_images, data.test_labels)} | ({"val": val} if val else {})
    model = runs.sync_batch_norm(model, device).to(device, memory_format=torch.channels_last)
    forward = runs.make_forward(model, args.precision, args.compile)
    attack = make_attack(model, forward, args)
    optimizer = make_optimizer(model, args.optimizer, args.lr, args.wd, args.momentum)
    runs.average_gradients(optimizer)

    state = {"model": model, "optimizer": optimizer}  # what a run saves and --resume restores
    average, tested, forward_tested = None, model, forward
    if args.ema:
        state["average"] = average = tested = copy.deepcopy(model)
        forward_tested = runs.make_forward(average, args.precision, args.compile)
    about = {"num_classes": data.num_classes, "normalize": NORMALIZE}
    measure = "val_pgd10" if val else "test_pgd10"  # chooses the best epoch
    with runs.Run(args, make_parser(), state, about, data.sha256, measure, tested) as run:
        for epoch in range(run.epoch, args.epochs):
            entry = train_epoch(model, forward, attack, optimizer, *train, args, epoch, average)
            if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                for split, (images, labels) in splits.items():
                    entry |= test(tested, forward_tested, images, labels, args, epoch, split)
            run.save(entry)


if __name__ == "__main__":
    runs.run_script(main)
