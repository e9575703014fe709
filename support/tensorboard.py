"""--tensorboard: a trainer's curves and grids as events in run_dir/tensorboard/{vae,unet}, for TensorBoard to show.

What it is not: the record of a run; that is its CSVs and PNGs. Nor SummaryWriter: its thread would keep events for two
minutes, which a kill would lose, and print a traceback of its own where a disk is full.
"""

import os
import time

import numpy as np

from support.errors import UserError
from support.show import to_pil


class Board:
    """The events of one trainer, each in the file before the set that holds its step is saved."""

    def __init__(self, folder):
        try:
            from tensorboard.compat.proto import event_pb2
            from tensorboard.summary.writer import record_writer
            from torch.utils.tensorboard import summary
        except ImportError:
            raise UserError("--tensorboard: is not installed; pip install tensorboard, or leave it out") from None
        self.proto, self.record_writer, self.summary, self.folder = event_pb2, record_writer, summary, folder

    def start(self, step):
        """Go on after `step`: what a killed run has left of later steps counts no more."""
        os.makedirs(self.folder, exist_ok=True)
        self.path, self.step = os.path.join(self.folder, f"events.out.tfevents.{time.time_ns()}"), step
        self.file = open(self.path, "xb")
        self.write(step, file_version="brain.Event:2")
        self.write(step + 1, session_log={"status": "START"})  # readers call it purge_step

    def write(self, step, **content):
        event = self.proto.Event(wall_time=time.time(), step=step, **content)
        try:
            self.record_writer.RecordWriter(self.file).write(event.SerializeToString())
            self.file.flush()
        except OSError as e:  # a full disk does not say of which file
            raise OSError(e.errno, e.strerror, self.path) from None

    def log(self, name, row):
        """A row of the CSV {name}; what is None is left out."""
        self.step = row["step"]
        for figure, value in row.items():
            if figure not in ("epoch", "step") and value is not None:
                self.write(self.step, summary=self.summary.scalar(f"{name}/{figure}", value))

    def show(self, name, grid):
        """grid: (3, H, W) in [0, 1], made at the step of the newest row."""
        pixels = np.asarray(to_pil(grid))  # rounded; floats would be cut
        self.write(self.step, summary=self.summary.image(name, pixels, dataformats="HWC"))
