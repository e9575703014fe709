"""CUDA graphs: a function's kernels, recorded once and then launched all at once.

A step of the U-Net is some 2,800 kernels of a few microseconds each, and Python takes longer to ask for one than a large
GPU to run it. A recording asks once. What it is not: a compiler. The kernels stay the same, and so do the results;
torch.compile makes fewer and faster ones, which can be recorded too. On other devices nothing happens here.
"""

from collections import Counter

import torch

from support.errors import warn

WARM_UP = 3  # calls before the recording: libraries and torch.compile choose their kernels in the first ones


def record_cuda_graph(function, device, parameters=()):
    """-> the same function; on CUDA, from its fourth call with arguments of the same shapes on, a replay of its kernels.

    function(*arguments) -> a tensor, a tuple of them or nothing; arguments that are no tensors are compared by value. It
    must do the same at every call: draw nothing at random, read nothing back from the GPU, take from outside nothing but
    weights, which must stay where they are in memory. All calls are under one autocast and one grad mode. parameters:
    those whose .grad it leaves behind. What cannot be recorded runs as it is, after a warning.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return function
    calls, recordings, pool = Counter(), {}, torch.cuda.graph_pool_handle()  # one recording runs at a time

    def call(*arguments):
        kind = tuple((a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments)
        calls[kind] += 1
        if calls[kind] <= WARM_UP:
            return function(*arguments)
        if kind not in recordings:
            with torch.cuda.device(device):
                recordings[kind] = record(function, arguments, parameters, pool)
        return recordings[kind](*arguments)

    return call


def record(function, arguments, parameters, pool):
    """-> replay(*arguments), for arguments of these shapes. pool: the memory that the recordings of a function share."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    own = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    try:
        with torch.cuda.graph(graph, pool=pool):
            outputs = function(*own)
    except RuntimeError as e:
        # back to the stream before the recording, with a generator that does not take part in it
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        why = (str(e.__context__ or e).strip().splitlines() or [""])[0][:200]  # ending a failed recording fails too
        warn(f"no CUDA graph can be made here ({why}); each step takes longer")
        return function
    inputs, gradients = tensors_of(own), [p.grad for p in parameters]

    def replay(*arguments):
        torch._foreach_copy_(inputs, tensors_of(arguments))
        graph.replay()
        for p, gradient in zip(parameters, gradients):  # a call with other shapes may have left its own
            p.grad = gradient
        return copies(outputs)  # the next replay overwrites what this one leaves

    return replay


def copies(outputs):
    """Of a tensor, a tuple of them, or nothing."""
    if isinstance(outputs, tuple):
        return tuple(map(copies, outputs))
    return None if outputs is None else outputs.clone()


def tensors_of(arguments):
    return [a for a in arguments if isinstance(a, torch.Tensor)]
