"""HCL 1 and its JSON form: one structure, positions in every error, and never another exception than HCLError."""

from __future__ import annotations

import json
import re
import time

import hcl2
import pytest
from hcl2 import SerializationOptions
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar import hcl
from sidecar.hcl import Body, HCLError, ObjectValue, scanner


def plain(body: Body) -> dict:
    """Values without positions."""
    return {
        "attributes": {name: attribute.value for name, attribute in body.attributes.items()},
        "blocks": [(block.type, block.labels, plain(block.body)) for block in body.blocks],
    }


def value_of(text: str):
    return hcl.parse(f"x = {text}").attributes["x"].value


def test_a_block_with_several_attributes_on_one_line_as_vault_files_have_it():
    body = hcl.parse('storage "consul" { address = "127.0.0.1:8500" path = "outrider/" }')
    (block,) = body.blocks
    assert (block.type, block.labels) == ("storage", ("consul",))
    assert plain(block.body)["attributes"] == {"address": "127.0.0.1:8500", "path": "outrider/"}


def test_comments_repeated_and_nested_blocks_and_bare_labels():
    text = """
    # one
    ui = true // two
    listener tcp { address = "a" }  /* three
      still three */
    listener "tcp" {
      telemetry { unauthenticated_metrics_access = true }
    }
    """
    assert plain(hcl.parse(text)) == {
        "attributes": {"ui": True},
        "blocks": [
            ("listener", ("tcp",), {"attributes": {"address": "a"}, "blocks": []}),
            (
                "listener",
                ("tcp",),
                {
                    "attributes": {},
                    "blocks": [
                        ("telemetry", (), {"attributes": {"unauthenticated_metrics_access": True}, "blocks": []}),
                    ],
                },
            ),
        ],
    }


def test_a_policy_with_parameters_both_ways_of_writing_an_object():
    text = """
    path "secret/data/{{identity.entity.name}}/*" {
      capabilities = ["create", "update",]
      allowed_parameters = { "ttl" = ["1h", "2h"], "*" = [] }
      denied_parameters { note = [] }
    }
    """
    (block,) = hcl.parse(text).blocks
    assert block.labels == ("secret/data/{{identity.entity.name}}/*",)
    assert block.body.attributes["allowed_parameters"].value == {"ttl": ["1h", "2h"], "*": []}
    assert plain(block.body.blocks[0].body)["attributes"] == {"note": []}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", 12),
        ("-7", -7),
        ("1.5", 1.5),
        ("2e3", 2000.0),
        ("0x1F", 31),
        ("0755", 493),
        ("true", True),
        ("false", False),
        ("[]", []),
        ('["a", 1, [true]]', ["a", 1, [True]]),
        ('{ a = 1, "b c" = "d" }', {"a": 1, "b c": "d"}),
        ("{ a { b = 1 } }", {"a": {"b": 1}}),
        ('{ a "l" { b = 1 } }', {"a": {"l": {"b": 1}}}),
        (r'"\t\"\\\x41\u00e9\U0001F600\101"', '\t"\\A\u00e9\U0001f600A'),
        ('"cost: $5 ${a "quoted" {b}} end"', 'cost: $5 ${a "quoted" {b}} end'),
        ("<<EOT\none\n  two\nEOT\n", "one\n  two\n"),
        ("<<-EOT\n    one\n      two\n    EOT\n", "one\n  two\n"),
        ("<<-EOT\n  one\n    EOT\n", "  one\n"),
        ("<<EOT\r\none\r\nEOT\r\n", "one\r\n"),
    ],
)
def test_values(text, expected):
    assert value_of(text) == expected
    assert type(value_of(text)) is (type(expected) if not isinstance(expected, dict) else ObjectValue)


@pytest.mark.parametrize(
    ("text", "line", "col", "reason"),
    [
        ("a = ", 1, 5, "expected a value, found the end of the file"),
        ('a = "b', 1, 5, "string is not closed"),
        ('a = "b\n"', 1, 5, "string is not closed"),
        ("\n  a {", 2, 6, "expected a name, found the end of the file"),
        ("a = [1 2]", 1, 8, 'expected "," or "]"'),
        ("x = 1\n/* never", 2, 1, "comment is not closed"),
        ("ttl = 10s", 1, 7, "a duration is written in quotes"),
        ("a = 1\n a = 2", 2, 2, '"a" is set twice; first on line 1'),
        ('a "b" = 1', 1, 7, 'expected "{"'),
        ("a = yes", 1, 5, "text is written in quotes"),
        ("a b c", 1, 6, 'expected "{"'),
        ("}", 1, 1, "expected a name"),
        ("a = { b = 1, b {} }", 1, 14, '"b" is set twice'),
        (r'a = "\q"', 1, 6, "unknown escape"),
        (r'a = "\ud800"', 1, 6, "not a Unicode character"),
        ("a = <<EOT\nx\n", 1, 5, "here-document is not closed"),
        ("a = <<\n", 1, 5, "expected a here-document"),
        ('a = "${ {"', 1, 6, '"${" is not closed'),
        ("a = 1e999", 1, 5, "out of range"),
        ("a = 09", 1, 5, "malformed number"),
        ("a = " + "9" * 5000, 1, 5, "too many digits"),
        ("a = \0", 1, 5, "U+0000"),
        ("a = " + "[" * 50, 1, 37, "nested more than"),
        ("a {" * 50, 1, 99, "nested more than"),
    ],
)
def test_every_error_says_where_and_what(text, line, col, reason):
    with pytest.raises(HCLError) as caught:
        hcl.parse(text, "f.hcl")
    assert (caught.value.line, caught.value.col) == (line, col)
    assert reason in caught.value.reason
    assert str(caught.value).startswith(f"f.hcl:{line}:{col}: ")


