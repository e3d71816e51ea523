"""A pretended GPU: what the scripts do on CUDA, executed on a machine without one.

Tensors created on or moved to `cuda...` stay on the CPU but say that they are on the GPU, and so do all that
are computed from them; mixing them with the CPU's is an error, as on a GPU. What this cannot show: kernels,
their precision (TF32, bf16 autocast), compiled code, asynchrony, streams, memory, speed.
"""

import contextlib
import types

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GETTERS = {torch.Tensor.device.__get__: lambda: torch.device("cuda", 0),
           torch.Tensor.is_cuda.__get__: lambda: True}
MAY_MIX = {torch.Tensor.copy_, torch.Tensor.data.__set__, torch.Tensor.__getitem__,
           torch._has_compatible_shallow_copy_type}
CPU_GENERATOR = torch.Generator
COPY_PARAMETER = torch.nn.Parameter.__deepcopy__


def says_cuda(value):
    return str(value).partition(":")[0] == "cuda" if isinstance(value, (str, torch.device)) else False


class Generator(CPU_GENERATOR):
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


class PretendedGPU(TorchFunctionMode):
    """While it is entered, tensors that are sent to CUDA say that they are there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        flat, _ = tree_flatten((args, kwargs))
        tensors = [v for v in flat if isinstance(v, torch.Tensor)]
        here = [hasattr(t, "on_gpu") for t in tensors]
        if func in GETTERS:
            return GETTERS[func]() if here[0] else func(*args, **kwargs)
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
        if (any(here) or sent) and not back:
            for t in tree_flatten(out)[0]:
                if isinstance(t, torch.Tensor):
                    t.on_gpu = True
        return out


class RecordedGraph:
    """Stands in for torch.cuda.CUDAGraph: keeps the operations of a capture, and executes them again, on the
    same tensors."""

    def __init__(self):
        self.operations = []

    def replay(self):
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for func, args, kwargs, out in self.operations:
                for old, new in zip(tree_flatten(out)[0], tree_flatten(func(*args, **kwargs))[0]):
                    # neither in place nor a view
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Capture(TorchDispatchMode):
    """Stands in for torch.cuda.graph: records into the graph; what would wait for the device is refused, as
    in a capture."""

    def __init__(self, graph, pool=None):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise RuntimeError(f"{func} waits for the device: not permitted while a graph is captured")
        out = func(*args, **(kwargs or {}))
        self.graph.operations.append((func, args, kwargs or {}, out))
        return out


def stand_ins(n):
    """What replaces the parts of torch that need a driver, for n GPUs: {(object, name): value}."""
    def set_driver_device(index):  # called by the real torch.cuda.set_device, after its checks
        if index >= n:
            raise RuntimeError("CUDA error: invalid device ordinal")

    stream = types.SimpleNamespace(wait_stream=lambda other: None, is_capturing=lambda: False)
    cuda = {
        "is_available": lambda: True, "device_count": lambda: n, "current_device": lambda: 0,
        "is_bf16_supported": lambda: True,
        "get_device_name": lambda device=None: "pretended GPU", "synchronize": lambda device=None: None,
        "memory_allocated": lambda device=None: 0, "max_memory_allocated": lambda device=None: 1,
        "reset_peak_memory_stats": lambda device=None: None, "graph_pool_handle": lambda: (0, 0),
        "CUDAGraph": RecordedGraph, "graph": Capture, "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext, "is_current_stream_capturing": lambda: False,
    }
    return {(torch._C, "_cuda_setDevice"): set_driver_device,
            (torch.accelerator, "current_stream"): lambda: stream, (torch, "Generator"): Generator,
            (torch.nn.Parameter, "__deepcopy__"): copy_parameter,
            (torch, "compile"): lambda model, **options: model,
            **{(torch.cuda, k): v for k, v in cuda.items()}}


@contextlib.contextmanager
def pretended_gpu(n=1):
    """A machine with n GPUs, of which tensors are on the first."""
    before = {}
    for (owner, name), value in stand_ins(n).items():
        before[owner, name] = getattr(owner, name, None)
        setattr(owner, name, value)
    try:
        with PretendedGPU():
            yield
    finally:
        for (owner, name), value in before.items():
            setattr(owner, name, value)
