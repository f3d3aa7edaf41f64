"""HCL, version 1, and its JSON form: the language of Vault's configuration files and policies.

Version 1 differs from HCL 2 where it matters to users: a block may hold several attributes on one line, an object may
be written with or without ``=``, and there are no expressions (``${...}`` in a string stays as it is). Either form
gives the same :class:`Body`; :func:`parse_any` decides by the first character, as Vault does.

Every defect of the input raises :class:`HCLError` with its position, and nothing else is ever raised. Messages name
keys and positions and never a value, since a configuration file may hold a token.

Stricter than the original on purpose: one name may be assigned only once in a body (there the last one silently wins,
which in a policy is a trap). Blocks may repeat.
"""

from __future__ import annotations

from sidecar.hcl.json_form import JSONParser
from sidecar.hcl.native import NativeParser
from sidecar.hcl.scanner import Attribute, Block, Body, HCLError, ObjectValue, Value

__all__ = [
    "Attribute",
    "Block",
    "Body",
    "HCLError",
    "ObjectValue",
    "Value",
    "as_blocks",
    "parse",
    "parse_any",
    "parse_json",
]


def parse(text: str, filename: str = "<text>") -> Body:
    """Parse HCL 1. Raises HCLError."""
    return NativeParser(text, filename).body(end="")


def parse_json(text: str, filename: str = "<text>") -> Body:
    """Parse the JSON form into the structure the HCL form would give. Raises HCLError.

    JSON has no blocks, so at the top level an object of objects (``{"path": {"secret/*": {...}}}``) is read as
    labelled blocks, any other object (``{"telemetry": {"x": 1}}``) as a block without label, and a list of objects as
    a repetition. Deeper objects stay attributes; :func:`as_blocks` turns one into blocks where a schema says it is one.
    """
    top = JSONParser(text, filename).document()
    body = Body(filename)
    for name, value in top.items():
        line, col = top.positions[name]
        attribute = Attribute(value, line, col)
        if _is_object_or_objects(value):
            body.blocks.extend(as_blocks(name, attribute, filename))
        else:
            body.attributes[name] = attribute
    return body


def parse_any(text: str, filename: str = "<text>") -> Body:
    """Parse JSON if the first visible character is ``{``, else HCL 1. Raises HCLError."""
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        return parse_json(text, filename)
    return parse(text, filename)


def as_blocks(name: str, attribute: Attribute, filename: str = "<text>") -> list[Block]:
    """The blocks that ``name = {...}`` or ``name = [{...}, ...]`` stands for; HCL 1 makes no difference between them.

    An object whose members are all objects gives labelled blocks, any other one block without label. Raises HCLError if
    the value is something else.
    """
    if not _is_object_or_objects(attribute.value):
        raise HCLError(f'"{name}" must be a block', filename, attribute.line, attribute.col)
    blocks: list[Block] = []
    for each in _objects(attribute.value):
        if each and all(_is_object_or_objects(member) for member in each.values()):
            for label, member in each.items():
                line, col = each.positions[label]
                blocks.extend(Block(name, (label,), _body_of(inner, filename), line, col) for inner in _objects(member))
        else:
            blocks.append(Block(name, (), _body_of(each, filename), attribute.line, attribute.col))
    return blocks


def _is_object_or_objects(value: Value) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, ObjectValue) for each in value)
    return isinstance(value, ObjectValue)


def _objects(value: Value) -> list[ObjectValue]:
    several = value if isinstance(value, list) else [value]
    return [each for each in several if isinstance(each, ObjectValue)]


def _body_of(value: ObjectValue, filename: str) -> Body:
    attributes = {name: Attribute(member, *value.positions[name]) for name, member in value.items()}
    return Body(filename, attributes)
