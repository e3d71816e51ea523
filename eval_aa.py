"""Clean, PGD-10 and AutoAttack accuracy of a run, of one of our checkpoints, or of anyone's CIFAR checkpoint.

    python eval_aa.py runs/NAME                 its best checkpoint, all test images -> runs/NAME/result.json
    python eval_aa.py runs/NAME --which last    its last checkpoint -> runs/NAME/result_last.json
    python eval_aa.py wrn.pt --model wrn-34-10 --no-normalize       anyone's state dict -> wrn_result.json
    python eval_aa.py runs/NAME --n 1000 --attacks apgd-ce,apgd-t --out quick.json    a quick look, never AA
    python eval_aa.py runs/NAME --attacks none --pgd-steps 50 --restarts 10 --loss cw

Accuracies are per cent of the images. `pgd10` counts an image as robust if the last iterate is classified
right (as the paper's checkpoints were selected), `pgd10_worst` if every iterate is. AutoAttack is the
`standard` version (Croce & Hein, 2020); the figure of each of its attacks is what is left after it and those
before it. An AutoAttack evaluation that was interrupted goes on, to the batch, when the same command is given
again. result.npz keeps which images withstood what, one bool an image and attack. `torchrun
--nproc_per_node=N -- eval_aa.py ...` deals the work out to N processes, with the same figures.
"""

import argparse
import importlib
import io
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import models
import runs
from utils import InputError, cw_loss, percent, pgd_evaluate, to_float

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")  # AutoAttack's standard version, in its order
ATTACKS = (*STANDARD, "apgd-dlr", "fab")
LOSSES = {"ce": F.cross_entropy, "cw": cw_loss}


def attack_list(text):
    """An argparse type: "standard", "none" or a comma-separated list of AutoAttack's attacks, as a tuple."""
    names = {"standard": STANDARD, "none": ()}.get(text, tuple(text.split(",")))
    unknown = [n for n in names if n not in ATTACKS]
    if unknown or len(set(names)) < len(names):
        known = ",".join(ATTACKS)
        raise argparse.ArgumentTypeError(f"{text!r} is not standard, none, or a list out of {known}")
    return names


def make_parser():
    p = runs.Parser(description=__doc__)
    p.add_argument("target", type=Path, help="a run's folder or a checkpoint file")
    p.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint of a run's folder")
    p.add_argument("--out", type=Path, help="file of the result (default: result.json in the run's folder, "
                   "CHECKPOINT_result.json beside another checkpoint)")
    p.add_argument("--overwrite", action="store_true", help="discard what that file holds")
    p.add_argument("--save-adv", type=Path, metavar="FILE.npz",
                   help="write AutoAttack's adversarial images there, clean ones where it failed: images "
                        "(N, 3, 32, 32) float32 in [0, 1], labels (N,), robust (N,) bool")

    g = p.add_argument_group("a checkpoint from elsewhere, which does not say what it is")
    g.add_argument("--model", choices=models.MODELS, metavar="NAME", help=", ".join(models.MODELS))
    g.add_argument("--activation", choices=models.ACTIVATIONS, metavar="NAME",
                   help=f"{', '.join(models.ACTIVATIONS)} (default: relu)")
    g.add_argument("--no-normalize", action="store_true", help="it takes images in [0, 1] as they are")
    g.add_argument("--mean", type=runs.number(0, 1), nargs=3, metavar="M",
                   help="channel means that normalise its input (default: PGD-AT's, of CIFAR-10)")
    g.add_argument("--std", type=runs.number(1e-6), nargs=3, metavar="S",
                   help="channel standard deviations that do (default: PGD-AT's, of CIFAR-10)")

    g = p.add_argument_group("attacks")
    g.add_argument("--eps", type=runs.fraction,
                   help="L-inf radius on the [0, 1] scale (default: the run's, or 8/255)")
    g.add_argument("--attacks", type=attack_list, default="standard",
                   help=f"standard (AutoAttack), none, or a quick look: a list out of {','.join(ATTACKS)}")
    g.add_argument("--pgd-steps", type=runs.integer(1), default=10,
                   help="steps of 2/255 of a further PGD, run if one of these three differs from its default")
    g.add_argument("--restarts", type=runs.integer(1), default=1, help="random starts of the further PGD")
    g.add_argument("--loss", choices=LOSSES, default="ce",
                   help="loss of the further PGD: cross-entropy, or the margin of Carlini & Wagner")

    g = p.add_argument_group("run")
    g.add_argument("--dataset",
                   help="cifar10, cifar100 or the path of an .npz (default: the run's, or cifar10)")
    g.add_argument("--data-dir", default="data", help="where cifar10.npz is, or is put on first use")
    g.add_argument("--n", type=runs.integer(1), help="evaluate the first N test images (default: all)")
    g.add_argument("--seed", type=runs.integer(0), default=0, help="seed of the attacks")
    g.add_argument("--batch-size", type=runs.integer(1), default=250, help="images a batch")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    g.add_argument("--precision", choices=("fp32", "tf32"),
                   help="fp32: strict; tf32: torch's own float32 (default: tf32 on CUDA, fp32 elsewhere)")
    return p


