"""mc_distil.py --search: the paper's grid of learning rate, weight decay and momentum, for each method, on validation rows."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from hfkd.records import write_json
from mc_study import TAKD
from program import say

if TYPE_CHECKING:
    from mc_study import McStudy

# As reported of the paper: students are trained by SGD with a cosine, and these values are searched
GRID = {
    "learning_rate": [0.1, 0.05],
    "weight_decay": [1e-5, 5e-5, 1e-4],
    "momentum": [0.65, 0.75, 0.85, 0.95],
}


def space(trial: Any) -> dict[str, Any]:
    """Momentum is among the optimizer's own settings, which the Trainer takes as one string."""
    chosen = {name: trial.suggest_categorical(name, values) for name, values in GRID.items()}
    momentum = chosen.pop("momentum")
    return {**chosen, "optim_args": f"momentum={momentum}"}


def refuse_wrong_search(study: McStudy) -> None:
    if importlib.util.find_spec("optuna") is None:
        raise ValueError("--search needs optuna: pip install optuna")
    if study.data.validation is None:
        raise ValueError("--search scores on a validation split, and the data has none: give --validation_share")
    if str(study.args.optim.value) != "sgd":
        raise ValueError(f"--search tries momenta of SGD, and --optim is {study.args.optim.value}: give --optim sgd")
    if TAKD in study.recipe.methods:
        raise ValueError("--search tries methods that are one group, and takd is a chain of runs: leave it out")


def search(study: McStudy) -> None:
    """Teacher and warm start of seed 0 have the settings that are given; the grid is that of the methods."""
    study.teacher(0.0, 0)
    if study.recipe.warm_start == "ce":
        study.warm(0.0, 0)
    found = {}
    for method in study.recipe.methods:
        say(f"{method}: {study.recipe.search} settings")
        found[method] = best_of(study, method)
    write_json(study.runs.output / "search.json", found)
    lines = ["| method | validation accuracy, mean of the students (%) | settings |", "|---|---|---|"]
    for method, best in found.items():
        settings = ", ".join(f"{name} {value:g}" for name, value in best["settings"].items())
        lines.append(f"| {method} | {100 * best['accuracy']:.2f} | {settings} |")
    print("\n" + "\n".join(lines) + f"\n\n  all                    {study.runs.output / 'search.json'}")


def best_of(study: McStudy, method: str) -> dict[str, Any]:
    from optuna.samplers import GridSampler

    run = study.run(method, 0.0, 0)
    args = study.runs.arguments(run, study.runs.output / "search" / method)
    args.save_strategy = args.save_strategy.__class__("no")
    trainer = study.runs.trainer(run, run.model(), args)
    trainer.model_init = run.model  # every trial starts anew, from the warm start
    trainer.eval_dataset = run.view.validation
    best = trainer.hyperparameter_search(
        hp_space=space,
        compute_objective=lambda metrics: metrics["eval_mean_accuracy"],
        n_trials=study.recipe.search,
        direction="maximize",
        backend="optuna",
        sampler=GridSampler(GRID, seed=0),
    )
    return {"accuracy": best.objective, "settings": best.hyperparameters}
