"""Which text is trained on, and how it becomes tokens."""

from typing import Literal, Self

from pydantic import Field, model_validator

from gdn_mup.settings import Settings


class CorpusSettings(Settings):
    """Text in, tokens out. Sizes in bytes of UTF-8."""

    source: Literal["stdlib", "files"] = Field(
        "stdlib", description="`stdlib`: the Python standard library's own text (offline); `files`: your own text."
    )
    files: tuple[str, ...] = Field(
        (), description="Glob patterns of .txt, .md, .py, .jsonl or .parquet files; for source `files`."
    )
    field: str = Field(
        "text", description="The field (.jsonl) or column (.parquet) that holds the text; for source `files`."
    )
    maximum_bytes: int = Field(
        20_000_000, gt=0, description="Stop taking documents beyond this much text (in order of document hash)."
    )
    vocabulary_size: int = Field(
        512, ge=257, le=2**20, description="Byte-level BPE vocabulary, the end-of-document token included."
    )
    tokenizer_sample_bytes: int = Field(
        4_000_000, gt=0, description="How much training text the tokenizer is trained on."
    )
    validation_fraction: float = Field(
        0.05, gt=0, lt=1, description="Share of documents held out, chosen by document hash."
    )

    @model_validator(mode="after")
    def _files_are_named(self) -> Self:
        if self.source == "files" and not self.files:
            raise ValueError("source `files` needs at least one glob pattern under `files`")
        if self.source != "files" and self.files:
            raise ValueError(f"`files` is only read by source `files`, but source is `{self.source}`")
        return self
