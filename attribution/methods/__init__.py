"""The attribution methods, one file each, found by name through `registry`."""

from trimtab.attribution.methods.registry import DEFAULT, METHODS, Method, Scores, describe, make

__all__ = ["DEFAULT", "METHODS", "Method", "Scores", "describe", "make"]
