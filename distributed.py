"""Several processes: torchrun starts one for each GPU, a rank, and each does every step on its share of the batch.

Rank 0 alone decides, shows and writes. Without torchrun there is one rank, and nothing here does anything.
"""

import contextlib
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from command_line import UserError
from device import pick_device


def is_distributed():
    """Whether this process is one of the ranks that torchrun started, and has joined them."""
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if is_distributed() else 0


def world_size():
    return dist.get_world_size() if is_distributed() else 1


@contextlib.contextmanager
def joined_ranks():
    """Join the other processes if torchrun started this one, and leave them together where all went well."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        yield
        return
    # With CUDA both: tensors on the GPU travel by NCCL, the small messages below, which are on the CPU, by gloo.
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    try:
        yield
        dist.barrier()  # torchrun kills the others as soon as one has ended with another status than 0
    finally:
        dist.destroy_process_group()


def pick_rank_device(name):
    """Return the torch.device that the value of --device names; under torchrun the CPU or this rank's own GPU."""
    if is_distributed() and name not in ("auto", "cuda", "cpu"):
        raise UserError(f"--device {name}: under torchrun each process has a GPU of its own; choose auto, cuda or cpu")
    if is_distributed() and name != "cpu":
        name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" or torch.cuda.is_available() else "cpu"
    return pick_device(name)


def share_of_batch(batch_size):
    """Return the slice of a batch that is this rank's: contiguous, of the same length on all ranks."""
    share, rest = divmod(batch_size, world_size())
    if rest:
        raise UserError(f"--batch-size {batch_size}: cannot be shared by {world_size()} processes; use a multiple")
    return slice(rank() * share, (rank() + 1) * share)


def from_rank_0(function, *args):
    """Return function(*args) as it is on rank 0, which alone calls it. The result must be picklable."""
    result = [function(*args) if rank() == 0 else None]
    if is_distributed():
        dist.broadcast_object_list(result, src=0)
    return result[0]


def one_rank_first(function):
    """Return function(), which one rank of each machine has called to its end before the others begin."""
    if not is_distributed():
        return function()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))  # packing takes as long as it takes
    result = function() if os.environ["LOCAL_RANK"] == "0" else None
    dist.barrier(group)
    return function() if result is None else result


def agree_on_stop(signals):
    """Return the signal that ends the run after this step, whichever rank it reached; 0 if none did.

    signals: the numbers of those that reached this rank. The message is on the CPU, so it never waits for the GPU.
    """
    number = torch.tensor(signals[0] if signals else 0)
    if is_distributed():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


class MeanOverRanks(torch.autograd.Function):
    """The mean of a tensor over all ranks; its gradient is the mean of theirs. torch's own function is deprecated."""

    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / world_size()

    @staticmethod
    def backward(ctx, gradient):
        return MeanOverRanks.apply(gradient)


def mean_over_ranks(tensor):
    """Return the mean of a tensor over all ranks, with its gradient; all must call it, with the same shape."""
    return MeanOverRanks.apply(tensor) if is_distributed() else tensor


@torch.no_grad()
def average_over_ranks(tensors):
    """Put in place of each tensor its mean over all ranks, in one message."""
    if is_distributed():
        flat = mean_over_ranks(torch.cat([tensor.flatten() for tensor in tensors]))
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


@torch.no_grad()
def gather_batch(share, batch_size):
    """Return the whole batch (B, ...) on every rank, of which each has a share (B / ranks, ...)."""
    whole = share.new_zeros(batch_size, *share.shape[1:], dtype=torch.float32)
    whole[share_of_batch(batch_size)] = share.float() * world_size()
    average_over_ranks([whole])
    return whole


class BatchNormOverRanks(nn.BatchNorm2d):
    """BatchNorm2d over the batches of all ranks: (N, C, H, W) -> (N, C, H, W). nn.SyncBatchNorm is for GPUs alone."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean = mean_over_ranks(x.float().mean((0, 2, 3)))  # (C,)
        centred = x.float() - mean[:, None, None]  # E[x^2] - E[x]^2 would lose digits where the mean is large
        variance = mean_over_ranks(centred.square().mean((0, 2, 3)))  # (C,)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * world_size()  # numbers that each mean is over
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        normed = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        if self.affine:
            normed = normed * self.weight[:, None, None] + self.bias[:, None, None]
        return normed.to(x.dtype)


def normalise_over_ranks(network):
    """Let the BatchNorms in `network` see the batches of all ranks; the names in its state dict stay the same."""
    for module in network.modules() if is_distributed() else ():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = BatchNormOverRanks  # it has the same state, and only computes it otherwise
