"""Clean, PGD-10 and AutoAttack accuracy of a run, of one of our checkpoints, or of anyone's CIFAR checkpoint.

    python eval_aa.py runs/NAME                                  its best checkpoint, all test images -> runs/NAME/result.json
    python eval_aa.py runs/NAME --which last                     its last one -> result_last.json (the gap: robust overfitting)
    python eval_aa.py wrn.pt --model wrn-34-10 --no-normalize    a state dict from elsewhere -> wrn_result.json
    python eval_aa.py runs/NAME --n 1000 --attacks apgd-ce,apgd-t   a quick look; never called AA
    python eval_aa.py runs/NAME --attacks none --pgd-steps 50 --restarts 10 --loss cw   against gradient masking

Accuracies are per cent of the images. `pgd10` counts an image as robust if the last iterate is classified right (as the
paper's checkpoints were selected), `pgd10_any` if every iterate is. AutoAttack is the `standard` version (Croce & Hein,
2020); the figure of each of its attacks is what is left after it and those before it. An AutoAttack evaluation that was
interrupted goes on where it was, to the batch, when the same command is given again. `torchrun --nproc_per_node=N --
eval_aa.py ...` deals the batches out to N processes, with the same figures.
"""

import argparse
import hashlib
import importlib
import json
import logging
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import models
from utils import (
    InputError, Parser, clock, cw_loss, environment, fraction, fraction_text, join_processes,
    load_checkpoint, load_dataset, load_weights, make_forward, number, percent, pgd_evaluate, pick_device, progress_bar,
    rank, read_json, run_folder, run_script, set_precision, sum_over_ranks, to_float, world, write_json,
)

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")  # AutoAttack's standard version, in its order
ATTACKS = (*STANDARD, "apgd-dlr", "fab")
LOSSES = {"ce": F.cross_entropy, "cw": cw_loss}


def attack_list(text):
    """An argparse type: "standard", "none" or a comma-separated list of AutoAttack's attacks -> tuple of names."""
    names = {"standard": STANDARD, "none": ()}.get(text, tuple(text.split(",")))
    unknown = [n for n in names if n not in ATTACKS]
    if unknown or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not standard, none, or a list out of {','.join(ATTACKS)}")
    return names


def parse_args(argv=None):
    p = Parser(description=__doc__)
    p.add_argument("target", type=Path, help="a run's folder or a checkpoint file")
    p.add_argument("--which", choices=("best", "last"), default="best", help="of a run's folder (default: %(default)s)")
    p.add_argument("--model", choices=models.MODELS, metavar="NAME", help=f"of a checkpoint that does not name it: {', '.join(models.MODELS)}")
    p.add_argument("--activation", choices=models.ACTIVATIONS, metavar="NAME", help=f"likewise: {', '.join(models.ACTIVATIONS)} (default: relu)")
    p.add_argument("--no-normalize", action="store_true", help="it takes images in [0, 1] as they are")
    p.add_argument("--mean", type=number(0, 1), nargs=3, metavar="M", help="its channel means (default: PGD-AT's, of CIFAR-10)")
    p.add_argument("--std", type=number(1e-6), nargs=3, metavar="S", help="its channel standard deviations (likewise)")

    p.add_argument("--dataset", help="cifar10, cifar100 or the path of an .npz (default: the run's, or cifar10)")
    p.add_argument("--data-dir", default="data", help="where cifar10.npz is, or is put on first use (default: %(default)s)")
    p.add_argument("--n", type=number(1, kind=int), help="evaluate the first N test images (default: all)")
    p.add_argument("--eps", type=fraction, help='L-inf radius on the [0, 1] scale (default: the run\'s, or 8/255)')
    p.add_argument("--attacks", type=attack_list, default="standard",
                   help=f"standard, none, or a quick look: a list out of {','.join(ATTACKS)} (default: %(default)s)")
    p.add_argument("--pgd-steps", type=number(1, kind=int), default=10, help="beside PGD-10 a PGD with this many steps of 2/255,")
    p.add_argument("--restarts", type=number(1, kind=int), default=1, help="this many random starts")
    p.add_argument("--loss", choices=LOSSES, default="ce", help="and this loss (cw: the margin of Carlini & Wagner)")

    p.add_argument("--seed", type=number(0, kind=int), default=0, help="of the attacks (default: %(default)s)")
    p.add_argument("--batch-size", type=number(1, kind=int), default=250, help="images a batch (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s)")
    p.add_argument("--precision", choices=("fp32", "tf32"), help="fp32: strict; tf32: torch's own default (default on CUDA)")
    p.add_argument("--compile", action="store_true", help="compile the model with torch.compile")
    p.add_argument("--out", type=Path,
                   help="the result's file (default: result.json in the run's folder; CHECKPOINT_result.json beside another)")
    p.add_argument("--overwrite", action="store_true", help="discard what that file holds of other settings")
    args = p.parse_args(argv)
    if args.no_normalize and (args.mean or args.std):
        p.error("--no-normalize contradicts --mean and --std")
    if bool(args.mean) != bool(args.std):
        p.error("--mean and --std go together")
    return args


