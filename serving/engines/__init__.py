"""Engines: how a model is run and steered, behind one contract."""
