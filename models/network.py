"""What all architectures share: normalisation and precision live inside the model."""

import torch
from torch import nn

# Channel means and standard deviations of CIFAR-10's training set. PGD-AT normalises by them, TRADES by none.
CIFAR_NORMALIZE = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


class Normalize(nn.Module):
    """(x - mean) / std per channel, for x (B, 3, H, W). Its buffers stay out of the state dict."""

    def __init__(self, mean, std):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x):
        return (x - self.mean) / self.std


class Network(nn.Module):
    """Base of the architectures, which define logits(x): x (B, 3, 32, 32) in [0, 1] -> (B, num_classes).

    A base class, since a wrapper would change the keys of the state dict. normalize: a module that the images
    pass first. bf16: compute under bfloat16 autocast; weights, batch norm's statistics and the logits that
    come out stay float32.
    """

    def __init__(self):
        super().__init__()
        self.normalize, self.bf16 = nn.Identity(), False

    def forward(self, x):
        if not self.bf16:
            return self.logits(self.normalize(x))
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.logits(self.normalize(x)).float()
