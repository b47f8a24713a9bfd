"""The shape of one generation's cache: bytes of one token of one row, and how many there are. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

ITEMSIZE_BYTES = {"float64": 8, "float32": 4}  # of K and V; all others have 2
TARGET_CHUNK_BYTES = 32 * 2**20  # K/V of a chunk: large enough for full link and GEMM rate on GPUs measured by others


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Bytes of one token of one row, and how many there are."""

    num_offloaded_layers: int
    rows: int
    max_tokens: int  # cached at the end of the generation
    kv_row_bytes: int
    head_dim: int = 0  # of K and V; 0 where these differ, or are no heads
    kv_dtype: str = "float32"
    activation_row_bytes: int
    position_row_bytes: int = 0  # of position embeddings, where a block has some behind each activation
    beams: int = 1
    other_device_bytes: int = 0  # layers that stay on the device
    weight_bytes: int = 0  # that cross the link in every forward, beside the cache
    may_slice: bool = True  # rows of a prefill pass a layer with streamed weights in slices, where that saves memory
    weights_are_pinned: bool = True  # where the link reads them at full speed
    weight_device_bytes: int = 0  # of decoder layers that stay on the device, and slabs for those that do not
    ahead_tokens: int = 0  # that may be cached before anybody asks for them, in the tail
    shadow_form: str | None = None  # of copies on the device of all blocks on the host, for drafts; None: a window
    may_pack: bool = True  # False: blocks are not packed, whatever the configuration allows
    lives_on: bool = False  # may grow over further turns: blocks are not made for the first one's length alone
    is_segmented: bool = False  # attention takes chunks one by one: no layer buffers, and kv chunks use the ring
    least_chunk_bytes: int = TARGET_CHUNK_BYTES  # K/V of a chunk that keeps link and GEMM fast, see `rates`
    least_gap_s: float = 0.0  # that the ring covers, whatever else it is for; 0 on an emulated link

    @property
    def kv_itemsize_bytes(self) -> int:
        """p_kv."""
        return ITEMSIZE_BYTES.get(self.kv_dtype, 2)

    @property
    def kv_bytes_per_token(self) -> int:
        """beta_kv."""
        return self.rows * self.kv_row_bytes

    @property
    def stored_activation_row_bytes(self) -> int:
        """A row of a block stored as activations."""
        return self.activation_row_bytes + self.position_row_bytes
