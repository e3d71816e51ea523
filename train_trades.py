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

Cost: with --bn-mode eval 27 forwards per image and epoch (a backward by inputs or by weights counts as one),
of which the attack takes 21; 110 epochs.
"""

import contextlib
import copy
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from tqdm import tqdm

import models
import utils
from utils import (attack_mode, batches, linf_step, load_dataset, lr_at, make_optimizer, perturbed_weights,
                   seeded, training_images, update_average, warmup)

NORMALIZE = None  # TRADES takes images in [0, 1] as they are


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
    g.add_argument("--time-scale", type=utils.number(0), default=1, metavar="F",
                   help="multiply every number of epochs of the recipe by F (not --eval-...) and round it")

    g = p.add_argument_group("TRADES")
    g.add_argument("--beta", type=utils.number(0), default=6.0, help="weight of the robust term of the loss")
    g.add_argument("--eps", type=utils.fraction, default="8/255",
                   help="L-inf radius, in training and in the test, on the [0, 1] scale")
    g.add_argument("--alpha", type=utils.fraction, default="2/255",
                   help="step size of the training attack, on the [0, 1] scale")
    g.add_argument("--steps", type=utils.number(1, kind=int), default=10, help="steps of the training attack")
    g.add_argument("--warmup-eps", type=utils.number(0), default=0, metavar="EPOCHS",
                   help="epochs over which eps first rises linearly from 0")
    g.add_argument("--bn-mode", choices=("train", "eval"), default="eval",
                   help="mode of batch norm while the training attack runs")

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

    return utils.settle(p, p.parse_args(argv), "trades")


def divergence(log_p, log_q):
    """KL(p || q) summed over the batch, of log-probabilities (B, K). Log-softmax on both sides stays finite
    where a probability underflows, as the log of a softmax does not."""
    return (log_p.exp() * (log_p - log_q)).sum()


def training_attack(model, args, x, x_start, eps):
    """x' (B, 3, 32, 32): steps of alpha from x_start up the gradient of KL(f(x) || f(x')).

    f(x) does not change meanwhile, so with --bn-mode eval it is computed once. The reference makes a natural
    forward at every step, after the adversarial one; with --bn-mode train these move the running statistics,
    and are kept for that.
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
    """One step of TRADES: the attack, then an update on the images and its own.

    attack(x, x_start, eps): training_attack with this model; x (B, 3, 32, 32) in [0, 1], y (B,); rng: the
    generator of the attack's start. Returns the loss () and the logits (B, K) of the adversarial and of the
    natural images.
    """
    x_adv = attack(x, x + 0.001 * torch.empty_like(x).normal_(generator=rng), eps)

    awp = contextlib.nullcontext()
    if args.awp and epoch >= args.awp_warmup:
        awp = perturbed_weights(model, lambda: trades_loss(model(x), model(x_adv), y, args.beta), args.awp)
    with awp:
        natural, adversarial = model(x), model(x_adv)  # in this order: both move the running statistics
        loss = trades_loss(natural, adversarial, y, args.beta)
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()
    return loss.detach(), adversarial.detach(), natural.detach()


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
        stream = batches(images, labels, args.batch_size, order, "zero", utils.SHARD)
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

        log.append({"epoch": epoch + 1, "lr": lr, "eps": eps, **meter.read(),
                    **utils.test(tested, splits, args, epoch), "seconds": round(time.time() - began, 2)})
        utils.save(args, state, log)
        utils.show_epoch(args, log)
    print(f"the best epoch is {utils.best(log)['epoch']}: {args.out}/best.pt\n"
          f"evaluate it with: python eval_aa.py {args.out}")


if __name__ == "__main__":
    utils.run_script(main)
