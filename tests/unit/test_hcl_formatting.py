"""The usual layout of HCL: what changes is blanks, what stays is everything else."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar import hcl
from sidecar.hcl.formatting import format_text

UGLY = """


# what the deployers may do
path    "secret/data/app/*"   {
capabilities=["create",   "update" ,"read"]
      min_wrapping_ttl   =   "1s" // a second
    max_wrapping_ttl = "90m"


    allowed_parameters = {
"name"=["a","b"]
      "*" = []
    }

}
path "sys/health" { capabilities = [ "read" ] }
path "secret/metadata/*" {
  capabilities = [
"list",
      "read", # both
  ]
  /* of
     several lines */
}
"""

NEAT = """# what the deployers may do
path "secret/data/app/*" {
  capabilities     = ["create", "update", "read"]
  min_wrapping_ttl = "1s" // a second
  max_wrapping_ttl = "90m"

  allowed_parameters = {
    "name" = ["a", "b"]
    "*"    = []
  }
}

path "sys/health" { capabilities = ["read"] }
path "secret/metadata/*" {
  capabilities = [
    "list",
    "read", # both
  ]
  /* of
     several lines */
}
"""


def test_a_policy_in_the_usual_layout() -> None:
    assert format_text(UGLY) == NEAT
    assert format_text(NEAT) == NEAT


def test_here_documents_stay_as_they_are() -> None:
    text = 'a {\n      x = <<EOT\n  kept   =  as it is\n   }\nEOT\n y="z"\n}'
    assert format_text(text) == 'a {\n  x = <<EOT\n  kept   =  as it is\n   }\nEOT\n  y = "z"\n}\n'
    indented = "x = <<-EOT\n    a\n     b\n    EOT\n"
    assert hcl.parse(format_text(indented)).attributes["x"].value == "a\n b\n"


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "a = {}\n", 'a "b" {}\n'])
def test_little_texts(text: str) -> None:
    assert format_text(text) == text.lstrip("\n")


@pytest.mark.parametrize("text", ["path {", "a = ", 'a = "', "a b c", "a = [1", "a = 1 a = 2", "/* open"])
def test_what_is_no_hcl_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(hcl.HCLError, match=r"f\.hcl:1:"):
        format_text(text, "f.hcl")


_PIECES = st.sampled_from(
    ["a", "b.c", "=", "{", "}", "[", "]", ",", '"x y"', '"${f("}")}"', "1", "-2.5", "true", "\n", "\n\n", " ", "\t",
     "# c\n", "// d\n", "/* e */", "/* f\n g */", "<<E\nh\nE\n", "x = 1\n", 'p "q" {\n', "}\n", "l = [1,\n2]\n", "\r\n"]
)  # fmt: skip


@given(st.lists(_PIECES, max_size=30).map("".join))
@settings(max_examples=400, deadline=None)
def test_it_means_the_same_and_is_settled_or_it_is_refused(text: str) -> None:
    try:
        hcl.parse(text)
    except hcl.HCLError:
        with pytest.raises(hcl.HCLError):
            format_text(text)
        return
    made = format_text(text)
    assert format_text(made) == made
    assert made.count("#") + made.count("/*") >= text.count("/* e */")


@given(st.text(alphabet='ab={}[],"#/*<>$\\ \n\t1', max_size=40))
@settings(max_examples=400, deadline=None)
def test_nothing_else_is_ever_raised(text: str) -> None:
    with contextlib.suppress(hcl.HCLError):
        format_text(text)
