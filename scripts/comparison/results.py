"""From the runs' ``log.txt`` to tables: each epoch, each layer, and the numbers that arms are compared by."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from epochlog import read_log
from scripts.comparison.records import find_folder, is_finished, read_record
from scripts.comparison.study import Run

RUN = ["setting", "arm", "seed"]


@dataclass(frozen=True)
class Quantity:
    """A quantity by which arms are compared.

    Attributes:
        label: Its name in tables and on axes.
        unit: Its unit there.
        digits: Digits after the decimal point.
    """

    label: str
    unit: str
    digits: int


HEADLINE = "test_acc1"
BEFORE_LAST = "before the last block"
QUANTITIES = {
    "test_acc1": Quantity("top-1 accuracy, last epoch", "%", 2),
    "acc1_at_best_val": Quantity("top-1 accuracy, epoch chosen by the validation split", "%", 2),
    "test_ema_acc1": Quantity("top-1 accuracy of the EMA, last epoch", "%", 2),
    "test_loss": Quantity("test loss, last epoch", "nats", 4),
    "train_loss": Quantity("training loss, last epoch", "nats", 4),
    "token_similarity": Quantity(f"token similarity {BEFORE_LAST}", "cosine", 4),
    "hc_dc_mlp": Quantity(f"‖HC‖/‖DC‖ {BEFORE_LAST}", "ratio", 4),
}
SPECTRAL = ("token_similarity", "hc_dc_mlp")


@dataclass(frozen=True)
class Results:
    """All finished runs of a study.

    Attributes:
        epochs: One row an epoch of a run: setting, arm, seed, epoch, and what ``log.txt`` has as numbers.
        layers: One row a layer, quantity and epoch with a spectrum: setting, arm, seed, epoch, quantity, layer, value.
        missing: Folders of runs that are not finished.
        revisions: Revisions of the code that made the runs.
        versions: Versions of torch that made the runs.
        seconds: Total time of the runs.
    """

    epochs: pd.DataFrame
    layers: pd.DataFrame
    missing: list[str]
    revisions: list[str]
    versions: list[str]
    seconds: float

    def last(self) -> pd.DataFrame:
        """One row a run, setting, arm, seed and every quantity of ``QUANTITIES`` that was logged.

        Accuracies and losses are those of the last epoch. Spectral quantities are those of the last epoch that has
        them, at the output of the second-to-last block: of the last block, the head reads only one token.
        """
        ordered = self.epochs.sort_values([*RUN, "epoch"])
        table = ordered.groupby(RUN, sort=False).tail(1).set_index(RUN)
        if "val_acc1" in ordered:
            chosen = ordered.loc[ordered.groupby(RUN)["val_acc1"].idxmax()].set_index(RUN)
            table["acc1_at_best_val"] = chosen["test_acc1"]
        # Of all quantities: an infinite ratio is missing. A model of one block has none before the last.
        before = self.layers.groupby(RUN)["layer"].transform("max").sub(1).clip(lower=0)
        for name in SPECTRAL:
            rows = self.at_last_epoch(name)
            if not rows.empty:
                table[name] = rows[rows["layer"] == before.loc[rows.index]].set_index(RUN)["value"]
        return table[[name for name in QUANTITIES if name in table]].dropna(axis="columns", how="all").reset_index()

    def at_last_epoch(self, quantity: str) -> pd.DataFrame:
        """The rows of ``layers`` with this quantity, of the last epoch of each run that has it."""
        rows = self.layers[self.layers["quantity"] == quantity]
        return rows[rows["epoch"] == rows.groupby(RUN)["epoch"].transform("max")]

    def by_arm(self, quantity: str, setting: str) -> dict[str, dict[int, float]]:
        """Arm -> seed -> value, of one setting; arms that lack the quantity are absent."""
        table = self.last()
        table = table[table["setting"] == setting].dropna(subset=[quantity])
        return {
            arm: dict(zip(rows["seed"], rows[quantity], strict=True)) for arm, rows in table.groupby("arm", sort=False)
        }


def collect(runs: list[Run], folder: Path) -> Results:
    """Reads the logs of all runs that are finished.

    Args:
        runs: Runs of the arms of a study.
        folder: Holds their folders.
    """
    epochs, layers, missing, records = [], [], [], {}
    for run in runs:
        path = find_folder(folder, run)
        if not is_finished(path):
            missing.append(path.name)
            continue
        records[path] = read_record(path)
        about = {"setting": run.setting, "arm": run.arm, "seed": run.seed}
        for line in read_log(path):
            epochs.append(about | {"epoch": line["epoch"]} | {k: v for k, v in line.items() if not isinstance(v, list)})
            layers += [
                about
                | {"epoch": line["epoch"], "quantity": name.removeprefix("spectrum_"), "layer": layer, "value": value}
                for name, values in line.items()
                if isinstance(values, list)
                for layer, value in enumerate(values)
                if value is not None
            ]
    columns = [*RUN, "epoch", "quantity", "layer", "value"]
    return Results(
        pd.DataFrame(epochs, columns=None if epochs else [*RUN, "epoch"]),
        pd.DataFrame(layers, columns=columns),
        missing,
        sorted({revision for record in records.values() for revision in record["revisions"]}),
        sorted({record["torch"] for record in records.values()}),
        sum(record["seconds"] for record in records.values()),
    )