def parse_args(argv=None):
    """The arguments of a command line. One that contradicts itself is refused with exit status 2."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.no_normalize and (args.mean or args.std):
        p.error("--no-normalize contradicts --mean and --std")
    if bool(args.mean) != bool(args.std):
        p.error("--mean and --std go together")
    if args.save_adv and (not args.attacks or args.save_adv.suffix != ".npz"):
        p.error("--save-adv takes an .npz, and needs AutoAttack")
    return args


def locate(args):
    """(checkpoint file, result file) of the target."""
    if args.target.is_dir():
        checkpoint = args.target / f"{args.which}.pt"
        result = args.target / ("result.json" if args.which == "best" else "result_last.json")
        if not checkpoint.exists() and not result.exists():
            raise InputError(f"{args.target} holds no {args.which}.pt: is it a run that has tested an epoch?")
    elif not args.target.exists() and args.target.parent.name == "checkpoints":
        raise InputError(f"no such file: {args.target} (its row in run_all.sh says where it is from)")
    else:
        checkpoint, result = args.target, args.target.with_name(f"{args.target.stem}_result.json")
        if args.which != "best":
            raise InputError("--which chooses in a run's folder, but the target is a file")
    result = args.out or result
    if result.suffix != ".json":
        raise InputError(f"--out {result} does not end in .json")
    return checkpoint, result


# What runs.Run.save writes beside the weights, and what this script writes.
OURS = {"args": runs.RECORD["args"], "num_classes": int, "epoch": int, "normalize": (list, tuple, type(None))}
PERCENT = (int, float, type(None))
RESULT = {"clean": PERCENT, "pgd10": PERCENT, "pgd10_worst": PERCENT, "aa": PERCENT,
          "attacks": dict, "quick": dict, "stages": dict, "n": int, "test_images": int,
          "eps": (int, float), "weights_sha256": str}
STATE = {"identity": dict, "robust": [int], "left": dict, "todo": (list, type(None)), "seconds": dict}


def is_ours(checkpoint):
    """Whether a training script wrote it, so that it names its architecture and data set."""
    return runs.fits(checkpoint, OURS)


def rebuild(args, path, checkpoint, trained):
    """(model, what it is) from a checkpoint of ours, or from --model and the rest.

    trained: the arguments it was trained with, or {} for one from elsewhere.
    """
    if trained:
        given = [f for f in ("model", "activation", "no_normalize", "mean") if getattr(args, f)]
        if given:
            flag = f"--{given[0].replace('_', '-')}"
            raise InputError(f"{flag} has no effect: {path} names its own architecture and normalisation")
        spec = {k: trained[k] for k in ("model", "activation")} | {"normalize": checkpoint["normalize"]}
        num_classes = checkpoint["num_classes"]
    else:
        if args.model is None:
            raise InputError(f"{path} does not name its architecture: give --model "
                             "(and --no-normalize if it takes plain images)")
        own = (args.mean, args.std) if args.mean else models.CIFAR_NORMALIZE
        spec = {"model": args.model, "activation": args.activation or "relu",
                "normalize": None if args.no_normalize else own}
        bias = list(checkpoint["state_dict"].values())[-1]  # of the last layer
        num_classes = min(bias.numel(), 10_000)
    try:
        model = models.build(spec["model"], num_classes, spec["activation"], spec["normalize"])
    except ValueError as e:  # a checkpoint that names something we do not have
        raise InputError(f"{path}: {e}") from None
    runs.load_weights(model, checkpoint["state_dict"], path)
    return model, {**spec, "num_classes": num_classes}


def open_result(path, identity, overwrite):
    """What the result file holds, or a fresh result. Raises InputError if it is of another identity."""
    fresh = {"clean": None, "pgd10": None, "pgd10_worst": None, "aa": None,
             "attacks": {}, "quick": {}, "stages": {}, **identity}
    if not path.exists():
        return fresh
    result = runs.read_json(path, RESULT)
    if not overwrite and result["weights_sha256"] != identity["weights_sha256"]:
        raise InputError(f"{path} holds results of other weights: the checkpoint has changed since. "
                         "--overwrite evaluates it anew, another --out keeps both")
    differ = [f"{k} was {result.get(k)}, is {v}" for k, v in identity.items() if result.get(k) != v]
    if overwrite:
        return fresh
    if differ:
        raise InputError(f"{path} holds results of something else ({'; '.join(differ)}): "
                         "choose another --out, or --overwrite")
    return result


def open_state(path, identity, overwrite):
    """The state that an interrupted AutoAttack evaluation left in the file, or None.

    Raises InputError if it is of another evaluation. (AutoAttack has a state file of its own, which version
    0.2.0 cannot read back: it writes the set of its attacks as a string, and then finds it different from the
    set.)
    """
    if not path.exists() or overwrite:
        return None
    state = runs.read_json(path, STATE)
    differ = [k for k, v in identity.items() if state["identity"].get(k) != v]
    if differ:
        raise InputError(f"{path} is of an interrupted evaluation with another {', '.join(differ)}: "
                         "finish that, or --overwrite")
    return state


def run_pgd(model, images, labels, args, name, **attack):
    """(clean, last, worst, seconds): three (N,) bool tensors of pgd_evaluate, under a progress bar."""
    started = time.time()
    with runs.progress_bar(len(labels) * attack.get("restarts", 1), name) as bar:
        flags = pgd_evaluate(model, images, labels, seed=args.seed, batch_size=args.batch_size,
                             share=runs.share(), progress=lambda n: bar.update(runs.world() * n), **attack)
    return *runs.sum_over_processes(flags), round(time.time() - started, 1)


class AutoAttack:
    """One attack of AutoAttack's standard version at a time, on one batch.

    The package is pyautoattack, from PyPI, or autoattack, from GitHub.
    """

    def __init__(self, forward, eps, seed, device):
        for package in ("pyautoattack", "autoattack"):
            try:
                module = importlib.import_module(package)
                break
            except ImportError:
                continue
        else:
            raise InputError("AutoAttack is missing: pip install pyautoattack==0.2.0 (or --attacks none)")
        self.name = f"{package} {getattr(module, '__version__', '(no version)')}"
        self.model, self.bar, self.forwards = forward, None, 0
        logging.getLogger("auto-attack").addFilter(OncePerMessage())
        quiet = {} if package == "pyautoattack" else {"verbose": False}
        self.aa = module.AutoAttack(self.forward, norm="Linf", eps=eps, seed=seed, version="standard",
                                    device=device, **quiet)
        self.size = "batch_size" if package == "pyautoattack" else "bs"

    def watch(self, bar):
        """From now on the tqdm bar shows how many forwards have been made: a batch can take minutes."""
        self.bar, self.forwards = bar, 0

    def forward(self, x):
        self.forwards += 1
        if self.bar is not None:
            self.bar.set_postfix_str(f"{self.forwards:,} forwards", refresh=False)
            self.bar.update(0)
        # AutoAttack calls .view on the gradient of x. Going through flat memory makes that gradient
        # contiguous, whatever layout the convolutions prefer.
        return self.model(x.flatten(1).unflatten(1, x.shape[1:]))

    def fools(self, attack, x, y):
        """x under the attack (B, 3, 32, 32), and (B,) bool: which of them are misclassified."""
        self.aa.attacks_to_run = [attack]
        x_adv = self.aa.run_standard_evaluation(x.contiguous(), y, **{self.size: len(x)})
        if isinstance(x_adv, tuple):  # pyautoattack returns the labels too
            x_adv = x_adv[0]
        with torch.no_grad():
            return x_adv, self.forward(x_adv).argmax(1) != y


class OncePerMessage(logging.Filter):
    """Lets a message through the first time; AutoAttack repeats its warnings for every batch."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def filter(self, record):
        new = record.getMessage() not in self.seen
        self.seen.add(record.getMessage())
        return new


