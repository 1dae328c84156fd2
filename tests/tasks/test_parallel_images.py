"""Conversations of which some have no image, trained on by several processes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from PIL import Image
from test_parallel_cli import CONFIG, spread, start

DEMO = CONFIG.parents[1] / "vision_language" / "demo_instruction.yaml"


@pytest.mark.parametrize(("every", "whole"), [(2, False), (1, True), (100, True)], ids=["some", "all", "none"])
def test_a_model_in_parts_is_shown_images_by_all_processes_or_by_none(every: int, whole: bool, tmp_path: Path) -> None:
    importlib.import_module("tasks.vision_language")  # once, before the processes begin
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    records = []
    for i in range(20):
        shown = every == 1 or (every == 2 and i % 2)
        question = {"from": "human", "value": f"{'<image>' if shown else ''}\nWhat is {i}?"}
        turns = [question, {"from": "gpt", "value": "Red."}]
        records.append({"id": str(i), "conversations": turns, **({"image": "red.png"} if shown else {})})
    (tmp_path / "all.json").write_text(json.dumps(records))
    args = ["vision_language", "fit", "--config", str(DEMO), f"--data.source={tmp_path}/all.json", *spread(expert=2)]
    args += ["--data.batch_size=1", "--data.tested=null", "--trainer.max_steps=4", "--trainer.callbacks=null"]
    args += ["--trainer.default_root_dir", str(tmp_path), "--trainer.accelerator=cpu", "--trainer.val_check_interval=4"]
    args += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    if whole:
        start(2, args)
        return
    with pytest.raises(mp.ProcessRaisedException, match=r"step [1-4]: the batches of some processes have images"):
        start(2, args)
