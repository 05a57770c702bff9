"""Where a run stands: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from shoal.observe.charts_server import mean_staleness
from shoal.observe.mfu import Mfu
from shoal.observe.smooth import Smooth
from shoal.observe.units import duration, number, percent
from shoal.observe.waiting import Recently

# Steps whose speed is averaged; one step alone jumps too much to be read.
_WINDOW = 20
# A terminal is drawn at most this often, in seconds.
_REDRAW = 0.1
# Plain lines: at least so many seconds apart, and at least this share of the time so far, so that the log of
# a run of weeks stays short.
_PAUSE, _PAUSE_SHARE = 5.0, 0.01
_BAR = 40


class Progress:
    """Shows each row of metrics: step, loss, speed, MFU, gradient norm, learning rate, time left."""

    def __init__(
        self,
        console: Console,
        steps: int,
        mfu: Mfu,
        first: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """steps: of the whole run, 0 = it has no end. first: steps that were done before.

        clock: seconds, from any zero.
        """
        self.console, self.steps, self.mfu, self.clock = console, steps, mfu, clock
        self.first = self.done = first
        self.row: dict[str, Any] = {}
        self.loss = Smooth()
        self.validation: float | None = None
        self._recent: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._waiting = Recently()
        self._begun = clock()
        self._after_first: float | None = None
        self._shown, self._shown_step = self._begun, first
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # What libraries print here goes above the display, unless the user has sent it elsewhere.
            self._live = Live(
                console=console,
                auto_refresh=False,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()
            # A rank that is killed could not bring a hidden cursor back.
            console.show_cursor(True)

    def step(self, row: dict[str, Any]) -> None:
        """Takes in one row of metrics, and shows it if it is time to."""
        self.row, self.done = row, row["step"]
        self.loss.add(row["loss"])
        self.validation = row.get("val_loss", self.validation)
        self._recent.append((row["tokens"], row["seconds"]))
        if "commits" not in row:  # workers of a server need not come together
            self._waiting.add(row)
        if self._after_first is None:
            self._after_first = self.clock()
        if self._due():
            self._show()

    def close(self) -> None:
        """Shows the last step, if it is not shown yet, and leaves the display as it is."""
        if self.row and (self._live or self._shown_step != self.done):
            self._show()
        if self._live:
            self._live.update(_Display(self, running=False))
            self._live.stop()
            self._live = None

    def _due(self) -> bool:
        now = self.clock()
        if self.done in (self.first + 1, self.steps or None):
            return True
        if self._live:
            return now - self._shown >= _REDRAW
        if "val_loss" in self.row or self._tenth(self.done) > self._tenth(self._shown_step):
            return True
        return now - self._shown >= max(_PAUSE, _PAUSE_SHARE * (now - self._begun))

    def _tenth(self, step: int) -> int:
        return 10 * step // self.steps if self.steps else 0

    def _show(self) -> None:
        self._shown, self._shown_step = self.clock(), self.done
        if self._live:
            self._live.update(_Display(self, running=True), refresh=True)
        else:
            figures = [self.position(), *(f"{label} {value}".strip() for label, value in self.figures())]
            self.console.print("  ".join(figures), markup=False, highlight=False, soft_wrap=True)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices together, over the last steps."""
        seconds = sum(s for _, s in self._recent)
        return sum(t for t, _ in self._recent) / seconds if seconds else None

    @property
    def left(self) -> float | None:
        """Seconds until the last step, if the rest goes as it went since the first, validation included."""
        steps = self.done - self.first
        if self._after_first is None:
            return None
        # The first step also compiles and allocates, so it counts only while it is the only one.
        each = (self.clock() - self._after_first) / (steps - 1) if steps > 1 else self.row["seconds"]
        return (self.steps - self.done) * each

    def position(self) -> str:
        if not self.steps:
            return f"step {self.done:,} (no end)"
        return f"step {self.done:,}/{self.steps:,}  {percent(self.done / self.steps)}"

    def figures(self) -> Iterator[tuple[str, str]]:
        """(label, value) of everything shown beside the position; some of them are their own label."""
        yield "loss", number(self.loss.mean, ".3f")
        if self.validation is not None:
            yield "val loss", number(self.validation, ".3f")
        speed = self.tokens_per_second
        yield "", f"{number(speed)} tok/s"
        if speed is not None and self.mfu.devices > 1:
            yield "", f"{speed / self.mfu.devices:,.0f} tok/s per device"
        if self.mfu.peak:
            yield "MFU", percent(self.mfu.of(speed))
        yield "grad norm", number(self.row.get("grad_norm"), ".3g")
        if "busiest_load" in self.row:
            yield "busiest expert", f"{number(self.row['busiest_load'], '.2f')}×"
        if late := mean_staleness(self.row):
            yield "staleness", number(late, ".1f")
        if slow := self._waiting.slowest():
            yield f"waiting for replica {slow[0]}:", percent(slow[1])
        yield "lr", number(self.row.get("lr"), ".2e")
        if not self.steps:
            yield "for", duration(self.clock() - self._begun)
            return
        ended = self.done >= self.steps
        yield ("took", duration(self.clock() - self._begun)) if ended else ("ETA", duration(self.left))


class _Display:
    """What the terminal shows: a bar, below it the figures in as many lines as its width asks for."""

    def __init__(self, progress: Progress, running: bool):
        self.progress, self.running = progress, running

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        position = self.progress.position()
        line = Text(position, style="bold", no_wrap=True, overflow="crop")
        room = min(_BAR, width - len(position) - 2)
        if room >= 10 and self.progress.steps:
            line.append("  ")
            line.append_text(self._bar(room, options.ascii_only))
        yield line
        yield from self._folded(width)
        if self.running:
            # An empty line for the cursor: if this process is killed, what others say begins on its own line.
            yield Text("")

    def _bar(self, room: int, ascii_only: bool) -> Text:
        full = round(room * self.progress.done / self.progress.steps)
        done, rest = ("#", ".") if ascii_only else ("━", "━")
        return Text.assemble((done * full, "cyan"), (rest * (room - full), "bright_black"))

    def _folded(self, width: int) -> Iterator[Text]:
        """The figures, none of them broken unless the terminal is narrower than one."""
        line = Text(no_wrap=True, overflow="crop")
        for label, value in self.progress.figures():
            figure = Text.assemble((f"{label} ", "bright_black"), value) if label else Text(value)
            if line and len(line) + 3 + len(figure) > width:
                yield line
                line = Text(no_wrap=True, overflow="crop")
            if line:
                line.append("   ")
            line.append_text(figure)
        yield line


class Lasting:
    """A text stream whose reader may leave and whose disk may be full: no reason to stop training."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
