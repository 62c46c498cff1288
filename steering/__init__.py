"""The steering core: specs, artifacts, plans, the bank and the hooks that put them into a model.

Import from the modules themselves; this package stays empty so that reading a spec or a path does
not import torch.
"""
