"""The record of a soak."""

from __future__ import annotations

from xml.etree.ElementTree import fromstring

from kvfs.tools.soak_report import BEGIN, END, PAGE, section, with_section

REPORT = fromstring("""<testsuites><testsuite timestamp="2026-11-29T07:00:00+00:00" time="5400">
<properties><property name="version" value="9.9"/><property name="factor" value="7"/></properties>
<testcase classname="tests.crash.test_kill" name="test_kill" time="120.0"><properties>
<property name="kills" value="1000"/></properties></testcase>
<testcase classname="tests.mount.test_fio" name="test_fio[a]" time="30"/>
<testcase classname="tests.mount.test_fio" name="test_fio[b]" time="30">
<failure message="x"/></testcase>
<testcase classname="tests.mount.test_fio" name="test_fio[c]" time="0"><skipped/></testcase>
</testsuite></testsuites>""")


def test_it_says_what_ran_and_what_failed() -> None:
    lines = section(REPORT).splitlines()
    assert lines[0].startswith("Begun 2026-11-29 07:00 UTC, FACTOR=7, kvfs 9.9, Linux ")
    assert lines[0].endswith(": 4 cases, 1 failed, 90 minutes.")
    assert lines[-2:] == [
        "| `crash/test_kill.py: test_kill` | 1 | 1,000 kills | passed | 2.0 |",
        "| `mount/test_fio.py: test_fio` | 3 | - | 1 FAILED, 1 skipped | 1.0 |",
    ]


def test_it_has_a_place_on_the_page() -> None:
    page = PAGE.read_text()
    assert with_section(with_section(page, "old"), "new") == with_section(page, "new")
    assert page.count(BEGIN) == page.count(END) == 1
