"""PGD adversarial training (PGD-AT), and standard training, on CIFAR-10: Pang et al., "Bag of Tricks for Adversarial Training".

    python train_pgdat.py                                        Table 2, "Base"; paper: clean 82.52, PGD-10 53.58, AA 48.51
    python train_pgdat.py --bn-mode eval                         Table 7, ResNet-18; paper: 83.48 / 53.64 / 48.75
    python train_pgdat.py --wd 5e-4 --bn-mode eval --ls 0.1      the paper's recommended recipe
    python train_pgdat.py --attack none --model wrn-34-10        standard training (Figure 4)

Every step perturbs the batch by a 10-step L-inf PGD attack (Madry et al., 2018) and descends on the loss of the perturbed
images. The defaults are the paper's "default setting" (Section 3). What the paper does not say is settled, with its
reason, in the README's table of deviations. A run leaves args.json, log.jsonl, last.pt and best.pt in its folder;
`python eval_aa.py FOLDER` evaluates it.

Cost: 26 forward-equivalents an image (25 with --bn-mode eval; 20 of them the attack's), 110 epochs.
"""

import math
import time
from pathlib import Path

import torch

import models
from utils import (
    OPTIMIZERS, SCHEDULES, InputError, Meter, Parser, Stopped, attack_mode, backward, batches, catch_signals, check_finite,
    dataset_size, fraction, hold_out, join_processes, load_dataset, make_forward, make_optimizer, number,
    open_run, percent, pgd, pgd_evaluate, pick_device, progress_bar, random_start, rank, replayed, resolve, restore,
    run_folder, run_script, save_epoch, schedule, seeded, set_precision, share_statistics, show_epoch,
    show_progress, show_setting, smoothed_cross_entropy, split_model, stop_diverged, stop_if_asked, stop_interrupted, trim_log, without_effect,
)

NORMALIZE = models.CIFAR_NORMALIZE  # inside the model, so that the attack lives in [0, 1]


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
    g.add_argument("--ls", type=number(0, 1, open_high=True), default=0,
                   help="label smoothing: the mass spread over the other classes, in [0, 1) (default: 0)")

    g = p.add_argument_group("training attack")
    g.add_argument("--attack", choices=("pgd", "none"), default="pgd", help="none: standard training (default: %(default)s)")
    g.add_argument("--eps", type=fraction, default=8 / 255,
                   help='L-inf radius of this attack and of the PGD-10 test, on the [0, 1] scale (default: 8/255)')
    g.add_argument("--alpha", type=fraction, default=2 / 255, help='step size on the [0, 1] scale (default: 2/255)')
    g.add_argument("--steps", type=number(1, kind=int), default=10, help="attack steps (default: %(default)s)")
    g.add_argument("--warmup-eps", type=number(0), default=0, metavar="EPOCHS", help="eps rises linearly from 0 (default: 0)")
    g.add_argument("--early-stop-pgd", type=number(0), nargs=2, default=None, metavar="EPOCH",
                   help="stop moving an image once misclassified 1 time, from the first epoch on 2 times, from the second 3")
    g.add_argument("--bn-mode", choices=("train", "eval"), default="train", help="batch norm while attacking (default: %(default)s)")
    g.add_argument("--bn-clean-passes", type=int, choices=(0, 1, 2), default=2,
                   help="clean forwards a step that only move BN's running statistics: 1 is after the update, 2 adds one before it "
                        "(default: 2, as the authors' code)")

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
    if args.attack == "none":
        without_effect(p, args, "--attack none", "eps", "alpha", "steps", "warmup_eps", "early_stop_pgd", "bn_mode", "bn_clean_passes")
    if args.early_stop_pgd and args.early_stop_pgd[0] >= args.early_stop_pgd[1]:
        p.error("--early-stop-pgd takes two rising epochs")
    return resolve(p, args, "pgdat")


