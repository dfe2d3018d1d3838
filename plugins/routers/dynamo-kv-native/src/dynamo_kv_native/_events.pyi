def pack_numbers(message: bytes, /) -> bytes:
    """A batch of KV events with its arrays of tokens and of hashes as `bin` of 32-bit length: 8 bytes a number in this machine's order.

    What is no such array stays as it is, and so does a message that is no batch. Other buffers than bytes are read as well.
    """
