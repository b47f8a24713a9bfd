"""Bytes on their way: chunks to the device and new blocks to the host, in order, each buffer with one owner."""
