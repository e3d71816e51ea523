"""PGD adversarial training (PGD-AT), and standard training, on CIFAR-10, with the tricks of Pang et al.

    python train_pgdat.py                                     Table 2, "Base"; paper: 82.52 / 53.58 / 48.51
    python train_pgdat.py --bn-mode eval                      Table 7, ResNet-18; 83.48 / 53.64 / 48.75
    python train_pgdat.py --wd 5e-4 --bn-mode eval --ls 0.1   the tricks that the paper ends up with
    python train_pgdat.py --attack none --model wrn-34-10     standard training (Figure 4)

Figures are clean / PGD-10 / AutoAttack accuracy in per cent. Every step perturbs the batch by a 10-step L-inf
PGD attack (Madry et al., 2018) and descends on the loss of the perturbed images. The defaults are the paper's
"default setting" (Section 3); what the paper leaves open is in the README's table of deviations. A run leaves
args.json, log.jsonl, last.pt and best.pt in its folder, and `python eval_aa.py FOLDER` evaluates it.

Cost: 26 forwards per image and epoch (a backward by inputs or by weights counts as one): 10 steps x 2 + 1 of
the attack, 3 of the update, 2 clean passes; one less with --bn-mode eval; 110 epochs, and the tests.
"""

import contextlib
import copy
import math
import time
from functools import partial

import torch
from tqdm import tqdm

import models
import utils
from utils import (attack_mode, batches, load_dataset, lr_at, make_optimizer, perturbed_weights, pgd,
                   random_start, seeded, smoothed_cross_entropy, training_images, update_average, warmup)

NORMALIZE = models.CIFAR_NORMALIZE  # inside the model, so that the attack lives in [0, 1]


