"""Sample inputs, comparers, spies and the published decoder, shared by tests, bench and `verify`."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "PublishedDecoder": "published_decoder",
    "published_cost_volume": "published_decoder",
    "published_dense": "published_decoder",
    "published_labels": "published_decoder",
    "published_loss": "published_decoder",
    "published_selection": "published_decoder",
    "published_votes": "published_decoder",
    "trace_intermediates": "published_decoder",
    "assert_close": "compare",
    "assert_absolutely_close": "compare",
    "assert_labels_equal_except_ties": "compare",
    "assert_within_eager_error": "compare",
    "error_budget": "compare",
    "labels_equal_except_ties": "compare",
    "relative_error": "compare",
    "rms_error": "compare",
    "AllocationSpy": "memory",
    "assert_no_allocation_larger_than": "memory",
    "forbid_host_syncs": "memory",
    "measure_peak_memory": "memory",
    "poisoned_memory": "memory",
    "random_class_ids": "inputs",
    "random_decoder_weights": "inputs",
    "random_features": "inputs",
    "random_logits": "inputs",
    "random_target": "inputs",
    "random_tensor": "inputs",
    "random_text_embeddings": "inputs",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
