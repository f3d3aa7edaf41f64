"""Requests that carry one input or a list of them, and the answer to either."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugin_api.errors import InvalidRequest
from plugin_api.framework import Fields, FieldSpec, FieldType, parse_int
from plugin_api.request import Request, Response

BATCH_FIELD = {
    "batch_input": FieldSpec(FieldType.ANY, description="List of inputs, each an object with its own fields.")
}
PARTIAL_FIELD = {
    "partial_failure_response_code": FieldSpec(
        FieldType.INT, description="HTTP status where some, but not all, inputs of a batch failed."
    )
}

ITEMS_PER_PAUSE = 1000
"""Items looked at between two turns of the event loop, 3 ms."""

_BODILESS = (204, 205, 304)


class Item:
    """One input: its fields as they were sent. Texts and numbers only; anything else is refused."""

    def __init__(self, sent: Mapping[str, Any]) -> None:
        self._sent = sent

    def text(self, name: str) -> str:
        """A text, ``""`` if it was not sent. Raises InvalidRequest."""
        value = self._sent.get(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise InvalidRequest(f"error converting input for field \"{name}\": expected type 'string'")
        return value

    def needed(self, name: str, missing: str) -> str:
        """A text that must have been sent, were it empty. Raises InvalidRequest with ``missing``."""
        if self._sent.get(name) is None:
            raise InvalidRequest(missing)
        return self.text(name)

    def number(self, name: str) -> int:
        """A whole number, 0 if it was not sent. Raises InvalidRequest."""
        try:
            return parse_int(self._sent.get(name))
        except (ValueError, OverflowError) as error:
            raise InvalidRequest(f'error converting input for field "{name}": {error}') from None

    def given(self, name: str) -> bool:
        return self._sent.get(name) is not None

    def size(self) -> int:
        """About how many bytes it is."""
        return sum(len(value) for value in self._sent.values() if isinstance(value, str))


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is to be done: ``items``, and whether they came as a batch."""

    items: Sequence[Item]
    is_batch: bool

    def respond(self, results: Sequence[dict[str, Any]], *, partial: int | None = None) -> Response:
        """The answer. A single failure is an error of the request; in a batch every item has its own. With ``partial``
        (0 for the default) a batch with failures has a status of its own too."""
        if not self.is_batch:
            result = results[0]
            if "error" in result:
                raise InvalidRequest(result["error"])
            return Response(data=result)
        for item, result in zip(self.items, results, strict=True):
            if item.given("reference"):
                result["reference"] = item.text("reference")
        failed = sum("error" in result for result in results)
        status = 200
        if failed and partial is not None:
            status = partial if partial and failed < len(results) else 400
        return Response(data={"batch_results": list(results)}, status=status)


async def inputs(request: Request, fields: Fields, names: Sequence[str]) -> Inputs:
    """The inputs of a request: its ``batch_input``, or else its own fields of those ``names``, where null is not sent.
    Raises InvalidRequest."""
    batch = fields["batch_input"]
    if batch is None:
        sent = {name: fields[name] for name in names if request.data.get(name) is not None}
        return Inputs([Item(sent)], is_batch=False)
    if not isinstance(batch, list) or not all(isinstance(sent, Mapping) for sent in batch):
        raise InvalidRequest("failed to parse batch input: it must be a list of objects")
    if not batch:
        raise InvalidRequest("missing batch input to process")
    items = []
    for number, one in enumerate(batch, 1):
        items.append(_checked(Item(one), names))
        if number % ITEMS_PER_PAUSE == 0:
            await asyncio.sleep(0)
    return Inputs(items, is_batch=True)


def _checked(item: Item, names: Sequence[str]) -> Item:
    """What is wrong in shape is wrong with the request; what is wrong in content belongs to the item."""
    for name in (*names, "reference"):
        if name == "key_version":
            item.number(name)
        else:
            item.text(name)
    return item


def partial_code(fields: Fields) -> int:
    """The status that the client wants for a batch of which a part failed; 0 for the default. Raises InvalidRequest."""
    code: int = fields["partial_failure_response_code"]
    if code and (not 200 <= code <= 599 or code in _BODILESS):
        raise InvalidRequest("partial_failure_response_code is not an HTTP status")
    return code
