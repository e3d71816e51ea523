"""The evaluator sends batches through AutoAttack's attacks, one after the other; stopped, it goes on."""

import json
import random

import numpy as np
import pyautoattack
import pytest
import torch

import eval_aa
import models
import utils

EPS, BATCH = 0.01, 5
QUERIES, ITERATIONS = 300, 20  # instead of 5,000 and 100: for the test's time


class Quadratic(torch.nn.Module):
    """A small smooth classifier that thousands of queries of Square cost little on."""

    def __init__(self, classes=10):
        super().__init__()
        self.classes = classes
        g = torch.Generator().manual_seed(0)
        self.w = torch.nn.Parameter(torch.randn(10, 48, generator=g), requires_grad=False)
        self.v = torch.nn.Parameter(torch.randn(10, 48, generator=g), requires_grad=False)

    def forward(self, x):
        x = torch.nn.functional.avg_pool2d(x, 8).view(len(x), -1) - 0.5  # .view refuses channels-last memory
        return (x @ self.w.T + 4 * x.square() @ self.v.T)[:, : self.classes]


def shortened(aa):
    aa.square.n_queries, aa.fab.n_iter, aa.apgd_targeted.n_iter = QUERIES, ITERATIONS, ITERATIONS
    return aa


@pytest.fixture
def pictures():
    """14 images (14, 32, 32, 3) of 4 x 4 squares, and Quadratic's labels of them, but for the first."""
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (14, 4, 4, 3), generator=g, dtype=torch.uint8)
    images = images.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels = Quadratic()(utils.to_float(images).contiguous()).argmax(1)
    labels[0] = (labels[0] + 1) % 10
    return images, labels


@pytest.fixture
def short(monkeypatch):
    make = eval_aa.make_autoattack
    monkeypatch.setattr(eval_aa, "make_autoattack", lambda *args: shortened(make(*args)))


def test_flags_are_those_of_autoattacks_own_call_in_the_order_of_keys(tmp_path, pictures, short):
    """With any module; a second call goes on where the first one was stopped."""
    model, (images, labels), path = Quadratic(), pictures, tmp_path / "mine.json"
    part = eval_aa.autoattack(model, images, labels, EPS, path, batch_size=BATCH, stop_after=3)
    assert part["n_done"] == 5 and not part["complete"] and part["aa_error"] > 0
    result = eval_aa.autoattack(model, images, labels, EPS, path, batch_size=BATCH)
    flags = np.load(path.with_suffix(".npz"))
    order = eval_aa.priority(flags["pgd10"], flags["margin"], 0)[1].argsort()
    want, x = np.zeros(14, bool), utils.to_float(images).contiguous()
    for batch in (order[:5], order[5:10], order[10:]):
        theirs = shortened(pyautoattack.AutoAttack(model, eps=EPS, seed=0, version="standard"))
        x_adv, _ = theirs.run_standard_evaluation(x[batch], labels[batch], batch_size=BATCH)
        want[batch] = model(x_adv).argmax(1) == labels[batch]
    assert 0 < want.sum() < 13
    assert (flags["square"] == want).all() and flags["done"].all()
    left = [flags[a].sum() for a in eval_aa.STANDARD]
    assert left == sorted(left, reverse=True) and left[0] > left[-1]
    assert result["aa"] == round(100 * want.sum() / 14, 2) and result["aa_error"] == 0 and result["complete"]
    with pytest.raises(utils.InputError, match="data_sha256 was"):
        eval_aa.autoattack(model, images, labels.roll(1), EPS, path, batch_size=BATCH)
    model.w[0, 0] += 1
    with pytest.raises(utils.InputError, match="weights_sha256 was"):
        eval_aa.autoattack(model, images, labels, EPS, path, batch_size=BATCH)


def test_with_few_classes_the_targeted_attacks_try_all_others(pictures, tmp_path, monkeypatch, capsys):
    make, targets = eval_aa.make_autoattack, []

    def spy(*args):
        aa = shortened(make(*args))
        targets.extend((aa.apgd_targeted.n_target_classes, aa.fab.n_target_classes))
        return aa

    monkeypatch.setattr(eval_aa, "make_autoattack", spy)
    labels = Quadratic(4)(utils.to_float(pictures[0]).contiguous()).argmax(1)
    aa = eval_aa.autoattack(Quadratic(4), pictures[0], labels, EPS, tmp_path / "x.json")["aa"]
    assert targets == [3, 3]
    assert f" / AA, 3 targets {aa:.2f}\n" in capsys.readouterr().out


