"""python -m models: the size and cost of every architecture, beside Table 11 of Pang et al. (2021)."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from . import MODELS, build

# "Number of parameters" in Table 11; in truth the size of a checkpoint file in MB.
TABLE_11 = {
    "densenet-121": 28.29, "densenet-201": 73.55, "regnetx-200mf": 9.42, "regnetx-400mf": 19.34,
    "dpn-26": 46.47, "dpn-92": 137.50, "preactresnet-18": 44.70, "preactresnet-50": 94.28, "googlenet": 24.81,
    "resnext-29": 36.65, "senet-18": 45.09, "wrn-34-10": 193.20,
}


class Counter:
    """A file that only counts what is written to it."""

    size = 0

    def write(self, data):
        self.size += len(data)
        return len(data)

    def flush(self):
        pass


def checkpoint_mb(name):
    """Size in MB (1e6 bytes) of the file that torch.save makes of the state dict.

    wrn-34-10's includes sub_block1, a block that the field's checkpoints carry and no forward pass uses.
    """
    with torch.device("meta"):
        state = build(name).state_dict()
    if name == "wrn-34-10":
        state |= {f"sub_{k}": v for k, v in state.items() if k.startswith("block1.")}
    file = Counter()
    torch.save({k: torch.empty(v.shape, dtype=v.dtype) for k, v in state.items()}, file)
    return file.size / 1e6


def multiply_adds(name):
    """Of the convolutions and linear layers, in a forward pass of one 32x32 image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build(name).eval()(torch.empty(1, 3, 32, 32))
    return counter.get_total_flops() // 2


def main():
    print("model             parameters / M   checkpoint / MB   Table 11   difference   multiply-adds / G")
    for name in MODELS:
        with torch.device("meta"):
            parameters = sum(p.numel() for p in build(name).parameters())
        size, paper = checkpoint_mb(name), TABLE_11.get(name)
        beside = f"{paper:8.2f}   {100 * (size / paper - 1):+8.2f} %" if paper else f"{'-':>8}   {'-':>8}  "
        note = "   (with sub_block1, which no forward uses)" if name == "wrn-34-10" else ""
        cost = multiply_adds(name) / 1e9
        print(f"{name:16} {parameters / 1e6:14.2f}   {size:15.2f}   {beside}   {cost:17.3f}{note}")


if __name__ == "__main__":
    main()