def locate(args):
    """(checkpoint file, result file) of the target."""
    if args.target.is_dir():
        checkpoint = args.target / f"{args.which}.pt"
        result = args.target / ("result.json" if args.which == "best" else "result_last.json")
        if not checkpoint.exists():
            raise InputError(f"{args.target} holds no {args.which}.pt: is it a run's folder, and has an epoch been tested?")
    else:
        checkpoint, result = args.target, args.target.with_name(f"{args.target.stem}_result.json")
        if args.which != "best":
            raise InputError("--which chooses in a run's folder, but the target is a file")
    result = args.out or result
    if result.suffix != ".json":
        raise InputError(f"--out {result} does not end in .json")
    return checkpoint, result


OURS = {"args": dict, "num_classes": int, "epoch": int, "normalize": (list, tuple, type(None))}  # what save_epoch writes


def is_ours(checkpoint):
    """Whether it is one that save_epoch wrote, which names its architecture and data set."""
    return all(isinstance(checkpoint.get(k), t) for k, t in OURS.items()) and {"model", "activation", "dataset", "eps"} <= checkpoint["args"].keys()


def rebuild(args, path, checkpoint, trained):
    """(model, what it is) from a checkpoint of ours, which names its architecture, or from --model and the rest.

    trained: the arguments it was trained with, or {} for one from elsewhere.
    """
    if trained:
        given = [f for f in ("model", "activation", "no_normalize", "mean") if getattr(args, f)]
        if given:
            raise InputError(f"--{given[0].replace('_', '-')} has no effect: {path} names its own architecture and normalisation")
        spec = {"model": trained["model"], "activation": trained["activation"], "normalize": checkpoint["normalize"]}
        num_classes = checkpoint["num_classes"]
    else:
        if args.model is None:
            raise InputError(f"{path} does not name its architecture: give --model (and --no-normalize if it takes plain images)")
        normalize = None if args.no_normalize else (args.mean, args.std) if args.mean else models.CIFAR_NORMALIZE
        spec = {"model": args.model, "activation": args.activation or "relu", "normalize": normalize}
        num_classes = min(list(checkpoint["state_dict"].values())[-1].numel(), 10_000)  # the last layer's bias
    try:
        model = models.build(spec["model"], num_classes, spec["activation"], spec["normalize"])
    except ValueError as e:  # a checkpoint that names something we do not have
        raise InputError(f"{path}: {e}") from None
    load_weights(model, checkpoint["state_dict"], path)
    return model, {**spec, "num_classes": num_classes}


def digest(state):
    """SHA-256 of a state dict's values, by which a result names the weights it belongs to."""
    h = hashlib.sha256()
    for key in sorted(state):
        h.update(key.encode())
        h.update(state[key].cpu().flatten().view(torch.uint8).numpy())
    return h.hexdigest()


