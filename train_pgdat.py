"""PGD adversarial training (PGD-AT), and standard training, on CIFAR-10, with the tricks of Pang et al.

    command                                                   the paper's clean / PGD-10 / AutoAttack, in %
    python train_pgdat.py                                     Table 2, "Base": 82.52 / 53.58 / 48.51
    python train_pgdat.py --bn-mode eval                      Table 7, ResNet-18: 83.48 / 53.64 / 48.75
    python train_pgdat.py --bn-mode eval --ls 0.1             with label smoothing too
    python train_pgdat.py --attack none --model wrn-34-10     standard training, as in Figure 4

Every step perturbs the batch with a 10-step L-inf PGD attack (Madry et al., 2018) and then takes an optimiser
step on the loss of the perturbed images. The defaults are the paper's "default setting" (Section 3), whose
ResNet-18 is our preactresnet-18. docs/deviations.md says what the paper leaves open. A run writes args.json,
log.jsonl, last.pt and best.pt to its folder; `python eval_aa.py FOLDER` evaluates it.

An image costs 26 passes an epoch: 21 in the attack (20 with --bn-mode eval), 3 in the update, 2 clean ones.
A backward pass counts as one in the attack, and as two in the update, which needs weight gradients too.
"""

import contextlib
import copy
import math
import time
from functools import partial

import torch

import models
import utils
from utils import (attack_mode, batches, load_dataset, lr_at, make_optimizer, perturbed_weights, pgd,
                   random_start, seeded, smoothed_cross_entropy, training_images, update_average, warmup)

NORMALIZE = models.CIFAR_NORMALIZE  # inside the model, so that the attack lives in [0, 1]


def parse_args(argv=None):
    """The flags of a command line. Exits with status 2 if one of them would have no effect."""
    p = utils.Parser(description=__doc__)
    g = p.add_argument_group("model and data")
    g.add_argument("--model", choices=models.MODELS, default="preactresnet-18", metavar="NAME",
                   help=", ".join(models.MODELS))
    g.add_argument("--activation", choices=models.ACTIVATIONS, default="relu", metavar="NAME",
                   help=f"activation function: {', '.join(models.ACTIVATIONS)}")
    g.add_argument("--dataset", default="cifar10", help="data set: cifar10, cifar100 or the path of an .npz")
    g.add_argument("--n-train", type=int, metavar="N", help="take the first N training images; default: all")
    g.add_argument("--val", type=int, default=0, metavar="N",
                   help="hold out N training images, and choose the best checkpoint on them")

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, default=110, help="passes over the training images")
    g.add_argument("--batch-size", type=int, default=128, help="images per step")
    g.add_argument("--optimizer", choices=utils.OPTIMIZERS, default="sgd", help="one of Table 5's optimisers")
    g.add_argument("--lr", type=float, help="learning rate; default: 0.1, or 1e-4 for adam(w)")
    g.add_argument("--momentum", type=float, default=0.9, help="momentum of the SGD family")
    g.add_argument("--wd", type=float, default=5e-4, help="weight decay, on all parameters")
    g.add_argument("--lr-schedule", choices=utils.SCHEDULES, default="piecewise",
                   help="learning-rate schedule")
    g.add_argument("--lr-decay-epochs", type=float, nargs="+", default=[100, 105], metavar="EPOCH",
                   help="epochs at which the piecewise schedule decays")
    g.add_argument("--lr-decay-factor", type=float, nargs="+", default=0.1, metavar="FACTOR",
                   help="what each decay multiplies the learning rate by: one factor, or one per decay")
    g.add_argument("--warmup-lr", type=float, default=0, metavar="EPOCHS",
                   help="epochs over which the learning rate first rises linearly from 0")
    g.add_argument("--ls", type=float, default=0,
                   help="label smoothing: the mass in [0, 1) that is spread over the other classes")
    g.add_argument("--time-scale", type=float, default=1, metavar="F",
                   help="shorten the recipe: multiply --epochs, decays and warm-ups by F, rounded")

    g = p.add_argument_group("training attack")
    g.add_argument("--attack", choices=("pgd", "none"), default="pgd", help="none: standard training")
    g.add_argument("--eps", type=utils.fraction, default="8/255",
                   help="L-inf radius, in training and in the test, on the [0, 1] scale")
    g.add_argument("--alpha", type=utils.fraction, default="2/255",
                   help="step size of the training attack, on the [0, 1] scale")
    g.add_argument("--steps", type=int, default=10, help="steps of the training attack")
    g.add_argument("--warmup-eps", type=float, default=0, metavar="EPOCHS",
                   help="epochs over which eps first rises linearly from 0")
    g.add_argument("--early-stop-pgd", type=float, nargs=2, metavar=("A", "B"),
                   help="early-stopped PGD: an image stops moving once it has been misclassified once; after "
                        "epoch A twice, after epoch B three times")
    g.add_argument("--bn-mode", choices=("train", "eval"), default="train",
                   help="mode of batch norm while the training attack runs")
    g.add_argument("--bn-clean-passes", type=int, choices=(0, 1, 2), default=2,
                   help="clean forward passes per step, which move the running statistics: one after the "
                        "update, which is logged, and with 2, as in the authors' code, one before it")

    g = p.add_argument_group("tricks since the paper")
    g.add_argument("--ema", type=float, default=0, metavar="DECAY",
                   help="test and save an exponential moving average of the weights, whose decay at update t "
                        "is min(DECAY, (1 + t) / (10 + t))")
    g.add_argument("--awp", type=float, default=0, metavar="GAMMA",
                   help="adversarial weight perturbation: take the gradient with every weight tensor moved "
                        "uphill by GAMMA times its norm; its authors use 0.01 for PGD-AT, 0.005 for TRADES")
    g.add_argument("--awp-warmup", type=int, default=0, metavar="EPOCHS",
                   help="epochs before --awp starts; its authors use 0 for PGD-AT and 10 for TRADES")

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0, help="seed of weights, batches and attacks")
    g.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS",
                   help="test after every EPOCHS epochs, and after the last one")
    g.add_argument("--eval-from", type=int, default=1, metavar="EPOCH",
                   help="do not test before this epoch; the best one usually comes after the first decay")
    g.add_argument("--test-batch-size", type=int,
                   help="images per test batch; default: 1000 on CUDA, 250 elsewhere")
    g.add_argument("--out", help="folder of the run; default: runs/ and a name built from the flags")
    g.add_argument("--resume", action="store_true",
                   help="continue the run in that folder: repeat its command and add this flag")
    g.add_argument("--data-dir", default="data", help="folder of cifar10.npz, which is fetched on first use")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    g.add_argument("--precision", choices=("fp32", "tf32", "bf16"),
                   help="arithmetic of the model; default: tf32 on CUDA, fp32 elsewhere")
    g.add_argument("--compile", action="store_true",
                   help="compile the model, and on CUDA capture the attack in a CUDA graph, which is faster")
    g.add_argument("--dry-run", action="store_true", help="print the setting and exit")

    args = p.parse_args(argv)
    if args.attack == "none":
        p.refuse(args, "--attack none", "eps", "alpha", "steps", "warmup_eps", "early_stop_pgd", "bn_mode")
    return utils.settle(p, args, "pgdat")  # applies --time-scale, and fills in --lr and --out


