"""Making the runs of a study: each once, several at a time, on from where it was stopped; by a launcher of the test."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from studies import ARMS, study_of, write_run

from scripts.comparison import run as execution
from scripts.comparison.launch import Job, Local, launch_words
from scripts.comparison.records import epochs_done, find_folder, read_record, write_record
from scripts.comparison.results import collect
from scripts.comparison.run import make_runs
from scripts.comparison.study import Run, Study


@dataclass
class FakeJob:
    """Makes an epoch each time it is asked whether it has ended."""

    launcher: "FakeLauncher"
    run: Run
    folder: Path
    waited: bool = False

    def poll(self) -> int | None:
        if self.run.arm in self.launcher.broken:
            return 1
        epochs = epochs_done(self.folder) + 1
        record = read_record(self.folder)
        write_run(self.folder.parent, self.run, accuracy_of(self.run), epochs, finished=False)
        write_record(self.folder, record)
        self.launcher.epochs += 1
        if self.launcher.epochs == self.launcher.killed_after:
            os.kill(os.getpid(), signal.SIGTERM)
        return 0 if epochs == self.run.epochs else None

    def stop(self) -> None:
        self.launcher.stopped.append(self.run.folder)

    def wait(self, timeout_s: float) -> None:
        self.waited = True


@dataclass
class FakeLauncher:
    places: int = 1
    broken: tuple[str, ...] = ()
    killed_after: int | None = None
    epochs: int = 0
    started: list[str] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    most: int = 0

    def start(self, run: Run, folder: Path, words: list[str], place: int) -> Job:
        assert 0 <= place < self.places and read_record(folder)["command"].startswith("main.py ")
        assert "--auto_reload" in words and words[words.index("--output_dir") + 1] == str(folder)
        self.started.append(run.folder)
        if run.arm in self.broken:
            (folder / "console.txt").write_text("began\nerror: it is broken\nfrom the launcher: exit code 1\n")
        return FakeJob(self, run, folder)


def accuracy_of(run: Run) -> float:
    return 50 + run.seed + 10 * (run.arm == "attnscale")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "POLL_S", 0)


def table(study: Study, folder: Path) -> list:
    return collect(study.runs(), folder).epochs.values.tolist()


@pytest.mark.parametrize("places", [1, 3, 10])
def test_every_run_is_made_once(places: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    study = study_of(seeds=3)
    launcher = FakeLauncher(places)
    assert make_runs(study.runs(), tmp_path, launcher) == []
    assert sorted(launcher.started) == sorted(run.folder for run in study.runs()) and launcher.epochs == 6 * 2
    printed = capsys.readouterr().out
    assert "[6/6 runs, 100% of the epochs, about 0:00:00 left]" in printed
    again = FakeLauncher()
    make_runs(study.runs(), tmp_path, again)
    assert again.started == [] and "6 runs are there already" in capsys.readouterr().out


def test_a_study_killed_three_times_ends_with_the_table_of_one_that_was_not(tmp_path: Path) -> None:
    study = study_of(seeds=3)
    make_runs(study.runs(), tmp_path / "whole", FakeLauncher())
    epochs = 0
    for killed_after in (1, 2, 3):
        launcher = FakeLauncher(2, killed_after=killed_after)
        with pytest.raises(execution.Stopped, match="stopped by SIGTERM"):
            make_runs(study.runs(), tmp_path / "killed", launcher)
        assert launcher.stopped or killed_after > 1  # at first both runs are going on
        epochs += launcher.epochs
    last = FakeLauncher()
    assert make_runs(study.runs(), tmp_path / "killed", last) == []
    assert epochs + last.epochs == 6 * 2  # nothing was made twice
    assert table(study, tmp_path / "killed") == table(study, tmp_path / "whole")


def test_what_is_changed_is_made_anew_and_what_is_renamed_is_not(tmp_path: Path) -> None:
    study = study_of()
    make_runs(study.runs(), tmp_path, FakeLauncher())
    renamed = study_of(arms={"base": ARMS["plain"], "remedy": ARMS["attnscale"]}, baseline="base", title="other")
    launcher = FakeLauncher()
    make_runs(renamed.runs(), tmp_path, launcher)
    assert launcher.started == []
    changed = replace(study, arms=study.arms | {"attnscale": study.arms["attnscale"] | {"lr": 1e-3}}, seeds=[0, 1, 2])
    make_runs(changed.runs(), tmp_path, launcher)
    assert [re.sub(r"-\w+$", "", name) for name in launcher.started] == [
        "attnscale-seed0", "attnscale-seed1", "plain-seed2", "attnscale-seed2"
    ]  # fmt: skip


def test_equal_arms_share_their_runs(tmp_path: Path) -> None:
    study = study_of(arms={"plain": ARMS["plain"], "same": ARMS["plain"] | {"num_workers": 3}})
    launcher = FakeLauncher()
    make_runs(study.runs(), tmp_path, launcher)
    assert len(launcher.started) == 2
    assert sorted(collect(study.runs(), tmp_path).last()["arm"]) == ["plain", "plain", "same", "same"]


def test_a_failed_run_does_not_stop_the_others_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    study = study_of(seeds=1)
    failed = make_runs(study.runs(), tmp_path, FakeLauncher(broken=("plain",)))
    assert [run.arm for run in failed] == ["plain"] and collect(study.runs(), tmp_path).missing == [failed[0].folder]
    expected = f"{failed[0].folder}: FAILED, exit code 1, error: it is broken, see {tmp_path / failed[0].folder}/"
    assert expected in capsys.readouterr().out
    again = FakeLauncher()
    assert make_runs(study.runs(), tmp_path, again) == [] and again.started == [failed[0].folder]


def test_a_run_that_starts_from_another_waits_for_it(tmp_path: Path) -> None:
    arms = {"plain": ARMS["plain"] | {"finetune": "{half}"}, "attnscale": ARMS["attnscale"] | {"finetune": "{half}"}}
    study = study_of(first={"half": ARMS["plain"] | {"epochs": 3}}, arms=arms, seeds=1)
    launcher = FakeLauncher(places=3)
    make_runs(study.runs(), tmp_path, launcher)
    half, plain, _ = study.runs()
    assert launcher.started[0] == half.folder and len(launcher.started) == 3
    words = read_record(find_folder(tmp_path, plain))["command"].split()
    assert words[words.index("--finetune") + 1] == str(tmp_path / half.folder / "checkpoint.pth")
    # Without it the others cannot begin; they are named as missing.
    failed = make_runs(study.runs(), tmp_path / "broken", FakeLauncher(broken=("half",)))
    assert sorted(run.arm for run in failed) == ["attnscale", "half", "plain"]


def test_the_launch_command_is_the_published_one_and_each_run_has_gpus_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = launch_words(2)
    ports = {next(word for word in launch_words(2) if word.startswith("--master_port=")) for _ in range(3)}
    assert words[:1] == [sys.executable] and "--nproc_per_node=2" in words and "--use_env" in words
    assert words[3:5] == ["-m", "torch.distributed.launch"] and words[-1].endswith("main.py") and len(ports) > 1
    calls = []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, env, **kwargs: calls.append(env))
    run = study_of().runs()[0]
    for place in range(3):
        Local(processes=2, places=3, threads=4, gpus=4).start(run, tmp_path, [], place)
    assert [env["CUDA_VISIBLE_DEVICES"] for env in calls] == ["0,1", "2,3", "0,1"]
    assert {env["OMP_NUM_THREADS"] for env in calls} == {"4"}


def test_a_study_s_own_commands_run_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    execution.prepare(study_of(prepare=['-c \'open("made", "w")\'']))
    assert (tmp_path / "made").exists()
    with pytest.raises(execution.StudyError, match="prepare = '-c 1/0': it left with exit code 1"):
        execution.prepare(study_of(prepare=["-c 1/0"]))
