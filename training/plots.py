"""The curves of a training run, as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def save_curves(path: Path, history: Sequence[Mapping[str, float]], title: str) -> None:
    """Draw loss and accuracy, in training and held out, over the epochs in `history`."""
    # The object interface: no window, no global state.
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [row["epoch"] for row in history]
    panels = (("loss", "cross-entropy loss", 1), ("accuracy", "accuracy (%)", 100))
    for axes, (name, label, factor) in zip(figure.subplots(1, 2), panels, strict=True):
        for split, legend in (("train", "training"), ("test", "held out")):
            values = [factor * row[f"{split}_{name}"] for row in history]
            axes.plot(epochs, values, marker=".", label=legend)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
