"""Measuring: codecs of pixels to compare with, and the report."""