def test_no_attack_is_called_on_a_batch_without_survivors_and_a_channels_last_model_is_attacked():
    """The package raises on an empty batch, and APGD calls .view on gradients in the model's own layout."""
    torch.manual_seed(0)
    model = models.build("tiny").to(memory_format=torch.channels_last).eval()
    x = utils.to_float(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)).contiguous()
    y = model(x).argmax(1)
    aa = eval_aa.make_autoattack(model, 8 / 255, 0, "cpu")
    assert dict(eval_aa.withstood(aa, ["apgd-ce"], x, y))["apgd-ce"].shape == (4,)
    wrong = dict(eval_aa.withstood(aa, ["apgd-ce", "square"], x, (y + 1) % 10))
    assert not wrong["apgd-ce"].any() and not wrong["square"].any()
    aa.model = lambda x: x.flatten(1)[:, :10] * float("nan")  # whose argmax is 0
    assert not dict(eval_aa.withstood(aa, ["apgd-ce"], x, torch.zeros_like(y)))["apgd-ce"].any()


def population(total=1000):
    """(PGD-10, margins, AutoAttack) of images: what AutoAttack breaks beyond PGD-10 has a small margin, and
    some of what PGD-10 breaks withstands a single other attack. Sorted: the robust ones come last."""
    rng = np.random.default_rng(0)
    margin = np.sort(rng.normal(size=total))
    margin -= np.quantile(margin, 0.45)
    pgd10 = margin > 0
    left = rng.random(total) < np.where(pgd10, 1 - 0.8 * np.exp(-12 * margin), 0.1 * np.exp(9 * margin))
    return pgd10, margin, left


def estimates(pgd10, margin, left, n, seeds):
    for seed in range(seeds):
        order = eval_aa.priority(pgd10, margin, seed)
        done = np.zeros(len(pgd10), bool)
        done[order[1].argsort()[:n]] = True
        yield eval_aa.estimate(pgd10, np.where(done, left, 0), done, *order)  # it sees no more than that


@pytest.mark.parametrize("n", (50, 200, 600))
def test_the_estimate_is_unbiased_over_orders_and_its_error_covers_it(n):
    pgd10, margin, left = population()
    assert 3 < (left & ~pgd10).sum() < 12 < (pgd10 & ~left).sum() < 60
    truth = 100 * left.mean()
    values, errors = np.array(list(estimates(pgd10, margin, left, n, 2000))).T
    assert abs(values.mean() - truth) < 4 * values.std() / 2000**0.5 + 0.005
    assert (errors > 0).all() and (abs(values - truth) <= 2 * errors).mean() > 0.9
    difference, rng = pgd10.astype(float) - left, np.random.default_rng(0)
    plain = [100 * difference[rng.permutation(1000)[:n]].mean() for _ in range(500)]  # in a random order
    assert n != 200 or values.std() < 0.6 * np.std(plain)
    nothing = np.zeros(1000, bool)
    values, errors = np.array(list(estimates(nothing, -abs(margin), nothing, n, 20))).T
    assert (values == 0).all() and (errors > 0).all()


def test_the_estimate_by_hand_and_at_the_end():
    """Five images, two done. t = 0.2, so p = 0.8 and 0.2. PGD-10 leaves three and AutoAttack breaks the
    second: 100 (3 - 1 / 0.2) / 5, with the variance 0.8 / 0.04. One to come withstands PGD-10: weight 2."""
    pgd10, robust = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 0, 0], bool)
    weight, key = np.array([4, 1, 2, 1, 0.5]), np.array([0.05, 0.1, 0.2, 0.3, 0.9])
    assert eval_aa.estimate(pgd10, robust, key < 0.15, weight, key) == (-40, round(20 * 20**0.5, 2))
    # with no difference: q = 2 * 0.2; if no image to come withstands PGD-10, q = 0.75 * 0.3
    assert eval_aa.estimate(pgd10, pgd10, key < 0.15, weight, key) == (60, round(20 * (0.6 / 0.16) ** 0.5, 2))
    q = 0.75 * 0.3
    assert eval_aa.estimate(pgd10, pgd10, key < 0.25, weight, key) == (60, round(20 * (1 - q) ** 0.5 / q, 2))
    assert eval_aa.estimate(pgd10, robust, key < 1, weight, key) == (20, 0)


def test_weights_and_keys_by_hand():
    """Ranks of closeness to 0, 0 and 1/2 in each group; keys are u / w."""
    margin, pgd10 = np.array([0.3, -0.1, 0.1, -np.inf]), np.array([1, 0, 1, 0], bool)
    weight, key = eval_aa.priority(pgd10, margin, 5)
    np.testing.assert_allclose(weight, [1 / 0.55, 0.3 / 0.05, 1 / 0.05, 0.3 / 0.55])
    u = key * weight
    assert ((0 <= u) & (u < 1)).all() and len(set(u)) == 4
    other = eval_aa.priority(~pgd10, margin[::-1], 5)
    np.testing.assert_allclose(other[0] * other[1], u)  # drawn by the seed and the image's number alone
    assert (eval_aa.priority(pgd10, margin, 6)[1] != key).all()