def write_npz(path, **arrays):
    """Write arrays, whole or not at all; under torchrun the first process does."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    runs.write_atomically(path, file.getbuffer())


def keep_flags(path, **flags):
    """Add {name: (N,) bool tensor of the images that are right} to an .npz; other names in it stay."""
    known = {}
    if path.exists():
        with np.load(path) as npz:
            known = dict(npz)
    write_npz(path, **{**known, **{name: f.cpu().numpy() for name, f in flags.items()}})


def open_adversarial(path, images, fresh):
    """An array (N, 3, 32, 32) float32 on the disk, to outlive an interruption; at first the clean images."""
    if path.exists() and not fresh:
        return np.lib.format.open_memmap(path, "r+")
    array = np.lib.format.open_memmap(path, "w+", np.float32, (len(images), 3, 32, 32))
    array[:] = to_float(images).cpu().numpy()
    return array


def run_autoattack(aa, images, labels, attacks, batch_size, state, state_path, keep, adversarial=None):
    """Run the attacks in turn, each on the images that withstood those before; fill state["left"], in per
    cent.

    Batches and seeds are those of one call of AutoAttack's run_standard_evaluation, and so are the figures.
    Under torchrun every process takes a batch at a time. The state is on the disk after every round.
    keep(attack, robust): told which images have withstood the attack and those before. adversarial: None, or
    an array (N, 3, 32, 32) that receives the images which fool the network.
    """
    device, step = labels.device, runs.world() * batch_size
    robust = torch.tensor(state["robust"], dtype=torch.bool, device=device)
    for attack in attacks:
        if attack in state["left"]:  # before an interruption
            show(attack, state["left"][attack], state["seconds"].get(attack))
            continue
        if state["todo"] is None:
            state["todo"] = robust.nonzero().squeeze(1).tolist()
        said = time.time()
        with runs.progress_bar(len(state["todo"]), attack) as bar:
            aa.watch(bar)
            while state["todo"]:
                started = time.time()
                mine = state["todo"][runs.rank() * batch_size :][:batch_size]
                mine = torch.tensor(mine, dtype=torch.int64, device=device)
                fooled = torch.zeros_like(robust)
                if len(mine):
                    x_adv, fooled[mine] = aa.fools(attack, to_float(images[mine]), labels[mine])
                    if adversarial is not None:
                        hit = fooled[mine]
                        adversarial[mine[hit].cpu().numpy()] = x_adv[hit].cpu().numpy()
                robust &= ~runs.sum_over_processes(fooled)
                done = min(step, len(state["todo"]))
                state["robust"], state["todo"] = robust.int().tolist(), state["todo"][done:]
                state["seconds"][attack] = round(state["seconds"].get(attack, 0) + time.time() - started, 1)
                runs.write_json(state_path, state)
                bar.update(done)
                if bar.disable and time.time() - said > 60:  # no terminal: a line a minute
                    said = time.time()
                    to_go = f"{len(state['todo']):,} images to go"
                    print(f"  {attack}: {to_go}, {percent(robust):.2f} left so far", flush=True)
        keep(attack, robust.clone())
        state["left"][attack], state["todo"] = percent(robust), None
        runs.write_json(state_path, state)
        show(attack, state["left"][attack], state["seconds"].get(attack))


def show(name, accuracy, seconds=None, remark=""):
    """Print one aligned line of a result."""
    took = "" if seconds is None else runs.clock(seconds)
    print(f"{name:14} {accuracy:6.2f} {took:>8}   {remark}".rstrip(), flush=True)


def summary(result, stage="aa", further=None):
    """A result's figures in a line: clean, PGD-10, a further PGD, a stage of AutoAttack."""
    parts = [f"clean {result['clean']:.2f}", f"PGD-10 {result['pgd10']:.2f}"]
    if further:
        parts.append(f"{further} {result['attacks'][further]:.2f}")
    if stage == "aa" and result["aa"] is not None:
        parts.append(f"AA {result['aa']:.2f} ({result['pgd10'] - result['aa']:.2f} below PGD-10)")
    elif quick := result["quick"].get(stage):
        parts.append(f"{stage} (a quick look, not AA) {list(quick.values())[-1]:.2f}")
    return " / ".join(parts)


