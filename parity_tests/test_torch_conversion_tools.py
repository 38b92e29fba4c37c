"""A converted model works wherever the original did: compilers, exporters, copies, processes."""

import copy
import io
import pickle
from collections.abc import Callable

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.fx import GraphModule, Tracer
from torch.nn.parallel import DistributedDataParallel

from bcn_torch import (
    BatchChannelNorm,
    BatchNorm,
    ChannelNorm,
    EstimatedBatchNorm,
    Standardization,
    WSConv2d,
    WSLinear,
    convert_batch_norm,
    fold,
)
from bcn_torch.surgery.replacement import WSConv2dSame
from parity_tests.torch_conversions import BatchNormAct2d, TimmConv2dSame, drawn

# TorchScript is deprecated, and says so wherever it is used.
pytestmark = [
    pytest.mark.torch,
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


class Net(nn.Module):
    """A convolution of each kind, and a norm of each kind that a compiler understands."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = TimmConv2dSame(3, 8, 3, stride=2), BatchNormAct2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x))
        x = torch.relu(self.bn2(self.conv2(x)) + x)
        return self.head(x.mean((2, 3)))


def images(seed: int = 0, batch: int = 2) -> torch.Tensor:
    """A batch for the network."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 7, 7, generator=generator, dtype=torch.float64)


def converted(estimate: bool = True) -> nn.Module:
    """The network with statistics of its own, converted."""
    torch.manual_seed(0)
    inputs = (images(),)
    return convert_batch_norm(drawn(Net()).double(), example_inputs=inputs, estimate=estimate)


def every_layer() -> nn.Module:
    """Every layer of the library, with every branch of its forward that the network leaves out."""
    torch.manual_seed(0)
    return nn.Sequential(
        WSConv2dSame(3, 8, 3, 2, standardization=Standardization(eps_role="least_variance")),
        BatchNorm(8, running_variance="unbiased"),
        ChannelNorm(8, 4, affine=False),
        WSConv2d(8, 6, 1, standardization=Standardization(gain=True, fan_in_scaling=True)),
        BatchChannelNorm(6, 3, update_stats=True, running_variance="around_running_mean"),
        nn.Flatten(),
        WSLinear(96, 4, standardization=Standardization(eps_role="added_to_deviation")),
        EstimatedBatchNorm(4, update_stats=False),
    ).double()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "estimate": converted,
    "batch": lambda: converted(estimate=False),
    "every layer": every_layer,
    "folded": lambda: fold(converted(), images()),
}


def saved_script(model: nn.Module) -> nn.Module:
    """Compiled by TorchScript, saved and loaded."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


TOOLS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fx": torch.fx.symbolic_trace,
    "fx, pickled": lambda model: pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model))),
    "script": saved_script,
    "export": lambda model: torch.export.export(model, (images(),)).module(),
    "copy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "channels last": lambda model: copy.deepcopy(model).to(memory_format=torch.channels_last),
}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS.keys())
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@each_model
def test_what_a_tool_makes_of_a_model_computes_the_same(make, tool, training):
    model = make().train(training)
    made = tool(copy.deepcopy(model))
    for seed in range(3):
        x = images(seed)
        torch.testing.assert_close(made(x), model(x))
        torch.testing.assert_close(dict(made.state_dict()), dict(model.state_dict()))


# The exporter uses something that PyTorch deprecates.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.parametrize("name", ["estimate", "batch", "folded"])
def test_an_onnx_file_computes_the_same(name):
    model = MODELS[name]().eval()
    program = torch.onnx.export(model, (images(),), dynamo=True, verbose=False)
    assert program is not None
    file = onnx.load_from_string(program.model_proto.SerializeToString())
    (given,) = file.graph.input
    x = images(1)
    (y,) = ReferenceEvaluator(file).run(None, {given.name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x))


@pytest.mark.parametrize("tool", ["fx", "script"])
@each_model
def test_a_traced_or_compiled_model_can_still_be_trained_and_evaluated(make, tool):
    model = make().train()
    made = TOOLS[tool](copy.deepcopy(model))
    for training in (False, True, False):
        model.train(training)
        made.train(training)
        torch.testing.assert_close(made(images(1)), model(images(1)))
    torch.testing.assert_close(made(images(1, batch=5)), model(images(1, batch=5)))
    gradients = []
    for each in (model, made):
        each.train()(images(2)).pow(2).sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    torch.testing.assert_close(*gradients)


# It says that the shape of the example stays in it.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@each_model
def test_a_trace_computes_the_same_in_evaluation(make):
    model = make().eval()
    if make is every_layer:
        model[4].update_stats = None  # torch.jit.trace runs the model several times
    traced = torch.jit.trace(model, images())
    torch.testing.assert_close(traced(images(1)), model(images(1)))


class PathTracer(Tracer):
    """Knows which module each node comes from, as the one of create_feature_extractor does."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.paths = "", {}

    def call_module(self, m, forward, args, kwargs):
        before, self.path = self.path, self.path_of_module(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.path = before

    def create_proxy(self, *args, **kwargs):
        proxy = super().create_proxy(*args, **kwargs)
        self.paths[proxy.node] = self.path
        return proxy


def test_features_are_extracted_at_the_names_of_the_modules():
    """What torchvision's create_feature_extractor does: the nodes' modules, and a new output."""
    model = converted().eval()
    tracer = PathTracer()
    graph = tracer.trace(model)
    nodes = {tracer.paths[node]: node for node in graph.nodes if node.op == "call_module"}
    assert {*nodes} == {"conv1", "bn1.norm", "bn1.drop", "bn1.act", "conv2", "bn2", "head"}
    (output,) = (node for node in graph.nodes if node.op == "output")
    graph.erase_node(output)
    graph.output({name: nodes[name] for name in ("bn1.act", "bn2")})
    features = GraphModule(model, graph)(images(1))
    first = model.bn1(model.conv1(images(1)))
    expected = {"bn1.act": first, "bn2": model.bn2(model.conv2(first))}
    torch.testing.assert_close(features, expected)


def test_an_exported_model_takes_other_batch_sizes():
    model = converted().eval()
    batch = {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(model, (images(),), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(exported(images(1, 5)), model(images(1, 5)))


def test_a_traced_layer_still_checks_its_input():
    traced = torch.fx.symbolic_trace(nn.Sequential(BatchChannelNorm(8, 4)))
    with pytest.raises(ValueError, match="must be 8 here"):
        traced(torch.ones(2, 6, 3, 3))


def test_the_layout_of_the_memory_is_kept():
    model = converted()
    x = images().to(memory_format=torch.channels_last)
    y = model.bn1(model.conv1(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("estimate", [True, False])
def test_autocast_computes_in_half_precision_what_float32_computes(estimate):
    model, x = converted(estimate).eval().float(), images(1).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    # A few roundings to 8 bits
    torch.testing.assert_close(y.float(), model(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("estimate", [True, False])
def test_data_parallelism_trains_its_parameters_and_keeps_its_buffers(estimate, tmp_path):
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, parallel = converted(estimate), DistributedDataParallel(converted(estimate))
        for seed in range(2):
            for each in (model, parallel):
                each(images(seed)).pow(2).sum().backward()
        theirs = {name: p.grad for name, p in parallel.module.named_parameters()}
        torch.testing.assert_close(theirs, {n: p.grad for n, p in model.named_parameters()})
        torch.testing.assert_close(parallel.module.state_dict(), model.state_dict())
    finally:
        destroy_process_group()
