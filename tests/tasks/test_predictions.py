"""The file of predictions that several processes made."""

import csv
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from tasks.predictions import write_predictions


class Numbered(pl.LightningModule):
    """Says which row it was given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def predict_step(self, batch, batch_idx):
        return [{"row": int(batch)}]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 6, 7])
def test_no_row_is_lost_where_processes_have_unequally_many(processes, count, tmp_path, monkeypatch):
    """Shares as Lightning deals them out: each process every so many-th row."""
    shares = [[[{"row": n}] for n in range(rank, count, processes)] for rank in range(processes)]

    def gather(told, own):
        told[:] = list(enumerate(shares))

    monkeypatch.setattr(dist, "all_gather_object", gather)
    kwargs = {"rank": 0, "num_replicas": processes} if processes > 1 else None
    trainer = SimpleNamespace(world_size=processes, is_global_zero=True, distributed_sampler_kwargs=kwargs)
    write_predictions(str(tmp_path / "rows.csv"), trainer, shares[0])
    with (tmp_path / "rows.csv").open() as file:
        assert [int(row["row"]) for row in csv.DictReader(file)] == list(range(count))


def test_two_processes_leave_every_row_in_order(tmp_path):
    class Write(pl.Callback):
        def on_predict_start(self, trainer, module):
            self.found = []

        def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            self.found.append(outputs)

        def on_predict_end(self, trainer, module):
            write_predictions(str(tmp_path / "rows.csv"), trainer, self.found)

    torch.set_num_threads(1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = pl.Trainer(strategy="ddp_fork", devices=2, callbacks=[Write()], enable_checkpointing=False, **quiet)
    trainer.predict(Numbered(), DataLoader(torch.arange(5), batch_size=None), return_predictions=False)
    with (tmp_path / "rows.csv").open() as file:
        assert [int(row["row"]) for row in csv.DictReader(file)] == [0, 1, 2, 3, 4]
