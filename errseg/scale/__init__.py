"""Many pictures on many processors: processes under torchrun, and Ray Data for clusters."""

from __future__ import annotations

from errseg.scale.dataset import Summary, segment_dataset, segment_rows

__all__ = ["Summary", "segment_dataset", "segment_rows"]
