"""Convert and fold torchvision's and timm's architectures, and prove each result.

python benchmarks/architectures.py

The models have random weights: nothing is downloaded. The packages, without their own needs,
because torchvision would want the PyTorch that it was compiled for, and timm wants of torchvision
no more than that it can be imported:

    pip install --no-deps torchvision==0.28.0 timm==1.0.31
    pip install safetensors pyyaml huggingface_hub pillow

Everything runs in float64 and in evaluation. The example is one batch; outputs are compared on
another one, so that what only fits the example shows. A result is wrong, and is shown as such, if

- after the conversion a batch norm or a convolution is left as it was without a line in the report;
- a norm does not carry the statistics, scale and shift of the batch norm in its place;
- without its channel norms the converted model computes other numbers than the original does with
  standardized weights and the same statistics;
- the converted model does not run, or cannot be recalibrated;
- a folded model computes other numbers than before, be it the original or the converted one;
- `torch.fx` traces the original, but not what has become of it.
"""

from timing import report, store  # isort: skip  # sets up the environment, so it comes first

import argparse
import copy
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from bcn_torch import BatchChannelNorm, convert_batch_norm, fold, recalibrate, standardize_weight
from bcn_torch.weight_standardization import WSLayer

# torchvision's compiled operators fit one build of PyTorch, and its import asks for two of them. No
# architecture here calls them.
OPERATORS = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm  # noqa: E402
from torchvision.models import get_model  # noqa: E402
from torchvision.models.detection.backbone_utils import (  # noqa: E402
    mobilenet_backbone,
    resnet_fpn_backbone,
)

# By the length of the images' sides
TORCHVISION = {
    64: """
        resnet18 resnet50 vgg11_bn densenet121 mobilenet_v2
        mobilenet_v3_small mobilenet_v3_large efficientnet_b0 efficientnet_v2_s regnet_x_400mf
        regnet_y_400mf shufflenet_v2_x0_5 mnasnet0_5 googlenet squeezenet1_1 convnext_tiny swin_t
    """,
    96: "inception_v3",
}
SEGMENTATION = (
    "fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large"
)
VIDEO = "r3d_18 mc3_18 r2plus1d_18"
TIMM = {
    64: """
        resnet18 resnet26d resnet50_clip resnetaa50 resnetblur18 ecaresnet26t
        seresnext26ts legacy_seresnet18 skresnet18 res2net50_14w_8s resnest14d
        resnetv2_50 resnetv2_50x1_bit rexnet_100 rexnetr_100 hrnet_w18_small dla34 dla60_res2net
        dpn48b cspresnet50 cspdarknet53 cs3darknet_s darknet17 vovnet39a ese_vovnet19b_dw
        ghostnet_050 ghostnetv2_100 ghostnetv3_050 efficientnet_b0 efficientnet_es
        efficientnet_cc_b0_4e efficientnetv2_rw_t tf_efficientnet_b0 tf_efficientnetv2_b0
        tf_mobilenetv3_small_100 tf_mixnet_s mixnet_s mobilenetv2_050
        mobilenetv3_small_050 mobilenetv4_conv_small spnasnet_100
        lcnet_050 tinynet_e hardcorenas_a fbnetc_100 fbnetv3_b regnetx_002 regnety_002 regnetv_040
        regnetz_005 gernet_s repvgg_a0 repghostnet_050 repvit_m0_9 mobileone_s0 nf_regnet_b0
        eca_nfnet_l0 xception41p legacy_xception selecsls42 densenetblur121d
        tresnet_m hgnetv2_b0 convmixer_768_32 convnext_atto edgenext_xx_small fastvit_t8
        fasternet_t0 mobilevit_xxs mobilevitv2_050 efficientvit_b0 shvit_s1 starnet_s050
        swiftformer_xs poolformer_s12
    """,
    96: "inception_v3",
    192: "inception_v4",
}
# Those whose parts depend on the size of the image, which is given when they are made
TIMM_SIZED = {
    64: """
        levit_128s levit_conv_128s maxvit_pico_rw_256 coatnet_nano_rw_224 coatnet_bn_0_rw_224
        visformer_tiny xcit_nano_12_p16_224 vit_tiny_patch16_224 botnet26t_256
    """,
    224: "efficientformer_l1 efficientformerv2_s0",
    240: "crossvit_9_dagger_240",
}

