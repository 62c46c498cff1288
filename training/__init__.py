"""Offline building of what steers: vectors, classifiers, adapters."""