def warn_if_normalised_otherwise(model, images, labels):
    """Warn if a checkpoint from elsewhere does better when its input is normalised another way."""
    images, labels = images[:1000], labels[:1000]

    def accuracy():
        return percent(pgd_evaluate(model, images, labels, eps=0, restarts=0)[0])

    given, as_given = model.normalize, accuracy()
    others = {"--no-normalize": torch.nn.Identity(),
              "PGD-AT's mean and std": models.Normalize(*models.CIFAR_NORMALIZE)}
    for name, other in others.items():
        model.normalize = other.to(images.device)
        otherwise = accuracy()
        if otherwise > as_given + 2 and runs.rank() == 0:
            print(f"warning: with {name}, {otherwise:.2f} % of the first {len(labels)} images are classified "
                  f"right, against {as_given:.2f} %: is the normalisation right?", file=sys.stderr)
    model.normalize = given


def load_subject(args, path, device):
    """What is evaluated: (model, images, labels, identity, what else the result says).

    identity: what decides the figures; a result file of another identity is of something else. Raises
    InputError if network and data do not fit together.
    """
    checkpoint = runs.load_checkpoint(path)
    ours = is_ours(checkpoint)
    trained = checkpoint["args"] if ours else {}
    data = runs.load_named(args.dataset or trained.get("dataset", "cifar10"), args.data_dir, device)
    model, spec = rebuild(args, path, checkpoint, trained)
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if data.num_classes > spec["num_classes"]:
        raise InputError(f"{path} knows {spec['num_classes']} classes, the data set has {data.num_classes}")
    needs = {a: 10 if a.endswith("-t") else 3 if a == "apgd-dlr" else 2 for a in args.attacks}
    few = [f"{a} needs {n} classes" for a, n in needs.items() if n > spec["num_classes"]]
    if few:
        raise InputError(f"{few[0]}, but {path} knows {spec['num_classes']}: try --attacks apgd-ce,square")
    n = args.n or len(data.test_labels)
    if n > len(data.test_labels):
        raise InputError(f"--n {n}: there are {len(data.test_labels):,} test images")
    identity = {**spec, "weights_sha256": runs.digest(checkpoint["state_dict"]), "data_sha256": data.sha256,
                "n": n, "eps": trained.get("eps", 8 / 255) if args.eps is None else args.eps,
                "seed": args.seed, "precision": args.precision}
    what = {"checkpoint": path.name, "epoch": checkpoint["epoch"] if ours else None,
             "test_images": len(data.test_labels)}
    identity = json.loads(json.dumps(identity))  # as it will be read back
    return model, data.test_images[:n], data.test_labels[:n], identity, what