def training_attack(model, args, x, y, x_start, eps, tolerance=None):
    """x' (B, 3, 32, 32): PGD from x_start on the plain cross-entropy, without --ls, as in the authors' code.

    tolerance: how many misclassifications stop an image; None: never. The authors' attack ends with a forward
    pass for its final loss. With --bn-mode train that pass moves the running statistics, so we make it too.
    """
    with attack_mode(model, args.bn_mode):
        x_adv = pgd(model, x, y, x_start, eps, args.alpha, args.steps, tolerance)
        if args.bn_mode == "train":
            with torch.no_grad():
                model(x_adv)
    return x_adv


def train_step(model, optimizer, attack, x, y, eps, epoch, rng, args):
    """One step of PGD-AT: the attack, then an update on its images x'. In standard training x' is x.

    attack(x, y, x_start, eps): training_attack of this model or, unless it stops early, a CUDA graph of it.
    x (B, 3, 32, 32) in [0, 1], y (B,); rng: the generator of the random start. Returns what is logged: the
    mean loss and the logits (B, K) of adversarial and of clean images, None for those not computed.
    """
    x_adv = x
    if args.attack == "pgd":
        if args.early_stop_pgd:  # by the epoch, 1, 2 or 3 misclassifications stop an image
            attack = partial(attack, tolerance=1 + sum(epoch >= e for e in args.early_stop_pgd))
        x_adv = attack(x, y, random_start(x, eps, rng), eps)

    awp = contextlib.nullcontext()
    if args.awp and epoch >= args.awp_warmup:
        awp = perturbed_weights(model, lambda: smoothed_cross_entropy(model(x_adv), y, args.ls), args.awp)
    with awp:  # which puts the weights back before the optimiser's step
        logits = model(x_adv)
        loss = smoothed_cross_entropy(logits, y, args.ls)
        optimizer.zero_grad()
        loss.backward()
    # The authors' code makes two clean passes, and logs the accuracy of the second. Both are in train mode,
    # so they move batch norm's running statistics, which the test uses, and the attack too with --bn-mode
    # eval. Two of the three updates of these statistics in a step come from clean images then.
    if args.bn_clean_passes == 2:
        with torch.no_grad():
            model(x)
    optimizer.step()
    clean_logits = None
    if args.bn_clean_passes >= 1:
        with torch.no_grad():
            clean_logits = model(x)
    if args.attack == "none":  # those passes only move the statistics then
        return loss.detach(), None, logits.detach()
    return loss.detach(), logits.detach(), clean_logits