def parse_args(argv=None):
    """The resolved setting of a command line; a flag without effect is refused with exit status 2."""
    p = utils.Parser(description=__doc__)
    g = p.add_argument_group("model and data")
    g.add_argument("--model", choices=models.MODELS, default="preactresnet-18", metavar="NAME",
                   help=", ".join(models.MODELS))
    g.add_argument("--activation", choices=models.ACTIVATIONS, default="relu", metavar="NAME",
                   help=f"activation function: {', '.join(models.ACTIVATIONS)}")
    g.add_argument("--dataset", default="cifar10", help="data set: cifar10, cifar100 or the path of an .npz")
    g.add_argument("--n-train", type=utils.number(1, kind=int), metavar="N",
                   help="train on the first N training images, not on all")
    g.add_argument("--val", type=utils.number(0, kind=int), default=0, metavar="N",
                   help="hold out N training images to choose the best checkpoint on, not on the test set")

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=utils.number(1, kind=int), default=110,
                   help="passes over the training images")
    g.add_argument("--batch-size", type=utils.number(1, kind=int), default=128, help="images a step")
    g.add_argument("--optimizer", choices=utils.OPTIMIZERS, default="sgd", help="one of Table 5's optimisers")
    g.add_argument("--lr", type=utils.number(0), help="learning rate; without it 0.1, or 1e-4 for adam(w)")
    g.add_argument("--momentum", type=utils.number(0, 1), default=0.9, help="momentum of the SGD family")
    g.add_argument("--wd", type=utils.number(0), default=5e-4, help="weight decay, on all parameters")
    g.add_argument("--lr-schedule", choices=utils.SCHEDULES, default="piecewise", help="of the learning rate")
    g.add_argument("--lr-decay-epochs", type=utils.number(0), nargs="+", default=[100, 105], metavar="EPOCH",
                   help="epochs at which the piecewise schedule decays")
    g.add_argument("--lr-decay-factor", type=utils.number(0), nargs="+", default=0.1, metavar="FACTOR",
                   help="factor of every such decay, or a factor for each")
    g.add_argument("--warmup-lr", type=utils.number(0), default=0, metavar="EPOCHS",
                   help="epochs over which the learning rate first rises linearly from 0")
    g.add_argument("--ls", type=utils.number(0, 1), default=0,
                   help="label smoothing: the mass in [0, 1) that is spread over the other classes")
    g.add_argument("--time-scale", type=utils.number(0), default=1, metavar="F",
                   help="multiply every number of epochs of the recipe by F (not --eval-...) and round it")

    g = p.add_argument_group("training attack")
    g.add_argument("--attack", choices=("pgd", "none"), default="pgd", help="none: standard training")
    g.add_argument("--eps", type=utils.fraction, default="8/255",
                   help="L-inf radius, in training and in the test, on the [0, 1] scale")
    g.add_argument("--alpha", type=utils.fraction, default="2/255",
                   help="step size of the training attack, on the [0, 1] scale")
    g.add_argument("--steps", type=utils.number(1, kind=int), default=10, help="steps of the training attack")
    g.add_argument("--warmup-eps", type=utils.number(0), default=0, metavar="EPOCHS",
                   help="epochs over which eps first rises linearly from 0")
    g.add_argument("--early-stop-pgd", type=utils.number(0), nargs=2, metavar="EPOCH",
                   help="stop moving an image once it has been misclassified 1 time, from the first epoch on "
                        "2 times, from the second on 3 times (default: off)")
    g.add_argument("--bn-mode", choices=("train", "eval"), default="train",
                   help="mode of batch norm while the training attack runs")
    g.add_argument("--bn-clean-passes", type=int, choices=(0, 1, 2), default=2,
                   help="clean forwards a step that only move the running statistics: 1 is after the update, "
                        "2 adds one before it (default: 2, as the authors' code)")

    g = p.add_argument_group("tricks since the paper")
    g.add_argument("--ema", type=utils.number(0, 1), default=0, metavar="DECAY",
                   help="test and save an exponential moving average of the weights; its decay is this, or "
                        "(1 + t) / (10 + t) at update t (from 0) while that is smaller; 0: off")
    g.add_argument("--awp", type=utils.number(0), default=0, metavar="GAMMA",
                   help="adversarial weight perturbation: take the gradient at weights one step up the loss, "
                        "each tensor moved by GAMMA of its norm; its authors use 0.01 for PGD-AT and 0.005 "
                        "for TRADES; it costs one more pass forward and backward; 0: off")
    g.add_argument("--awp-warmup", type=utils.number(0, kind=int), default=0, metavar="EPOCHS",
                   help="epochs before that starts; its authors use 0 for PGD-AT and 10 for TRADES")

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=utils.number(0, 2**63, int), default=0,
                   help="seed of weights, batches and attacks")
    g.add_argument("--eval-every", type=utils.number(1, kind=int), default=1, metavar="EPOCHS",
                   help="test after every so many epochs, and after the last")
    g.add_argument("--eval-from", type=utils.number(1, kind=int), default=1, metavar="EPOCH",
                   help="do not test before this epoch (on a GPU a test costs a quarter of a fast epoch, and "
                        "the best epoch of the paper's schedule comes after the first decay)")
    g.add_argument("--test-batch-size", type=utils.number(1, kind=int),
                   help="images a test batch; without it 1000 on CUDA, 250 elsewhere")
    g.add_argument("--out", help="the run's folder; without it runs/ and what differs from the defaults")
    g.add_argument("--resume", action="store_true",
                   help="go on with the run in that folder, if there is one: its command, with this flag")
    g.add_argument("--data-dir", default="data", help="where cifar10.npz is, or is put on first use")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    g.add_argument("--precision", choices=("fp32", "tf32", "bf16"),
                   help="arithmetic of the model; without it tf32 on CUDA, fp32 elsewhere")
    g.add_argument("--compile", action="store_true",
                   help="compile the model with torch.compile; on CUDA also capture the training attack in a "
                        "CUDA graph, one launch in place of thousands")
    g.add_argument("--dry-run", action="store_true", help="print the resolved setting and exit")

    args = p.parse_args(argv)
    if args.attack == "none":
        p.refuse(args, "--attack none", "eps", "alpha", "steps", "warmup_eps", "early_stop_pgd", "bn_mode")
    if args.early_stop_pgd and args.early_stop_pgd[0] >= args.early_stop_pgd[1]:
        p.error("--early-stop-pgd takes two rising epochs")
    return utils.settle(p, args, "pgdat")


def training_attack(model, args, x, y, x_start, eps, tolerance=None):
    """x' (B, 3, 32, 32): PGD from x_start up the cross-entropy, without smoothing; with --bn-mode train also
    the forward in which the authors' attack computes its final loss, since it moves the statistics."""
    with attack_mode(model, args.bn_mode):
        x_adv = pgd(model, x, y, x_start, eps, args.alpha, args.steps, tolerance)
        if args.bn_mode == "train":
            with torch.no_grad():
                model(x_adv)
    return x_adv