def open_result(path, identity, overwrite):
    """What the result file holds already, or a fresh result of this identity. Raises InputError if it is another's."""
    fresh = {"clean": None, "pgd10": None, "pgd10_any": None, "aa": None, "attacks": {}, "quick": {}, "stages": {}, **identity}
    if not path.exists():
        return fresh
    result = read_json(path, {"attacks": dict, "quick": dict, "stages": dict, "weights_sha256": str})
    differ = [f"{k} was {result.get(k)}, is {v}" for k, v in identity.items() if result.get(k) != v]
    if overwrite:
        return fresh
    if differ:
        raise InputError(f"{path} holds results of something else ({'; '.join(differ)}): choose another --out, or --overwrite")
    return result


def open_state(path, identity, overwrite):
    """The state that an interrupted AutoAttack evaluation left in the file, or None.

    Raises InputError if it is of another evaluation. (AutoAttack has a state file of its own, which version 0.2.0 cannot
    read back: it writes the set of its attacks as a string, and then finds it different from the set.)
    """
    if not path.exists() or overwrite:
        return None
    state = read_json(path, {"identity": dict, "robust": list, "left": dict, "seconds": dict})
    differ = [k for k, v in identity.items() if state["identity"].get(k) != v]
    if differ:
        raise InputError(f"{path} is of an interrupted evaluation with another {', '.join(differ)}: finish that, or --overwrite")
    return state


def padded(forward, batch_size):
    """forward for 1 to batch_size images, filled up to one of few sizes: a compiled model is compiled anew for each size,
    and AutoAttack goes on with fewer and fewer images."""
    def call(x):
        size = batch_size
        while size >= 2 * len(x):
            size //= 2
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, size - len(x))) if size > len(x) else x
        return forward(x.contiguous(memory_format=torch.channels_last))
    return lambda x: call(x)[: len(x)]


def run_pgd(forward, images, labels, args, name, **attack):
    """(clean, last, any) of utils.pgd_evaluate, three (N,) bool tensors, under a progress bar; and the seconds it took."""
    started = time.time()
    with progress_bar(len(labels) * attack.get("restarts", 1), name) as bar:
        flags = pgd_evaluate(forward, images, labels, seed=args.seed, batch_size=args.batch_size, progress=bar.update, **attack)
    return *flags, round(time.time() - started, 1)


class AutoAttack:
    """One attack of AutoAttack's standard version at a time, on one batch: from pyautoattack or GitHub's autoattack."""

    def __init__(self, forward, eps, seed, device):
        for package in ("pyautoattack", "autoattack"):
            try:
                module = importlib.import_module(package)
                break
            except ImportError:
                continue
        else:
            raise InputError("AutoAttack is not installed: pip install pyautoattack==0.2.0 (or --attacks none)")
        self.name = f"{package} {getattr(module, '__version__', '(no version)')}"
        self.model, self.bar, self.forwards = forward, None, 0
        logging.getLogger("auto-attack").addFilter(OncePerMessage())
        quiet = {} if package == "pyautoattack" else {"verbose": False}
        self.aa = module.AutoAttack(self.forward, norm="Linf", eps=eps, seed=seed, version="standard", device=device, **quiet)
        self.size = "batch_size" if package == "pyautoattack" else "bs"

    def watch(self, bar):
        """From now on the tqdm bar shows how many forwards have been made: a batch can take minutes."""
        self.bar, self.forwards = bar, 0

    def forward(self, x):
        self.forwards += 1
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.forwards:,} forwards", refresh=False)
            self.bar.update(0)
        # AutoAttack calls .view on the gradient of x: going through flat memory makes that gradient contiguous, whatever
        # layout the convolutions prefer
        return self.model(x.flatten(1).unflatten(1, x.shape[1:]))

    def fools(self, attack, x, y):
        """(B,) bool: which of x (B, 3, 32, 32) the attack gets misclassified."""
        self.aa.attacks_to_run = [attack]
        x_adv = self.aa.run_standard_evaluation(x.contiguous(), y, **{self.size: len(x)})
        if isinstance(x_adv, tuple):  # pyautoattack returns the labels too
            x_adv = x_adv[0]
        with torch.no_grad():
            return self.forward(x_adv).argmax(1) != y


