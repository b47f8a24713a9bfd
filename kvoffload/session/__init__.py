"""One model's offloading: each `generate()` planned, measured and counted."""