def test_the_order_does_not_depend_on_the_batch_size(tmp_path, pictures):
    result = eval_aa.autoattack(Quadratic(), *pictures, EPS, tmp_path / "r.json", ["apgd-ce"], 0, 2, 9)
    flags = np.load(tmp_path / "r.npz")
    order = eval_aa.priority(flags["pgd10"], flags["margin"], 0)[1].argsort()
    assert flags["done"][order].tolist() == [i < 10 for i in range(14)] and result["n_done"] == 10


def test_it_stops_as_soon_as_the_error_is_small_enough(tmp_path, pictures):
    argv = Quadratic(), *pictures, EPS, tmp_path / "r.json", ["apgd-ce", "apgd-t"], 0, 2
    first = eval_aa.autoattack(*argv, stop_after=2)
    error = first["left"]["apgd-t"][1] - 0.01
    second = eval_aa.autoattack(*argv, error=error)
    assert 2 < second["n_done"] < 14 and second["left"]["apgd-t"][1] <= error
    assert eval_aa.autoattack(*argv, error=error)["n_done"] == second["n_done"]


# ---- Which function it is of -----------------------------------------------------------------------------


class Defence(torch.nn.Module):
    """A module of somebody's own: what it computes depends on more than its weights."""

    def __init__(self):
        super().__init__()
        self.net, self.scale, self.act = Quadratic(), 1.0, torch.nn.Identity()
        self.others, self.purify = [], lambda x: x

    def forward(self, x):
        logits = self.act(self.net(self.purify(x) * self.scale))
        return logits + sum(other(x) for other in self.others)


@pytest.mark.parametrize("change", [
    lambda m: setattr(m, "scale", 0.9),  # a normalisation that is a plain attribute
    lambda m: setattr(m, "act", torch.nn.Tanh()),
    lambda m: setattr(m, "purify", lambda x: (8 * x).round() / 8),  # a wrapped defence
    lambda m: m.others.append(Quadratic()),  # an ensemble in a list
    lambda m: setattr(m, "forward", lambda x: Defence.forward(m, x.flip(3))),  # an edited file
])
def test_the_same_weights_in_another_function_are_another_evaluation(tmp_path, pictures, change):
    argv = *pictures, EPS, tmp_path / "r.json", ["apgd-ce"], 0, 5
    assert eval_aa.autoattack(Defence(), *argv, stop_after=5)["n_done"] == 5
    before = files(tmp_path)
    changed = Defence()
    change(changed)
    with pytest.raises(utils.InputError, match="logits"):
        eval_aa.autoattack(changed, *argv)
    assert files(tmp_path) == before
    assert eval_aa.autoattack(Defence(), *argv)["complete"]


class Noise(torch.nn.Module):
    def forward(self, x):
        return x + torch.randn(10)


@pytest.mark.parametrize("last", [torch.nn.BatchNorm1d(10, track_running_stats=False), Noise()])
def test_logits_that_depend_on_the_batch_or_on_chance_are_refused(tmp_path, pictures, last):
    model = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 10), last)
    with pytest.raises((utils.InputError, ValueError), match="random, or depend|more than 1 value"):
        eval_aa.autoattack(model, *pictures, EPS, tmp_path / "r.json", ["apgd-ce"])
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("change", [{"eps": 8}, {"path": "r.npz"}, {"images": torch.zeros(14, 3, 32, 32)},
                                    {"labels": torch.full((14,), 10)}])
