"""Sources of images: one module a layout, each of the same shape.

A module's `list_source(root, splits)` reads names and annotations, refuses what makes no sense before an image is
touched, and gives a `Listing`: classes, and for each split small picklable jobs. Its `read_sample(job)` makes one job
a `Sample`, a pure function that any process may run. `data_pipeline.build` knows nothing more of a layout.
"""

from __future__ import annotations

from data_pipeline.sources.listing import Job, Listing, Rejected, Sample, UnusableError

__all__ = ["Job", "Listing", "Rejected", "Sample", "UnusableError"]
