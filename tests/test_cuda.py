"""What only a GPU can show; skipped without one."""

import pytest
import torch

import models
import train_pgdat
import train_trades
import utils

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def setup(script, *argv):
    args = script.parse_args(["--model", "tiny", "--batch-size", "40", *argv])
    utils.set_precision("fp32", torch.device("cuda"))
    torch.manual_seed(0)
    model = models.build("tiny", normalize=script.NORMALIZE).cuda().to(memory_format=torch.channels_last)
    x = torch.rand(40, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    return args, model.train(), x, torch.randint(10, (40,), device="cuda")


@pytest.mark.parametrize("script", [train_pgdat, train_trades])
@pytest.mark.parametrize("bn_mode", ["train", "eval"])
def test_the_attack_in_a_graph_is_the_attack(script, bn_mode):
    """Iterates and running statistics, over several calls, weights changing in between, and two batch sizes."""
    args, model, x, y = setup(script, "--bn-mode", bn_mode)
    outcomes = []
    for graphed in (False, True):
        _, model, _, _ = setup(script)
        original, script.replayed = script.replayed, (lambda f, m, c: utils.Graphed(f, m)) if graphed else (lambda f, m, c: f)
        attack, seen = script.make_attack(model, model, args), []
        script.replayed = original
        for i, n in enumerate((40, 16, 40)):
            noise, eps = utils.seeded("cuda", i), (4 + i) / 255
            seen.append(attack(x[:n], y[:n], eps, 0, noise) if script is train_pgdat else attack(x[:n], eps, noise))
            with torch.no_grad():
                model.linear.weight.mul_(1.5)
        outcomes.append((seen, list(model.buffers())))
    for eager, graphed in zip(outcomes[0][0], outcomes[1][0]):
        assert ((eager - graphed).abs() < 1e-6).float().mean() > 0.99  # the sign of a gradient near 0 may differ
    for eager, graphed in zip(outcomes[0][1], outcomes[1][1]):
        torch.testing.assert_close(eager, graphed, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("script", [train_pgdat, train_trades])
def test_a_step_never_waits_for_the_device(script):
    args, model, x, y = setup(script)
    attack, optimizer, meter = script.make_attack(model, model, args), utils.make_optimizer(model, "sgd", 0.1, 5e-4), utils.Meter("cuda")
    for i in range(3):
        torch.cuda.set_sync_debug_mode("error" if i == 2 else "default")
        try:
            noise = utils.seeded(x.device, i)
            x_adv = attack(x, y, args.eps, 0, noise) if script is train_pgdat else attack(x, args.eps, noise)
            meter.add(*(lambda loss, logits, clean: (loss, y, logits, clean))(*script.train_step(model, model, optimizer, x, x_adv, y, args)))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_bf16_keeps_master_weights_statistics_and_input_gradients_in_fp32():
    _, model, x, y = setup(train_pgdat)
    forward = utils.make_forward(model, "bf16")
    x.requires_grad_()
    logits = forward(x)
    grad, = torch.autograd.grad(logits.sum(), x)
    assert logits.dtype == grad.dtype == torch.float32
    assert all(t.dtype in (torch.float32, torch.int64) for t in model.state_dict().values())


def test_evaluation_batches_fit():
    _, model, _, _ = setup(train_pgdat)
    with utils.attack_mode(model, "eval"):
        assert utils.evaluation_batch(model, torch.device("cuda")) == 1000