def test_a_byte_order_mark_is_passed_over():
    assert plain(hcl.parse("\ufeffa = 1"))["attributes"] == {"a": 1}


def test_a_number_may_have_64_digits():
    assert value_of("9" * 64) == int("9" * 64)
    with pytest.raises(HCLError, match="too many digits"):
        value_of("9" * 65)


def test_lists_beside_each_other_do_not_count_as_depth():
    assert len(value_of("[" + "[]," * 40 + "]")) == 40
    with pytest.raises(HCLError, match="nested more than"):
        value_of("[" + "[]," * 40 + "[" * 32)


def test_the_bounds_of_escaped_characters():
    assert value_of(r'"\U0010FFFF\ud7ff\ue000"') == "\U0010ffff\ud7ff\ue000"
    for text in (r'"\U00110000"', r'"\ud800"', r'"\udfff"'):
        with pytest.raises(HCLError, match="not a Unicode character"):
            value_of(text)


def test_how_long_a_text_may_be(monkeypatch):
    monkeypatch.setattr(scanner, "TEXT_CHARS_MAX", 6)
    assert plain(hcl.parse("a = 12"))["attributes"] == {"a": 12}
    with pytest.raises(HCLError, match="more than 6 characters"):
        hcl.parse("a = 123")


def test_an_error_never_repeats_a_value():
    for text in ('t = "s3cret', 't = "s3cret" "', 't = ["s3cret" "s3cret"]', "t = s3cret", '{"t":"s3cret}'):
        with pytest.raises(HCLError) as caught:
            hcl.parse_any(text)
        assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(hcl.parse('token = "s3cret"'))


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_json_gives_the_same_structure():
    as_json = """{"ui": true, "storage": {"consul": {"path": "o/", "address": "a"}},
      "listener": [{"tcp": {"address": "x"}}, {"tcp": {"address": "y"}}], "telemetry": {"disable_hostname": true}}"""
    as_hcl = """ui = true
      storage "consul" { path = "o/" address = "a" }
      listener "tcp" { address = "x" }
      listener "tcp" { address = "y" }
      telemetry { disable_hostname = true }"""
    assert plain(hcl.parse_any(as_json)) == plain(hcl.parse_any(as_hcl))


def test_json_lists_of_bodies_under_one_label_repeat_the_block():
    body = hcl.parse_json('{"listener": {"tcp": [{"address": "x"}, {"address": "y"}]}}')
    assert [block.labels for block in body.blocks] == [("tcp",), ("tcp",)]


def test_json_policy():
    text = '{"path": {"secret/*": {"capabilities": ["read"], "allowed_parameters": {"a": []}}, "x": {"policy": "d"}}}'
    body = hcl.parse_any("  \n" + text)
    assert [block.labels for block in body.blocks] == [("secret/*",), ("x",)]
    assert body.blocks[0].body.attributes["allowed_parameters"].value == {"a": []}


def test_an_assigned_object_can_be_read_as_blocks():
    body = hcl.parse('path = { "a" = { capabilities = ["read"] } }\nui = 1')
    (block,) = hcl.as_blocks("path", body.attributes["path"])
    assert block.labels == ("a",)
    with pytest.raises(HCLError, match='"ui" must be a block'):
        hcl.as_blocks("ui", body.attributes["ui"])


@pytest.mark.parametrize(
    ("text", "line", "col", "reason"),
    [
        ('{"a": 1, "a": 2}', 1, 10, '"a" is set twice'),
        ('{"a": 1,}', 1, 9, "expected a name in quotes"),
        ('{"a": [1,]}', 1, 10, "expected a value"),
        ('{"a": 01}', 1, 7, "expected a value"),
        ('{"a": NaN}', 1, 7, "expected a value"),
        ('{"a": 1} x', 1, 10, "expected the end of the file"),
        ('{\n "a" 1}', 2, 6, 'expected ":"'),
        ('{"a": "\\ud800"}', 1, 8, "not a Unicode character"),
        ('{"a": "\t"}', 1, 7, "string is not closed"),
        ('{"a":' * 40, 1, 161, "nested more than"),
    ],
)
def test_json_errors(text, line, col, reason):
    with pytest.raises(HCLError) as caught:
        hcl.parse_any(text)
    assert (caught.value.line, caught.value.col) == (line, col), caught.value
    assert reason in caught.value.reason


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**15), 10**15),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
documents = st.dictionaries(
    st.text(), st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
)


