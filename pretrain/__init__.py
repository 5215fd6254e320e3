"""Pretraining of the feature codec: the network, self-supervision, stages, export."""
