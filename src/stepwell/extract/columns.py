"""Columns of the output: what a shard holds of each picture, and how arrays are kept in Parquet.

An array is its shape, the name of its numbers' type and their bytes, row by row, so that one line of numpy
reads it: np.frombuffer(a["data"], a["dtype"]).reshape(a["shape"]).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from stepwell.extract.rows import Opened
from stepwell.extract.wanted import Store, What

__all__ = ["as_stored", "batch_of", "schema_of"]

_ARRAY = [("shape", pa.list_(pa.int32())), ("dtype", pa.string()), ("data", pa.large_binary())]
_MAP = pa.struct(
    [("name", pa.string()), ("stride", pa.float64()), ("box", pa.list_(pa.float64())), *_ARRAY]
)  # box: of the picture that the map shows, xyxy in its pixels
_COLUMNS: Mapping[What, tuple[str, pa.DataType]] = {
    "features": ("maps", pa.list_(_MAP)),
    "tokens": ("tokens", pa.struct(_ARRAY)),
    "predict": ("prediction", pa.string()),
    "ask": ("answer", pa.string()),
}


def schema_of(what: What) -> pa.Schema:
    """id, width and height of the upright picture, error (null where there is none), and what is wanted."""
    sizes = [("width", pa.int32()), ("height", pa.int32())]
    return pa.schema([("id", pa.string()), *sizes, ("error", pa.string()), _COLUMNS[what]])


def as_stored(numbers: Any, store: Store) -> dict[str, Any]:
    """A float tensor of any shape, on any device -> the fields of an array. Raises ValueError for numbers
    that are none, or too large for the type.
    """
    array = numbers.detach().float().cpu().numpy()
    with np.errstate(over="ignore"):
        kept = array.astype(np.dtype(store).newbyteorder("<"))
    if not np.isfinite(kept).all():
        if np.isfinite(array).all():
            raise ValueError(f"numbers of up to {np.abs(array).max():g} do not fit float16; store float32")
        raise ValueError("what the model gives for this picture are no numbers (nan or inf)")
    return {"shape": list(array.shape), "dtype": store, "data": kept.tobytes()}


def batch_of(what: What, looked_at: Sequence[tuple[Opened, Any, str]]) -> pa.RecordBatch:
    """looked_at: of each row its picture, what is wanted of it, and why there is none."""
    schema = schema_of(what)
    rows = [
        {
            "id": opened.id,
            "width": None if opened.image is None else opened.image.width,
            "height": None if opened.image is None else opened.image.height,
            "error": error or None,
            _COLUMNS[what][0]: None if error else found,
        }
        for opened, found, error in looked_at
    ]
    return pa.RecordBatch.from_pylist(rows, schema=schema)