def warn_if_masked(left):
    """Warn if FAB and Square still break many of the images that APGD leaves, a sign of masked gradients."""
    more = left["apgd-t"] - left["square"]
    if more > 0.5:
        print(f"warning: FAB and Square break {more:.2f} % of the images after APGD: are gradients masked?",
              file=sys.stderr)


def further_pgd(args):
    """The name of the PGD that the flags ask for beside PGD-10, or None."""
    if (args.pgd_steps, args.restarts, args.loss) == (10, 1, "ce"):
        return None
    return f"pgd-{args.loss}-{args.pgd_steps}x{args.restarts}"


def run_stages(model, images, labels, args, result, save, keep):
    """Print clean accuracy, PGD-10 and the further PGD, and first run what the result lacks.

    save(name, seconds=...) puts the result on the disk after such a stage.
    """
    if "pgd10" not in result["stages"]:
        clean, last, worst, seconds = run_pgd(model, images, labels, args, "PGD-10", eps=result["eps"])
        result |= {"clean": percent(clean), "pgd10": percent(last), "pgd10_worst": percent(worst)}
        keep(clean=clean, pgd10=last, pgd10_worst=worst)
        save("pgd10", seconds=seconds)
        if result["epoch"] is None:
            warn_if_normalised_otherwise(model, images, labels)
    show("clean", result["clean"])
    show("PGD-10", result["pgd10"], result["stages"]["pgd10"]["seconds"],
         f"(every iterate right: {result['pgd10_worst']:.2f})")

    if name := further_pgd(args):
        if name not in result["stages"]:
            attack = {"steps": args.pgd_steps, "restarts": args.restarts, "loss": LOSSES[args.loss]}
            _, _, worst, seconds = run_pgd(model, images, labels, args, name, eps=result["eps"], **attack)
            result["attacks"][name] = percent(worst)
            keep(**{name: worst})
            save(name, seconds=seconds)
        show(name, result["attacks"][name], result["stages"][name]["seconds"],
             "(every iterate of every restart right)")


