"""Clean, PGD-10 and AutoAttack accuracy of a run, of one of our checkpoints, or of anyone's CIFAR checkpoint.

    python eval_aa.py runs/NAME                 its best checkpoint, all test images -> runs/NAME/result.json
    python eval_aa.py runs/NAME --which last    its last checkpoint -> runs/NAME/result_last.json
    python eval_aa.py wrn.pt --model wrn-34-10 --no-normalize       anyone's state dict -> wrn_result.json
    python eval_aa.py runs/NAME --stop-after 2000                   an estimate of AA in a fifth of the time

Accuracies are per cent of the images. PGD-10 counts an image as robust if the last iterate is classified
right, as the paper's checkpoints were selected. AutoAttack is the `standard` version (Croce & Hein, 2020).
Its own driver runs an attack over all images before the next one starts, so that a figure exists at the very
end only. Here a batch of images goes through all attacks, each on the images that withstood those before,
and after every batch there is a figure:

    AA  =  PGD-10 of all N images  -  mean over the n images done of (PGD-10 - AA),  each 1 or 0 per image,

whose standard error is s sqrt((1 - n / N) / n) with s the standard deviation of these differences: PGD-10 is
known for all images after minutes and correlates with AA, so the error is half that of a plain mean. After
the last image it is 0 and the figure AutoAttack's. (CIFAR-10's test images are in random order.)

result.npz says which images are done and which withstood what; it is also the state of an evaluation in
progress: the same command goes on where it was stopped. `torchrun --nproc_per_node=N -- eval_aa.py ...` deals
the batches out to N processes, with the same figures.
"""

import argparse
import hashlib
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from pyautoattack import AutoAttack

import models
import utils
from utils import InputError, evaluate, load_dataset, percent, to_float

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")  # AutoAttack's standard version, in its order
CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "fab": 2, "square": 2, "apgd-t": 10, "fab-t": 10}  # that they need
# What decides an evaluation's figures: a result of another one is refused.
IDENTITY = ("weights_sha256", "data_sha256", "model", "activation", "normalize", "n", "eps", "attacks",
            "seed", "precision", "batch_size")


def attack_list(text):
    """An argparse type: "standard", "none" or a comma-separated list of AutoAttack's attacks, as a tuple."""
    names = {"standard": STANDARD, "none": ()}.get(text, tuple(text.split(",")))
    if not set(names) <= set(CLASSES) or len(set(names)) < len(names):
        known = ",".join(CLASSES)
        raise argparse.ArgumentTypeError(f"{text!r} is not standard, none, or a list out of {known}")
    return names


def parse_args(argv=None):
    """The arguments of a command line. One that contradicts itself is refused with exit status 2."""
    p = utils.Parser(description=__doc__)
    p.add_argument("target", type=Path, help="a run's folder or a checkpoint file")
    p.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run's folder")
    p.add_argument("--out", type=Path, help="file of the result, beside which an .npz is written; None means "
                   "result.json in the run's folder, CHECKPOINT_result.json beside another checkpoint")

    g = p.add_argument_group("a checkpoint from elsewhere, which does not say what it is")
    g.add_argument("--model", choices=models.MODELS, metavar="NAME", help=", ".join(models.MODELS))
    g.add_argument("--activation", choices=models.ACTIVATIONS, metavar="NAME",
                   help=f"{', '.join(models.ACTIVATIONS)}; None means relu")
    g.add_argument("--no-normalize", action="store_true", help="it takes images in [0, 1] as they are")
    g.add_argument("--mean", type=utils.number(0), nargs=3, metavar="M",
                   help="channel means that normalise its input; None means PGD-AT's, of CIFAR-10")
    g.add_argument("--std", type=utils.number(1e-6), nargs=3, metavar="S",
                   help="channel standard deviations, likewise; None means PGD-AT's, of CIFAR-10")

    g = p.add_argument_group("attacks")
    g.add_argument("--eps", type=utils.fraction,
                   help="L-inf radius on the [0, 1] scale; None means the run's, or 8/255")
    g.add_argument("--attacks", type=attack_list, default="standard",
                   help=f"standard (AutoAttack), none, or a list out of {','.join(CLASSES)}, which is no AA")
    g.add_argument("--stop-after", type=utils.number(1, kind=int), metavar="N",
                   help="stop after the batch with the N-th image; the command without this flag continues")

    g = p.add_argument_group("run")
    g.add_argument("--dataset",
                   help="cifar10, cifar100 or the path of an .npz; None means the run's, or cifar10")
    g.add_argument("--data-dir",
                   help="folder of cifar10.npz, which is fetched on first use; None means the run's, or data")
    g.add_argument("--n", type=utils.number(1, kind=int), help="evaluate the first N test images alone")
    g.add_argument("--seed", type=utils.number(0, 2**63, int), default=0, help="seed of the attacks")
    g.add_argument("--batch-size", type=utils.number(1, kind=int),
                   help="images per batch, of which later attacks see about half; None means 500 on CUDA, "
                        "250 elsewhere")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    g.add_argument("--precision", choices=("fp32", "tf32"),
                   help="fp32: strict; tf32: torch's own float32; None means tf32 on CUDA, fp32 elsewhere")
    args = p.parse_args(argv)
    if args.no_normalize and (args.mean or args.std):
        p.error("--no-normalize contradicts --mean and --std")
    if bool(args.mean) != bool(args.std):
        p.error("--mean and --std go together")
    if args.stop_after and not args.attacks:
        p.error("--stop-after has no effect with --attacks none")
    return args


