"""Inputs that several nodes have, each made anew for every node."""

from __future__ import annotations

from comfy_api.latest import io

from .host.missing_keys import ERROR, MISSING


def missing_keys_input() -> io.Combo.Input:
    return io.Combo.Input(
        "missing_keys",
        options=MISSING,
        default=ERROR,
        optional=True,
        advanced=True,
        tooltip="What becomes of keys of the LoRA that find no place in the model. error: stop and name them. warn: go "
        "on without them and say so in the report. Parts for a text encoder never stop the node.",
    )
