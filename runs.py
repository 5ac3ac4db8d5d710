"""The files of a training run: metrics.jsonl and its plots, the checkpoints to resume from, and what the lines of the log measure."""

import contextlib
import json
import resource
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import distributed
from optim import local
from pipeline import precision


def due(step, every):
    """Is it step's turn? 0: never."""
    return bool(every) and step % every == 0


def read_lines(path):
    """The objects of a file of JSON lines, if it is there; a killed run may leave half a line."""
    return [json.loads(line) for line in (path.read_text().splitlines() if path.exists() else []) if line.endswith("}")]


def read_metrics(path):
    rows = read_lines(path)
    if not all({"stage", "step"} <= row.keys() for row in rows):
        raise ValueError(f"{path} is not what train.py writes")
    return rows


KEPT = {"vae": ("latent_channels",), "clip": ("text_width", "clip_length"), "t5": ("text_width", "t5_length"), "dpo": ("weights", "pairs", "rank", "alpha")}     # what a run keeps, by stage
ARCHITECTURE = ("resolution", "depth", "qk_norm", "weight_sets", "base_resolution", "formulation")


class Run:
    """The files of a stage in a run folder, which rank 0 writes: metrics.jsonl, STAGE-loss.png, and the checkpoints STAGE-STEP.ckpt (with FSDP, folders).

    A checkpoint has this name only when it is whole."""

    def __init__(self, cfg):
        self.cfg, self.folder = cfg, Path(cfg.out)
        self.metrics = self.folder / "metrics.jsonl"
        self.board = None

    def checkpoints(self):
        """{step: path}, the newest last."""
        return {int(path.stem.split("-")[1]): path for path in sorted(self.folder.glob(f"{self.cfg.stage}-{'[0-9]' * 7}*.ckpt"))}

    def latest(self):
        return next(reversed(self.checkpoints().values()), None)

    def check_folder(self):
        """Refuses to overwrite a run or what another made, and to resume one that is further than --steps or was begun otherwise."""
        done, made = self.done(), max(self.checkpoints(), default=0)
        if not self.cfg.resume and (made or done):
            raise ValueError(f"{self.folder} holds a run of stage {self.cfg.stage}: --resume goes on with it, another --out starts afresh")
        before = self.folder / f"{self.cfg.stage}-config.json"
        begun = checkpoint.read_object(before) if before.exists() else {}
        for name in KEPT.get(self.cfg.stage, ARCHITECTURE) if self.cfg.resume else ():
            if begun.get(name, getattr(self.cfg, name)) != getattr(self.cfg, name):
                raise ValueError(f"{self.folder} was begun with --{name.replace('_', '-')} {begun[name]}, not {getattr(self.cfg, name)}")
        parts = {"vae": "vae.pt", "clip": "clip_l.pt", "t5": "t5.pt", "pretrain": "mmdit.pt"}.get(self.cfg.stage, "*.pt")       # the others write all
        part = min(self.folder.glob(parts), default=None)
        if part and not before.exists():                # `claim` writes it
            raise ValueError(f"{part} is there and no run of stage {self.cfg.stage} made it: another --out is needed")
        if made > self.cfg.steps and not done:
            raise ValueError(f"--steps is {self.cfg.steps}, {self.latest()} is further")

    def claim(self):
        """Writes the settings, by which `check_folder` knows what else the stage writes as its own."""
        if not distributed.rank():
            checkpoint.write_json(self.folder / f"{self.cfg.stage}-config.json", asdict(self.cfg))

    def start(self, step):
        """At `step`: forgets what a killed run wrote after its last checkpoint."""
        if distributed.rank():
            return
        self.claim()
        for left in self.folder.glob(f".{self.cfg.stage}-*.ckpt*"):
            remove(left)
        kept = [row for row in self.rows() if row["stage"] != self.cfg.stage or row["step"] <= step]
        checkpoint.write_lines(self.metrics, kept)
        with contextlib.suppress(ImportError):  # no TensorBoard, no files for it
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.folder / "tensorboard" / self.cfg.stage, purge_step=step + 1)

    def save(self, step, module, averages, optimizers, **numbers):
        """Beside, then renamed; then the older ones go, but for `keep` and milestones. Weights that are not trained are in no file of one process."""
        path, every = self.folder / f"{self.cfg.stage}-{step:07}.ckpt", self.cfg.milestone_every
        if not torch.stack(torch._foreach_norm(local(module.parameters()))).isfinite().all():
            raise ValueError(f"the weights of stage {self.cfg.stage} are no longer finite at step {step}; {self.last_good()} (a smaller --lr may help)")
        if self.cfg.sharding == "fsdp":
            with self.disk():
                distributed.save_sharded(path, distributed.sharded_state(module, averages, optimizers, {"step": step, **numbers}))
        elif distributed.rank() == 0:
            kept = frozen(module)
            state = {name: x for name, x in module.state_dict().items() if name not in kept}
            ema = {**state, **dict(zip((name for name, p in module.named_parameters() if p.requires_grad), averages))}
            with self.disk():
                checkpoint.save_checkpoint(path, {"step": step, "model": state, "ema": {k: x.detach() for k, x in ema.items()},
                                                  "optimizers": [o.state_dict() for o in optimizers], "config": asdict(self.cfg), **numbers})
        if distributed.rank() == 0:
            for old, path in list(self.checkpoints().items())[:-self.cfg.keep]:
                if not every or old % every:
                    remove(path)

    @contextlib.contextmanager
    def disk(self):
        """What the disk refuses meanwhile is said with what there is to go on from."""
        try:
            yield
        except OSError as error:
            raise OSError(f"{error}; {self.last_good()}" + (", --resume goes on from it" if self.latest() else "")) from None

    def load(self, module, averaged, averages, optimizers):
        """Fills them from the newest checkpoint, if any; -> (step, bad steps)."""
        path, numbers = self.latest(), {"step": 0, "bad": 0}
        if path is None:
            return 0, 0
        if path.is_dir() != (self.cfg.sharding == "fsdp"):
            raise ValueError(f"{path} was saved with --sharding {'fsdp' if path.is_dir() else 'ddp'}")
        if path.is_dir():
            numbers = distributed.load_sharded(path, module, averages, optimizers, numbers)
        else:
            state = checkpoint.load_checkpoint(path)
            if not (isinstance(state, dict) and {"step", "model", "ema", "optimizers"} <= state.keys()):
                raise ValueError(f"{path} is no training checkpoint")
            for one, name in ((module, "model"), (averaged, "ema")):
                checkpoint.load_strictly(one, frozen(module) | checkpoint.checked_state(state[name], path), path)
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            numbers |= {name: state[name] for name in numbers.keys() & state.keys()}
        return numbers["step"], numbers["bad"]

    def last_good(self):
        return f"the last good checkpoint is {self.latest()}" if self.latest() else "there is no checkpoint yet"

    def done(self):
        return any(row["stage"] == self.cfg.stage and row.get("done") for row in self.rows())

    def finish(self):
        """The stage's part is written: the checkpoints have served, but for milestones."""
        self.log(self.cfg.steps, done=True)
        for step, path in self.checkpoints().items() if distributed.rank() == 0 else ():
            if not due(step, self.cfg.milestone_every):
                remove(path)

    def rows(self):
        return read_metrics(self.metrics)

    def log(self, step, **values):
        """A line of metrics.jsonl, and its numbers for TensorBoard, a list's by their places."""
        if distributed.rank():
            return
        with self.disk(), open(self.metrics, "a") as file:
            file.write(json.dumps({"stage": self.cfg.stage, "step": step, **values}) + "\n")
        if self.board:
            numbers = {f"{name}/{i}" if isinstance(value, list) else name: x for name, value in values.items() for i, x in enumerate(value if isinstance(value, list) else [value])}
            for name, x in numbers.items():
                if x is not None:
                    self.board.add_scalar(name, x, step)
            self.board.flush()

    def validated(self, step, values):
        """Logs and says the figures {name: number}, and draws them with all before."""
        self.log(step, **values)
        self.plot()
        tqdm.write(f"{self.cfg.stage} step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, float)), file=sys.stderr)

    def skipped(self, step, bad, loss, norm):
        """Logs and says that `step`, the `bad`-th such, was not finite; one too many is a ValueError."""
        what = f"the {self.cfg.stage} loss is {loss} and its gradient {norm} at step {step}"
        if bad > self.cfg.max_bad_steps:
            raise ValueError(f"{what}, the {bad}. step that is not finite; {self.last_good()} (a smaller --lr may help)")
        self.log(step, bad_steps=bad)
        tqdm.write(f"{what}: skipped ({bad} so far)", file=sys.stderr)

    def plot(self):
        """STAGE-loss.png: the training loss and every validation figure over the steps of this stage."""
        with self.disk():
            draw_metrics({"": [row for row in self.rows() if row["stage"] == self.cfg.stage]}, self.folder / f"{self.cfg.stage}-loss.png")


def frozen(module):
    """{name: weight} that are not trained, as those under a LoRA."""
    return {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}


def remove(path):
    """A file or a folder, which is no checkpoint any more when its removal begins."""
    if path.is_dir():
        path = path.rename(path.with_name(f".{path.name.lstrip('.')}.old"))
        shutil.rmtree(path)
    else:
        path.unlink()


def draw_metrics(rows_of, path):
    """{run: rows}: one panel a figure, one line a run, over the steps."""
    skip = "lr", "rate", "grad_norm", "waiting", "memory", "tflops", "of_peak"
    names = sorted({k for rows in rows_of.values() for row in rows for k, v in row.items() if isinstance(v, float) and k not in skip})
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, max(len(names), 1), figsize=(4 * max(len(names), 1), 3), squeeze=False)
    for axis, name in zip(axes[0], names):
        for run, rows in rows_of.items():
            axis.plot([row["step"] for row in rows if name in row], [row[name] for row in rows if name in row], label=run)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    if len(rows_of) > 1:
        axes[0, 0].legend()
    figure.tight_layout()
    checkpoint.write(path, lambda temporary: figure.savefig(temporary, format="png"))
    plt.close(figure)


