"""Every named data set says where it is from."""

from __future__ import annotations

from instructft.data.formats import FORMATS
from instructft.data.sources import SOURCES


def test_every_source_says_where_it_is_from_and_under_which_licence():
    for name, source in SOURCES.items():
        assert source.format in FORMATS
        assert source.licence
        assert source.homepage
        assert (source.hub is not None) + (source.url is not None) == (not name.startswith("quickstart"))
    assert "red-team-attempts" not in str(SOURCES["hh-rlhf"].files)