def make_attack(model, forward, args):
    """attack(x, y, eps, epoch, noise): the images (B, 3, 32, 32) to train on, x under PGD; x itself with --attack none."""
    def iterate(x, y, start, eps, tolerance=None):
        with attack_mode(model, args.bn_mode):
            x_adv = pgd(forward, x, y, start, eps, args.alpha, args.steps, tolerance=tolerance)
            if args.bn_mode == "train":
                with torch.no_grad():  # the authors' attack ends by computing its loss: one more move of the running statistics
                    forward(x_adv)
        return x_adv

    fixed_length = replayed(iterate, model, args.compile)

    def attack(x, y, eps, epoch, noise):
        if args.attack == "none":
            return x
        start = random_start(x, eps, noise)
        if args.early_stop_pgd is None:
            return fixed_length(x, y, start, eps)
        return iterate(x, y, start, eps, tolerance=1 + sum(epoch >= e for e in args.early_stop_pgd))
    return attack


def train_step(model, forward, optimizer, x, x_adv, y, args):
    """One update. Returns the loss () and the logits (B, K) of the training images and, or None, of the clean ones."""
    clean_passes = args.bn_clean_passes if args.attack == "pgd" else 0
    clean_logits = None

    logits = forward(x_adv)
    loss = smoothed_cross_entropy(logits, y, args.ls)
    optimizer.zero_grad()
    backward(loss, model, len(y))
    # The authors' clean passes exist to log clean accuracy, but they run in train mode: with --bn-mode eval two of every
    # three updates of the running statistics, which attack and test depend on, are clean. They need no gradient.
    if clean_passes == 2:
        with torch.no_grad():
            forward(x)
    optimizer.step()
    if clean_passes >= 1:
        with torch.no_grad():
            clean_logits = forward(x)
    share_statistics(model)
    return loss.detach(), logits.detach(), clean_logits


def train_epoch(model, forward, attack, optimizer, images, labels, args, epoch, meter):
    """One pass over the training images (N, 32, 32, 3), or what is left of it after meter.steps. Returns the epoch's part of its log line."""
    device, steps = images.device, math.ceil(len(labels) / args.batch_size)
    model.train()
    order = seeded(device, args.seed, "data", epoch)
    with progress_bar(len(labels), f"epoch {epoch + 1}/{args.epochs}", meter.steps * args.batch_size) as bar:
        for x, y in batches(images, labels, args.batch_size, order, padding="reflect", start=meter.steps):
            lr, eps = schedule(epoch + meter.steps / steps, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x_adv = attack(x, y, eps, epoch, noise=seeded(device, args.seed, "attack", epoch, meter.steps, rank()))
            loss, logits, clean_logits = train_step(model, forward, optimizer, x, x_adv, y, args)
            meter.add(loss, y, logits, clean_logits)
            show_progress(bar, args.batch_size, meter)
            stop_if_asked(model, meter)
    mean_loss, adv_acc, clean_acc = check_finite(model, meter)
    if args.attack == "none":
        adv_acc, clean_acc = None, adv_acc  # what was trained on was clean
    elif args.bn_clean_passes == 0:
        clean_acc = None
    lr, eps = schedule(epoch + (steps - 1) / steps, args)
    return {"lr": lr, "eps": eps, "train_loss": mean_loss, "train_adv_acc": adv_acc, "train_clean_acc": clean_acc}


def test(model, forward, images, labels, args, epoch, prefix):
    """{prefix_clean, prefix_pgd10}: accuracies in per cent; PGD-10 is not computed, and None, with --attack none."""
    with attack_mode(model, "eval"):
        clean, robust, _ = pgd_evaluate(forward, images, labels, eps=args.eps, seed=(args.seed, epoch),
                                        batch_size=args.test_batch_size,
                                        restarts=1 if args.attack == "pgd" else 0,
                                        progress=lambda images: stop_if_asked())
    return {f"{prefix}_clean": percent(clean), f"{prefix}_pgd10": percent(robust) if args.attack == "pgd" else None}


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
    select = next(iter(splits))                                   # the split that the best checkpoint is chosen on,
    measure = f"{select}_{'pgd10' if args.attack == 'pgd' else 'clean'}"  # and by which accuracy

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
                    if best is None or entry[measure] > best[measure]:
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

    figures = f"clean {best[f'{select}_clean']:.2f}" + (f", PGD-10 {best[f'{select}_pgd10']:.2f}" if args.attack == "pgd" else "")
    print(f"best of {args.epochs} epochs on the {select} set: epoch {best['epoch']}, {figures}: {out / 'best.pt'}")
    print(f"evaluate it with: python eval_aa.py {out}")


if __name__ == "__main__":
    run_script(main)