def plot(folders, out):
    """`train.py --plot RUN --plot OTHER`: every stage of the runs, in STAGE-compared.png of the folder `out`."""
    rows = {folder: read_metrics(Path(folder) / "metrics.jsonl") for folder in folders}
    for folder, found in rows.items():
        if not found:
            raise ValueError(f"{folder} holds no metrics.jsonl with a line in it: no run folder")
    for stage in dict.fromkeys(row["stage"] for found in rows.values() for row in found):
        path = Path(out) / f"{stage}-compared.png"
        draw_metrics({folder: [row for row in found if row["stage"] == stage] for folder, found in rows.items()}, path)
        print(f"wrote {path}")


# ---------------------------------------------------------------------------------------------------------------
# What a line of the log says

class Meter:
    """What the steps since the last line of the log gave, and how fast they were."""

    def __init__(self, cfg, flops):
        self.cfg, self.flops, self.peak = cfg, flops, flops and matrix_peak(cfg.device, precision(cfg)) * distributed.world()
        self.reset()

    def reset(self):
        self.rows, self.steps, self.seconds, self.waited = [], 0, 0, 0

    def add(self, rows, seconds, waited):
        """Of a step: {name: number or list} of each micro-batch, none if it was skipped; how long it took, and of that the wait for data."""
        self.rows += rows
        self.steps, self.seconds, self.waited = self.steps + 1, self.seconds + seconds, self.waited + waited

    def report(self, run, step, lr, bar):
        """Logs the means over all processes and the speed, and measures anew from there; nothing if every step was skipped."""
        if not (rows := distributed.everyones(self.rows)):
            return
        speed = {"rate": self.steps * self.cfg.batch_size / self.seconds, "waiting": self.waited / self.seconds, "memory": peak_memory(self.cfg.device) / 1e9}
        if self.flops:
            speed |= {"tflops": self.steps * self.flops / self.seconds / 1e12, "of_peak": self.steps * self.flops / self.seconds / self.peak}
        self.reset()
        means = mean_of(rows)
        run.log(step, **means, lr=lr, **speed)
        bar.set_postfix_str(f"loss {means['loss']:.4f}, " + ", ".join(f"{name} {value:.3g}" for name, value in speed.items()))


def mean_of(rows):
    """The mean of each number, or of each place of a list of which some are None, over the rows."""
    def mean(values):
        if isinstance(values[0], list):
            return [mean(column) for column in zip(*values)]
        there = [v for v in values if v is not None]
        return round(float(np.mean(there)), 7) if there else None
    return {key: mean([row[key] for row in rows]) for key in rows[0]}


# ---------------------------------------------------------------------------------------------------------------
# What the machine gives

def peak_memory(device):
    """Bytes: the most that this process has had, on its GPU or else resident."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if (status := Path("/proc/self/status")).exists():  # ru_maxrss of a new process begins with its parent's
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matrix_peak(device, dtype, seconds=0.2):
    """FLOP/s of square matrix products: the fastest of those that fit into `seconds`."""
    n = 8192 if device.startswith("cuda") else 1024
    a, b, times, end = *torch.rand(2, n, n, dtype=dtype, device=device), [], time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        begun = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        times.append(time.perf_counter() - begun)
    return 2 * n ** 3 / min(times)