@given(documents, st.booleans())
def test_json_agrees_with_the_standard_library(document, ascii_only):
    text = json.dumps(document, ensure_ascii=ascii_only)
    wrapped = hcl.parse_json(f'{{"v": [0, {text}]}}')  # the leading number keeps it an attribute
    assert wrapped.attributes["v"].value == [0, document]


# --- properties ---------------------------------------------------------------------------------------------------

pieces = st.sampled_from(
    ['"', "{", "}", "[", "]", "=", ",", "a", "key", "1", "-", ".5", "0x", "e9", "<<EOT\n", "<<-E\n", "EOT", "\n", " ",
     "/*", "*/", "//", "#", "\\", "\\u12", "${", "$", "true", ":", "null", "\0", "\ufeff", "\ud83d", "\u0661", "\r"]
)  # fmt: skip


def error_of(parse, text: str) -> HCLError | None:
    try:
        parse(text)
    except HCLError as error:
        return error
    return None


@settings(max_examples=400)
@given(st.one_of(st.text(), st.lists(pieces, max_size=60).map("".join)))
def test_any_text_parses_or_raises_hclerror(text):
    for parse in (hcl.parse, hcl.parse_json, hcl.parse_any):
        error = error_of(parse, text)
        assert error is None or (1 <= error.line <= text.count("\n") + 1 and error.col >= 1)


@pytest.mark.parametrize(
    "text",
    [
        'a = "${"' + '\\"' * 200_000,
        'a = "' + "${" * 200_000,
        "a = [" + "1," * 200_000,
        "/*" * 400_000,
        "#\n" * 400_000,
        "a = <<X\n" + " " * 400_000,
        '{"a":"' + "\\" * 400_001,
        "a " * 200_000,
    ],
    ids=lambda text: text[:8],
)
def test_a_hostile_text_costs_one_pass(text):
    started = time.process_time()
    error_of(hcl.parse_any, text)
    assert time.process_time() - started < 5.0, "a quadratic parser would take minutes"


SAMPLE = """
storage "consul" { address = "127.0.0.1:8500" path = "o/" } # c
listener "tcp" {
  address = ["a", "b"]
  size = 0x10
}
text = <<-EOT
  hello
  EOT
map = { a = 1, "b" = "\\u00e9" }
"""


@given(st.integers(0, len(SAMPLE) - 1), st.one_of(st.just(""), pieces))
def test_a_damaged_file_parses_or_raises_hclerror(at, replacement):
    error_of(hcl.parse, SAMPLE[:at] + replacement + SAMPLE[at + 1 :])


# --- the independent parser, where HCL 1 and 2 agree --------------------------------------------------------------

names = st.from_regex(re.compile(r"[a-z][a-z_]{0,8}"), fullmatch=True).map(lambda name: f"n{name}")
letters = st.text(st.characters(whitelist_categories=("L", "N", "Zs"), whitelist_characters="./-_*+:"), max_size=12)
common_scalars = st.one_of(st.booleans(), st.integers(0, 10**9), letters.map(lambda text: text.strip()))
common_values = st.one_of(common_scalars, st.lists(common_scalars, max_size=4))
bodies = st.dictionaries(names, common_values, max_size=4)
files = st.tuples(bodies, st.lists(st.tuples(names, letters.filter(str.strip), bodies), max_size=3))


def render(body: dict, indent: str = "") -> str:
    return "".join(f"{indent}{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in body.items())


@settings(max_examples=60, deadline=None)
@given(files)
def test_python_hcl2_reads_the_same(file):
    attributes, blocks = file
    blocks = [(f"{kind}_block", label, body) for kind, label, body in blocks]
    text = render(attributes) + "".join(
        f'{kind} "{label}" {{\n{render(body, "  ")}}}\n' for kind, label, body in blocks
    )
    options = SerializationOptions(strip_string_quotes=True, explicit_blocks=False)
    theirs = hcl2.loads(text, serialization_options=options)
    ours: dict = {name: attribute.value for name, attribute in hcl.parse(text).attributes.items()}
    for block in hcl.parse(text).blocks:
        inner = {name: attribute.value for name, attribute in block.body.attributes.items()}
        ours.setdefault(block.type, []).append({block.labels[0]: inner})
    assert ours == theirs
