"""Replace running estimates by averages over given data."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bcn_torch import checks
from bcn_torch.norms import BatchNorm, batch_moments
from bcn_torch.precision import widen


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor | tuple[Any, ...]]) -> None:
    """Replace all running estimates by averages over `batches`, in place.

        exp_mean = sum(n_t * mean_t) / sum(n_t)
        exp_var = sum(n_t * var_t) / sum(n_t)

    over the batches t of `n_t` values in a channel each. Old estimates are discarded. The variance
    is the batch's, around its own mean; unbiased if `running_variance` says so; and if that is
    "around_running_mean", the variance of all the values together.

    The model runs as in evaluation, except that every `BatchNorm` and `EstimatedBatchNorm`, alone
    or inside a `BatchChannelNorm`, first updates its average and then normalizes by it. After one
    batch the network is consistent on that batch: the input of every norm has the stored mean and
    variance. After more it is nearly so, because earlier layers change while later ones are
    measured.

    Modes and `update_stats` are restored at the end, and after an error the estimates too. A norm
    that no batch reaches keeps its estimates.

    `torch.optim.swa_utils.update_bn` works too. It runs the model as in training, dropout included,
    and gives each batch the same weight, whatever its size.

    Args:
        model: any module that has batch norms of `bcn_torch`, not compiled.
        batches: the model's input of each batch: a tensor, or a tuple of positional arguments.

    Raises:
        ValueError: there is no batch norm, no batch reaches one, or in some batch the mean or
            variance of a channel is not finite.

    Example:
        >>> import torch
        >>> from bcn_torch import BatchNorm, recalibrate
        >>> layer = BatchNorm(1)
        >>> recalibrate(layer, [torch.tensor([[1.0], [3.0]]), torch.tensor([[8.0]] * 4)])
        >>> layer.exp_mean, layer.exp_var
        (tensor([6.]), tensor([0.3333]))

    Source: "precise BatchNorm" of Wu and Johnson, "Rethinking 'Batch' in BatchNorm",
    arXiv 2105.07576.
    """
    checks.require_module("model", model)
    names = {m: name for name, m in model.named_modules() if isinstance(m, BatchNorm)}
    if not names:
        raise ValueError(
            "The model must have a BatchNorm, EstimatedBatchNorm or BatchChannelNorm of bcn_torch, "
            "but it has none. Convert those of torch.nn with convert_batch_norm."
        )
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        raise ValueError(f"The batches must be an iterable of inputs, but they are {batches!r}.")
    if hasattr(batches, "shape"):
        raise ValueError(
            "The batches must be an iterable of inputs, but they are one tensor of shape "
            f"{tuple(batches.shape)}. For a single batch, put it in a list."
        )
    values = dict.fromkeys(names, 0)

    def average(norm: BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (x,) = (*args, *kwargs.values())
        checks.require_input(x, norm.channels)
        _update(norm, widen(x), values[norm], names[norm])
        values[norm] += x.numel() // norm.channels

    with _restored(model, names), ExitStack() as hooks:
        model.eval()
        for norm in names:
            norm.training, norm.update_stats = False, False
            hooks.callback(norm.register_forward_pre_hook(average, with_kwargs=True).remove)
        for batch in batches:
            model(*batch) if isinstance(batch, tuple) else model(batch)
        if not any(values.values()):
            raise ValueError(
                "The batches must reach a batch norm at least once, but none did. Give at least "
                "one batch (an iterator can be used once only), and the model as it was before "
                "torch.compile."
            )


def _update(norm: BatchNorm, x: Tensor, before: int, name: str) -> None:
    """Update the estimates, averages over `before` values so far, by those of `x`."""
    n = x.numel() // norm.channels
    mu, sigma2 = (moment.flatten() for moment in batch_moments(x))
    _require_finite(mu, sigma2, name)
    if norm.running_variance == "unbiased":
        sigma2 = sigma2 * (n / max(n - 1, 1))
    if not before:
        # 0 times an old estimate that is not finite would be NaN.
        norm.exp_mean.zero_()
        norm.exp_var.zero_()
    r = n / (before + n)
    change = mu - norm.exp_mean
    norm.exp_mean.copy_(norm.exp_mean + r * change)
    # Var = E[var] + Var[mean], the second term only for the variance of all values together
    together = norm.running_variance == "around_running_mean"
    between = r * (1 - r) * change**2 if together else 0
    norm.exp_var.copy_((1 - r) * norm.exp_var + r * sigma2 + between)


@contextmanager
def _restored(model: nn.Module, norms: Iterable[BatchNorm]) -> Iterator[None]:
    """Restore modes and settings at the end, and after an error the estimates too."""
    modes = {module: module.training for module in model.modules()}
    settings = {norm: norm.update_stats for norm in norms}
    estimates = [(e, e.clone()) for n in norms for e in (n.exp_mean, n.exp_var)]
    try:
        yield
    except BaseException:
        for estimate, before in estimates:
            estimate.copy_(before)
        raise
    finally:
        for module, training in modes.items():
            module.training = training
        for norm, update_stats in settings.items():
            norm.update_stats = update_stats


def _require_finite(mean: Tensor, var: Tensor, name: str) -> None:
    bad = (~(mean.isfinite() & var.isfinite())).flatten().nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"The mean and variance of every channel must be finite, but at {name!r} those of the "
            f"channels {', '.join(map(str, bad))} are not. The statistics are as they were before; "
            "leave the batch out."
        )