def test_arguments_that_do_not_fit_are_refused(tmp_path, pictures, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    images, labels = pictures
    given = {"images": images, "labels": labels, "eps": EPS, "path": "r.json", "attacks": ["apgd-ce"]}
    with pytest.raises(utils.InputError):
        eval_aa.autoattack(Quadratic(), **given | change)
    assert files(tmp_path) == {}


def test_it_runs_in_inference_mode_and_with_a_state_of_any_kind(tmp_path, pictures):
    """As in Lightning's test loop, whose images and labels are tensors of inference mode."""
    model = Quadratic()
    model.get_extra_state = lambda: {"a state": "of any kind"}
    want = eval_aa.autoattack(model, *pictures, EPS, tmp_path / "a.json", ["apgd-ce"])
    with torch.inference_mode():
        images, labels = (t.clone() for t in pictures)
        got = eval_aa.autoattack(model, images, labels, EPS, tmp_path / "b.json", ["apgd-ce"])
    assert got["left"] == want["left"] and 0 < want["left"]["apgd-ce"][0] < 93


def test_of_an_older_order_only_what_is_at_its_end_is_taken(tmp_path, pictures):
    argv = Quadratic(), *pictures, EPS, tmp_path / "r.json", ["apgd-ce"], 0, 5

    def make_old():
        arrays = dict(np.load(tmp_path / "r.npz"))
        del arrays["margin"]
        result = json.loads(str(arrays["result"]))
        del result["logits"]
        np.savez(tmp_path / "r.npz", **arrays | {"result": json.dumps(result)})
        return files(tmp_path)

    eval_aa.autoattack(*argv, stop_after=5)
    make_old()
    with pytest.raises(utils.InputError, match="older version"):
        eval_aa.autoattack(*argv)
    for name in ("r.json", "r.npz"):
        (tmp_path / name).unlink()
    want = eval_aa.autoattack(*argv)["left"]
    before = make_old()
    assert eval_aa.autoattack(*argv)["left"] == {a: list(v) for a, v in want.items()}
    assert files(tmp_path) == before


@pytest.fixture
def checkpoint(tmp_path, small_npz, monkeypatch):
    """A folder with tiny.pt, a state dict, and small.npz; the working directory is in it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    model = models.build("tiny")
    for m in model.modules():
        m.momentum = 1.0  # one forward fills in batch norm's statistics: predictions are not all alike
    model(utils.to_float(utils.load_dataset(small_npz).test_images))
    torch.save({f"module.{k}": v for k, v in model.state_dict().items()}, "tiny.pt")
    (tmp_path / "small.npz").write_bytes(small_npz.read_bytes())
    return tmp_path


TINY = ("tiny.pt", "--model", "tiny", "--dataset", "small.npz")


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".lock" and p.is_file()}


def test_an_interruption_at_any_moment_changes_no_flag(script, checkpoint, monkeypatch):
    argv = [*TINY, "--eps", "1/255", "--attacks", "apgd-ce", "--n", 12, "--batch-size", 2]
    status, _, err = script(eval_aa, *argv)
    assert status == 0, err
    whole, write = dict(np.load("tiny_result.npz")), utils.write_whole
    moments, interrupted = random.Random(1), 0

    def dying(path, fill):
        moment = moments.choice(("before", "after", "", ""))
        if moment == "before":
            raise KeyboardInterrupt
        write(path, fill)
        if moment == "after":
            raise KeyboardInterrupt

    monkeypatch.setattr(utils, "write_whole", dying)
    while (status := script(eval_aa, *argv, "--out", "cut.json")[0]) == 130:
        interrupted += 1
    cut = dict(np.load("cut.npz"))
    assert status == 0 and interrupted > 3 and json.loads((checkpoint / "cut.json").read_text())["complete"]
    assert whole.keys() == cut.keys() and all((whole[k] == cut[k]).all() for k in whole if k != "result")


@pytest.mark.parametrize("argv, problem", [
    (("--out", "small.json"), "small.json is of another evaluation"),  # it is the data set
    (("--out", "other.json"), "other.npz"),
    (("--eps", "4/255"), "eps was"),
    (("--batch-size", 7), "batch_size was 250, is 7"),
    (("--dataset", "nine.npz"), "nine.npz has 9 classes"),
    (("--n", "41"), "40 test images, not 10 and 41"),
    (("--no-normalize", "--mean", "0", "0", "0", "--std", "1", "1", "1"), "--no-normalize"),
    (("--stop-after", "3"), "have no effect with --attacks none"),
])
def test_what_is_refused_leaves_everything_as_it_was(script, checkpoint, argv, problem):
    assert script(eval_aa, *TINY, "--attacks", "none")[0] == 0
    (checkpoint / "other.json").write_text('{"clean": 3}')
    arrays = dict(np.load("small.npz"))
    np.savez("nine.npz", **arrays | {k: arrays[k].clip(0, 8) for k in ("train_labels", "test_labels")})
    before = files(checkpoint)
    status, _, err = script(eval_aa, *TINY, "--attacks", "none", *argv)
    assert status == 2 and problem in err and len(err.splitlines()) == 1, err
    assert files(checkpoint) == before


def test_anyones_checkpoint_is_normalised_as_the_flags_say(script, checkpoint):
    data = utils.load_dataset("small.npz")
    x = utils.to_float(data.test_images)
    model, _, _ = eval_aa.load_model("tiny.pt", "tiny")
    model.normalize = torch.nn.Identity()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.1])
    normalised = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for i, (flags, shown) in enumerate([
            (("--no-normalize",), x), (("--mean", 0.5, 0.4, 0.3, "--std", 0.2, 0.2, 0.1), normalised)]):
        status, _, err = script(eval_aa, *TINY, *flags, "--attacks", "none", "--out", f"{i}.json")
        assert status == 0, err
        result = json.loads((checkpoint / f"{i}.json").read_text())
        assert result["clean"] == utils.percent(model(shown).argmax(1) == data.test_labels)
        assert result["eps"] == 8 / 255 and result["precision"] == "fp32"
