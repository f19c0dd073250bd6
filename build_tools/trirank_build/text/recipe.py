"""Recipes of text classifiers: TOML files that say all that a training depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from trirank_build.errors import BadRecipe
from trirank_build.recipe import Positive, Share, error_lines, read_recipe

RECIPES = Path(__file__).parent / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ReadingRecipe(_Section):
    """How a text becomes numbers."""

    units: Literal["characters", "subwords"] = "characters"
    """What a text is cut into."""
    vocabulary: Annotated[int, Field(ge=100, le=100_000)] = 8_000
    """Different units that are known."""
    length: Annotated[int, Field(ge=4, le=4_096)] = 512
    """Units of a text that are read, by the linear model all of them; of a longer one its first and its last half."""
    orders: Annotated[int, Field(ge=1, le=5)] = 4
    """Each place is read with the units after it, up to so many together; 1: alone."""


class TextModelRecipe(_Section):
    """Sizes of the classifier."""

    rows: Annotated[int, Field(ge=64, le=1 << 22)] = 65_536
    """Of the encoder's table of all sequences of units; each row has ``dim`` numbers."""
    length: Annotated[int, Field(ge=4, le=1_024)] = 96
    """Units that the encoder sees; of a longer text its first and its last half of them."""
    dim: PositiveInt = 96
    """Width of embeddings and states."""
    heads: PositiveInt = 4
    """Of attention; a divisor of dim."""
    blocks: Annotated[int, Field(ge=0)] = 2
    """Transformer blocks, the ranker's own."""
    ffn: PositiveInt = 192
    """Width of the feed-forward layers."""
    dropout: Share = 0.3
    """Share of activations that are left out in training."""

    @model_validator(mode="after")
    def _fits(self) -> TextModelRecipe:
        if self.dim % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide dim = {self.dim}")
        return self


class MaskingRecipe(_Section):
    """What is learned from texts without their labels: which unit is hidden (BERT's way, Devlin et al. 2019)."""

    epochs: Annotated[int, Field(ge=0)] = 2
    """0: none."""
    patience: PositiveInt = 2
    batch_size: PositiveInt = 64
    learning_rate: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 200
    masked_share: Annotated[float, Field(gt=0, lt=1)] = 0.15


class LabelsRecipe(_Section):
    """How it learns the labels."""

    epochs: PositiveInt = 3
    patience: PositiveInt = 2
    """Epochs without a better accuracy on validation before it stops."""
    batch_size: PositiveInt = 64
    learning_rate: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    label_smoothing: Share = 0.05
    hidden_units: Share = 0.1
    """Share of units that are hidden in training, so that no single one decides."""


class SmallerRecipe(_Section):
    """What compression does, and what it may cost."""

    calibration_texts: PositiveInt = 512
    """Training texts that are read for the scales of INT8."""
    embeddings: bool = True
    """Whether the tables are INT8, too."""
    min_accuracy_ratio: Annotated[float, Field(ge=0, le=1)] = 0.995
    """Least share of the accuracy on validation that the compressed graph keeps."""
    min_agreement: Annotated[float, Field(ge=0, le=1)] = 0.97
    """Least share of validation texts that it puts into the same class."""


class TextRecipe(_Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    seed: int = 7
    reading: ReadingRecipe = ReadingRecipe()
    model: TextModelRecipe = TextModelRecipe()
    pretraining: MaskingRecipe = MaskingRecipe()
    training: LabelsRecipe = LabelsRecipe()
    compression: SmallerRecipe = SmallerRecipe()


def load_text_recipe(name: str) -> TextRecipe:
    """A recipe by path, or by the name of one that ships with the package.

    Raises:
        BadRecipe: there is none, it is no TOML, or a key or value is wrong; the message names each.
    """
    path, raw = read_recipe(name, RECIPES, "text recipes")
    try:
        return TextRecipe.model_validate(raw)
    except ValidationError as error:
        raise BadRecipe(f"{path}: " + error_lines(error, TextRecipe)) from None
