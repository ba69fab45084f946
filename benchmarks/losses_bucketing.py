"""How far the bucketed gradient lies from the exact one, as numbers and as a figure (docs/losses.md shows both).

python benchmarks/losses_bucketing.py --figure docs/images/losses_bucketing.svg
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brs_detr.losses import rank_sort_loss

# Name, positives, negatives, (mean, spread) of either.
SETTINGS = (
    ("paper", 100, 10_000, (-1.0, 1.0), (1.0, 1.0)),
    ("paper", 1000, 100_000, (-1.0, 1.0), (1.0, 1.0)),
    ("trained", 30, 20_000, (2.0, 1.5), (-5.0, 1.5)),
    ("trained", 300, 100_000, (2.0, 1.5), (-5.0, 1.5)),
)
DELTAS = (0.0, 0.25, 0.5, 1.0)


def draw(positives: int, negatives: int, own: tuple[float, float], other: tuple[float, float]):
    """Logits with the positives first, and their qualities."""
    logits = torch.cat([torch.randn(positives) * own[1] + own[0], torch.randn(negatives) * other[1] + other[0]])
    return logits.double(), torch.rand(positives)


def gradient(logits: Tensor, quality: Tensor, delta: float, method: str) -> Tensor:
    """Gradient of both terms of Rank & Sort."""
    leaf = logits.clone().requires_grad_()
    sum(rank_sort_loss(leaf, torch.arange(len(quality)), quality, delta=delta, method=method)).backward()
    return leaf.grad


def distances(logits: Tensor, quality: Tensor, delta: float) -> tuple[float, float, float]:
    """Relative L1 distance on negatives and on positives, and the ratio of the negatives' summed gradients."""
    count = len(quality)
    exact, bucketed = (gradient(logits, quality, delta, method) for method in ("exact", "bucketed"))
    relative = [
        ((bucketed[part] - exact[part]).abs().sum() / exact[part].abs().sum()).item()
        for part in (slice(count, None), slice(0, count))
    ]
    return *relative, (bucketed[count:].sum() / exact[count:].sum()).item()


def table(draws: int) -> None:
    """Mean over several draws of every setting."""
    print("| logits | P | N | delta | L1 on negatives | L1 on positives | total negative gradient |")
    print("|---|---|---|---|---|---|---|")
    for name, positives, negatives, own, other in SETTINGS:
        for delta in DELTAS:
            samples = [distances(*draw(positives, negatives, own, other), delta) for _ in range(draws)]
            on_negatives, on_positives, total = torch.tensor(samples).mean(0).tolist()
            setting = f"| {name} | {positives} | {negatives} | {delta}"
            print(f"{setting} | {on_negatives:.2%} | {on_positives:.2%} | {total:.3f} |")


def figure(path: str) -> None:
    """Gradient of each negative over its logit, exact and bucketed, for two spreads of the positives."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    canvas, panels = plt.subplots(1, 2, figsize=(8, 3.2))
    for panel, (title, positives, own) in zip(panels, (("8 positives", 8, 1.5), ("80 positives", 80, 1.5))):
        logits, quality = draw(positives, 2000, (2.0, own), (-2.0, 1.5))
        for method, style in (("exact", "C3-"), ("bucketed", "C0-")):
            values = gradient(logits, quality, 0.5, method)[positives:]
            order = logits[positives:].argsort()
            panel.plot(logits[positives:][order], 1e3 * values[order], style, label=method, drawstyle="default")
        panel.plot(logits[:positives], torch.zeros(positives), "k|", markersize=9, label="positives")
        panel.set(title=title, xlabel="logit", xlim=(-2.5, 4))
    panels[0].set_ylabel("gradient of a negative, x 1000")
    panels[0].legend(frameon=False)
    canvas.tight_layout()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--figure", help="file to draw into (needs matplotlib)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table(options.draws)
    if options.figure:
        figure(options.figure)
