"""Several processes: torchrun starts one for each GPU, a rank, and each does all steps on its share of every batch.

Rank 0 alone decides, shows and writes. Without torchrun there is one rank, and nothing here does anything.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

from command_line import UserError
from device import pick_device


def is_distributed():
    """Whether this process is one of the ranks that torchrun started, and has joined them."""
    return dist.is_available() and dist.is_initialized()


def rank():
    """Return this process's number: 0 .. world_size() - 1."""
    return dist.get_rank() if is_distributed() else 0


def world_size():
    return dist.get_world_size() if is_distributed() else 1


def init():
    """Join the other processes if torchrun started this one. Of ranks above 0 only errors are seen then."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return
    # With CUDA both: tensors on the GPU travel by NCCL, the small messages below, which are on the CPU, by gloo.
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_nccl else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends


def leave():
    """Wait for all ranks and leave them: torchrun kills the others as soon as one has ended with a status."""
    if is_distributed():
        dist.barrier()
        dist.destroy_process_group()


def pick_rank_device(name):
    """Return the torch.device that the value of --device names; under torchrun the CPU or this rank's own GPU.

    Raises UserError where the machine lacks that device.
    """
    if not is_distributed() or name == "cpu":
        return pick_device(name)
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name}: under torchrun each process has a GPU of its own; choose auto, cuda or cpu")
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    return pick_device(f"cuda:{os.environ['LOCAL_RANK']}")


def share_of_batch(batch_size):
    """Return the slice of a batch that is this rank's: contiguous, of the same length on all ranks."""
    if batch_size % world_size():
        raise UserError(f"--batch-size {batch_size}: cannot be shared by {world_size()} processes; use a multiple")
    share = batch_size // world_size()
    return slice(rank() * share, (rank() + 1) * share)


def from_rank_0(function, *args):
    """Return function(*args) as it is on rank 0, which alone calls it. The result must be picklable."""
    result = [function(*args) if rank() == 0 else None]
    if is_distributed():
        dist.broadcast_object_list(result, src=0)
    return result[0]


def one_rank_first(function):
    """Return function(), which one rank of each machine has called to its end before the others begin."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    result = function() if first else None
    if is_distributed():
        dist.barrier()
    return result if first else function()


def mean_over_ranks(tensor):
    """Return the mean of a tensor over all ranks, with its gradient; all must call it, with the same shape."""
    return all_reduce(tensor.contiguous()) / world_size() if is_distributed() else tensor


class BatchNormOverRanks(nn.BatchNorm2d):
    """BatchNorm2d over the batches of all ranks: (N, C, H, W) -> (N, C, H, W). SyncBatchNorm refuses CPUs."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        values = x.float()  # (N, C, H, W)
        mean = mean_over_ranks(values.mean((0, 2, 3)))  # (C,)
        centred = values - mean[:, None, None]  # E[x^2] - E[x]^2 would lose digits where the mean is large
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


def wrap(network):
    """Let the BatchNorms in `network` see the batches of all ranks. Returns a wrapper that averages its gradients.

    Its parameters and the names in its state dict stay the same.
    """
    if next(network.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    else:
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = BatchNormOverRanks  # it has the same state, and only computes it otherwise
    wrapper = nn.parallel.DistributedDataParallel(network)
    wrapper.broadcast_buffers = False  # every rank comes to the same buffers by itself
    return wrapper


def agree_on_stop(signals):
    """Return the signal that ends the run after this step, whichever rank it reached; 0 if none did.

    signals: the numbers of those that reached this rank. The message is on the CPU, so it never waits for the GPU.
    """
    number = torch.tensor(signals[0] if signals else 0)
    if is_distributed():
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()
