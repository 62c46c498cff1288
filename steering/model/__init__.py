"""Models: where they are kept, how they are loaded, where their decoder layers are."""
