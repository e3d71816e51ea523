"""PGD adversarial training (PGD-AT), and standard training, on CIFAR-10, with the tricks of Pang et al.

    python train_pgdat.py                                     Table 2, "Base"; paper: 82.52 / 53.58 / 48.51
    python train_pgdat.py --bn-mode eval                      Table 7, ResNet-18; 83.48 / 53.64 / 48.75
    python train_pgdat.py --wd 5e-4 --bn-mode eval --ls 0.1   the tricks that the paper ends up with
    python train_pgdat.py --attack none --model wrn-34-10     standard training (Figure 4)

Figures are clean / PGD-10 / AutoAttack accuracy in per cent. Every step perturbs the batch by a 10-step L-inf
PGD attack (Madry et al., 2018) and descends on the loss of the perturbed images. The defaults are the paper's
"default setting" (Section 3); what the paper leaves open is in the README's table of deviations. A run leaves
args.json, log.jsonl, last.pt and best.pt in its folder, and `python eval_aa.py FOLDER` evaluates it.

Cost: 26 forwards an image and epoch (a backward by inputs or by weights counts as one), of which the attack
takes 21; one less with --bn-mode eval; 110 epochs.
"""

import copy
import math

import torch

import models
import runs
from utils import (OPTIMIZERS, SCHEDULES, InputError, attack_mode, batches, ema_decay, hold_out,
                   make_optimizer, percent, perturb_weights, pgd, pgd_evaluate, random_start, restore_weights,
                   schedule, seeded, smoothed_cross_entropy, update_average)

NORMALIZE = models.CIFAR_NORMALIZE  # inside the model, so that the attack lives in [0, 1]


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
    g.add_argument("--ls", type=runs.number(0, 1, open_high=True), default=0,
                   help="label smoothing: the mass in [0, 1) that is spread over the other classes")

    g = p.add_argument_group("training attack")
    g.add_argument("--attack", choices=("pgd", "none"), default="pgd", help="none: standard training")
    g.add_argument("--eps", type=runs.fraction, default=8 / 255,
                   help="L-inf radius, in training and in the test, on the [0, 1] scale (default: 8/255)")
    g.add_argument("--alpha", type=runs.fraction, default=2 / 255,
                   help="step size of the training attack, on the [0, 1] scale (default: 2/255)")
    g.add_argument("--steps", type=runs.integer(1), default=10, help="steps of the training attack")
    g.add_argument("--warmup-eps", type=runs.number(0), default=0, metavar="EPOCHS",
                   help="epochs over which eps first rises linearly from 0")
    g.add_argument("--early-stop-pgd", type=runs.number(0), nargs=2, metavar="EPOCH",
                   help="stop moving an image once it has been misclassified 1 time, from the first epoch on "
                        "2 times, from the second on 3 times (default: off)")
    g.add_argument("--bn-mode", choices=("train", "eval"), default="train",
                   help="mode of batch norm while the training attack runs")
    g.add_argument("--bn-clean-passes", type=int, choices=(0, 1, 2), default=2,
                   help="clean forwards a step that only move the running statistics: 1 is after the update, "
                        "2 adds one before it (default: 2, as the authors' code)")

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
    if args.attack == "none":
        runs.without_effect(p, args, "--attack none", "eps", "alpha", "steps", "warmup_eps", "early_stop_pgd",
                            "bn_mode")
    if args.awp == 0:
        runs.without_effect(p, args, "--awp 0", "awp_warmup")
    if args.early_stop_pgd and args.early_stop_pgd[0] >= args.early_stop_pgd[1]:
        p.error("--early-stop-pgd takes two rising epochs")
    return runs.resolve(p, args, "pgdat")


def make_attack(model, forward, args):
    """attack(x, y, eps, epoch, generator): x (B, 3, 32, 32) under PGD, or x itself with --attack none."""
    def iterate(x, y, start, eps, tolerance=None):
        with attack_mode(model, args.bn_mode):
            x_adv = pgd(forward, x, y, start, eps, args.alpha, args.steps, tolerance=tolerance)
            if args.bn_mode == "train":
                with torch.no_grad():
                    forward(x_adv)  # the authors' attack computes its final loss: the statistics move
        return x_adv

    replay = runs.graphed(iterate, model, args.compile)  # cannot stop early

    def attack(x, y, eps, epoch, generator):
        if args.attack == "none":
            return x
        start = random_start(x, eps, generator)
        if args.early_stop_pgd is None:
            return replay(x, y, start, eps)
        return iterate(x, y, start, eps, tolerance=1 + sum(epoch >= e for e in args.early_stop_pgd))
    return attack


