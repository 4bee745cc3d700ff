"""One training loop for both stages: cosine schedule, weight averaging, checkpoints to resume from, a loss curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from densegeo.files import atomic_write
from densegeo.training.data import batches

Loss = Callable[[NDArray[np.int64], int], dict[str, Tensor]]  # batch of indices, step -> named terms; "loss" is the sum


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up and a cosine decay to zero over `steps`."""

    steps: int
    batch: int
    rate: float
    warmup: int = 200
    decay: float = 0.01  # weight decay, of matrices and kernels
    averaging: float = 0.998  # of the exponential moving average that is kept
    every: int = 250  # steps between checkpoints

    def rate_at(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        names = list(self.values)
        parameters = dict(module.named_parameters())
        torch._foreach_lerp_([self.values[n] for n in names], [parameters[n].detach() for n in names], weight)


def fit(
    name: str,
    module: nn.Module,
    loss: Loss,
    count: int,
    schedule: Schedule,
    folder: Path,
    *,
    seed: int,
    until: int | None = None,
    muon: Sequence[nn.Parameter] = (),
) -> dict[str, Tensor]:
    """Train `module` in place to step `until` (default: the schedule's end); returns the averaged parameters.

    `loss` is called with indices below `count`; `muon` are the matrices that Muon updates, AdamW the rest.
    Checkpoints, a CSV of losses and the curve lie in `folder`; a run that was cut off goes on from its last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.ckpt"
    optimizers = make_optimizers(module, schedule, muon)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.rate_at) for optimizer in optimizers]
    average, start, history = Average(module, schedule.averaging), 0, []
    if file.exists():
        saved = torch.load(file, weights_only=True)
        module.load_state_dict(saved["module"])
        for optimizer, scheduler, *states in zip(
            optimizers, schedulers, saved["optimizers"], saved["schedulers"], strict=True
        ):
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        average.values, start, history = saved["average"], saved["step"], saved["history"]
    end = min(schedule.steps, until or schedule.steps)
    names: list[str] = []
    with _bar() as progress:
        task = progress.add_task(name, total=end, completed=start)
        for step, indices in zip(range(start, end), batches(count, schedule.batch, seed, start), strict=False):
            terms = loss(indices, step)
            module.zero_grad(set_to_none=True)
            terms["loss"].backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                scheduler.step()
            average.update(module, step)
            names = list(terms)
            history.append([float(value.detach()) for value in terms.values()])
            if not math.isfinite(history[-1][0]):
                raise RuntimeError(
                    f"{name}: the loss is {history[-1][0]} at step {step}; the last checkpoint is {file}"
                )
            progress.update(task, advance=1, description=f"{name} {np.mean(history[-50:], axis=0)[0]:.4f}")
            if (step + 1) % schedule.every == 0 or step + 1 == end:
                state = {
                    "module": module.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "schedulers": [scheduler.state_dict() for scheduler in schedulers],
                    "average": average.values,
                    "step": step + 1,
                    "history": history,
                }
                with atomic_write(file) as partial:
                    torch.save(state, partial)
                _curve(name, names, np.array(history), folder)
    return average.values


def make_optimizers(module: nn.Module, schedule: Schedule, muon: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for `muon`, its step as large as AdamW's (arXiv 2502.16982); AdamW for the rest."""
    by_muon = {id(parameter) for parameter in muon}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in by_muon]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": schedule.decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=schedule.rate, betas=(0.9, 0.98), fused=True)
    ]
    if muon:
        rate, decay = schedule.rate, schedule.decay
        optimizers.append(torch.optim.Muon(muon, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), refresh_per_second=1)


def _curve(name: str, names: list[str], history: NDArray[np.float64], folder: Path) -> None:
    """The losses as a table and as a picture, smoothed over 1 % of the steps."""
    np.savetxt(folder / f"{name}.csv", history, fmt="%.6g", delimiter=",", header=",".join(names), comments="")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    window = max(1, len(history) // 100)
    kernel = np.ones(window) / window
    for column, label in enumerate(names):
        smooth = np.convolve(history[:, column], kernel, mode="valid")
        axes.plot(np.arange(len(smooth)) + window, smooth, label=label)
    axes.set(title=f"fe2e-tiny: {name}", xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / f"{name}.png", dpi=110)


def generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one step, the same after a resume."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 for linears and convolutions; master weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16)


def chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
