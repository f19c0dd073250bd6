"""Recipes: TOML files that say all that a training run depends on, checked before anything starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from trirank_backend.features import INPUTS
from trirank_backend.words.analysis import ANY, LANGUAGES

from trirank_build.errors import BadRecipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
LEAST_PRIVATE_BATCH = 32
"""Expected users of a step with differential privacy; of so many one step in 10^13 has none, which cannot be taken."""
RECIPES = Path(__file__).parent / "recipes"
"""Recipes that ship with the package, by name."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)  # docs/training.md has them


class FeatureRecipe(_Section):
    """What of a request the ranker sees."""

    history_length: Annotated[int, Field(ge=1, le=1024)] = 32
    """L, newest events kept."""
    query_length: Annotated[int, Field(ge=1, le=64)] = 8
    """Subwords of a query that are read."""
    title_length: Annotated[int, Field(ge=0, le=64)] = 12
    """Subwords of a title that are read; 0: none."""
    embed_text: bool = True
    """Whether words have embeddings. Where queries are few, how well query and title match says more."""
    attribute_slots: Annotated[int, Field(ge=0, le=16)] = 4
    """Attributes of an item that are kept."""
    vocabulary: Annotated[int, Field(ge=100, le=100_000)] = 8_000
    """Subwords of the tokeniser."""
    words: str = ""
    """The language in which words are understood (stems, spelling, what is near by meaning or letters, what training
    requests teach), or ``any`` for no language in particular; empty: they are not. Off unless asked for: preprocess
    takes longer with it."""
    encoder: str = ""
    """Folder of a team's own text encoder: ``model.onnx`` and ``tokenizer.json`` as sentence-transformers exports them.
    Titles are encoded when features are fitted, queries as they come. Goes with ``words``; empty: none."""
    transitions: bool = False
    """Whether it is counted which item follows which, for a column of its own and to find candidates by. For recipes
    that learn from held-out choices: of a choice that was counted the count says too much."""
    without: tuple[str, ...] = ()
    """Inputs to leave out, of trirank_backend.features.INPUTS; for ablations."""

    @model_validator(mode="after")
    def _inputs_exist(self) -> FeatureRecipe:
        if unknown := set(self.without) - set(INPUTS):
            raise ValueError(f"without {sorted(unknown)}; inputs are {list(INPUTS)}")
        if self.words not in ("", ANY, *LANGUAGES):
            raise ValueError(f"words = {self.words!r} is no language; they are {ANY}, {', '.join(LANGUAGES)}")
        if self.encoder and not self.words:
            raise ValueError('encoder goes with words; say words = "any", or the language')
        return self


class ModelRecipe(_Section):
    """Architecture and sizes of the ranker."""

    architecture: Literal["shared_context", "sasrec", "lstm", "bst"] = "shared_context"
    """The ranker of this project, or one of the baselines."""
    dim: PositiveInt = 64
    """Width of embeddings and states."""
    heads: PositiveInt = 4
    """Of attention; a divisor of dim."""
    encoder_blocks: Annotated[int, Field(ge=0)] = 2
    """Transformer blocks over the history."""
    cross_blocks: Annotated[int, Field(ge=0)] = 1
    """Blocks in which candidates attend to the encoded history. 0: candidates meet the user in the affinity and the
    dense features alone, and of a causal encoder's last block nothing but the newest event's state is calculated."""
    ffn: PositiveInt = 128
    """Width of the feed-forward layers."""
    dropout: Share = 0.1
    """Share of activations that are left out in training."""
    attention: Literal["causal", "full"] = "causal"
    """Whether an event sees only those before it, or all; masked-item pre-training needs ``full``."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """Of the user's state and an item, in the ranker's affinity term."""
    embedding: Literal["plain", "quotient_remainder", "low_rank"] = "plain"
    """The item ids' table; see trirank_build.models.embeddings."""
    embedding_rank: PositiveInt = 16
    """For low_rank: numbers kept of each item."""
    embedding_rows: Annotated[int, Field(ge=2)] = 4_096
    """For quotient_remainder: rows of the remainder table."""
    embedding_updates: Literal["all", "rows"] = "all"
    """What of the embedding tables a training step moves: all rows, or those that its batch held (without weight decay
    on any). ``rows`` is for catalogues of a million items and more, whose steps then take as long as those of small
    ones."""

    @model_validator(mode="after")
    def _fits(self) -> ModelRecipe:
        if self.dim % self.heads:
            raise ValueError(f"heads = {self.heads} does not divide dim = {self.dim}")
        return self


