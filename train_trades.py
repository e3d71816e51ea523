"""TRADES (Zhang et al., 2019) on CIFAR-10, with the training settings of Pang et al., "Bag of Tricks for Adversarial Training".

    python train_trades.py                                    Table 12, eval, ReLU; paper: clean 81.45, PGD-10 53.51, AA 49.06
    python train_trades.py --model wrn-34-20                  Table 13, best at 8/255; paper: clean 86.43, AA 54.39
    python train_trades.py --wd 2e-4 --bn-mode eval --eps 0.031 --alpha 0.007 --model wrn-34-10
                                                              Table 9, as the original TRADES; paper: 85.17 / 55.10 / 51.85

Every step minimises CE(f(x), y) + beta * KL(f(x) || f(x')), where x' maximises that divergence in the eps-ball around x.
No input normalisation, zero padding, two passes (natural, adversarial) in the loss, as in the authors' TRADES code. The
defaults are the setting of Table 13's best model at 8/255; beta 6 and the step of 2/255 at 8/255 are not in the paper:
assumptions. A run leaves the same files as train_pgdat.py's; `python eval_aa.py FOLDER` evaluates it.

Cost: 27 forward-equivalents an image with --bn-mode eval (21 of them the attack's), 110 epochs.
"""

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import models
from utils import (
    OPTIMIZERS, SCHEDULES, InputError, Meter, Parser, Stopped, attack_mode, backward, batches, catch_signals, check_finite,
    dataset_size, fraction, hold_out, join_processes, linf_step, load_dataset, make_forward,
    make_optimizer, number, open_run, percent, pgd_evaluate, pick_device, progress_bar, rank, replayed, resolve, restore,
    run_folder, run_script, save_epoch, schedule, seeded, set_precision, share_statistics, show_epoch,
    show_progress, show_setting, split_model, stop_diverged, stop_if_asked, stop_interrupted, trim_log,
)

NORMALIZE = None  # TRADES takes images in [0, 1] as they are


def make_parser():
    p = Parser(description=__doc__)
    g = p.add_argument_group("model and data")
    g.add_argument("--model", choices=models.MODELS, default="preactresnet-18", metavar="NAME",
                   help=f"{', '.join(models.MODELS)} (default: %(default)s, the paper's ResNet-18)")
    g.add_argument("--activation", choices=models.ACTIVATIONS, default="relu", metavar="NAME",
                   help=f"{', '.join(models.ACTIVATIONS)} (default: %(default)s)")
    g.add_argument("--dataset", default="cifar10", help="cifar10, cifar100 or the path of an .npz (default: %(default)s)")
    g.add_argument("--data-dir", default="data", help="where cifar10.npz is, or is put on first use (default: %(default)s)")
    g.add_argument("--val", type=number(0, kind=int), default=0, metavar="N",
                   help="choose the best checkpoint on N held-out training images (default: 0, on the test set as in the paper)")

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=number(1, kind=int), default=110, help="(default: %(default)s)")
    g.add_argument("--batch-size", type=number(1, kind=int), default=128, help="images a step (default: %(default)s)")
    g.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="(default: %(default)s)")
    g.add_argument("--lr", type=number(0), default=None, help="learning rate (default: 0.1; adam and adamw 1e-4)")
    g.add_argument("--momentum", type=number(0, 1, open_high=True), default=0.9, help="of the SGD family (default: %(default)s)")
    g.add_argument("--wd", type=number(0), default=5e-4, help="weight decay on all parameters (default: %(default)s)")
    g.add_argument("--lr-schedule", choices=SCHEDULES, default="piecewise", help="(default: %(default)s)")
    g.add_argument("--lr-decay-epochs", type=number(0), nargs="+", default=[100, 105], metavar="EPOCH",
                   help="of the piecewise schedule (default: 100 105)")
    g.add_argument("--lr-decay-factor", type=number(0, 1), default=0.1, help="multiplies lr there (default: %(default)s)")
    g.add_argument("--warmup-lr", type=number(0), default=0, metavar="EPOCHS", help="lr rises linearly from 0 (default: 0)")

    g = p.add_argument_group("TRADES")
    g.add_argument("--beta", type=number(0), default=6.0, help="weight of the robust term (default: %(default)s)")
    g.add_argument("--eps", type=fraction, default=8 / 255,
                   help='L-inf radius of this attack and of the PGD-10 test, on the [0, 1] scale (default: 8/255)')
    g.add_argument("--alpha", type=fraction, default=2 / 255, help='step size on the [0, 1] scale (default: 2/255)')
    g.add_argument("--steps", type=number(1, kind=int), default=10, help="attack steps (default: %(default)s)")
    g.add_argument("--warmup-eps", type=number(0), default=0, metavar="EPOCHS", help="eps rises linearly from 0 (default: 0)")
    g.add_argument("--bn-mode", choices=("train", "eval"), default="eval", help="batch norm while attacking (default: %(default)s)")

    g = p.add_argument_group("run")
    g.add_argument("--eval-every", type=number(1, kind=int), default=1, metavar="EPOCHS",
                   help="test every so many epochs, and after the last (default: %(default)s)")
    g.add_argument("--test-batch-size", type=number(1, kind=int), default=250, help="images a batch in the tests (default: %(default)s)")
    g.add_argument("--seed", type=number(0, kind=int), default=0, help="(default: %(default)s)")
    g.add_argument("--out", default=None, help="the run's folder (default: runs/ and what differs from the defaults)")
    g.add_argument("--resume", action="store_true", help="go on with the run in that folder, if there is one")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s)")
    g.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default=None, help="(default: tf32 on CUDA, fp32 elsewhere)")
    g.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    g.add_argument("--dry-run", action="store_true", help="print the resolved setting and exit")
    return p