ROUNDING = 1e-9  # relative to the largest output, through a hundred layers in float64
HEADER = (
    *("architecture", "batch norms", "convolutions", "conversion", "standardized", "left as it is"),
    *("difference, converted", "folded", "difference, folded"),
    *("folded after conversion", "difference, both", "seconds to convert", "seconds to fold"),
)


class Architecture(NamedTuple):
    """A model to make, and the shape of its input."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def architectures() -> Iterator[Architecture]:
    """All of them, those of torchvision first."""
    bare = {"weights": None}
    without = bare | {"weights_backbone": None}
    for size, names in TORCHVISION.items():
        for name in names.split():
            # Otherwise these two warn of a slow start.
            more = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            make = partial(get_model, name, **bare, **more)
            yield Architecture(f"torchvision {name}", make, (2, 3, size, size))
    for name in SEGMENTATION.split():
        yield Architecture(
            f"torchvision {name}",
            partial(get_model, name, **without, aux_loss=None),
            (2, 3, 64, 64),
        )
    for name in VIDEO.split():
        yield Architecture(
            f"torchvision {name}", partial(get_model, name, **bare), (2, 3, 8, 32, 32)
        )
    # Their norms are `FrozenBatchNorm2d`.
    for name, backbone in (
        ("resnet50", partial(resnet_fpn_backbone, backbone_name="resnet50", **bare)),
        (
            "mobilenet_v3_large",
            partial(mobilenet_backbone, backbone_name="mobilenet_v3_large", fpn=True, **bare),
        ),
    ):
        yield Architecture(f"torchvision {name}, detection", backbone, (2, 3, 64, 64))
    for sizes, sized in ((TIMM, False), (TIMM_SIZED, True)):
        for size, names in sizes.items():
            for name in names.split():
                arguments = {"img_size": size} if sized else {}
                make = partial(timm.create_model, name, **arguments)
                yield Architecture(f"timm {name}", make, (2, 3, size, size))


class Slow(BaseException):
    """The time is over. Not an `Exception`, which code that tries something out may catch."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Slow` after so many seconds of the processor, which other programs do not shorten."""

    def stop(*_: Any) -> None:
        raise Slow

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Everything with running statistics, whatever its class."""
    statistics = {"running_mean", "running_var"}
    return {name: m for name, m in model.named_modules() if statistics <= m._buffers.keys()}


def convolutions(model: nn.Module) -> dict[str, _ConvNd]:
    return {name: m for name, m in model.named_modules() if isinstance(m, _ConvNd)}


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Draw what starts constant: a scale of 0, say, hides whatever happens before it."""
    for parameter in model.parameters():
        if parameter.numel() and (parameter == parameter.flatten()[0]).all():
            is_bias = bool(parameter.flatten()[0] == 0) or parameter.dim() > 1
            parameter.normal_(0, 0.1) if is_bias else parameter.uniform_(0.5, 1.5)


@torch.no_grad()
def measure_statistics(model: nn.Module, x: Tensor) -> None:
    """Give each batch norm the mean and variance of its input, one after the other."""

    def before(norm: nn.Module, arguments: tuple[Tensor]) -> None:
        (y,) = arguments
        axes = [axis for axis in range(y.dim()) if axis != 1]
        norm.get_buffer("running_mean").copy_(y.mean(axes))
        norm.get_buffer("running_var").copy_(y.var(axes, correction=0))

    with ExitStack() as hooks:
        for norm in batch_norms(model).values():
            hooks.callback(norm.register_forward_pre_hook(before).remove)
        model(x)


