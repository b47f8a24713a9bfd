"""Facts of a model: what it weighs, what its layers cache, which matrices a token meets; from the model itself.

Owns how they are learned (transformers' own classes, without memory), kept in a file, and guessed where transformers
does not know the model. Does not own what follows from them (`advise`, `planning`). Nothing here imports torch or
transformers before it has to: facts that are kept need neither.
"""
