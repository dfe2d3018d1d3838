"""Between text and tokens. The contract is in `contract.py`; `text` implements it for any `tokenizer.json`."""

from dynamo_core.preprocess.contract import Assembler, Preprocessor

__all__ = ["Assembler", "Preprocessor"]
