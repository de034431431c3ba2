"""Plain values for JSON: numpy numbers and arrays unpacked, what is not finite as null."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditscale.errors import InputError


def plain(value: Any) -> Any:
    """A copy that ``json.dumps(..., allow_nan=False)`` takes."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "to_json"):
        return plain(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, Path):
        return str(value)
    return value


def dumps(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(plain(value), allow_nan=False)


def load(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected a readable JSON file, got {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected JSON, got bytes that are no UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, as --json prints it, got something else ({error})") from None