def main():
    args, defaults = parse_args(), parse_args([])
    utils.show_setting(args, defaults)
    if args.dry_run:
        return
    device = utils.start_device(args)  # fills in args.precision and args.test_batch_size
    data = load_dataset(args.dataset, device, args.data_dir)
    (images, labels), held_out = training_images(data, args.n_train, args.val)
    splits = {"test": (data.test_images, data.test_labels)}
    if args.val:
        splits["val"] = held_out
    steps_per_epoch = math.ceil(len(labels) / args.batch_size)

    torch.manual_seed(args.seed)  # initialised on the CPU: the same weights on every device
    model = models.build(args.model, data.num_classes, args.activation, NORMALIZE,
                         bf16=args.precision == "bf16")
    model.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.optimizer, args.lr, args.wd, args.momentum)
    utils.share_training(model, optimizer, args, len(labels))  # if torchrun started several processes
    tested = copy.deepcopy(model) if args.ema else model
    attack = partial(training_attack, model, args)
    if args.compile:
        model.compile(dynamic=False)
        if device.type == "cuda" and not args.early_stop_pgd:  # early stopping has no fixed length
            attack = utils.CapturedAttack(attack, model)
    # What a checkpoint holds: the state_dict() of each of these objects, which start_or_resume loads again.
    # "state_dict" is the network that is tested; with --ema "model" is the one that is trained.
    saved = {"state_dict": tested, "optimizer": optimizer, "normalize": NORMALIZE,
             "num_classes": data.num_classes, "data_sha256": data.sha256}
    if args.ema:
        saved["model"] = model
    log = utils.start_or_resume(args, saved, defaults)  # an entry for each epoch that is done
    print(f"{args.model}: {args.epochs} epochs of {len(labels):,} images, {steps_per_epoch:,} steps each")

    began = time.time()
    for epoch in range(len(log), args.epochs):
        meter = utils.Meter(device)
        data_rng = seeded(device, args.seed, "data", epoch)
        # Random crops and flips; the authors pad by reflection. SHARD: this process's part of every batch.
        stream = batches(images, labels, args.batch_size, data_rng, padding="reflect", shard=utils.SHARD)
        model.train()
        for step, (x, y) in enumerate(utils.progress(stream, f"epoch {epoch + 1}", steps_per_epoch)):
            t = epoch + step / steps_per_epoch
            lr = warmup(t, args.warmup_lr) * lr_at(t, args.lr, args.lr_schedule, args.epochs,
                                                   args.lr_decay_epochs, args.lr_decay_factor)
            eps = warmup(t, args.warmup_eps) * args.eps
            for group in optimizer.param_groups:
                group["lr"] = lr
            rng = seeded(device, args.seed, "attack", epoch, step, utils.RANK)
            # The last batch may be smaller: compiling for its size would take longer than it saves.
            with utils.uncompiled(args.compile and len(y) < args.batch_size):
                loss, adv_logits, clean_logits = train_step(
                    model, optimizer, attack, x, y, eps, epoch, rng, args)
            meter.add(loss, y, adv_logits, clean_logits)
            if args.ema:
                update_average(tested, model, args.ema, epoch * steps_per_epoch + step)

        # The PGD-10 test, where --eval-from and --eval-every want one. The best epoch has the highest PGD-10
        # accuracy on the test set, as in the paper, or with --val on the held-out images.
        figures = meter.read() | utils.test_pgd10(tested, splits, args, epoch + 1)
        log.append({"epoch": epoch + 1, "lr": lr, "eps": eps if args.attack == "pgd" else None, **figures,
                    "seconds": round(time.time() - began, 2)})
        began = time.time()  # saving counts for the next epoch, so that the seconds add up to the run's
        utils.save(args, saved, log)
        utils.show_epoch(args, log)
    print(f"the best epoch is {utils.best(log)['epoch']}; evaluate it with: python eval_aa.py {args.out}")


if __name__ == "__main__":
    utils.run_script(main)  # main(), but the user's errors end in one line
