"""Bytes on disk to batches: sources, shards, the order of samples, the loader and the views."""
