"""`train.py --plan`: what a training run would take, counted without allocating it.

A step of the real MM-DiT with its real optimizers runs on torch's fake tensors, which have shapes and no storage, and what lives at each moment is added up.
"""

import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from mmdit import MMDiT
from optim import make_optimizers
from pipeline import precision
from runs import matrix_peak, peak_memory

GB = 1e9
LATER = 0.07 * GB  # what a run on a CPU loads after its start, and the text encoders at work, of the miniature, measured


class Counted(TorchDispatchMode):
    """Adds up the FLOPs of the operations inside it and the bytes of the tensors that they make, as long as these live; `bare` is the peak without the gradients of the weights."""

    def __init__(self, module):
        super().__init__()
        self.flops = self.live = self.peak = self.bare = self.gradients = 0
        self.known = WeakIdKeyDictionary({x.untyped_storage(): True for x in (*module.parameters(), *module.buffers())})
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(self.gradient)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.flops += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            if storage not in self.known:
                self.known[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out

    def add(self, size):
        self.live += size
        self.peak, self.bare = max(self.peak, self.live), max(self.bare, self.live - self.gradients)

    def gradient(self, p):
        if not hasattr(p, "counted"):  # in the first micro-batch
            p.counted = True
            self.gradients += p.nbytes


def counted_step(config, cfg, rows, side, tokens, checkpointing=False, update=True):
    """A step of one process that has all weights, with micro-batches of `rows` latents (side x side) and `tokens` of text. Bytes but for `parameters` and `flops`, which are a micro-batch's:
    `saved` for the backward pass; `backward`, the most at a time with gradients, `bare` without; `optimizer`, its states; `update`, what it takes besides for a moment."""
    half = precision(cfg) is torch.bfloat16
    with FakeTensorMode():
        model = MMDiT(**config, attention=cfg.attention).train()
        model.checkpointing = checkpointing
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.joint_blocks]
        optimizers = make_optimizers(model, cfg, precision(cfg))
        with Counted(model) as count:
            inputs = torch.empty(rows, config["in_channels"], side, side), torch.empty(rows), torch.empty(rows, tokens, config["context_dim"]), torch.empty(rows, config["pooled_dim"])
            for _ in range(min(cfg.grad_accum, 2)):
                flops = count.flops
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    loss = model(*inputs).float().square().mean()
                    saved = count.live - count.gradients
                loss.backward()
            flops, backward, bare, before = count.flops - flops, count.peak, count.bare, count.live
            for _ in range(2 if update else 0):  # the first makes the states
                count.peak = count.live
                for optimizer in optimizers:
                    optimizer.step()
    return SimpleNamespace(parameters=sum(p.numel() for p in model.parameters()), block=max(blocks), blocks=sum(blocks), flops=flops, saved=saved, backward=backward, bare=bare,
                           optimizer=count.live - before, update=count.peak - count.live, copies=2 * sum(p.numel() for p in model.parameters()) if half else 0)


def memory(step, sharding, processes):
    """{what: bytes} of the fullest process, rank 0, with the peak, which is less than the sum: gradients appear while activations go.

    DDP keeps the gradients a second time, in its buckets. FSDP has a part of everything, but for weights in use (two blocks and what is outside of blocks) and rank 0's whole average."""
    weights, optimizer, averages, saved = 4 * step.parameters, step.optimizer, 4 * step.parameters, step.saved
    if sharding == "ddp":
        buckets = weights if processes > 1 else 0
        peak = weights + averages + optimizer + buckets + max(step.backward, weights + step.update)
        return dict(weights=weights, gradients=weights + buckets, optimizer=optimizer, averages=averages, activations=saved, update=step.update, peak=peak)
    size = 2 if step.copies else 4
    used = (step.parameters - step.blocks + 2 * step.block) * size + 2 * step.block * 4  # and two blocks' gradients
    state = (2 * weights + optimizer + averages) / processes + averages
    peak = state + max(step.bare - step.copies + used, step.update)
    return dict(weights=weights / processes + used, gradients=weights / processes, optimizer=optimizer / processes, averages=averages / processes + averages,
                activations=saved - step.copies, update=step.update, peak=peak)


