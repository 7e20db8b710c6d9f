"""Circuits: the graph of a model's parts, and what happens when its edges are cut."""
