"""Distances between decoder layers, the pruning path, surgery and healing adapters."""
