"""Time, peak memory and accuracy of the Rank & Sort loss, beside torchvision's focal loss and the published loop.

Repeats the synthetic setting of the Bucketed Ranking-based Losses supplement (Sec. S.3.2): L logits, m percent of them
positive, logits N(-1, 1) for positives and N(1, 1) for negatives ("paper"); and one like a trained detector, N(2, 1.5)
and N(-5, 1.5) ("trained").

    python benchmarks/losses.py --quick
    python benchmarks/losses.py --sizes 10000 100000 1000000 --plot docs/images/losses_time.png
    python benchmarks/losses.py --device cuda

Forward and backward, float32, on a CPU in seconds of its own time. Focal, bucketed and exact run in turn in the same
process, and what is printed of a row are the medians over its turns of the factor to the focal run of the same turn, so
that neither other programs nor a drifting clock count. Focal loss depends on L only: one time of it is printed for each
L, the fastest of all its rows. "Loop" is the published algorithm restated, the update of one positive after another,
each with all positives and the negatives that any of them can see; `~` marks it extrapolated from evenly spaced
positives. Peaks are of focal, bucketed and exact. The error is the largest difference of a gradient from the definition
(`method="pairwise"`) in float64 (`*`: from the exact one in float64, where the definition would take too long).
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from counting import PeakMemory

from brs_detr.losses import rank_sort_loss

DISTRIBUTIONS = {"paper": ((-1.0, 1.0), (1.0, 1.0)), "trained": ((2.0, 1.5), (-5.0, 1.5))}
PERCENTAGES = (0.1, 1.0, 2.0, 5.0)
PAIRS = 2 * 10**7


def sample(length: int, percent: float, distribution: str, device: str):
    """Shuffled logits (L,), indices of the positives (P,), their qualities, and focal loss targets (L,)."""
    count = max(1, round(length * percent / 100))
    (own_mean, own_spread), (mean, spread) = DISTRIBUTIONS[distribution]
    logits = torch.randn(length) * spread + mean
    positives = torch.randperm(length)[:count]
    logits[positives] = torch.randn(count) * own_spread + own_mean
    targets = torch.zeros(length)
    targets[positives] = 1
    return logits.to(device), positives.to(device), torch.rand(count).to(device), targets.to(device)


def timed(function: Callable[[], None], device: str) -> float:
    """Milliseconds of one call: of the CPU's time in all threads, or of the clock on a GPU."""
    if device == "cpu":
        start = time.process_time()
        function()
        return (time.process_time() - start) * 1e3
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def in_turn(steps: dict[str, Callable[[], Tensor]], device: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each step in each turn, all taking turns, after one turn that warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            times[name].append(timed(step, device))
    return {name: values[1:] for name, values in times.items()}


def peak_megabytes(function: Callable[[], None], device: str) -> float:
    """Most memory alive at once during one call, beyond what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with PeakMemory() as memory:
        function()
    return memory.peak / 2**20


def rank_sort_step(logits: Tensor, positives: Tensor, quality: Tensor, method: str) -> Tensor:
    """Gradient of both terms of Rank & Sort, by a forward and a backward pass."""
    leaf = logits.detach().requires_grad_()
    sum(rank_sort_loss(leaf, positives, quality, method=method)).backward()
    return leaf.grad


def focal_step(logits: Tensor, targets: Tensor) -> Tensor:
    """Gradient of torchvision's focal loss, likewise."""
    leaf = logits.detach().requires_grad_()
    sigmoid_focal_loss(leaf, targets, reduction="sum").backward()
    return leaf.grad


def loop_step(
    logits: Tensor, positives: Tensor, quality: Tensor, delta: float = 0.5, only: Tensor | None = None
) -> Tensor:
    """Gradient of both terms of Rank & Sort, one positive after another (Oksuz et al., ICCV 2021), in logits' dtype.

    Args:
        only: positives, as positions among them, whose turn is taken; None: all. The others' parts are missing then.
    """
    gradient, scores = torch.zeros_like(logits), logits[positives]
    visible = (logits >= scores.min() - delta).index_fill(0, positives, False)
    negatives = logits[visible]
    of_negatives, of_positives = torch.zeros_like(negatives), torch.zeros_like(scores)
    for i in range(len(scores)) if only is None else only.tolist():
        above = ((scores - scores[i]) / (2 * delta) + 0.5).clamp(0, 1)
        false = ((negatives - scores[i]) / (2 * delta) + 0.5).clamp(0, 1)
        rank, num_fp = above.sum(), false.sum()
        ranking = num_fp / (rank + num_fp)
        worse = quality < quality[i]  # positives above i that should not be
        right, wrong = above * ~worse, above * worse
        sorting = (above * (1 - quality)).sum() / rank - (right * (1 - quality)).sum() / right.sum()
        if num_fp > 0:
            of_negatives += false * (ranking / num_fp)
            of_positives[i] -= ranking
        if (total := wrong.sum()) > 0:
            of_positives += wrong * (sorting / total)
            of_positives[i] -= sorting
    gradient[visible], gradient[positives] = of_negatives, of_positives
    return gradient / len(scores)


def measure(length: int, percent: float, distribution: str, device: str, repeats: int) -> dict[str, float | str]:
    """One row of the table."""
    logits, positives, quality, targets = sample(length, percent, distribution, device)
    steps = {
        "focal": lambda: focal_step(logits, targets),
        "bucketed": lambda: rank_sort_step(logits, positives, quality, "bucketed"),
        "exact": lambda: rank_sort_step(logits, positives, quality, "exact"),
    }
    row: dict[str, float | str] = {f"{name} peak": peak_megabytes(step, device) for name, step in steps.items()}
    times = in_turn(steps, device, repeats)
    row["focal"] = min(times["focal"])
    for method in ("bucketed", "exact"):
        ratios = [own / focal for own, focal in zip(times[method], times["focal"], strict=True)]
        row[method] = statistics.median(ratios)

    part = min(len(positives), max(1, PAIRS // length))
    complete = part == len(positives)
    loop = time_loop(logits, positives, quality, part, device) / statistics.median(times["focal"])
    row["loop"] = f"{'' if complete else '~'}{loop:,.1f}"
    truth = rank_sort_step(logits.double(), positives, quality.double(), "pairwise" if complete else "exact")
    for method in ("bucketed", "exact"):
        error = (rank_sort_step(logits, positives, quality, method) - truth).abs().max().item()
        row[f"{method} error"] = f"{error:.0e}{'' if complete else '*'}"
    return row | {"distribution": distribution, "L": length, "percent": percent, "P": len(positives)}


def time_loop(logits: Tensor, positives: Tensor, quality: Tensor, part: int, device: str) -> float:
    """Milliseconds of the loop, one run; extrapolated where `part` of the positives, evenly spaced, take their turn."""
    ordered = logits[positives].argsort()

    def turns(count: int) -> float:
        only = ordered[torch.linspace(0, len(ordered) - 1, count, device=logits.device).long()]
        return timed(lambda: loop_step(logits, positives, quality, only=only), device)

    turns(1)
    one, several = turns(1), turns(part)
    return several if part in (1, len(positives)) else one + (several - one) / (part - 1) * (len(positives) - 1)


def as_line(row: dict[str, float | str], focal: float) -> str:
    """One line of the printed table; `focal` is the time of its L."""
    peaks = " / ".join(f"{row[name + ' peak']:.1f}" for name in ("focal", "bucketed", "exact"))
    return (
        f"| {row['distribution']} | {row['L']} | {row['percent']} % | {row['P']} | {focal:.2f} "
        f"| {row['bucketed']:.1f} | {row['exact']:.1f} | {row['loop']} | {peaks} | {row['bucketed error']} "
        f"| {row['exact error']} |"
    )


def plot(rows: list[dict[str, float | str]], path: str) -> None:
    """Factor to the time of focal loss over the number of positives, one panel per number of logits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["distribution"] == rows[0]["distribution"]]
    lengths = sorted({row["L"] for row in rows})
    figure, panels = plt.subplots(1, len(lengths), figsize=(3.6 * len(lengths), 3.2), squeeze=False, sharey=True)
    for panel, length in zip(panels[0], lengths):
        chosen = [row for row in rows if row["L"] == length]
        for name, style in (("bucketed", "C0o-"), ("exact", "C3s-"), ("loop", "C7^:")):
            values = [float(str(row[name]).lstrip("~").replace(",", "")) for row in chosen]
            label = "published loop" if name == "loop" else name
            panel.loglog([row["P"] for row in chosen], values, style, label=label, markersize=4)
        panel.axhline(1, color="k", linestyle="--", label="focal")
        panel.set(title=f"{length:,} logits", xlabel="positives")
    panels[0][0].set_ylabel("forward + backward, focal = 1")
    panels[0][0].legend(frameon=False)
    figure.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="numbers of logits")
    parser.add_argument("--percentages", type=float, nargs="+", default=PERCENTAGES, help="percent of positives")
    parser.add_argument("--distributions", nargs="+", default=list(DISTRIBUTIONS), choices=list(DISTRIBUTIONS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two small sizes, three repeats")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--plot", help="file to draw the times into (needs matplotlib)")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.repeats = [10_000, 100_000], 3
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = "CPU time" if options.device == "cpu" else "time"
    print(f"torch {torch.__version__}, {options.device}, {options.threads} thread(s), {clock}, {options.repeats} turns")
    rows = []
    for distribution in options.distributions:
        for length in options.sizes:
            for percent in options.percentages:
                rows.append(measure(length, percent, distribution, options.device, options.repeats))
                print(f"measured: {distribution}, L {length}, {percent} %", file=sys.stderr)
    titles = "logits | L | m | P | focal ms | bucketed / focal | exact / focal | loop / focal | peak MB"
    print(f"| {titles} | error bucketed | exact |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(as_line(row, min(other["focal"] for other in rows if other["L"] == row["L"])))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