def locate(args):
    """(checkpoint file, result file) of the target."""
    target, name = args.target, "result.json" if args.which == "best" else "result_last.json"
    if target.is_dir():
        target = target / f"{args.which}.pt"
    elif args.which == "best":
        name = f"{target.stem}_{name}"
    else:
        raise InputError("--which chooses in a run's folder, but the target is a file")
    if args.out and args.out.suffix != ".json":
        raise InputError(f"--out {args.out} does not end in .json")
    return target, args.out or target.with_name(name)


def open_checkpoint(path):
    """The dict in a checkpoint file: ours, {"state_dict": ...}, or a bare state dict made that.

    A `module.` prefix (DataParallel) and the `sub_block1.*` keys of WideResNets, which no forward pass uses,
    are dropped. Raises InputError for a file that cannot be read safely, or holds no state dict.
    """
    loaded = utils.load_checkpoint(path)
    if isinstance(loaded, dict) and not isinstance(loaded.get("state_dict"), dict):
        loaded = {"state_dict": loaded}
    state = loaded["state_dict"] if isinstance(loaded, dict) else {}
    if not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise InputError(f"{path} holds no state dict")
    state = {k.removeprefix("module."): v for k, v in state.items()}
    loaded["state_dict"] = {k: v for k, v in state.items() if not k.startswith("sub_block1.")}
    return loaded


