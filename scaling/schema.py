"""Columns of a run table: what each name means, its unit, and which must agree before runs may share one law."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column that the package knows.

    Attributes:
        name: as study folders write it.
        unit: of its numbers; "text" for a label.
        meaning: in a few words.
        alike: runs that differ here are not pooled unless told to.
        also: other spellings under which the agreement is checked.
    """

    name: str
    unit: str
    meaning: str
    alike: bool = False
    also: tuple[str, ...] = ()


COLUMNS = (
    Column("params", "parameters", "size N, all of them; name another count with --params"),
    Column("params_per_token", "parameters", "those that work on every token: what 6ND counts"),
    Column("params_per_sample", "parameters", "those that work once an image, such as adaLN modulation"),
    Column("params_active", "parameters", "those that a token meets in a mixture of experts"),
    Column("params_embedding", "parameters", "looked up, not multiplied"),
    Column("images", "images", "training data D"),
    Column("tokens", "tokens", "training data D, where images are no unit"),
    Column("unique_images", "images", "how many of them differ"),
    Column("flops", "FLOPs", "training compute C, as the ledger counts it"),
    Column("flop_convention", "text", "what C counts", alike=True),
    Column("budget", "FLOPs", "nominal compute: runs of one isoFLOP curve share it"),
    Column("loss", "the loss's own", "final loss, the same for all runs"),
    Column("loss_kind", "text", "which loss, such as velocity_mse", alike=True),
    Column("loss_window", "text", "over which steps it is averaged", alike=True),
    Column("evaluation", "text", "validation set and its noise", alike=True),
    Column("objective", "text", "what training minimises", alike=True),
    Column("lr", "1", "peak learning rate"),
    Column("lr_schedule", "text", "shape of the learning rate over a run", alike=True, also=("schedule",)),
    Column("batch", "images", "images a step"),
    Column("seed", "1", "of initialisation and data order"),
    Column("architecture", "text", "family, such as adaLN or cross-attention; not the size", alike=True),
    Column("data", "text", "training set", alike=True, also=("dataset", "data_set", "data_sha256")),
    Column("feature_network", "text", "whose features a quality metric compares", alike=True),
)
# Columns that must agree: a loss is a convention, not a quantity.
POOL_COLUMNS = tuple(name for column in COLUMNS if column.alike for name in (column.name, *column.also))
# Of these, what a comparison of two designs or data sets is about.
COMPARED_COLUMNS = ("architecture", "data", "dataset", "data_set", "data_sha256")
# A tracker's step log has several rows a run; a law takes one.
RUN_COLUMNS = ("run_id", "run_name", "run", "name", "Name")
STEP_COLUMNS = ("step", "_step", "global_step", "Step")


def markdown() -> str:
    """The columns as the rows of a table, those that must agree marked with a star (docs/fitting.md holds it)."""
    rows = []
    for column in COLUMNS:
        names = ", ".join(f"`{name}`" for name in (column.name, *column.also))
        rows.append(f"| {names}{' *' if column.alike else ''} | {column.unit} | {column.meaning} |")
    return "\n".join(rows)