class PretrainingRecipe(_Section):
    """What the user's encoder and the items learn from the event sequences, before they learn to rank."""

    objective: Literal["none", "next_item", "masked_item"] = "none"
    """GPT's way, or BERT's."""
    epochs: PositiveInt = 20
    patience: PositiveInt = 3
    batch_size: PositiveInt = 256
    """Sequences."""
    learning_rate: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: bool = True
    """Cosine decay of the learning rate down to a tenth, or a constant one."""
    masked_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    negatives: Literal["all", "uniform", "popularity", "in_batch"] = "all"
    negative_samples: PositiveInt = 1_024
    log_q: bool = True
    """Whether logits are corrected for how likely a sampled negative was (Bengio and Senécal 2008)."""
    item_dropout: Share = 0.0
    validation_users: PositiveInt = 10_000


class PrivacyRecipe(_Section):
    """Differential privacy of what training gives: weights and features hardly depend on whether any one user is in the
    training split. See trirank_build.training.private."""

    epsilon: Annotated[float, Field(gt=0, le=100)] = 8.0
    """Of the whole run, counts of items included."""
    delta: Annotated[float, Field(gt=0, lt=1e-3)] = 1e-6
    """Choose it well below one in the number of users."""
    max_norm: Positive = 1.0
    """Of one user's gradient in a step; longer ones are cut to it."""
    counts_share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Of epsilon: what counting how often items were chosen would use by itself."""
    choices_per_user: PositiveInt = 8
    """Different items of a user that are counted, drawn where there are more."""


class TrainingRecipe(_Section):
    """How the ranker learns to rank requests."""

    epochs: Annotated[int, Field(ge=0)] = 10
    """0: what it starts from is the ranker."""
    patience: PositiveInt = 2
    """Epochs without a better validation NDCG@10 before it stops."""
    batch_size: PositiveInt = 128
    learning_rate: Positive = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    requests: Literal["logged", "held_out"] = "logged"
    """``logged``: the dataset's training requests. ``held_out``: four fifths of the validation split's choices, among
    what the pre-trained states and item-to-item similarity retrieve. Pre-training has not seen those choices, so the
    ranker learns how far its affinity is to be trusted; on training choices it would learn to trust it too much."""
    start: Literal["linear", "nothing"] = "linear"
    """What the ranker begins with: the best order that is linear in the dense features and the affinity (training.start
    says which single ones are tried besides), or what pre-training gave. Training keeps the start where no epoch is
    better."""
    refit: bool = False
    """With held-out requests and ``epochs = 0``: whether the ranker is pre-trained once more at the end, as many epochs
    as were best, on the choices that were held out besides, whose counts of transitions and popularity are added, too.
    The linear weights stay as they were learned when these choices were new."""
    objective: Literal["listwise", "pointwise", "lambda"] = "listwise"
    """Softmax over the candidates, a classifier of each candidate and task, or LambdaLoss over pairs."""
    task_weights: Literal["learned"] | dict[str, Positive] | None = None
    """Of the tasks' losses: learned (uncertainty weighting), given, or None: all alike."""
    candidates: Annotated[int, Field(ge=2)] = 50
    """Kept of each request's list: what was chosen, and a sample of the rest (hard negatives, from retrieval)."""
    negatives: Literal["uniform", "popularity", "in_batch"] = "uniform"
    """Where further negatives come from."""
    random_negatives: Annotated[int, Field(ge=0)] = 0
    """Further negatives, added in the batches that go without retrieval scores. Of held-out requests: also the number
    of drawn items among which each choice is to be found a second time."""
    log_q: bool = False
    """Whether their logits are corrected for how likely they were."""
    position_bias: Annotated[float, Field(ge=0, le=3)] = 0.0
    """How fast people stop looking: position k of a page is taken to be looked at with probability k^-position_bias.
    For requests that came with feedback; 0: all positions count alike."""
    position_correction: Literal["offset", "weights"] = "offset"
    """``offset``: the log of that probability is added to the logits in training and left out in serving, so that
    they need not explain what the page's order does (as the position's own tower in Zhao et al., RecSys 2019).
    ``weights``: what was chosen counts the inverse of it, 10 at most (inverse propensity scoring, Joachims et al., WSDM
    2017); right on average too, and noisier."""
    without_scores: Share = 0.1
    """Share of batches that go without retrieval scores, which a service need not send."""
    item_dropout: Share = 0.05
    """Share of candidates that lose their id in training, so that new items learn to live by their content."""
    freeze: Literal["nothing", "embeddings", "encoder"] = "nothing"
    """What of a pre-trained ranker stays as it is; ``encoder`` keeps the embeddings and the user's encoder."""
    validation_requests: PositiveInt = 5_000
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision in both phases, where the device has it."""
    checkpoint_minutes: Positive = 5.0
    """At most so much work is lost when a run is killed, in either phase."""
    privacy: PrivacyRecipe | None = None
    """``[training.privacy]`` trains with differential privacy. ``batch_size`` is then the expected number of users in a
    step, of each of whom one request is drawn, and an epoch is as many steps as there are users for; the last epoch is
    kept, whatever validation says, and every run is another one."""

    @model_validator(mode="after")
    def _privacy_fits(self) -> TrainingRecipe:
        if self.privacy is None:
            return self
        wanted = {
            "requests": ("logged", "others are retrieved with what was learned of users"),
            "start": ("nothing", "the linear order is fitted without noise"),
            "negatives": ("uniform", "others are drawn from what all users chose"),
            "precision": ("float32", "gradients are calculated request by request"),
            "refit": (False, "it learns from validation besides"),
        }
        for key, (value, why) in wanted.items():
            if getattr(self, key) != value:
                raise ValueError(
                    f"training.privacy goes with {key} = {json.dumps(value)}, not "
                    f"{json.dumps(getattr(self, key))}: {why}"
                )
        if not self.epochs or self.batch_size < LEAST_PRIVATE_BATCH:
            raise ValueError(
                f"training.privacy goes with epochs of 1 and more and a batch_size of {LEAST_PRIVATE_BATCH} and more, "
                f"not {self.epochs} and {self.batch_size}"
            )
        return self


class TuningRange(_Section):
    """An interval to draw a number from; whole numbers if both ends are."""

    low: int | float
    high: int | float
    log: bool = False


class TuningRecipe(_Section):
    """What `trirank tune` searches: dotted key → its range, as a list of choices or {low, high, log}."""

    space: dict[str, list[Any] | TuningRange] = {}
    trials: PositiveInt = 20


class Recipe(_Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    seed: int = 7
    features: FeatureRecipe = FeatureRecipe()
    model: ModelRecipe = ModelRecipe()
    pretraining: PretrainingRecipe = PretrainingRecipe()
    training: TrainingRecipe = TrainingRecipe()
    tuning: TuningRecipe = TuningRecipe()

    @model_validator(mode="after")
    def _objective_fits(self) -> Recipe:
        if self.pretraining.objective == "masked_item" and self.model.attention != "full":
            raise ValueError('pretraining.objective = "masked_item" needs model.attention = "full"')
        if self.pretraining.objective == "next_item" and self.model.attention != "causal":
            raise ValueError('pretraining.objective = "next_item" needs model.attention = "causal"')
        if (
            self.model.embedding_updates == "rows"
            and self.pretraining.objective != "none"
            and (self.pretraining.negatives == "all")
        ):
            raise ValueError(
                'model.embedding_updates = "rows" goes with sampled negatives, such as pretraining.negatives = '
                '"uniform": "all" moves every row at every step'
            )
        if self.training.position_bias and self.training.objective == "pointwise":
            raise ValueError(
                'training.position_bias goes with objective = "listwise" or "lambda": a classifier would '
                "take what was not chosen for refused, wherever it stood"
            )
        for key in ("training.position_bias", "training.position_correction"):
            if key in self.tuning.space:
                raise ValueError(
                    f"{key} cannot be tuned: validation has the same bias and cannot judge it; show some pages in "
                    "random order, and see how clicks fall with the position"
                )
        if self.training.privacy is not None:
            if self.pretraining.objective != "none" or self.features.transitions:
                raise ValueError(
                    'training.privacy goes with pretraining.objective = "none" and features.transitions = false: both '
                    "learn from sequences of users without noise"
                )
            if self.features.words:
                raise ValueError('training.privacy goes with features.words = "": lessons on words have no noise')
            if self.model.embedding_updates == "rows":
                raise ValueError(
                    'training.privacy goes with model.embedding_updates = "all": which rows move tells who was there'
                )
            if self.tuning.space:
                raise ValueError(
                    "training.privacy cannot be tuned: each trial would use up as much privacy as the run. Tune on "
                    "data that may be seen, and leave [tuning.space] out"
                )
        if not self.training.epochs and self.pretraining.objective == "none" and self.training.start == "nothing":
            raise ValueError(
                'training.epochs = 0, training.start = "nothing" and no pre-training leave nothing to learn'
            )
        if self.features.transitions and self.training.requests == "logged":
            raise ValueError(
                'features.transitions goes with training.requests = "held_out": of logged requests each choice is '
                "among what was counted"
            )
        if self.training.refit:
            if self.training.requests != "held_out" or self.training.epochs or self.pretraining.objective == "none":
                raise ValueError(
                    'training.refit goes with training.requests = "held_out", training.epochs = 0 and pre-training: '
                    "what else learned from the held-out choices would not fit states that have seen them"
                )
            if self.training.start != "linear" or self.model.architecture != "shared_context":
                raise ValueError(
                    'training.refit goes with training.start = "linear" and the architecture shared_context'
                )
        return self

    def changed(self, changes: dict[str, Any]) -> Recipe:
        """The same recipe with other values: dotted key → value.

        Raises:
            BadRecipe: a key is unknown, or its value is out of range.
        """
        raw = self.model_dump()
        for key, value in changes.items():
            *sections, name = key.split(".")
            place: Any = raw
            for section in sections:
                place = place.get(section) if isinstance(place, dict) else None
            if not isinstance(place, dict) or name not in place:
                known = [f"{s}.{n}" for s in ("features", "model", "pretraining", "training") for n in raw[s]]
                raise BadRecipe(f"{key} is no key of a recipe; known: seed, {', '.join(known)}")
            place[name] = value
        try:
            return Recipe.model_validate(raw)
        except ValidationError as error:
            raise BadRecipe(f"{changes}: " + error_lines(error, Recipe)) from None


def load_recipe(name: str) -> Recipe:
    """A recipe by path, or by the name of one that ships with the package.

    Raises:
        BadRecipe: there is none, it is no TOML, or a key or value is wrong; the message names each.
    """
    path, raw = read_recipe(name, RECIPES, "recipes")
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise BadRecipe(f"{path}: " + error_lines(error, Recipe)) from None


def read_recipe(name: str, shipped: Path, what: str) -> tuple[Path, dict[str, Any]]:
    """The file of a recipe, which may be the name of one of the folder ``shipped``, and its plain values.

    Raises:
        BadRecipe: there is none, or it is no TOML.
    """
    path = Path(name)
    if not path.is_file():
        path = shipped / f"{name}.toml"
    if not path.is_file():
        names = ", ".join(sorted(recipe.stem for recipe in shipped.glob("*.toml")))
        raise BadRecipe(f"{name} is neither a file nor one of the shipped {what} ({names})")
    try:
        return path, tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRecipe(f"{path} is no valid TOML: {error}") from error


def error_lines(error: ValidationError, of: type[BaseModel]) -> str:
    """What is wrong with each key of a recipe's part ``of``, in one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {_words(e, of)}" for e in error.errors())


def _words(error: object, of: type[BaseModel]) -> str:
    assert isinstance(error, dict)
    if error["type"] == "extra_forbidden":
        section = error["loc"][0] if len(error["loc"]) > 1 else None
        known = of.model_fields[section].annotation if section in of.model_fields else of
        names = ", ".join(getattr(known, "model_fields", {}))
        return f"unknown key (known: {names})" if names else "unknown key"
    return f"{error['msg']} (got {error['input']!r})"
