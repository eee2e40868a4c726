"""Models of format 1, in which a trainer's None meant none: the same parameters as they are written today."""

from __future__ import annotations

import math
from typing import Any

from madad.saving.model_folder import to_json
from madad.training import Trainer
from madad.training.trainer import DEFAULTS

NONE_MEANT = {
    "max_steps": math.inf,
    "max_time": math.inf,
    "gradient_clip": math.inf,
    "patience": math.inf,
    "batch_size": "auto",
    "validate_every": "epoch",
}


def from_format_1(value: Any) -> Any:
    """JSON of format 1 in today's words; of an autoencoder without a trainer, that has the defaults' own."""
    if isinstance(value, list):
        return [from_format_1(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: from_format_1(item) for key, item in value.items()}
    fields = value.get("fields")
    if value.get("__class__") == "Trainer" and isinstance(fields, dict):
        meant = {name: to_json(NONE_MEANT.get(name)) for name, field in fields.items() if field is None}
        return value | {"fields": fields | meant}
    if value.get("__class__") == "LatentAutoencoder" and isinstance(fields, dict):
        if fields.get("trainer") is None:
            return value | {"fields": fields | {"trainer": to_json(Trainer(**DEFAULTS))}}
    return value
