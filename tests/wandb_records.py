"""Reads the file of an offline W&B run, which nothing in wandb itself does any more."""

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2

HEADER, BLOCK = 7, 32768  # LevelDB's log format; the file's own header has 7 bytes as well
WHOLE, LAST = 1, 4


def records(path):
    data, place, parts = Path(path).read_bytes(), HEADER, b""
    assert data[:4] == b":W&B"
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + HEADER])
        parts += data[place + HEADER : place + HEADER + size]
        place += HEADER + size
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_run(path):
    """`run` (name, group, job type, project), `config`, `history` (a dict a call of log), `artifacts` (paths of each)."""
    found = {"config": {}, "history": [], "artifacts": {}, "names": set()}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found["run"] = (run.display_name, run.run_group, run.job_type, run.project)
            found["config"] |= values(run.config.update)
        elif kind == "config":
            found["config"] |= values(record.config.update)
        elif kind == "history":
            found["history"].append(values(record.history.item))
        elif kind == "artifact":
            found["artifacts"][record.artifact.name] = [entry.path for entry in record.artifact.manifest.contents]
    found["names"] = {name for entry in found["history"] for name in entry}
    return found


def values(items):
    """By name; tables and pictures come in parts, and are dicts of these."""
    found = {}
    for item in items:
        name, *inside = [item.key] if item.key else item.nested_key
        value = json.loads(item.value_json)
        if inside:
            found.setdefault(name, {})[".".join(inside)] = value
        else:
            found[name] = value
    return found


def read_runs(folder):
    """All runs below a folder, in the order they were started."""
    paths = sorted(Path(folder).rglob("run-*.wandb"), key=lambda path: path.stat().st_ctime)
    return [read_run(path) for path in paths]


def series(run, name):
    """(step, value) of a metric."""
    return [(entry["train/global_step"], entry[name]) for entry in run["history"] if name in entry]