def parse_args(argv=None):
    """The resolved setting of a command line. One that names a flag without effect is refused with exit status 2."""
    p = make_parser()
    args = p.parse_args(argv)
    return resolve(p, args, "trades")


def divergence(log_p, log_q):
    """KL(p || q) summed over the batch, of log-probabilities (B, K). Log-softmax on both sides stays finite where a
    probability underflows, as the log of a softmax does not."""
    return (log_p.exp() * (log_p - log_q)).sum()


def trades_attack(model, forward, x, start, eps, args):
    """x' (B, 3, 32, 32): steps of alpha from `start` up the gradient of KL(f(x) || f(x')).

    f(x) does not change meanwhile, so with --bn-mode eval it is computed once. The reference makes a natural forward at
    every step, after the adversarial one; with --bn-mode train these move the running statistics, and are kept for that.
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
    """attack(x, eps, noise): trades_attack from x + 0.001 N(0, 1)."""
    iterate = replayed(lambda x, start, eps: trades_attack(model, forward, x, start, eps, args), model, args.compile)

    def attack(x, eps, noise):
        return iterate(x, x + 0.001 * torch.empty_like(x).normal_(generator=noise), eps)
    return attack


def trades_loss(natural, adversarial, y, beta):
    """CE(f(x), y) + beta * mean KL(f(x) || f(x')) of logits (B, K); the gradient flows through both (Zhang et al., Eq. 5)."""
    robust = divergence(F.log_softmax(natural, dim=1), F.log_softmax(adversarial, dim=1)) / len(y)
    return F.cross_entropy(natural, y) + beta * robust


def train_step(model, forward, optimizer, x, x_adv, y, args):
    """One update. Returns the loss () and the logits (B, K) of the adversarial and of the natural images."""
    natural, adversarial = forward(x), forward(x_adv)  # in this order: both move the running statistics
    loss = trades_loss(natural, adversarial, y, args.beta)
    optimizer.zero_grad()
    backward(loss, model, len(y))
    optimizer.step()
    share_statistics(model)
    return loss.detach(), adversarial.detach(), natural.detach()


def train_epoch(model, forward, attack, optimizer, images, labels, args, epoch, meter):
    """One pass over the training images (N, 32, 32, 3), or what is left of it after meter.steps. Returns the epoch's part of its log line."""
    device, steps = images.device, math.ceil(len(labels) / args.batch_size)
    model.train()
    order = seeded(device, args.seed, "data", epoch)
    with progress_bar(len(labels), f"epoch {epoch + 1}/{args.epochs}", meter.steps * args.batch_size) as bar:
        for x, y in batches(images, labels, args.batch_size, order, padding="zero", start=meter.steps):
            lr, eps = schedule(epoch + meter.steps / steps, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x_adv = attack(x, eps, noise=seeded(device, args.seed, "attack", epoch, meter.steps, rank()))
            loss, logits, clean_logits = train_step(model, forward, optimizer, x, x_adv, y, args)
            meter.add(loss, y, logits, clean_logits)
            show_progress(bar, args.batch_size, meter)
            stop_if_asked(model, meter)
    mean_loss, adv_acc, clean_acc = check_finite(model, meter)
    lr, eps = schedule(epoch + (steps - 1) / steps, args)
    return {"lr": lr, "eps": eps, "train_loss": mean_loss, "train_adv_acc": adv_acc, "train_clean_acc": clean_acc}


def test(model, forward, images, labels, args, epoch, prefix):
    """{prefix_clean, prefix_pgd10}: accuracies in per cent, under PGD-10 with steps of 2/255 whatever the training's."""
    with attack_mode(model, "eval"):
        clean, robust, _ = pgd_evaluate(forward, images, labels, eps=args.eps, seed=(args.seed, epoch),
                                        batch_size=args.test_batch_size,
                                        progress=lambda images: stop_if_asked())
    return {f"{prefix}_clean": percent(clean), f"{prefix}_pgd10": percent(robust)}


def main():
    args = parse_args()
    device = pick_device(args.device)
    join_processes(device)
    args.precision = set_precision(args.precision, device)
    if args.dry_run:
        n_train, n_test, num_classes = dataset_size(args.dataset, args.data_dir)
    else:
        data = load_dataset(args.dataset, args.data_dir, device)
        n_train, n_test, num_classes = len(data.train_labels), len(data.test_labels), data.num_classes
    if args.val >= n_train:
        raise InputError(f"--val {args.val} leaves nothing to train on of {n_train:,} training images")
    n_train -= args.val

    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):  # initialised on the CPU, so alike on every device
        model = models.build(args.model, num_classes, args.activation, NORMALIZE)
    show_setting(args, model, n_train, n_test)
    if args.dry_run:
        return
    model = split_model(model, device, n_train, args.batch_size, args.compile)
    model.to(device, memory_format=torch.channels_last)
    forward = make_forward(model, args.precision, args.compile)
    attack = make_attack(model, forward, args)
    optimizer = make_optimizer(model, args.optimizer, args.lr, args.wd, args.momentum)
    train, val = hold_out(data.train_images, data.train_labels, args.val)
    splits = {"val": val} if args.val else {}
    splits["test"] = (data.test_images, data.test_labels)
    select = next(iter(splits))  # the split that the best checkpoint is chosen on, by its PGD-10 accuracy

    out = Path(args.out)
    with run_folder(out):
        checkpoint = open_run(out, args, data.sha256, device)
        meter = Meter(device)
        done, best = restore(checkpoint, model, optimizer, meter, out)
        trim_log(out / "log.jsonl", done)
        if checkpoint or meter.steps:
            print(f"{out} has finished" if done == args.epochs else
                  f"going on with {out} after epoch {done}" + (f", step {meter.steps}" if meter.steps else ""))
        if done < args.epochs:
            show_epoch(None, select, args.epochs, False, None)
        about = {"args": vars(args), "num_classes": num_classes, "normalize": NORMALIZE}
        catch_signals()
        started = time.time() - meter.seconds
        for epoch in range(done, args.epochs):
            epoch_started = time.time() - meter.seconds
            try:
                entry = {"epoch": epoch + 1, **train_epoch(model, forward, attack, optimizer, *train, args, epoch, meter)}
                if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
                    for split, (images, labels) in splits.items():
                        entry |= test(model, forward, images, labels, args, epoch, split)
                    if best is None or entry[f"{select}_pgd10"] > best[f"{select}_pgd10"]:
                        best = entry
            except FloatingPointError as e:
                stop_diverged(e.args[0], epoch, math.ceil(n_train / args.batch_size), args)
            except Stopped as e:
                meter.seconds = time.time() - epoch_started
                stop_interrupted(e.args[0], out, epoch, meter, model, optimizer, about)
            entry["seconds"] = round(time.time() - epoch_started, 2)
            save_epoch(out, entry, best, model, optimizer, about)
            meter = Meter(device)
            per_epoch = (time.time() - started) / (epoch + 1 - done)
            show_epoch(entry, select, args.epochs, best is entry, per_epoch * (args.epochs - epoch - 1))

    figures = f"clean {best[f'{select}_clean']:.2f}, PGD-10 {best[f'{select}_pgd10']:.2f}"
    print(f"best of {args.epochs} epochs on the {select} set: epoch {best['epoch']}, {figures}: {out / 'best.pt'}")
    print(f"evaluate it with: python eval_aa.py {out}")


if __name__ == "__main__":
    run_script(main)
