"""Text for language models: where it comes from, how it is cut into tokens, how documents fill sequences."""

from .corpus import SPLITS, Corpus, open_corpus
from .loader import Loader
from .packing import Packed, flash_lengths
from .tokenizer import ByteTokenizer, SubwordTokenizer, Tokenizer, open_tokenizer
from .tokens import Tokens, tokenize

__all__ = [
    "SPLITS",
    "ByteTokenizer",
    "Corpus",
    "Loader",
    "Packed",
    "SubwordTokenizer",
    "Tokenizer",
    "Tokens",
    "flash_lengths",
    "open_corpus",
    "open_tokenizer",
    "tokenize",
]
