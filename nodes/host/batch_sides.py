"""Which side of guidance each chunk of a batch is on, for everything of ours that treats the two sides differently.

The numbers in `cond_or_uncond` are places in the list of conditionings that one call of the model was given: nodes that
run one side alone (perturbed attention, skipped layers, SAG) pass a list of one, and some guiders order the list
differently (Dual CFG Guider: 0 is the negative). So the conditioning's uuid decides, and the place only for one that
the guider does not know.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping

from ...weights.row_adapters.rows import NEGATIVE, POSITIVE

_COPY_OF = "styleloom_copy_of"


def side_of_list(name: str) -> int:
    """The side of a guider's list of conditionings, by its name: "positive", "middle", "empty_negative_prompt", …"""
    return NEGATIVE if "negative" in name else POSITIVE


class BatchSides:
    """The sides of one run's conditionings.

    Attributes:
        known: uuid → side.
    """

    def __init__(self):
        self._given: dict[object, int] = {}
        self.known: dict[object, int] = {}

    def given(self, conds: Mapping[str, Iterable[dict]] | None) -> None:
        """Learn the ids of a guider's conditionings, name of the list → conditionings, before the host prepares them
        for the run."""
        self._given = {
            cond["uuid"]: side_of_list(name)
            for name, listed in (conds or {}).items()
            for cond in listed or ()
            if "uuid" in cond
        }
        self.known = dict(self._given)

    def prepared(self, conds: Mapping[str, Iterable[dict]] | None) -> list[tuple[dict, int]]:
        """Learn what the host has made of them. Where one side has an area and the other none, it copies the
        conditioning over, its id and hooks with it; the copy gets an id of its own here.

        Returns:
            The copies, each with the side that it now belongs to.
        """
        copies = []
        for name, listed in (conds or {}).items():
            side = side_of_list(name)
            for cond in listed or ():
                if "uuid" not in cond:
                    continue
                if self._given.get(cond.get(_COPY_OF, cond["uuid"]), side) != side:
                    if _COPY_OF not in cond:  # another of us may have seen it first
                        cond[_COPY_OF], cond["uuid"] = cond["uuid"], uuid.uuid4()
                    copies.append((cond, side))
                self.known[cond["uuid"]] = side
        return copies

    def of_chunks(self, options: Mapping) -> tuple[int, ...]:
        """The side of each chunk of the batch.

        Args:
            options: `transformer_options` of the call.
        """
        places = options.get("cond_or_uncond") or [0]
        ids = options.get("uuids") or [None] * len(places)
        return tuple(
            self.known.get(own, NEGATIVE if place == 1 else POSITIVE) for place, own in zip(places, ids, strict=True)
        )

    def of_conditioning(self, params: Mapping) -> int:
        """The side of one conditioning that the host is about to prepare.

        Args:
            params: What `extra_conds` is given.
        """
        return self.known.get(params.get("uuid"), side_of_list(str(params.get("prompt_type", ""))))

    def forget(self) -> None:
        self._given = {}
        self.known = {}
