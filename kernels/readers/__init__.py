"""How the attention kernel reads a tile of keys or values of a form: a file for each form, with a function `read`.

    read(ptr, halves_ptr, token, row, head, dim, is_token, block_tokens, block_bytes, rows, heads, IS_VALUE, HEAD_DIM)

        ptr            uint8: the first block; halves_ptr: the same address as float16
        token, row     [T]: number of each token among all blocks, and the stored row to read it from
        head           of K and V
        dim            [D]: elements of the head, and some beyond HEAD_DIM, which read as 0
        is_token       bool [T]: the others read as 0
        block_tokens, block_bytes, rows, heads: of a block
        IS_VALUE       0 for keys, 1 for values

It returns [T, D], in a dtype that holds what the form does. The layout of a block is in `kvoffload/store/forms/`.
"""
