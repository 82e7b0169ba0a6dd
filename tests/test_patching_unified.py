"""Parsing and applying unified diffs."""

from __future__ import annotations

import difflib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etap_integration.patching.errors import HunkError, ManifestError
from etap_integration.patching.unified import parse_patch, split_lines

LINES = st.lists(st.sampled_from([b"a\n", b"b\n", b"\n", b"c\r\n", b"d\x0ce\n", b"\xff\xfe\n", b"-- \n", b"+++ x\n"]))


def make_diff(old: list[bytes], new: list[bytes], context: int) -> bytes:
    header = [b"Some header text\n", b"--- a/f\n", b"+++ b/f\n"]
    hunks = list(difflib.diff_bytes(difflib.unified_diff, old, new, b"a/f", b"b/f", n=context, lineterm=b"\n"))[2:]
    out = []
    for line in header + hunks:
        out.append(line if line.endswith(b"\n") else line + b"\n\\ No newline at end of file\n")
    return b"".join(out)


@settings(max_examples=200, deadline=None)
@given(LINES, LINES, st.integers(0, 3), st.booleans(), st.booleans())
def test_any_diff_goes_forth_and_back(old, new, context, cut_old, cut_new):
    if cut_old:
        old = [*old, b"end"]
    if cut_new:
        new = [*new, b"end"]
    if old == new or not old:
        return
    (patch,) = parse_patch(make_diff(old, new, context), "p")
    assert patch.apply(b"".join(old)) == b"".join(new)
    assert patch.revert(b"".join(new)) == b"".join(old)


def test_lines_end_at_newline_only():
    assert split_lines(b"a\x0cb\rc\r\nd") == [b"a\x0cb\rc\r\n", b"d"]
    assert split_lines(b"") == []


PATCH = b"--- a/f\n+++ b/f\n@@ -2,3 +2,4 @@\n two\n three\n+new\n four\n"


def test_other_context_is_refused_with_line_and_content():
    (patch,) = parse_patch(PATCH, "p")
    with pytest.raises(HunkError, match=r"f: hunk @@ -2,3 \+2,4 @@ does not apply: line 3 is 'THREE\\n'"):
        patch.apply(b"one\ntwo\nTHREE\nfour\n")


def test_shifted_hunk_needs_fuzz():
    (patch,) = parse_patch(PATCH, "p")
    moved = b"zero\none\ntwo\nthree\nfour\n"
    with pytest.raises(HunkError, match="does not apply"):
        patch.apply(moved)
    assert patch.apply(moved, fuzz=True) == b"zero\none\ntwo\nthree\nnew\nfour\n"


def test_fuzz_drops_outer_context():
    (patch,) = parse_patch(PATCH, "p")
    assert patch.apply(b"TWO\nthree\nFOUR\n", fuzz=True) == b"TWO\nthree\nnew\nFOUR\n"


def test_fuzz_refuses_an_ambiguous_place():
    (patch,) = parse_patch(PATCH, "p")
    with pytest.raises(HunkError, match="fits at lines 3, 6: refused"):
        patch.apply(b"0\n1\ntwo\nthree\nfour\ntwo\nthree\nfour\n", fuzz=True)


def test_fuzz_finds_no_place():
    (patch,) = parse_patch(PATCH, "p")
    with pytest.raises(HunkError, match="does not apply anywhere"):
        patch.apply(b"nothing\nalike\n", fuzz=True)


def test_created_file():
    (patch,) = parse_patch(b"--- /dev/null\n+++ b/n\n@@ -0,0 +1,2 @@\n+a\n+b\n", "p")
    assert patch.creates and patch.apply(None) == b"a\nb\n"
    assert patch.revert(b"a\nb\n") is None
    with pytest.raises(HunkError, match="exists already"):
        patch.apply(b"a\n")
    with pytest.raises(HunkError, match="was changed"):
        patch.revert(b"a\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"just words\n", "holds no hunk"),
        (b"--- a/f\n+++ b/f\n@@ -1,2 +1,1 @@\n one\n", "not a unified diff"),
        (b"--- a/../f\n+++ b/../f\n@@ -1 +1 @@\n-a\n+b\n", "not of the form"),
        (b"--- /etc/f\n+++ /etc/f\n@@ -1 +1 @@\n-a\n+b\n", "not of the form"),
        (b"--- a/f\n+++ /dev/null\n@@ -1 +0,0 @@\n-a\n", "renames or deletes"),
        (b"--- a/f\n+++ b/g\n@@ -1 +1 @@\n-a\n+b\n", "renames or deletes"),
    ],
)
def test_malformed_patches_are_refused(text, message):
    with pytest.raises(ManifestError, match=message):
        parse_patch(text, "p")
