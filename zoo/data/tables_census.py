"""Census-Income (KDD) with the two groups of tasks of the MMoE paper (Ma et al., KDD 2018, section 6.3)."""

from __future__ import annotations

import io
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np

from .tables_download import downloaded, written
from .tables_files import CsvFiles, Part
from .tables_schema import Categorical, Dense, Schema, Target
from .tables_split import Table

URL = "https://archive.ics.uci.edu/static/public/117/census+income+kdd.zip"
TRAIN_ROWS, TEST_ROWS = 199_523, 99_762
# In the order of the files, which have no header.
# fmt: off
COLUMNS = (
    "age", "class_worker", "det_ind_code", "det_occ_code", "education", "wage_per_hour", "hs_college", "marital_stat",
    "major_ind_code", "major_occ_code", "race", "hisp_origin", "sex", "union_member", "unemp_reason",
    "full_or_part_emp", "capital_gains", "capital_losses", "stock_dividends", "tax_filer_stat", "region_prev_res",
    "state_prev_res", "det_hh_fam_stat", "det_hh_summ", "instance_weight", "mig_chg_msa", "mig_chg_reg",
    "mig_move_reg", "mig_same", "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father", "country_mother",
    "country_self", "citizenship", "own_or_self", "vet_question", "vet_benefits", "weeks_worked", "year",
    "income_50k",
)
# fmt: on
NUMBERS = (
    "age",
    "wage_per_hour",
    "capital_gains",
    "capital_losses",
    "stock_dividends",
    "num_emp",
    "weeks_worked",
)
# No inputs in either group: two are what a task asks for, one says how many people a row stands for.
LEFT_OUT = ("education", "marital_stat", "instance_weight", "income_50k")
# "At least college" is a degree of one: so read, the labels of the second group correlate as the paper says.
COLLEGE = (
    "Associates degree-occup /vocational",
    "Associates degree-academic program",
    "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)",
    "Prof school degree (MD DDS DVM LLB JD)",
    "Doctorate degree(PhD EdD)",
)
TASKS = {
    "income": Target("income", "income_50k", positive=("50000+.",)),
    "education": Target("education", "education", positive=COLLEGE),
}
NEVER_MARRIED = Target("never_married", "marital_stat", positive=("Never married",))


def census_schema(group: str) -> Schema:
    """Inputs of both groups, and the tasks of "income" or "education": that one, and whether somebody never married.

    Numbers go through a logarithm; every other column is a vocabulary, recoded industries and years too.
    """
    inputs = [name for name in COLUMNS if name not in LEFT_OUT]
    features = tuple(Dense(name, transform="log") if name in NUMBERS else Categorical(name) for name in inputs)
    return Schema(features, (TASKS[group], NEVER_MARRIED))


def census_table(group: str, root: str = "data", download: bool = False) -> Table:
    """Train on census-income.data; validate and test on halves of census-income.test, drawn once and for all.

    The files, or the same with .gz, lie in `root`; UCI's archive (CC BY 4.0) is fetched with `download`. Raises
    FileNotFoundError where they are not there, ValueError for lines that have not 42 columns.
    """
    if download:
        _download(Path(root))
    train, test = (CsvFiles((_file(root, part),), header=COLUMNS, quoted=False) for part in ("data", "test"))

    @cache
    def first_half() -> np.ndarray:
        rows = sum(len(chunk.rows) for chunk in test.chunks(COLUMNS[:1]))
        return np.random.default_rng(0).permutation(rows) < rows // 2

    halves = {"val": Part(test, lambda i: first_half()[i]), "test": Part(test, lambda i: ~first_half()[i])}
    return Table(
        f"Census-Income (KDD), tasks {group} and never_married", census_schema(group), {"train": train, **halves}
    )


def _file(root: str, part: str) -> Path:
    plain = Path(root).expanduser() / f"census-income.{part}"
    for path in (plain, plain.with_name(f"{plain.name}.gz")):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"there is no {plain.name} or {plain.name}.gz in {root!r} (from {Path.cwd()}); put it there, or set "
        "data.download to true"
    )


def _download(root: Path) -> None:
    if all((root / f"census-income.{part}").is_file() for part in ("data", "test")):
        return
    with zipfile.ZipFile(io.BytesIO(downloaded(URL))) as outer:
        packed = outer.read("census.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(packed)) as inner:
        for part, rows in (("data", TRAIN_ROWS), ("test", TEST_ROWS)):
            file = inner.extractfile(f"census-income.{part}")
            content = file.read() if file else b""
            if (found := content.count(b"\n")) != rows:
                raise ValueError(f"{URL}: expected {rows} lines in census-income.{part}, got {found}")
            written(root / f"census-income.{part}", content)
