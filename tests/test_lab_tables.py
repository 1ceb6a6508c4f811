"""The tables of the lab are those that tests/lab_tables.py makes from the committed results."""

import pytest

import lab_tables


@pytest.mark.parametrize("document", lab_tables.TABLES, ids=lambda path: path.name)
def test_the_tables_are_those_of_the_results(document):
    assert document.read_text() == lab_tables.filled(document)


@pytest.mark.parametrize("gap, said", [
    ("+0.010 [-0.020, +0.040], p 0.400", "no effect seen"), ("-0.030 [-0.040, -0.020], p 0.001", "**lower gold**"),
    ("+0.009 [+0.000, +0.017], p 0.049", "**higher gold**"), ("+0.000 [-0.000, +0.000], p 1.000", "never acted here"),
    ("-0.300 [-0.700, +0.100], p 0.060", "cannot tell: the interval is too wide")])
def test_an_interval_with_zero_in_it_is_no_effect(gap, said):
    assert lab_tables.verdict(gap) == said
