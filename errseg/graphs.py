"""A network replayed from CUDA graphs: its hundred launches become one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from errseg.model.decoder import DecoderOutput

Network = Callable[..., DecoderOutput]
MOST_GRAPHS = 8


class Graph(NamedTuple):
    """One captured call: where its images go, how to run it, what it leaves behind, what it must not outlive."""

    images: Tensor
    replay: Callable[[], object]
    output: DecoderOutput
    holds: tuple[Any, ...]


class GraphCache:
    """Calls of a network in inference, captured by the shapes and words they come with.

    A call runs as it is the first time, is captured the second time, and is replayed from then on: odd shapes, such as
    the last batch of many, never pay for a graph. The oldest of ``limit`` graphs makes room for a new one. The network
    must not synchronise.

    Args:
        network: called with images [B, 3, S, S], word embeddings [T, D] and options that can be compared.
        limit: graphs that are kept.
        capture: makes a graph of one call.
        places: where the network's weights lie; graphs read them there, and are given up when it answers otherwise.
    """

    def __init__(
        self,
        network: Network,
        *,
        limit: int = MOST_GRAPHS,
        capture: Callable[..., Graph] | None = None,
        places: Callable[[], object] = lambda: None,
    ) -> None:
        self.network, self.limit = network, limit
        self._places, self._captured_at = places, places()
        self._capture = CudaCapture() if capture is None else capture
        self._graphs: OrderedDict[Any, Graph | None] = OrderedDict()

    def __call__(self, images: Tensor, embeddings: Tensor, **options: Any) -> DecoderOutput:
        """What the network gives; the tensors are the caller's."""
        if (places := self._places()) != self._captured_at:
            self._graphs.clear()
            self._captured_at = places
        words = embeddings.data_ptr(), embeddings.shape, embeddings.dtype, embeddings.stride()
        key = (images.shape, images.dtype, words, tuple(sorted(options.items())))
        if key not in self._graphs:
            self._remember(key, None)
            return self.network(images, embeddings, **options)
        graph = self._graphs[key]
        if graph is None:
            graph = self._capture(self.network, images, embeddings, options)
        self._remember(key, graph)
        graph.images.copy_(images)
        graph.replay()
        return DecoderOutput(*(tensor.clone() for tensor in graph.output))

    def _remember(self, key: Any, graph: Graph | None) -> None:
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        while len(self._graphs) > self.limit:
            self._graphs.popitem(last=False)


class CudaCapture:
    """Captures calls into one pool of memory: replays of one cache never overlap."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, network: Network, images: Tensor, embeddings: Tensor, options: dict[str, Any]) -> Graph:
        """Capture a call on copies of ``images``; ``embeddings`` are read where they lie."""
        static = images.clone()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(images.device):
            graph = torch.cuda.CUDAGraph()
            # Only calls of this thread are captured: others may pin memory meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = network(static, embeddings, **options)
        return Graph(static, graph.replay, output, (embeddings,))