def train_step(model, optimizer, attack, x, y, eps, epoch, rng, args):
    """One step of PGD-AT: the attack, then an update on its images.

    attack(x, y, x_start, eps): training_attack with this model; x (B, 3, 32, 32) in [0, 1], y (B,); rng: the
    generator of the random start. Returns the loss () and the logits (B, K) of the adversarial images and of
    x: in standard training the former are None, without a clean pass after the update the latter.
    """
    x_adv = x
    if args.attack == "pgd":
        if args.early_stop_pgd:
            attack = partial(attack, tolerance=1 + sum(epoch >= e for e in args.early_stop_pgd))
        x_adv = attack(x, y, random_start(x, eps, rng), eps)

    awp = contextlib.nullcontext()
    if args.awp and epoch >= args.awp_warmup:
        awp = perturbed_weights(model, lambda: smoothed_cross_entropy(model(x_adv), y, args.ls), args.awp)
    with awp:
        logits = model(x_adv)
        loss = smoothed_cross_entropy(logits, y, args.ls)
        optimizer.zero_grad()
        loss.backward()
    # The authors' clean passes exist to log clean accuracy, but batch norm is in train mode then, whatever
    # --bn-mode says of the attack: with --bn-mode eval two of every three updates of the running statistics,
    # which attack and test depend on, are clean. With --attack none they move what the test depends on.
    if args.bn_clean_passes == 2:
        with torch.no_grad():
            model(x)
    optimizer.step()
    clean_logits = None
    if args.bn_clean_passes >= 1:
        with torch.no_grad():
            clean_logits = model(x)
    if args.attack == "none":
        return loss.detach(), None, logits.detach()
    return loss.detach(), logits.detach(), clean_logits


def main():
    args = parse_args()
    utils.show_setting(args)
    device = utils.start_device(args)
    data = load_dataset(args.dataset, device, args.data_dir)
    (images, labels), held_out = training_images(data, args.n_train, args.val)
    splits = {"test": (data.test_images, data.test_labels)} | ({"val": held_out} if args.val else {})
    steps, whole_batches = math.ceil(len(labels) / args.batch_size), len(labels) // args.batch_size

    torch.manual_seed(args.seed)  # the model is initialised on the CPU, so alike on every device
    model = models.build(args.model, data.num_classes, args.activation, NORMALIZE, args.precision == "bf16")
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.optimizer, args.lr, args.wd, args.momentum)
    utils.share_training(model, optimizer, args, len(labels))  # among several processes, under torchrun
    state = {"state_dict": model, "optimizer": optimizer, "normalize": NORMALIZE,
             "num_classes": data.num_classes, "data_sha256": data.sha256}  # what is saved
    if args.ema:
        state |= {"state_dict": copy.deepcopy(model), "model": model}
    tested, attack = state["state_dict"], partial(training_attack, model, args)
    if args.compile:
        attack = utils.compile_training(model, attack, args, len(labels))
    log = utils.start_or_resume(args, state, defaults=parse_args([]))
    print(f"{args.model}: {args.epochs} epochs of {len(labels):,} images, {steps:,} steps each; "
          f"{len(data.test_labels):,} test images")

    for epoch in range(len(log), args.epochs):
        began, meter, order = time.time(), utils.Meter(device), seeded(device, args.seed, "data", epoch)
        stream = batches(images, labels, args.batch_size, order, "reflect", utils.SHARD)
        bar = tqdm(stream, f"epoch {epoch + 1}", steps, leave=False, disable=utils.RANK or None)
        model.train()
        for step, (x, y) in enumerate(bar):
            t = epoch + step / steps
            lr = warmup(t, args.warmup_lr) * lr_at(t, args.lr, args.lr_schedule, args.epochs,
                                                   args.lr_decay_epochs, args.lr_decay_factor)
            eps = warmup(t, args.warmup_eps) * args.eps
            for group in optimizer.param_groups:
                group["lr"] = lr
            rng = seeded(device, args.seed, "attack", epoch, step, utils.RANK)
            with utils.uncompiled(args.compile and step == whole_batches):
                figures = train_step(model, optimizer, attack, x, y, eps, epoch, rng, args)
            meter.add(y, *figures)
            if args.ema:
                update_average(tested, model, args.ema, epoch * steps + step)

        log.append({"epoch": epoch + 1, "lr": lr, "eps": eps if args.attack == "pgd" else None,
                    **meter.read(), **utils.test(tested, splits, args, epoch),
                    "seconds": round(time.time() - began, 2)})
        utils.save(args, state, log)
        utils.show_epoch(args, log)
    print(f"the best epoch is {utils.best(log)['epoch']}: {args.out}/best.pt\n"
          f"evaluate it with: python eval_aa.py {args.out}")


if __name__ == "__main__":
    utils.run_script(main)
