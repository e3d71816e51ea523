"""A pretended GPU: what the scripts do on CUDA, executed on a machine without one.

Tensors created on or moved to `cuda...` stay on the CPU but say that they are on the GPU, and so do all that
are computed from them; mixing them with the CPU's is an error, as on a GPU. What this cannot show: kernels,
their precision (TF32, bf16 autocast), compiled code, asynchrony, memory, speed. A CUDA graph is played by
PretendedGraph.
"""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

import utils

GETTERS = {torch.Tensor.device.__get__: torch.device("cuda", 0), torch.Tensor.is_cuda.__get__: True}
MAY_MIX = {torch.Tensor.copy_, torch.Tensor.data.__set__, torch.Tensor.__getitem__,
           torch._has_compatible_shallow_copy_type}
COPY_PARAMETER = torch.nn.Parameter.__deepcopy__


def says_cuda(value):
    return isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"


class Generator(torch.Generator):
    """A subclass, since torch's own modules name torch.Generator in type hints while they are imported."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.on_gpu = says_cuda(device)
        return made


def copy_parameter(parameter, memo):
    """Parameter.__deepcopy__ makes the copy by a constructor that no mode sees."""
    copied = COPY_PARAMETER(parameter, memo)
    if hasattr(parameter, "on_gpu"):
        copied.on_gpu = True
    return copied


class PretendedGraph:
    """A stand-in for utils.capture: a replay calls the function again, and copies what it returns to where
    the capture's output lies. It, too, runs the function three times beforehand, and leaves an output that is
    not the function's until the first replay."""

    made = []  # all of them

    def __init__(self, function):
        self.function, self.replays = function, 0
        for _ in range(3):
            self.output = function()
        self.output = torch.full_like(self.output, torch.nan)
        self.made.append(self)

    def replay(self):
        self.replays += 1
        self.output.copy_(self.function())

    @classmethod
    def record(cls, function):
        graph = cls(function)
        return graph, graph.output


class PretendedGPU(TorchFunctionMode):
    """While it is entered, tensors that are sent to CUDA say that they are there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        flat, _ = tree_flatten((args, kwargs))
        tensors = [v for v in flat if isinstance(v, torch.Tensor)]
        here = [hasattr(t, "on_gpu") for t in tensors]
        if func in GETTERS and here[0]:
            return GETTERS[func]
        if func == torch.Tensor.data.__set__ and here[-1]:
            tensors[0].on_gpu = True
        sent = any(map(says_cuda, flat))
        back = func in (torch.Tensor.cpu, torch.Tensor.numpy)
        back = back or func is torch.Tensor.to and any(str(v) == "cpu" for v in flat[1:])
        if any(here) and func not in MAY_MIX and any(not h and t.dim() for h, t in zip(here, tensors)):
            raise RuntimeError(f"{func.__name__}: expected all tensors to be on the same device")
        if (g := kwargs.get("generator")) is not None and g.on_gpu != (sent or any(here)):
            raise RuntimeError(f"{func.__name__}: the generator is on another device")
        args, kwargs = tree_map(lambda v: torch.device("cpu") if says_cuda(v) else v, (args, kwargs))
        out = func(*args, **kwargs)
        if sent or back:  # a copy, as between devices
            out = tree_map(lambda v: v.clone() if any(v is t for t in tensors) else v, out)
        for t in tree_flatten(out)[0]:
            if isinstance(t, torch.Tensor) and (any(here) or sent) and not back:
                t.on_gpu = True
        return out


@contextlib.contextmanager
def pretended_gpu(n=1):
    """A machine with n GPUs, of which tensors are on the first."""
    def set_driver_device(index):  # called by the real torch.cuda.set_device, after its checks
        if index >= n:
            raise RuntimeError("CUDA error: invalid device ordinal")

    cuda = {"is_available": True, "device_count": n, "current_device": 0, "is_bf16_supported": True,
            "is_current_stream_capturing": False, "get_device_name": "pretended GPU"}
    stream = mock.Mock(is_capturing=lambda: False)
    PretendedGraph.made.clear()
    with mock.patch.object(utils, "capture", PretendedGraph.record), \
            mock.patch.multiple(torch.cuda, **{k: mock.Mock(return_value=v) for k, v in cuda.items()}), \
            mock.patch.object(torch.accelerator, "current_stream", lambda: stream), \
            mock.patch.object(torch._C, "_cuda_setDevice", set_driver_device, create=True), \
            mock.patch.object(torch, "Generator", Generator), \
            mock.patch.object(torch.nn.Parameter, "__deepcopy__", copy_parameter), \
            mock.patch.object(torch, "compile", lambda model, **options: model), PretendedGPU():
        yield
