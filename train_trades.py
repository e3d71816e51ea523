"""TRADES (Zhang et al., 2019) on CIFAR-10, with the training settings that Pang et al. (2021) study.

    command                                      Pang et al.: clean / PGD-10 / AutoAttack accuracy, in %
    python train_trades.py                       Table 12, ReLU, --bn-mode eval: 81.45 / 53.51 / 49.06
    python train_trades.py --model wrn-34-20     Table 9, their best at 8/255: 86.43 / 57.91 / 54.39
    python train_trades.py --model wrn-34-10 --wd 2e-4 --eps 0.031 --alpha 0.007
                                                 Table 9, the original setting: 85.17 / 55.10 / 51.85

The loss is CE(f(x), y) + beta * KL(f(x) || f(x')), where x' maximises that divergence in the eps-ball around
x. As in the TRADES code that Pang et al. name (AT_HE), and unlike in PGD-AT, images are not normalised and
crops are padded with zeros. Pang et al. state neither beta nor the step size at 8/255: we assume 6 and 2/255.
A run writes args.json, log.jsonl, last.pt and best.pt to its folder; `python eval_aa.py FOLDER` evaluates it.

An image costs 27 passes an epoch: 21 in the attack and 6 in the update, with --bn-mode eval. A backward pass
counts as one in the attack, and as two in the update, which needs weight gradients too.
"""

import contextlib
import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F

import models
import utils
from utils import (attack_mode, batches, linf_step, load_dataset, lr_at, make_optimizer, perturbed_weights,
                   seeded, training_images, update_average, warmup)

NORMALIZE = None  # TRADES takes images in [0, 1] as they are


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
    g.add_argument("--time-scale", type=float, default=1, metavar="F",
                   help="shorten the recipe: multiply --epochs, decays and warm-ups by F, rounded")

    g = p.add_argument_group("TRADES")
    g.add_argument("--beta", type=float, default=6.0, help="weight of the robust term of the loss")
    g.add_argument("--eps", type=utils.fraction, default="8/255",
                   help="L-inf radius, in training and in the test, on the [0, 1] scale")
    g.add_argument("--alpha", type=utils.fraction, default="2/255",
                   help="step size of the training attack, on the [0, 1] scale")
    g.add_argument("--steps", type=int, default=10, help="steps of the training attack")
    g.add_argument("--warmup-eps", type=float, default=0, metavar="EPOCHS",
                   help="epochs over which eps first rises linearly from 0")
    g.add_argument("--bn-mode", choices=("train", "eval"), default="eval",
                   help="mode of batch norm while the training attack runs")

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

    return utils.settle(p, p.parse_args(argv), "trades")  # applies --time-scale, and fills in --lr and --out


def divergence(log_p, log_q):
    """KL(p || q) of log-probabilities (B, K), summed over the batch. It stays finite where a probability
    underflows, unlike a KL of softmax outputs."""
    return (log_p.exp() * (log_p - log_q)).sum()


def training_attack(model, args, x, x_start, eps):
    """x' (B, 3, 32, 32): projected steps of size alpha from x_start that increase KL(f(x) || f(x')).

    The original code computes f(x) at every step, after f(x'). With --bn-mode eval f(x) never changes, so we
    compute it once. With --bn-mode train its forward passes move the running statistics, so we keep them all.
    """
    x_adv = x_start
    with attack_mode(model, args.bn_mode):
        with torch.no_grad():
            log_p = F.log_softmax(model(x), dim=1) if args.bn_mode == "eval" else None
        for _ in range(args.steps):
            x_adv = x_adv.detach().requires_grad_()
            log_q = F.log_softmax(model(x_adv), dim=1)
            if args.bn_mode == "train":
                with torch.no_grad():
                    log_p = F.log_softmax(model(x), dim=1)
            grad, = torch.autograd.grad(divergence(log_p, log_q), x_adv)
            with torch.no_grad():
                x_adv = linf_step(x, x_adv, grad, eps, args.alpha)
    return x_adv


def trades_loss(natural, adversarial, y, beta):
    """CE(f(x), y) + beta * mean KL(f(x) || f(x')) of logits (B, K), with gradients through both (Eq. 5)."""
    robust = divergence(F.log_softmax(natural, dim=1), F.log_softmax(adversarial, dim=1)) / len(y)
    return F.cross_entropy(natural, y) + beta * robust


def train_step(model, optimizer, attack, x, y, eps, epoch, rng, args):
    """One step of TRADES: the attack, then an update on the natural and the adversarial images.

    attack(x, x_start, eps): training_attack with this model, or a CUDA graph of it; x (B, 3, 32, 32) in
    [0, 1], y (B,); rng: the generator of the attack's start. Returns the loss (a scalar tensor) and two
    logits (B, K): of the adversarial images and of the natural ones.
    """
    x_start = x + 0.001 * torch.empty_like(x).normal_(generator=rng)  # as in the original code
    x_adv = attack(x, x_start, eps)

    awp = contextlib.nullcontext()
    if args.awp and epoch >= args.awp_warmup:
        awp = perturbed_weights(model, lambda: trades_loss(model(x), model(x_adv), y, args.beta), args.awp)
    with awp:  # which puts the weights back before the optimiser's step
        natural, adversarial = model(x), model(x_adv)  # in this order: both move the running statistics
        loss = trades_loss(natural, adversarial, y, args.beta)
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    return loss.detach(), adversarial.detach(), natural.detach()


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
        if device.type == "cuda":
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
        # Random crops and flips; TRADES pads with zeros. SHARD: this process's part of every batch.
        stream = batches(images, labels, args.batch_size, data_rng, padding="constant", shard=utils.SHARD)
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
        log.append({"epoch": epoch + 1, "lr": lr, "eps": eps, **figures,
                    "seconds": round(time.time() - began, 2)})
        began = time.time()  # saving counts for the next epoch, so that the seconds add up to the run's
        utils.save(args, saved, log)
        utils.show_epoch(args, log)
    print(f"the best epoch is {utils.best(log)['epoch']}; evaluate it with: python eval_aa.py {args.out}")


if __name__ == "__main__":
    utils.run_script(main)  # main(), but the user's errors end in one line