def train_step(model, forward, optimizer, x, x_adv, y, args, gamma=0):
    """One update on the loss of x_adv (B, 3, 32, 32), at weights that --awp's gamma perturbs unless it is 0.

    Returns the loss (), the logits (B, K) of x_adv, and those of x from the pass after the update, or None
    without one.
    """
    clean_logits = None

    moved = perturb_weights(model, lambda: smoothed_cross_entropy(forward(x_adv), y, args.ls), gamma)
    logits = forward(x_adv)
    loss = smoothed_cross_entropy(logits, y, args.ls)
    optimizer.zero_grad()
    loss.backward()
    restore_weights(moved)
    # The authors' clean passes exist to log clean accuracy, but they run in train mode: with --bn-mode eval
    # two of every three updates of the running statistics, which attack and test depend on, are clean. With
    # --attack none they move the statistics too, which the test depends on.
    if args.bn_clean_passes == 2:
        with torch.no_grad():
            forward(x)
    optimizer.step()
    if args.bn_clean_passes >= 1:
        with torch.no_grad():
            clean_logits = forward(x)
    return loss.detach(), logits.detach(), clean_logits


def train_epoch(model, forward, attack, optimizer, images, labels, args, epoch, average=None):
    """One pass over the training images (N, 32, 32, 3) uint8. Returns the epoch's part of its log line."""
    device, steps = images.device, math.ceil(len(labels) / args.batch_size)
    gamma = args.awp if epoch >= args.awp_warmup else 0
    meter, generator = runs.Meter(device), seeded(device, args.seed, "data", epoch)
    stream = batches(images, labels, args.batch_size, generator, padding="reflect", share=runs.share())
    model.train()
    shown = runs.progress(stream, len(labels), f"epoch {epoch + 1}/{args.epochs}", meter)
    for step, (x, y) in enumerate(shown):
        lr, eps = schedule(epoch + step / steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x_adv = attack(x, y, eps, epoch, seeded(device, args.seed, "attack", epoch, step, runs.rank()))
        loss, logits, clean_logits = train_step(model, forward, optimizer, x, x_adv, y, args, gamma)
        meter.add(loss, y, logits, clean_logits)
        runs.share_statistics(model)
        if average is not None:
            update_average(average, model, ema_decay(epoch * steps + step, args.ema))
    mean_loss, adv_acc, clean_acc = meter.read()
    if args.attack == "none":
        adv_acc, clean_acc = None, adv_acc  # what was trained on was clean
    elif args.bn_clean_passes == 0:
        clean_acc = None
    return {"lr": lr, "eps": eps if args.attack == "pgd" else None,  # those of the last step
            "train_loss": mean_loss, "train_adv_acc": adv_acc, "train_clean_acc": clean_acc}


def test(model, forward, images, labels, args, epoch, split):
    """{SPLIT_clean, SPLIT_pgd10}: accuracies in per cent. PGD-10 steps by 2/255; None with --attack none."""
    with attack_mode(model, "eval"):
        flags = pgd_evaluate(forward, images, labels, eps=args.eps, restarts=1 if args.attack == "pgd" else 0,
                             seed=(args.seed, epoch), batch_size=args.test_batch_size, share=runs.share())
    clean, robust, _ = runs.sum_over_processes(flags)
    return {f"{split}_clean": percent(clean),
            f"{split}_pgd10": percent(robust) if args.attack == "pgd" else None}


def main():
    args = parse_args()
    device = runs.start(args)
    runs.check_folder(args, make_parser())
    data = runs.load(args, device)
    runs.check_split(args, len(data.train_labels) - args.val, device)
    if args.early_stop_pgd and runs.world() > 1:
        raise InputError("--early-stop-pgd takes one process: the attacks of several end at different steps")
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
    accuracy = "pgd10" if args.attack == "pgd" else "clean"
    measure = f"val_{accuracy}" if val else f"test_{accuracy}"  # chooses the best epoch
    with runs.Run(args, make_parser(), state, about, data.sha256, measure, tested) as run:
        for epoch in range(run.epoch, args.epochs):
            entry = train_epoch(model, forward, attack, optimizer, *train, args, epoch, average)
            if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                for split, (images, labels) in splits.items():
                    entry |= test(tested, forward_tested, images, labels, args, epoch, split)
            run.save(entry)


if __name__ == "__main__":
    runs.run_script(main)
