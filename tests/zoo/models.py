"""The zoo: every checkpoint by its short name."""

from __future__ import annotations

from tests.zoo import rows_llama, rows_mistral, rows_other, rows_qwen
from tests.zoo.checkpoint import Checkpoint

ZOO: dict[str, Checkpoint] = {
    row.slug: row for part in (rows_llama, rows_qwen, rows_mistral, rows_other) for row in part.ROWS
}
