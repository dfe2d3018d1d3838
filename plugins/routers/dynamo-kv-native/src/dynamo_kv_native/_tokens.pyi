from typing_extensions import Buffer

def read_tokens(message: Buffer, /) -> bytes:
    """The numbers of a msgpack array, 8 bytes each in this machine's order.

    :raises ValueError: it is no array of whole numbers. :raises OverflowError: one is negative.
    """
