"""Wide ResNets (Zagoruyko & Komodakis, 2016) without dropout; names and layers as in yaodongyu/TRADES.

Released WRN checkpoints also carry `sub_block1.*`, a block that no forward pass uses: drop those keys on
loading (eval_aa.py does).
"""

import math

from torch import nn

from .network import Network


class BasicBlock(nn.Module):
    """BN - act - conv3x3 - BN - act - conv3x3, plus the shortcut."""

    def __init__(self, in_planes, out_planes, stride, act):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, out_planes, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_planes)
        self.conv2 = nn.Conv2d(out_planes, out_planes, 3, padding=1, bias=False)
        self.act = act()
        same = in_planes == out_planes
        self.convShortcut = None if same else nn.Conv2d(in_planes, out_planes, 1, stride, bias=False)

    def forward(self, x):
        out = self.act(self.bn1(x))
        # a projection sees the activated input, the identity the raw one
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.act(self.bn2(out)))
        return out + shortcut


class NetworkBlock(nn.Module):
    """A stage of n blocks; exists for the `layer` in the state-dict names."""

    def __init__(self, n, in_planes, out_planes, stride, act):
        super().__init__()
        self.layer = nn.Sequential(
            BasicBlock(in_planes, out_planes, stride, act),
            *(BasicBlock(out_planes, out_planes, 1, act) for _ in range(n - 1)),
        )

    def forward(self, x):
        return self.layer(x)


class WideResNet(Network):
    """x (B, 3, 32, 32) in [0, 1] -> logits (B, num_classes). depth = 6 n + 4: n blocks in each stage."""

    def __init__(self, depth, widen_factor, num_classes, act):
        super().__init__()
        n, rest = divmod(depth - 4, 6)
        if rest:
            raise ValueError(f"depth {depth} is not 6 n + 4")
        widths = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1 = NetworkBlock(n, widths[0], widths[1], 1, act)
        self.block2 = NetworkBlock(n, widths[1], widths[2], 2, act)
        self.block3 = NetworkBlock(n, widths[2], widths[3], 2, act)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.act = act()
        self.fc = nn.Linear(widths[3], num_classes)
        self.init_weights()

    def init_weights(self):
        """He initialisation over the fan-out; BN is 1 and 0 already."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                k, _ = m.kernel_size
                nn.init.normal_(m.weight, 0, math.sqrt(2 / (k * k * m.out_channels)))
        nn.init.zeros_(self.fc.bias)

    def logits(self, x):
        out = self.conv1(x)
        out = self.block3(self.block2(self.block1(out)))
        out = self.act(self.bn1(out)).mean((2, 3))
        return self.fc(out)