@torch.no_grad()
def difference(actual: nn.Module, expected: nn.Module, x: Tensor) -> float:
    """The largest of two models' outputs, relative to the largest value; NaN if one has NaN."""
    pairs = zip(tree_leaves(actual(x)), tree_leaves(expected(x)), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def norm_at(name: str, model: nn.Module) -> BatchChannelNorm | None:
    """What a batch norm has become, alone or before its activation."""
    found = [m for m in model.get_submodule(name).modules() if isinstance(m, BatchChannelNorm)]
    return found[0] if len(found) == 1 else None


def carries(norm: nn.Module, new: BatchChannelNorm) -> bool:
    """Whether a new norm has the statistics, scale and shift of the old one."""
    ours = new.batch_norm
    theirs = [getattr(norm, name) for name in ("running_mean", "running_var", "weight", "bias")]
    return all(
        their is None or (our is not None and torch.equal(our, their))
        for our, their in zip(
            (ours.exp_mean, ours.exp_var, ours.scale, ours.shift), theirs, strict=True
        )
    )


@torch.no_grad()
def difference_of_conversion(converted: nn.Module, original: nn.Module, x: Tensor) -> float:
    """That of the converted model without its channel norms to the original as it should be.

    The original as it should be has standardized weights, and the statistics that fit them.
    """
    expected, actual = copy.deepcopy(original), copy.deepcopy(converted)
    for name, layer in actual.named_modules():
        if isinstance(layer, WSLayer):
            weight = expected.get_submodule(name).get_parameter("weight")
            weight.copy_(standardize_weight(weight, layer.standardization))
        if isinstance(layer, BatchChannelNorm):
            layer.channel_norm = nn.Identity()
    measure_statistics(expected, x)
    for name, norm in batch_norms(expected).items():
        if new := norm_at(name, actual):
            new.batch_norm.exp_mean.copy_(norm.get_buffer("running_mean"))
            new.batch_norm.exp_var.copy_(norm.get_buffer("running_var"))
    return difference(actual, expected, x)


def first_sentence(error: Exception) -> str:
    """Of what is wrong with the first module, if the error lists several."""
    head, *modules = str(error).splitlines() or [type(error).__name__]
    text = modules[0].partition(": ")[2] if modules else head
    return text.partition(". ")[0].rstrip(".")


def summarized(lines: Iterable[str]) -> str:
    """A report's lines, each of which begins with the name of a module, by what they say."""
    texts = [line.partition(": ")[2].partition(". ")[0].rstrip(".") for line in lines]
    reasons = Counter(text.partition(", because ")[2] or text for text in texts)
    return "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common())


def trace(model: nn.Module) -> Exception | None:
    """Let `torch.fx` trace a model; returns the error, if it cannot."""
    try:
        torch.fx.symbolic_trace(model)
    except Exception as error:  # Whatever the model does with a proxy
        return error
    return None


@dataclass
class Outcome:
    """What came of one architecture.

    Attributes:
        cells: of its line in the table, by the column.
        complaints: what is wrong.
    """

    cells: dict[str, str | float]
    complaints: list[str] = field(default_factory=list)

    @property
    def conversion(self) -> str:
        if self.complaints:
            return "WRONG: " + "; ".join(self.complaints[:3])
        return str(self.cells["conversion"])

    def note(self, column: str, value: float) -> None:
        """Enter the difference of two models that should compute the same."""
        self.cells[column] = value
        if not value <= ROUNDING:  # NaN neither
            self.complaints.append(f"{column}: {value:.1e}")

    @contextmanager
    def timed(self, column: str) -> Iterator[None]:
        """Enter the seconds of the processor that something takes."""
        start = time.process_time()
        try:
            yield
        finally:
            self.cells[column] = time.process_time() - start


def fold_original(model: nn.Module, example: Tensor, other: Tensor, outcome: Outcome) -> nn.Module:
    """Fold the batch norms of a model; one that is refused is returned as it is."""
    try:
        with outcome.timed("seconds to fold"):
            folded = fold(model, example)
    except ValueError as error:
        if outcome.cells["batch norms"]:
            outcome.cells["folded"] = f"refused: {first_sentence(error)}"
        return model
    outcome.cells["folded"] = len(batch_norms(model)) - len(batch_norms(folded))
    outcome.note("difference, folded", difference(folded, model, other))
    return folded


def convert(model: nn.Module, example: Tensor, both: Tensor, outcome: Outcome) -> nn.Module:
    """Convert a model and recalibrate it; one that is refused is returned as it is."""
    norms = batch_norms(model)
    lines: list[str] = []
    try:
        with outcome.timed("seconds to convert"):
            converted = convert_batch_norm(model, example_inputs=(example,), report=lines.append)
    except ValueError as error:
        refused = f"refused: {first_sentence(error)}"
        outcome.cells["conversion"] = refused if norms else "no batch norm"
        return model
    outcome.cells["conversion"] = "converted"
    outcome.cells["standardized"] = count(converted, WSLayer)
    outcome.cells["left as it is"] = summarized(lines)
    outcome.complaints += left_silently(converted, lines)
    outcome.complaints += [
        f"{name} does not carry the statistics"
        for name, norm in norms.items()
        if (new := norm_at(name, converted)) and not carries(norm, new)
    ]
    outcome.note("difference, converted", difference_of_conversion(converted, model, both))
    recalibrate(converted, [both])
    return converted


def attempt(model: nn.Module, shape: tuple[int, ...], outcome: Outcome) -> None:
    """Convert and fold a model, and find out what is wrong with the results."""
    example, other = torch.randn(2, *shape, dtype=torch.float64)
    # Statistics of the example alone would let a deep network explode on the other batch.
    both = torch.cat([example, other])
    measure_statistics(model, both)
    folded = fold_original(model, example, other, outcome)
    converted = convert(model, example, both, outcome)
    if converted is not model:
        try:
            final = fold(converted, example)
        except ValueError as error:
            outcome.cells["folded after conversion"] = f"refused: {first_sentence(error)}"
        else:
            before, after = (count(m, BatchChannelNorm) for m in (converted, final))
            outcome.cells["folded after conversion"] = before - after
            outcome.note("difference, both", difference(final, converted, other))
    if trace(model) is None:
        outcome.complaints += [
            f"torch.fx cannot trace the {what} model: {first_sentence(failure)}"
            for what, new in (("folded", folded), ("converted", converted))
            if (failure := trace(new))
        ]


def left_silently(converted: nn.Module, lines: Iterable[str]) -> list[str]:
    """Batch norms and convolutions that are as they were, and of which the report says nothing."""
    named = {line.partition(": ")[0] for line in lines}
    plain = {name: m for name, m in convolutions(converted).items() if not isinstance(m, WSLayer)}
    return [
        f"{name} is left without a line in the report"
        for name in batch_norms(converted) | plain
        if name not in named
    ]


def tried(architecture: Architecture, limit: float) -> Outcome:
    """Make a model and try it, but no longer than so many seconds."""
    torch.set_num_threads(1)  # so that the seconds of the processor are those of a quiet machine
    torch.manual_seed(0)
    outcome = Outcome({"architecture": architecture.name, "batch norms": 0, "convolutions": 0})
    try:
        model = architecture.make().double().eval()
        fill(model)
        outcome.cells["batch norms"] = len(batch_norms(model))
        outcome.cells["convolutions"] = len(convolutions(model))
        with limited(limit):
            attempt(model, architecture.shape, outcome)
    except Slow:
        outcome.cells["conversion"] = f"slow: longer than {limit:g} s"
    except Exception as error:
        outcome.complaints.append(f"{type(error).__name__}: {first_sentence(error)}")
    return outcome


def summary(outcomes: Sequence[Outcome]) -> str:
    """How many were converted, refused for which reasons, folded and wrong."""
    wrong = sum(1 for outcome in outcomes if outcome.complaints)
    with_norms = [outcome for outcome in outcomes if outcome.cells["batch norms"]]
    reasons = Counter(o.conversion for o in with_norms if not o.complaints)
    converted = reasons.pop("converted", 0)

    def total(column: str) -> int:
        values = (outcome.cells.get(column) for outcome in with_norms)
        return sum(value for value in values if isinstance(value, int))

    parts = [
        f"{converted} of {len(with_norms)} with batch norms converted",
        *(f"{n} {reason}" for reason, n in reasons.most_common()),
        f"{total('folded')} of {total('batch norms')} batch norms folded as they were, "
        f"{total('folded after conversion')} after the conversion",
        f"{wrong or 'none'} wrong",
    ]
    return "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="parts of names of architectures (default: all)")
    parser.add_argument(
        "--limit",
        type=float,
        default=60,
        metavar="SECONDS",
        help="of the processor, for each architecture (default: %(default)g)",
    )
    parser.add_argument("--workers", type=int, default=4, help="(default: %(default)s)")
    arguments = parser.parse_args()
    chosen = [
        architecture
        for architecture in architectures()
        if not arguments.names or any(part in architecture.name for part in arguments.names)
    ]
    outcomes: list[Outcome] = []
    rows: list[list[str | float]] = []
    with ProcessPoolExecutor(arguments.workers, get_context("fork")) as pool:
        for outcome in pool.map(partial(tried, limit=arguments.limit), chosen):
            outcome.cells["conversion"] = outcome.conversion
            print("{architecture}: {conversion}".format(**outcome.cells), file=sys.stderr)
            outcomes.append(outcome)
            rows.append([outcome.cells.get(column, "") for column in HEADER])
            title = f"{len(rows)} architectures of torchvision and timm: {summary(outcomes)}"
            store("architectures", title, HEADER, rows)
    report("architectures", title, HEADER, rows)
    sys.exit(any(outcome.complaints for outcome in outcomes))


if __name__ == "__main__":
    main()