class OncePerMessage(logging.Filter):
    """Lets a message through the first time; AutoAttack repeats its warnings for every batch."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def filter(self, record):
        new = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return new


def run_autoattack(aa, images, labels, attacks, batch_size, state, state_path):
    """Runs the attacks in turn, each on the images that withstood those before; fills state["left"], in per cent.

    Batches and seeds are those of one call of AutoAttack's run_standard_evaluation, and so are the figures. Under
    torchrun every process takes a batch at a time. The state is on the disk after every round.
    """
    robust = torch.tensor(state["robust"], dtype=torch.bool, device=labels.device)
    for attack in [a for a in attacks if a not in state["left"]]:
        if state["todo"] is None:
            state["todo"] = robust.nonzero().squeeze(1).tolist()
        said = time.time()
        with progress_bar(len(state["todo"]), attack) as bar:
            aa.watch(bar)
            while state["todo"]:
                started = time.time()
                mine = torch.tensor(state["todo"][rank() * batch_size :][:batch_size], dtype=torch.int64, device=labels.device)
                fooled = torch.zeros(len(labels), dtype=torch.int32, device=labels.device)
                if len(mine):
                    fooled[mine] = aa.fools(attack, to_float(images[mine]), labels[mine]).int()
                robust &= sum_over_ranks(fooled) == 0
                done = min(world() * batch_size, len(state["todo"]))
                state["robust"], state["todo"] = robust.int().tolist(), state["todo"][done:]
                state["seconds"][attack] = round(state["seconds"].get(attack, 0) + time.time() - started, 1)
                write_json(state_path, state)
                bar.update(done)
                if bar.disable and time.time() - said > 60:  # no terminal: a line a minute
                    said = time.time()
                    print(f"  {attack}: {len(state['todo']):,} images to go, {percent(robust):.2f} left so far", flush=True)
        state["left"][attack], state["todo"] = percent(robust), None
        write_json(state_path, state)
        show(attack, state["left"][attack], state["seconds"].get(attack))


def show(name, accuracy, seconds=None, remark=""):
    """One aligned line of a result."""
    print(f"{name:14} {accuracy:6.2f} {clock(seconds) if seconds is not None else '':>8}   {remark}".rstrip(), flush=True)


def warn_if_normalised_otherwise(model, images, labels):
    """A checkpoint from elsewhere does not say how its input is normalised: warns if another way does better."""
    images, labels = images[:1000], labels[:1000]

    def accuracy():
        return percent(pgd_evaluate(model, images, labels, eps=0, restarts=0)[0])

    given, as_given = model.normalize, accuracy()
    for name, other in (("--no-normalize", torch.nn.Identity()), ("PGD-AT's mean and std", models.Normalize(*models.CIFAR_NORMALIZE))):
        model.normalize = other.to(images.device)
        otherwise = accuracy()
        if otherwise > as_given + 2 and rank() == 0:
            print(f"warning: with {name}, {otherwise:.2f} of the first {len(labels)} images are classified right, "
                  f"against {as_given:.2f}: is the normalisation right?", file=sys.stderr)
    model.normalize = given


def main():
    args = parse_args()
    device = pick_device(args.device)
    join_processes(device)
    precision = set_precision(args.precision, device)
    path, result_path = locate(args)
    checkpoint = load_checkpoint(path)
    ours = is_ours(checkpoint)
    trained = checkpoint["args"] if ours else {}
    data = load_dataset(args.dataset or trained.get("dataset", "cifar10"), args.data_dir, device)
    model, spec = rebuild(args, path, checkpoint, trained)
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if data.num_classes > spec["num_classes"]:
        raise InputError(f"{path} knows {spec['num_classes']} classes, the data set has {data.num_classes}")
    if spec["num_classes"] < 10 and any(a.endswith("-t") for a in args.attacks):
        raise InputError(f"AutoAttack's targeted attacks need 10 classes, {path} knows {spec['num_classes']}: use --attacks none")
    n = args.n or len(data.test_labels)
    if n > len(data.test_labels):
        raise InputError(f"--n {n}: there are {len(data.test_labels):,} test images")
    images, labels = data.test_images[:n], data.test_labels[:n]
    eps = args.eps if args.eps is not None else trained.get("eps", 8 / 255)
    identity = {**spec, "weights_sha256": digest(checkpoint["state_dict"]), "data_sha256": data.sha256, "n": n, "eps": eps,
                "seed": args.seed, "precision": precision}
    identity = json.loads(json.dumps(identity))  # as it will be read back
    state_path = result_path.with_suffix(".state.json")
    forward = padded(make_forward(model, precision, compile=True), args.batch_size) if args.compile else model
    aa = AutoAttack(forward, eps, args.seed, device) if args.attacks else None

    with run_folder(result_path.parent, f".{result_path.stem}.lock"):
        result = open_result(result_path, identity, args.overwrite)
        result |= {"checkpoint": path.name, "epoch": checkpoint["epoch"] if ours else None, "test_images": len(data.test_labels)}
        about = {"batch_size": args.batch_size, "compiled": args.compile, **environment(device)}
        state_identity = {**identity, "attacks": list(args.attacks), "batch_size": args.batch_size}
        state = open_state(state_path, state_identity, args.overwrite) if args.attacks else None
        print(f"{path}: {spec['model']}, {n:,} of {len(data.test_labels):,} test images, eps {fraction_text(eps)}, {precision}")

        if "pgd10" not in result["stages"]:
            clean, last, always, seconds = run_pgd(forward, images, labels, args, "PGD-10", eps=eps)
            result |= {"clean": percent(clean), "pgd10": percent(last), "pgd10_any": percent(always)}
            result["stages"]["pgd10"] = {"seconds": seconds, **about}
            write_json(result_path, result)
            if not ours:
                warn_if_normalised_otherwise(model, images, labels)
        show("clean", result["clean"])
        show("PGD-10", result["pgd10"], result["stages"]["pgd10"]["seconds"], f"(every iterate right: {result['pgd10_any']:.2f})")

        if (args.pgd_steps, args.restarts, args.loss) != (10, 1, "ce"):
            name = f"pgd-{args.loss}-{args.pgd_steps}x{args.restarts}"
            if name not in result["stages"]:
                attack = {"steps": args.pgd_steps, "restarts": args.restarts, "loss": LOSSES[args.loss]}
                _, _, always, seconds = run_pgd(forward, images, labels, args, name, eps=eps, **attack)
                result["attacks"][name] = percent(always)
                result["stages"][name] = {"seconds": seconds, **about}
                write_json(result_path, result)
            show(name, result["attacks"][name], result["stages"][name]["seconds"], "(every iterate of every restart right)")

        stage = "aa" if args.attacks == STANDARD else ",".join(args.attacks)
        if args.attacks and stage not in result["stages"]:
            if state is None:
                clean, _, _, _ = run_pgd(forward, images, labels, args, "clean", eps=eps, restarts=0)
                state = {"identity": state_identity, "robust": clean.int().tolist(), "left": {}, "todo": None, "seconds": {}}
            else:
                print(f"going on with the evaluation that was interrupted ({state_path})")
            run_autoattack(aa, images, labels, args.attacks, args.batch_size, state, state_path)
            if stage == "aa":
                result["aa"] = state["left"][STANDARD[-1]]
                result["attacks"] |= state["left"]
            else:
                result["quick"][stage] = state["left"]
            result["stages"][stage] = {"seconds": state["seconds"], "autoattack": aa.name, **about}
            write_json(result_path, result)
        elif args.attacks:
            for attack in args.attacks:
                show(attack, (result["attacks"] if stage == "aa" else result["quick"][stage])[attack])
        if args.attacks and rank() == 0:
            state_path.unlink(missing_ok=True)

    summary = f"clean {result['clean']:.2f} / PGD-10 {result['pgd10']:.2f}"
    if stage == "aa":
        summary += f" / AA {result['aa']:.2f}"
    elif args.attacks:
        summary += f" / {stage} (a quick look, not AA) {result['quick'][stage][args.attacks[-1]]:.2f}"
    print(f"{path}, {n:,} images: {summary}   ({result_path})")


if __name__ == "__main__":
    run_script(main)
