"""Verified drafts: the model drafts on what is on the device, and one pass over the link checks all of it."""
