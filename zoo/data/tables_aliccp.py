"""Ali-CCP: clicks and conversions of Taobao (Ma et al., SIGIR 2018), in the CSV form that libraries share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .corpus import SPLITS
from .tables_files import CsvFiles
from .tables_schema import Categorical, Dense, Schema, Target
from .tables_split import HELD_OUT, Table, held_out_of

# Fields of the data set: the user, what the user did before, the item, both, and where it was shown.
# fmt: off
IDS = (
    "101", "121", "122", "124", "125", "126", "127", "128", "129", "109_14", "110_14", "127_14", "150_14",
    "205", "206", "207", "210", "216", "508", "509", "702", "853", "301",
)
# fmt: on
VALUES = ("D109_14", "D110_14", "D127_14", "D150_14", "D508", "D509", "D702", "D853")
RAW = "sample_skeleton_train.csv"


def aliccp_schema(columns: Sequence[str] | None = None) -> Schema:
    """Those fields that `columns` holds, all by default; click, and conversion (the column purchase) after a click.

    Users, field 101, are ranked apart.
    """
    ids = [Categorical(name) for name in IDS if columns is None or name in columns]
    values = [Dense(name, missing=0.0) for name in VALUES if columns is None or name in columns]
    return Schema((*ids, *values), (Target("click"), Target("conversion", "purchase", given="click")), group="101")


def aliccp_table(root: str = "data", held_out: float = HELD_OUT) -> Table:
    """ali_ccp_train.csv, ali_ccp_val.csv and ali_ccp_test.csv (or ..._sample.csv) in `root`.

    That is what torch-rechub's preprocess_ali_ccp.py makes of the original files: one id and one value a field, ids of
    fewer than ten rows together as 0. The licence lets nobody hand on either. Raises FileNotFoundError where there is
    no file to train on.
    """
    folder = Path(root).expanduser()
    found = {split: _file(folder, split) for split in SPLITS}
    readers = {split: CsvFiles((path,)) for split, path in found.items() if path}
    if "train" not in readers:
        raw = f"; {RAW} is the original form: run torch-rechub's preprocess_ali_ccp.py on it" if _raw(folder) else ""
        raise FileNotFoundError(
            f"there is no ali_ccp_train.csv or ali_ccp_train_sample.csv in {root!r} (from {Path.cwd()}){raw}"
        )
    return Table(f"Ali-CCP in {root}", aliccp_schema(readers["train"].names), held_out_of(readers, held_out))


def _file(folder: Path, split: str) -> Path | None:
    names = (f"ali_ccp_{split}.csv", f"ali_ccp_{split}.csv.gz", f"ali_ccp_{split}_sample.csv")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _raw(folder: Path) -> bool:
    return (folder / RAW).is_file() or (folder / "sample_train" / RAW).is_file()
