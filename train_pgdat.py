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

import copy
import math
import time
from functools import partial

import torch

import models
from utils import (OPTIMIZERS, SCHEDULES, Meter, Parser, attack_mode, average_gradients, batches, best,
                   broadcast_statistics, check_processes, compile_training, ema_decay, evaluate, fraction,
                   load_dataset, lock, make_optimizer, number, percent, perturb_weights, pgd, progress,
                   random_start, rank, resolve, restore_weights, resume, run_script, save, schedule, seeded,
                   shard, show_epoch, show_setting, smoothed_cross_entropy, start_device, sync_batch_norm,
                   training_images, uncompiled, update_average)

NORMALIZE = models.CIFAR_NORMALIZE  # inside the model, so that the attack lives in [0, 1]


def parse_args(argv=None):
    """The resolved setting of a command line; a flag without effect is refused with exit status 2."""
    p = Parser(description=__doc__)
    g = p.add_argument_group("model and data")
    g.add_argument("--model", choices=models.MODELS, default="preactresnet-18", metavar="NAME",
                   help=f"{', '.join(models.MODELS)} (default: preactresnet-18, the paper's ResNet-18)")
    g.add_argument("--activation", choices=models.ACTIVATIONS, default="relu", metavar="NAME",
                   help=f"activation function: {', '.join(models.ACTIVATIONS)}")
    g.add_argument("--dataset", default="cifar10", help="data set: cifar10, cifar100 or the path of an .npz")
    g.add_argument("--n-train", type=number(1, kind=int), metavar="N",
                   help="train on the first N training images (default: all)")
    g.add_argument("--val", type=number(0, kind=int), default=0, metavar="N",
                   help="hold out N training images to choose the best checkpoint on, not on the test set")

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=number(1, kind=int), default=110, help="passes over the training images")
    g.add_argument("--batch-size", type=number(1, kind=int), default=128, help="images a step")
    g.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="one of Table 5's optimisers")
    g.add_argument("--lr", type=number(0), help="learning rate (default: 0.1; adam and adamw: 1e-4)")
    g.add_argument("--momentum", type=number(0, 1), default=0.9, help="momentum of the SGD family")
    g.add_argument("--wd", type=number(0), default=5e-4, help="weight decay, on all parameters")
    g.add_argument("--lr-schedule", choices=SCHEDULES, default="piecewise", help="learning rate schedule")
    g.add_argument("--lr-decay-epochs", type=number(0), nargs="+", default=[100, 105], metavar="EPOCH",
                   help="epochs at which the piecewise schedule decays (default: 100 105)")
    g.add_argument("--lr-decay-factor", type=number(0), nargs="+", default=0.1, metavar="FACTOR",
                   help="factor of every such decay, or a factor for each")
    g.add_argument("--warmup-lr", type=number(0), default=0, metavar="EPOCHS",
                   help="epochs over which the learning rate first rises linearly from 0")
    g.add_argument("--ls", type=number(0, 1), default=0,
                   help="label smoothing: the mass in [0, 1) that is spread over the other classes")
    g.add_argument("--time-scale", type=number(0), default=1, metavar="F",
                   help="multiply every number of epochs of the recipe by F (not --eval-...) and round it")

    g = p.add_argument_group("training attack")
    g.add_argument("--attack", choices=("pgd", "none"), default="pgd", help="none: standard training")
    g.add_argument("--eps", type=fraction, default=8 / 255,
                   help="L-inf radius, in training and in the test, on the [0, 1] scale (default: 8/255)")
    g.add_argument("--alpha", type=fraction, default=2 / 255,
                   help="step size of the training attack, on the [0, 1] scale (default: 2/255)")
    g.add_argument("--steps", type=number(1, kind=int), default=10, help="steps of the training attack")
    g.add_argument("--warmup-eps", type=number(0), default=0, metavar="EPOCHS",
                   help="epochs over which eps first rises linearly from 0")
    g.add_argument("--early-stop-pgd", type=number(0), nargs=2, metavar="EPOCH",
                   help="stop moving an image once it has been misclassified 1 time, from the first epoch on "
                        "2 times, from the second on 3 times (default: off)")
    g.add_argument("--bn-mode", choices=("train", "eval"), default="train",
                   help="mode of batch norm while the training attack runs")
    g.add_argument("--bn-clean-passes", type=int, choices=(0, 1, 2), default=2,
                   help="clean forwards a step that only move the running statistics: 1 is after the update, "
                        "2 adds one before it (default: 2, as the authors' code)")

    g = p.add_argument_group("tricks since the paper")
    g.add_argument("--ema", type=number(0, 1), default=0, metavar="DECAY",
                   help="test and save an exponential moving average of the weights; its decay is this, or "
                        "(1 + t) / (10 + t) at update t (from 0) while that is smaller (default: 0, off)")
    g.add_argument("--awp", type=number(0), default=0, metavar="GAMMA",
                   help="adversarial weight perturbation: take the gradient at weights one step up the loss, "
                        "each tensor moved by GAMMA of its norm; its authors use 0.01 for PGD-AT and 0.005 "
                        "for TRADES; it costs one more pass forward and backward (default: 0, off)")
    g.add_argument("--awp-warmup", type=number(0, kind=int), default=0, metavar="EPOCHS",
                   help="epochs before that starts; its authors use 0 for PGD-AT and 10 for TRADES")

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=number(0, 2**63, int), default=0, help="seed of weights, batches, attacks")
    g.add_argument("--eval-every", type=number(1, kind=int), default=1, metavar="EPOCHS",
                   help="test after every so many epochs, and after the last")
    g.add_argument("--eval-from", type=number(1, kind=int), default=1, metavar="EPOCH",
                   help="do not test before this epoch (on a GPU a test costs a quarter of a fast epoch, and "
                        "the best epoch of the paper's schedule comes after the first decay)")
    g.add_argument("--test-batch-size", type=number(1, kind=int),
                   help="images a test batch (default: 1000 on CUDA, 250 elsewhere)")
    g.add_argument("--out", help="the run's folder (default: runs/ and what differs from the defaults)")
    g.add_argument("--resume", action="store_true",
                   help="go on with the run in that folder, if there is one: its command, with this flag")
    g.add_argument("--data-dir", default="data", help="where cifar10.npz is, or is put on first use")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    g.add_argument("--precision", choices=("fp32", "tf32", "bf16"),
                   help="arithmetic of the model (default: tf32 on CUDA, fp32 elsewhere)")
    g.add_argument("--compile", action="store_true",
                   help="compile the model with torch.compile; on CUDA also capture the training attack in a "
                        "CUDA graph, one launch in place of thousands")
    g.add_argument("--dry-run", action="store_true", help="print the resolved setting and exit")

    args = p.parse_args(argv)
    if args.attack == "none":
        p.refuse(args, "--attack none", "eps", "alpha", "steps", "warmup_eps", "early_stop_pgd", "bn_mode")
    if args.early_stop_pgd and args.early_stop_pgd[0] >= args.early_stop_pgd[1]:
        p.error("--early-stop-pgd takes two rising epochs")
    return resolve(p, args, "pgdat")


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
    generator of the random start. Returns the loss (), the logits (B, K) of the adversarial images, and those
    of x from the pass after the update, None without one.
    """
    def loss_of(logits):
        return smoothed_cross_entropy(logits, y, args.ls)

    x_adv, clean_logits = x, None
    if args.attack == "pgd":
        if args.early_stop_pgd:
            attack = partial(attack, tolerance=1 + sum(epoch >= e for e in args.early_stop_pgd))
        x_adv = attack(x, y, random_start(x, eps, rng), eps)

    gamma = args.awp if epoch >= args.awp_warmup else 0
    moved = perturb_weights(model, lambda: loss_of(model(x_adv)), gamma)
    logits = model(x_adv)
    loss = loss_of(logits)
    optimizer.zero_grad()
    loss.backward()
    restore_weights(moved)
    # The authors' clean passes exist to log clean accuracy, but batch norm is in train mode then, whatever
    # --bn-mode says of the attack: with --bn-mode eval two of every three updates of the running statistics,
    # which attack and test depend on, are clean. With --attack none they move what the test depends on.
    if args.bn_clean_passes == 2:
        with torch.no_grad():
            model(x)
    optimizer.step()
    if args.bn_clean_passes >= 1:
        with torch.no_grad():
            clean_logits = model(x)
    return loss.detach(), logits.detach(), clean_logits


def main():
    args = parse_args()
    show_setting(args)
    if args.dry_run:
        return
    device = start_device(args)
    data = load_dataset(args.dataset, device, args.data_dir)
    (images, labels), val = training_images(data, args.n_train, args.val)
    check_processes(args, len(labels), device)

    torch.manual_seed(args.seed)  # the model is initialised on the CPU, so alike on every device
    model = models.build(args.model, data.num_classes, args.activation, NORMALIZE, args.precision == "bf16")
    model = sync_batch_norm(model, device).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, args.optimizer, args.lr, args.wd, args.momentum)
    average_gradients(optimizer)
    state = {"model": model, "optimizer": optimizer}  # what is saved, and restored by --resume
    if args.ema:
        state["average"] = copy.deepcopy(model)
    tested, attack = state.get("average", model), partial(training_attack, model, args)
    if args.compile:
        attack = compile_training(model, attack, args, device)
    tests = {"test": (data.test_images, data.test_labels)} | ({"val": val} if val else {})
    measure = f"{'val' if val else 'test'}_{'pgd10' if args.attack == 'pgd' else 'clean'}"  # chooses the best
    about = {"args": vars(args), "num_classes": data.num_classes, "normalize": NORMALIZE, "measure": measure,
             "data_sha256": data.sha256}
    folder_lock = lock(args.out)  # until this process ends
    log = resume(args, parse_args([]), state, about)
    steps, whole_batches = math.ceil(len(labels) / args.batch_size), len(labels) // args.batch_size
    print(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters; {args.epochs} epochs of "
          f"{len(labels):,} images, {steps:,} steps each; {len(data.test_labels):,} test images")

    for epoch in range(len(log), args.epochs):
        began, meter, data_rng = time.time(), Meter(device), seeded(device, args.seed, "data", epoch)
        stream = batches(images, labels, args.batch_size, data_rng, padding="reflect", shard=shard())
        model.train()
        for step, (x, y) in enumerate(progress(stream, f"epoch {epoch + 1}", steps)):
            lr, eps = schedule(epoch + step / steps, args)
            for group in optimizer.param_groups:
                group["lr"] = lr
            rng = seeded(device, args.seed, "attack", epoch, step, rank())
            with uncompiled(args.compile and step == whole_batches):
                loss, logits, clean_logits = train_step(model, optimizer, attack, x, y, eps, epoch, rng, args)
            meter.add(loss, y, logits, clean_logits)
            broadcast_statistics(model)
            if args.ema:
                update_average(tested, model, ema_decay(epoch * steps + step, args.ema))

        loss, adv_acc, clean_acc = meter.read(epoch + 1)
        if args.attack == "none":
            eps, adv_acc, clean_acc = None, None, adv_acc  # what was trained on was clean
        elif args.bn_clean_passes == 0:
            clean_acc = None
        entry = {"epoch": epoch + 1, "lr": lr, "eps": eps, "train_loss": loss, "train_adv_acc": adv_acc,
                 "train_clean_acc": clean_acc}
        due = epoch + 1 >= args.eval_from and (epoch + 1) % args.eval_every == 0
        if due or epoch + 1 == args.epochs:
            for split, subset in tests.items():
                with uncompiled(args.compile):
                    clean, robust = evaluate(tested, *subset, args.eps, 10 if args.attack == "pgd" else 0,
                                             seed=(args.seed, epoch), batch_size=args.test_batch_size)
                entry[f"{split}_clean"] = percent(clean)
                entry[f"{split}_pgd10"] = percent(robust) if args.attack == "pgd" else None
        log.append(entry | {"seconds": round(time.time() - began, 2)})
        save(args.out, state, log, about)
        show_epoch(log, args, measure)

    chosen = best(log, measure)
    print(f"best of {args.epochs} epochs: epoch {chosen['epoch']}, {measure} {chosen[measure]:.2f}: "
          f"{args.out}/best.pt\nevaluate it with: python eval_aa.py {args.out}")


if __name__ == "__main__":
    run_script(main)