def plan(cfg, config, part_files):
    """`train.py --plan`: prints the table for the run's MM-DiT `config`, whose frozen parts are in the files; a ValueError if a process has less memory than the run takes."""
    n, side, tokens = cfg.processes, cfg.resolution // 8, cfg.clip_length + cfg.t5_length
    rows = cfg.batch_size // (n * cfg.grad_accum)
    steps = {on: counted_step(config, cfg, rows, side, tokens, on) for on in (False, True)}
    layouts = {(sharding, on): memory(step, sharding, n) for on, step in steps.items() for sharding in ("ddp", "fsdp")}
    besides = beside(cfg, config, tokens, part_files)
    most = {layout: sum(besides.values()) + found["peak"] for layout, found in layouts.items()}
    print(f"MM-DiT of depth {cfg.depth}: {steps[False].parameters:,} parameters; {tokens} tokens of text and {(side // 2) ** 2} of image, {precision(cfg)}".replace("torch.", ""))
    print(f"{cfg.steps} steps of {cfg.batch_size} pictures: {n} x {cfg.grad_accum} x {rows} (processes, micro-batches, pictures); {steps[False].flops * n * cfg.grad_accum:.3g} FLOPs a step")
    print(f"\n{'GB a process, of the fullest':32}" + "".join(f"{sharding:>8}{' ckpt' if on else '':5}" for sharding, on in layouts))
    for name in next(iter(layouts.values())):
        print(f"{name + ('' if name != 'peak' else ' of these, at one time'):32}" + "".join(f"{found[name] / GB:8.2f}     " for found in layouts.values()))
    for name, size in besides.items():
        print(f"{name:32}" + f"{size / GB:8.2f}     " * len(layouts))
    print(f"{'in all':32}" + "".join(f"{size / GB:8.2f}     " for size in most.values()))
    peak = cfg.peak * 1e12 or matrix_peak(cfg.device, precision(cfg))
    rate = peak * n * rows / steps[cfg.checkpointing].flops
    print(f"\nat most {rate:.4g} pictures/s, {cfg.steps * cfg.batch_size / rate / 3600:.3g} hours, if each process reaches {peak / 1e12:.4g} TFLOP/s ({'--peak' if cfg.peak else 'measured here'})")
    limit, needed = cfg.memory * GB or machine_memory(cfg), most[cfg.sharding, cfg.checkpointing]
    if needed > limit:
        smaller = [f"--sharding {sharding}{' --checkpointing' if on else ''} {size / GB:.3g}" for (sharding, on), size in most.items() if size <= limit]
        advice = f"it fits with {' GB or '.join(smaller)} GB" if smaller else "a larger --grad-accum or smaller --chunk takes less"
        raise ValueError(f"the run needs {needed / GB:.3g} GB a process, there are {limit / GB:.3g}: {advice}")


def beside(cfg, config, tokens, part_files):
    """{what: bytes} that a process holds apart from what trains the MM-DiT: on CPUs also Python with torch, and the samples that were encoded at once, with their text a second and third time
    while it is put together."""
    frozen = sum(3 * Path(path).stat().st_size for path in part_files)  # float32 made of the mapped half-precision file
    if not cfg.device.startswith("cpu"):
        return {"frozen parts": frozen}
    text, latent = 2 * tokens * config["context_dim"] + 4 * config["pooled_dim"], 4 * config["in_channels"] * (cfg.resolution // 8) ** 2
    samples = 0 if cfg.data.startswith("latents:") else cfg.chunk // cfg.processes
    return {"frozen parts": frozen, "encoded samples": samples * (latent + 3 * text), "Python with torch": peak_memory("cpu") + LATER}


def machine_memory(cfg):
    """Bytes that each process may have here: the GPU's, or its share of the machine's."""
    if cfg.device.startswith("cuda"):
        return torch.cuda.get_device_properties(cfg.device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / cfg.processes
