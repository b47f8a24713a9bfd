"""The cache of a model, layer by layer: attention over what is stored, recomputation, and its verification."""
