"""scripts/check_gpu.py runs everywhere and judges what it measures; a section that fails or hangs loses only itself."""

import json
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT

from scripts import check_gpu

CPU = ["--device", "cpu", "--quick"]


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert check_gpu.main([*CPU, "--results-file", str(tmp_path / "results.json")]) == 0
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {line["section"] for line in results} == set(check_gpu.SECTIONS)
    assert not [line for line in results if line["verdict"] in ("failed", "missed")]
    assert sum(line["verdict"] == "held" for line in results) > 15


def broken(setting: check_gpu.Setting, report: check_gpu.Report) -> None:
    report.add("before", 1.0)
    raise RuntimeError("illegal memory access\nand more")


def slow(setting: check_gpu.Setting, report: check_gpu.Report) -> None:
    time.sleep(60)


def wrong(setting: check_gpu.Setting, report: check_gpu.Report) -> None:
    report.add("gradient", 0.2, at_most=0.1, change="a flag", correctness=True)


def late(setting: check_gpu.Setting, report: check_gpu.Report) -> None:
    report.add("ratio", 2.0, at_most=1.0, change="another flag")
    report.add("rate", 2.0, at_least=1.0)


def test_what_fails_loses_only_itself_and_what_is_missed_names_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = dict(broken=(broken, 9), slow=(slow, 0.2), wrong=(wrong, 9), late=(late, 9))
    monkeypatch.setattr(check_gpu, "SECTIONS", sections)
    file = tmp_path / "results.json"
    assert check_gpu.main([*CPU, "--seconds", "100", "--results-file", str(file)]) == 1
    lines = [(line["section"], line["verdict"], line["change"]) for line in json.loads(file.read_text())["results"]]
    assert [line[:2] for line in lines] == [
        *(("broken", "measured"), ("broken", "failed"), ("slow", "failed")),
        *(("wrong", "missed"), ("late", "missed"), ("late", "held")),
    ]
    printed = capsys.readouterr()
    assert "illegal memory access" in printed.out and lines[3][2] == "a flag"
    assert "in broken" in printed.err and "in slow" in printed.err  # where it was
    assert check_gpu.main([*CPU, "--only", "late", "--results-file", str(file)]) == 0  # slow, but right


def test_a_section_that_the_whole_time_cuts_short_has_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_gpu, "SECTIONS", dict(slow=(slow, 100)))
    monkeypatch.setattr(check_gpu, "WORTHWHILE", 0.1)
    file = tmp_path / "results.json"
    for words in ([], ["--only", "slow"]):
        assert check_gpu.main([*CPU, *words, "--seconds", "0.5", "--results-file", str(file)]) == 0
        (line,) = json.loads(file.read_text())["results"]
        assert line["name"].startswith("stopped after") and line["verdict"] == "left out"
        assert "0 section(s) failed, 1 without the time to end" in capsys.readouterr().out


def test_several_sections_keep_their_limits_and_one_alone_has_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {}
    monkeypatch.setattr(check_gpu, "SECTIONS", dict(late=(late, 9), wrong=(wrong, 30)))
    monkeypatch.setattr(check_gpu, "run_section", lambda name, setting, path, limit: limits.update({name: limit}))
    words = [*CPU, "--seconds", "100", "--results-file", str(tmp_path / "results.json")]
    check_gpu.main([*words, "--only", "late", "wrong"])
    assert limits == dict(late=9, wrong=30)
    check_gpu.main([*words, "--only", "late"])
    assert limits["late"] > 90


def test_a_command_is_killed_when_it_has_written_its_file(tmp_path: Path) -> None:
    written = tmp_path / "written"
    with (tmp_path / "console.txt").open("w") as console:
        sleeps = f"import time; open({str(written)!r}, 'w'); time.sleep(60)"
        assert check_gpu.kill_when(written, [sys.executable, "-c", sleeps], console)
        assert not check_gpu.kill_when(tmp_path / "never", [sys.executable, "-c", ""], console)


def test_sections_that_no_time_is_left_for_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_gpu, "SECTIONS", dict(late=(late, 9)))
    file = tmp_path / "results.json"
    assert check_gpu.main([*CPU, "--seconds", "3", "--results-file", str(file)]) == 0
    assert [line["name"] for line in json.loads(file.read_text())["results"]] == ["not run: no time left"]
