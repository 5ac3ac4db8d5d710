"""Several processes, as torchrun starts them: which rows are whose, gradients averaged (DDP) or weights sharded (FSDP2), sharded checkpoints.

With one process every function here does nothing or the obvious.
"""

import contextlib
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

from checkpoint import first_line
from optim import whole
from sample import check_device


@contextlib.contextmanager
def processes(device, sharding):
    """Joins the processes that torchrun started, if it did; yields this one's device. FSDP makes a group of one process, too."""
    started = "RANK" in os.environ and "LOCAL_RANK" in os.environ
    if started and device.startswith("cuda:"):
        raise ValueError(f"--device {device}: under torchrun each process takes a GPU of its own, --device cuda")
    if started and device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    check_device(device)
    if not started and sharding != "fsdp":
        yield device
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)
    alone = {} if started else dict(rank=0, world_size=1, store=dist.HashStore())
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=2), **alone)  # the others wait while rank 0 evaluates
    try:
        yield device
    finally:
        failed = isinstance(sys.exc_info()[1], Exception)       # perhaps alone: NCCL would wait for the others, which wait for this process; torchrun ends them
        if not failed or dist.get_backend() != "nccl":
            dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def own(rows):
    """This process's rows of what all drew alike for the whole batch."""
    return rows[rank()::world()]


def barrier():
    if world() > 1:
        dist.barrier()


def mean(values, device="cpu"):
    """The mean over the processes of each of a few numbers."""
    values = torch.tensor(values, dtype=torch.float64 if device == "cpu" else torch.float32, device=device)
    if world() > 1:
        dist.all_reduce(values)
    return (values / world()).tolist()


def everyones(rows):
    """The lists of all processes, one behind the other."""
    if world() == 1:
        return rows
    lists = [None] * world()
    dist.all_gather_object(lists, rows)
    return [row for part in lists for row in part]


def gathered(x):
    """(b, ...) -> (B, ...): the rows of all processes, differentiable."""
    return torch.cat(all_gather(x)) if world() > 1 else x


# ---------------------------------------------------------------------------------------------------------------
# DDP and FSDP

class Step(nn.Module):
    """A stage's loss as the `forward` that DDP and FSDP hook into, whatever methods of `module` it calls."""

    def __init__(self, module, loss_of):
        super().__init__()
        self.module, self.loss_of = module, loss_of

    def forward(self, *columns):
        return self.loss_of(self.module, *columns)


def wrap(module, loss_of, cfg, dtype):
    """-> what to call with a batch for (loss, values): gradients are then averaged over the processes."""
    network = Step(module, loss_of)
    if cfg.sharding == "fsdp":
        policy = MixedPrecisionPolicy(None if dtype is torch.float32 else dtype, torch.float32, cast_forward_inputs=False)  # t stays fp32
        mesh = dist.init_device_mesh(cfg.device.split(":")[0], (world(),))
        for block in getattr(module, "joint_blocks", []):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(network, mesh=mesh, mp_policy=policy)
    return DistributedDataParallel(network, broadcast_buffers=False) if world() > 1 else network


@contextlib.contextmanager
def synchronized(network, now):
    """DDP averages gradients over the processes in the backward pass only `now`: at the last micro-batch. FSDP does in each, or would keep them whole."""
    with network.no_sync() if isinstance(network, DistributedDataParallel) and not now else contextlib.nullcontext():
        yield


def clip_gradients(module, most):
    """-> the norm of the gradient before it is clipped."""
    return whole(nn.utils.clip_grad_norm_(module.parameters(), most))


# ---------------------------------------------------------------------------------------------------------------
# Sharded checkpoints: folders that torch.distributed.checkpoint writes, each process its part; any number of processes reads them

def sharded_state(module, averages, optimizers, numbers):
    return {"model": module.state_dict(), "ema": {f"{i}": x for i, x in enumerate(averages)}, "optimizers": get_optimizer_state_dict(module, optimizers), **numbers}


def save_sharded(path, state):
    """Beside, then renamed."""
    part = Path(path).parent / f".{Path(path).name}.part"
    if rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
    barrier()
    try:
        dcp.save(state, checkpoint_id=part)
    except dcp.CheckpointException as error:  # no Exception, for all its name
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        reason = next(iter(error.failures.values()))[0]
        raise OSError(f"{path} cannot be written: {first_line(reason)} (is the disk full?)") from None
    if rank() == 0:
        part.rename(path)
    barrier()


def load_sharded(path, module, averages, optimizers, numbers):
    """Fills the weights, averages and optimizers; -> the numbers that were saved."""
    state = sharded_state(module, averages, optimizers, dict(numbers))
    try:
        dcp.load(state, checkpoint_id=path)
    except (OSError, MemoryError):
        raise
    except (Exception, dcp.CheckpointException) as error:  # a foreign folder, another architecture: torch raises anything
        raise ValueError(f"{path} is no sharded checkpoint of this architecture, or damaged ({first_line(error)})") from None
    set_optimizer_state_dict(module, optimizers, state["optimizers"])
    return {name: state[name] for name in numbers}
