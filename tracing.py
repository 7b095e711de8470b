"""``--profile``: a trace of a few training steps, and the operators that took longest."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

_logger = logging.getLogger(__name__)

WARM_UP = 3  # steps before the trace: memory pools, autotuning and compilation are not what a run spends its time on
ROWS = 12


class Tracer:
    """Traces ``steps`` steps within its context, after up to three others; draws nothing, changes no bit of the run.

    Args:
        path: The file to write, ``….json.gz``, in Chrome's trace format.
        steps: Steps to trace; fewer if there are not so many.
        available: Steps within the context.
        device: Where they run.
    """

    def __init__(self, path: Path, steps: int, available: int, device: torch.device) -> None:
        self.path = path
        lead = min(WARM_UP, max(available - steps, 0))
        self.steps = min(steps, available - lead)
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.profiler = profile(
            activities=activities,
            schedule=schedule(skip_first=max(lead - 1, 0), wait=0, warmup=min(lead, 1), active=self.steps, repeat=1),
            on_trace_ready=self._write,
        )

    def __enter__(self) -> "Tracer":
        self.profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.profiler.__exit__(kind, error, trace)

    def step(self) -> None:
        """To be called after each step."""
        self.profiler.step()

    def before(self, after_step: Callable[[int], None]) -> Callable[[int], None]:
        """``after_step`` with a call of :meth:`step` before it."""

        def both(done: int) -> None:
            self.step()
            after_step(done)

        return both

    def _write(self, profiler: profile) -> None:
        _logger.info(f"{self.steps} step(s) traced; the operators that took longest by themselves:\n{table(profiler)}")
        try:
            self.path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self.path))
        except (OSError, RuntimeError) as error:  # a failed trace must not end the run
            _logger.warning(f"--profile: {self.path} could not be written ({error})")
            return
        _logger.info(f"wrote {self.path}: open it in https://ui.perfetto.dev (docs/watch.md)")


def table(profiler: profile, rows: int = ROWS) -> str:
    """The operators that took most time by themselves: on the device if one was traced, else on the host."""
    events = [
        event
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU and not event.key.startswith("ProfilerStep")
    ]
    on_device = any(event.self_device_time_total for event in events)
    clocks = {"CPU": lambda event: event.self_cpu_time_total}
    if on_device:
        clocks = {"CUDA": lambda event: event.self_device_time_total} | clocks
    totals = {name: max(sum(map(clock, events)), 1e-9) for name, clock in clocks.items()}
    head = f"{'operator':<44}{'calls':>8}" + "".join(f"{name + ' ms':>12}{'share':>8}" for name in clocks)
    by = next(iter(clocks.values()))
    lines = [
        f"{event.key[:43]:<44}{event.count:>8}"
        + "".join(f"{clock(event) / 1000:>12.1f}{clock(event) / totals[name]:>8.1%}" for name, clock in clocks.items())
        for event in sorted(events, key=by, reverse=True)[:rows]
    ]
    return "\n".join([head, *lines])
