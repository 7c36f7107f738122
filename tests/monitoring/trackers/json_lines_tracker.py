"""A tracker in one file: it appends to RUN/lines/<stage>.jsonl. Named as `FILE.py:JsonLines`."""

import json
from pathlib import Path

from rcot_rl.monitoring.trackers.tracker import Tracker


class JsonLines(Tracker):
    """Writes each call as a line."""

    label = "JSON lines"

    def open(self, stage):
        self.file = stage.run / "lines" / f"{stage.stage}.jsonl"
        self.file.parent.mkdir(exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return max([line.get("step", 0) for line in map(json.loads, lines)], default=0)

    def log(self, step, values):
        self.write(
            step=step, values={k: v for k, v in values.items() if isinstance(v, float | int)}
        )

    def summarize(self, values):
        self.write(summary=sorted(values))

    def alert(self, alert):
        self.write(alert=alert.code)

    def close(self, state):
        self.write(closed=state)

    def where(self):
        return str(Path(self.file).parent)

    def write(self, **values):
        with self.file.open("a") as file:
            file.write(json.dumps(values) + "\n")