def main():
    args = parse_args()
    device = runs.start(args)
    path, result_path = locate(args)
    if args.target.is_dir() and not path.exists():  # deleted, to save disk
        result = runs.read_json(result_path, RESULT)
        print(f"{path} is gone, but has been evaluated: {summary(result)}   ({result_path})")
        return
    model, images, labels, identity, what = load_subject(args, path, device)
    stage = "aa" if args.attacks == STANDARD else ",".join(args.attacks)
    state_path, flags_path = result_path.with_suffix(".state.json"), result_path.with_suffix(".npz")
    adv_path = result_path.with_suffix(".adv.npy")  # what --save-adv has so far
    state_identity = {**identity, "attacks": list(args.attacks), "batch_size": args.batch_size,
                      "save_adv": bool(args.save_adv)}

    def save(name, **facts):
        result["stages"][name] = {**facts, "batch_size": args.batch_size, **runs.environment(device)}
        runs.write_json(result_path, result)

    def keep(**flags):
        keep_flags(flags_path, **flags)

    with runs.locked_folder(result_path.parent, f".{result_path.stem}.lock"):
        result = open_result(result_path, identity, args.overwrite) | what
        if not result["stages"]:
            flags_path.unlink(missing_ok=True)  # of a result that is discarded
        todo = args.attacks and stage not in result["stages"]
        if todo:  # first of all, for it may be refused
            aa = AutoAttack(model, result["eps"], args.seed, device)
            state = open_state(state_path, state_identity, args.overwrite)
        if args.save_adv and args.save_adv.resolve() == flags_path.resolve():
            raise InputError(f"--save-adv {args.save_adv}: that file says which images withstood what")
        if args.save_adv and (not todo or runs.world() > 1):
            why = "it takes one process" if todo else f"{result_path} is there already, add --overwrite"
            raise InputError(f"--save-adv: {why}")
        print(f"{path}: {result['model']}, {len(labels):,} of {result['test_images']:,} test images, "
              f"eps {runs.fraction_text(result['eps'])}, {args.precision}")
        run_stages(model, images, labels, args, result, save, keep)
        if todo:
            adversarial = open_adversarial(adv_path, images, state is None) if args.save_adv else None
            if state is None:
                clean, *_ = run_pgd(model, images, labels, args, "clean", eps=result["eps"], restarts=0)
                state = {"identity": state_identity, "robust": clean.int().tolist(), "todo": None,
                         "left": {}, "seconds": {}}
            else:
                print(f"going on with the evaluation that was interrupted ({state_path})")
            run_autoattack(aa, images, labels, args.attacks, args.batch_size, state, state_path,
                           lambda attack, robust: keep(**{attack: robust}), adversarial)
            if args.save_adv:
                robust = np.array(state["robust"], dtype=bool)
                write_npz(args.save_adv, images=adversarial, labels=labels.cpu().numpy(), robust=robust)
            if stage == "aa":
                result["aa"] = state["left"][STANDARD[-1]]
                result["attacks"] |= state["left"]
                warn_if_masked(state["left"])
            else:
                result["quick"][stage] = state["left"]
            save(stage, seconds=state["seconds"], autoattack=aa.name)
        elif args.attacks:
            for attack in args.attacks:
                show(attack, (result["attacks"] if stage == "aa" else result["quick"][stage])[attack])
        if args.attacks and runs.rank() == 0:
            state_path.unlink(missing_ok=True)
            adv_path.unlink(missing_ok=True)
    print(f"{path}, {len(labels):,} images: {summary(result, stage, further_pgd(args))}   ({result_path})")


if __name__ == "__main__":
    runs.run_script(main)
