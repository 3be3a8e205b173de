"""Byte-level byte-pair encoding: any text to token ids and back, without loss."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gdn_mup.corpus.background import in_background
from gdn_mup.corpus.config import CorpusSettings
from gdn_mup.errors import UserError

END_OF_TEXT = "<|endoftext|>"
"""The token after every document. Text that happens to contain these characters does not become it."""

LONGEST_WORD = 2048
"""Bytes of a word that the vocabulary is learnt from at once. Learning takes time in proportion to them, and text
without spaces (Chinese, DNA, padding) is one word; the longest one in 280 MB of source code has 1 864."""


def train_tokenizer(texts: Iterable[str], settings: CorpusSettings) -> Tokenizer:
    """Learn a vocabulary of exactly `settings.vocabulary_size`: the end-of-text token, 256 bytes, merges.

    The same texts give the same tokenizer, byte for byte, whatever the number of threads. How much text to
    learn from is the caller's choice (`settings.tokenizer_sample_bytes`).

    Raises UserError if the texts are too few to learn that many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary_size,
        min_frequency=2,  # a pair seen once says nothing about the text's statistics
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all bytes, also those that the sample lacks
        show_progress=False,
    )
    in_background(lambda: tokenizer.train_from_iterator(texts, trainer))
    tokenizer.pre_tokenizer = words  # text is encoded word by word, however long: that takes no longer
    reached = tokenizer.get_vocab_size()
    if reached != settings.vocabulary_size:
        raise UserError(
            f"corpus.vocabulary_size: {settings.vocabulary_size} is more than the text supports: its "
            f"training sample gave {reached} tokens; lower it to {reached} or less, give more text, or raise "
            f"corpus.tokenizer_sample_bytes ({settings.tokenizer_sample_bytes})"
        )
    return _treating_all_text_as_text(tokenizer)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer that a corpus was encoded with.

    Raises UserError if the file is missing or is not one of ours.
    """
    path = Path(path)
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such tokenizer; `gdn-mup corpus` writes it") from None
    except Exception as error:  # the library raises nothing more specific
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a tokenizer ({reason}); write it again with `gdn-mup corpus`") from None
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise UserError(f"{path}: has no {END_OF_TEXT} token; write it again with `gdn-mup corpus`")
    return _treating_all_text_as_text(tokenizer)


def _treating_all_text_as_text(tokenizer: Tokenizer) -> Tokenizer:
    """Encode a literal `<|endoftext|>` in a document as characters. The file does not store this setting."""
    tokenizer.encode_special_tokens = True
    return tokenizer