def sha256_of(state):
    """SHA-256 of a state dict's tensors and their names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_weights(model, state, path):
    """model.load_state_dict(state), strictly but for `num_batches_tracked`, which old checkpoints lack.

    Raises InputError, naming the first key that differs, or if a weight is not finite.
    """
    tracked = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked")}
    try:
        model.load_state_dict({**tracked, **state})
    except RuntimeError as e:  # line 2: what is missing, unexpected or of another size, the first key first
        first = str(e).splitlines()[1].strip().split('", ')[0]
        raise InputError(f"{path} is of another architecture: {first} ...") from None
    if not all(v.isfinite().all() for v in state.values()):
        raise InputError(f"{path} holds NaN or infinite weights")


def rebuild(args, path, checkpoint):
    """(model, what it is) from a checkpoint of ours, which says it, or from --model and the rest."""
    if "normalize" in checkpoint:
        for flag in ("model", "activation", "no_normalize", "mean"):
            if getattr(args, flag):
                raise InputError(f"--{flag.replace('_', '-')} has no effect: {path} says what it is itself")
        spec = {k: checkpoint["args"][k] for k in ("model", "activation")}
        spec |= {"normalize": checkpoint["normalize"], "num_classes": checkpoint["num_classes"]}
    else:
        if args.model is None:
            raise InputError(f"{path} does not name its architecture: give --model (and --no-normalize if it "
                             "takes plain images)")
        normalize = (args.mean, args.std) if args.mean else models.CIFAR_NORMALIZE
        bias = list(checkpoint["state_dict"].values())[-1]  # of the last layer
        spec = {"model": args.model, "activation": args.activation or "relu",
                "normalize": None if args.no_normalize else normalize, "num_classes": bias.numel()}
    model = models.build(spec["model"], spec["num_classes"], spec["activation"], spec["normalize"])
    load_weights(model, checkpoint["state_dict"], path)
    return model.eval().requires_grad_(False), spec


def load_subject(args, path, device):
    """What is evaluated: (model, images, labels, what the result says of it).

    Raises InputError if flags, checkpoint and data do not fit together.
    """
    checkpoint = open_checkpoint(path)
    model, about = rebuild(args, path, checkpoint)
    trained = checkpoint["args"] if "normalize" in checkpoint else {"dataset": "cifar10", "eps": 8 / 255}
    data_dir = args.data_dir or trained.get("data_dir", "data")
    data = load_dataset(args.dataset or trained["dataset"], device, data_dir)
    n, classes = args.n or len(data.test_labels), about["num_classes"]
    if data.num_classes > classes:
        raise InputError(f"{path} knows {classes} classes, but the data set has {data.num_classes}")
    if few := [a for a in args.attacks if CLASSES[a] > classes]:
        raise InputError(f"{few[0]} needs {CLASSES[few[0]]} classes: try --attacks apgd-ce,square")
    if n > len(data.test_labels):
        raise InputError(f"--n {n}: there are {len(data.test_labels):,} test images")
    about |= {"checkpoint": path.name, "epoch": checkpoint.get("epoch"), "n": n,
              "weights_sha256": sha256_of(checkpoint["state_dict"]), "data_sha256": data.sha256,
              "eps": trained["eps"] if args.eps is None else args.eps, "attacks": args.attacks,
              "seed": args.seed, "precision": args.precision,
              "batch_size": args.batch_size or (500 if device.type == "cuda" else 250),
              **utils.environment(device)}
    model.to(device, memory_format=torch.channels_last)
    return model, data.test_images[:n], data.test_labels[:n], json.loads(json.dumps(about))


# ---- The result --------------------------------------------------------------------------------------------


def open_result(path, about):
    """(result, flags) of the evaluation in the .json and the .npz beside it, or of one that begins.

    flags: {"clean", "pgd10", an attack's name: which images withstood it and those before, "done"}, (N,) bool
    each. Raises InputError if a file is of another evaluation, or not ours.
    """
    npz = path.with_suffix(".npz")
    if not path.exists() and not npz.exists():
        return {**about, "seconds": {"pgd10": 0, "autoattack": 0}}, {}
    try:
        with np.load(npz, allow_pickle=False) as file:
            flags = dict(file)
        result = json.loads(str(flags.pop("result")))
        differ = [f"{k} was {result[k]}, is {about[k]}" for k in IDENTITY if result[k] != about[k]]
    except Exception:  # gone, damaged, an .npz of something else ...
        differ = [f"{npz} says nothing of it"]
    if differ:
        raise InputError(f"{path} is of another evaluation ({'; '.join(differ)}): choose another --out, or "
                         f"delete it and {npz}")
    return result, flags


def estimate(pgd10, robust, done):
    """(accuracy, its standard error), per cent, from flags (N,): pgd10 of all images, robust of those done.

    See the formula at the top. At least one image has to be done.
    """
    total, n = len(done), done.sum()
    difference = pgd10[done].astype(float) - robust[done]
    spread = ((difference - difference.mean()) ** 2).sum() / max(n - 1, 1)
    error = math.sqrt((1 - n / total) * spread / n)
    return round(100 * (pgd10.mean() - difference.mean()), 2), round(100 * error, 2)


def report(path, result, flags):
    """Bring the figures up to date, write both files, each whole or not at all, and print the figures: clean
    82.16 / PGD-10 53.31 / AA 48.71 +- 0.45 (2,000 of 10,000 images)."""
    n_done, attacks = int(flags["done"].sum()), result["attacks"]
    figures = {a: estimate(flags["pgd10"], flags[a], flags["done"]) for a in attacks if n_done}
    aa, error = figures.get(STANDARD[-1], (None, None)) if tuple(attacks) == STANDARD else (None, None)
    result |= {k: percent(torch.from_numpy(flags[k])) for k in ("clean", "pgd10")}
    result |= {"n_done": n_done, "complete": not attacks or n_done == result["n"], "left": figures, "aa": aa,
               "aa_error": error}
    arrays = {**flags, "result": json.dumps(result)}
    utils.write_whole(path.with_suffix(".npz"), lambda file: np.savez_compressed(file, **arrays))
    utils.write_json(path, result)
    text = f"clean {result['clean']:.2f} / PGD-10 {result['pgd10']:.2f}"
    if figures:
        value, error = figures[attacks[-1]]
        text += f" / {'AA' if aa is not None else ','.join(attacks) + ' (not AA)'} {value:.2f}"
        if not result["complete"]:
            text += f" +- {error:.2f} ({n_done:,} of {result['n']:,} images)"
    print(text, flush=True)


# ---- Attacks -----------------------------------------------------------------------------------------------


def make_autoattack(model, eps, seed, device):
    """AutoAttack's standard version on a model in any memory format."""
    def forward(x):  # AutoAttack calls .view on the gradient of x, which flat memory makes contiguous
        return model(x.flatten(1).unflatten(1, x.shape[1:]))

    said = set()

    def once(record):  # warnings come again with every batch
        new = record.getMessage() not in said
        said.add(record.getMessage())
        return new

    logging.getLogger("auto-attack").addFilter(once)
    torch.backends.cudnn.benchmark = False  # batches shrink as images are broken
    return AutoAttack(forward, norm="Linf", eps=eps, seed=seed, version="standard", device=device)


def withstood(aa, attacks, x, y):
    """Which images of a batch withstand each attack and those before it: {attack: (B,) bool}.

    x (B, 3, 32, 32) in [0, 1], y (B,).
    """
    with torch.no_grad():
        robust = aa.get_logits(x).argmax(1) == y
    flags = {}
    for attack in attacks:
        index = robust.nonzero().squeeze(1)
        if len(index):  # the package raises where there is no image
            aa.attacks_to_run = [attack]
            _, predicted = aa.run_standard_evaluation(x[index], y[index], batch_size=len(index))
            robust[index] = predicted == y[index]
        flags[attack] = robust.clone()
    return flags


def run_autoattack(aa, images, labels, result, flags, stop_after, path):
    """Send the batches that are not done through all attacks; report after each round of the processes."""
    n, size, attacks = result["n"], result["batch_size"], result["attacks"]
    starts = [i for i in range(0, min(n, stop_after or n), size) if not flags["done"][i]]
    rounds = [starts[i : i + utils.WORLD] for i in range(0, len(starts), utils.WORLD)]
    for of_all in utils.progress(rounds, "AutoAttack", len(rounds)):
        began = time.time()
        new = torch.zeros(len(attacks) + 1, n, dtype=torch.bool, device=labels.device)
        for i in of_all[utils.RANK : utils.RANK + 1]:
            batch = slice(i, i + size)
            x = to_float(images[batch]).contiguous()
            new[:-1, batch] = torch.stack(list(withstood(aa, attacks, x, labels[batch]).values()))
            new[-1, batch] = True
        for name, values in zip((*attacks, "done"), utils.sum_over_processes(new).cpu().numpy()):
            flags[name] |= values
        result["seconds"]["autoattack"] = round(result["seconds"]["autoattack"] + time.time() - began, 1)
        report(path, result, flags)


def warn_if_normalised_otherwise(model, images, labels):
    """Warn if a checkpoint from elsewhere is right more often when its input is normalised the other way."""
    def accuracy(normalize):
        model.normalize = normalize.to(images.device)
        return percent(evaluate(model, images[:1000], labels[:1000], eps=0, steps=0)[0])

    given = model.normalize
    plain = isinstance(given, torch.nn.Identity)
    other = models.Normalize(*models.CIFAR_NORMALIZE) if plain else torch.nn.Identity()
    otherwise, as_given = accuracy(other), accuracy(given)
    if otherwise > as_given + 2:
        print(f"warning: {'without' if plain else 'with'} --no-normalize {otherwise:.2f} % of the first "
              f"images are classified right, like this {as_given:.2f} %: is the normalisation right?")


def show_late(flags):
    """Print which images only FAB and Square break, and warn if they are many: a sign of masked gradients."""
    late = np.flatnonzero(flags["apgd-t"] & ~flags["square"] & flags["done"])
    share = 100 * len(late) / flags["done"].sum()
    print(f"fab-t and square alone break {len(late)} of the images ({share:.2f} %) {late.tolist() or ''}"
          + ("\nwarning: that is many: are gradients masked?" if share > 0.5 else ""))


def main():
    args = parse_args()
    device = utils.start_device(args)
    path, out = locate(args)
    model, images, labels, about = load_subject(args, path, device)
    print(f"{path}: {about['model']}, {len(labels):,} test images, eps {255 * about['eps']:.4g}/255")
    utils.lock(out.parent, f".{out.stem}.lock")
    result, flags = open_result(out, about)
    if not flags:
        began = time.time()
        pgd10 = evaluate(model, images, labels, result["eps"], seed=args.seed,
                         batch_size=result["batch_size"], shard=utils.SHARD)
        flags = dict(zip(("clean", "pgd10"), utils.sum_over_processes(pgd10).cpu().numpy()))
        flags |= {name: np.zeros(len(labels), dtype=bool) for name in (*args.attacks, "done")}
        result["seconds"]["pgd10"] = round(time.time() - began, 1)
        if args.model:
            warn_if_normalised_otherwise(model, images, labels)
    report(out, result, flags)
    if args.attacks:
        aa = make_autoattack(model, result["eps"], args.seed, device)
        run_autoattack(aa, images, labels, result, flags, args.stop_after, out)
        if result["aa"] is not None:
            show_late(flags)
    print(f"written to {out}")


if __name__ == "__main__":
    utils.run_script(main)
