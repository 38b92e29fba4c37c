"""The layers in the graphs of `torch.fx`."""

from typing import Any

from torch import nn
from torch.fx import Proxy


def one_node(layer: nn.Module, x: Proxy) -> Proxy:
    """The call of a layer as one node of the graph, as `torch.fx` does it with PyTorch's layers.

    So checks of the input stay possible, and the traced model can be trained and evaluated.
    """
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), {})
