"""The page of a study, from OUT/results.json alone: OUT/study.md."""

from __future__ import annotations

from pathlib import Path

from rcot_rl.errors import InputError
from rcot_rl.monitoring.study.study_effects import Study
from rcot_rl.monitoring.study.study_markdown import plain
from rcot_rl.monitoring.study.study_results import RESULTS_FILE, StudyResults, read_results
from rcot_rl.monitoring.study.study_sections import (
    absent_section,
    kinds_section,
    main_result,
    masks_section,
    minutes_section,
    rewards_section,
    runs_section,
)
from rcot_rl.monitoring.study.study_tables import table_texts
from rcot_rl.system.files import write_text

PAGE_FILE = "study.md"

_METHOD = """\
J&F and the other figures are in percent, and every figure is the mean over the seeds. An effect is
the difference from a reference, paired over expressions. Brackets are 95 % confidence intervals of
it:

- **over clips**: each expression's difference is averaged over the seeds, and clips are the sample.
  Would other clips show the effect with these trained models?
- **over seeds**: the differences of the seeds are the sample (paired t interval). Would other seeds
  show it on these clips? With three seeds, the interval is wide.

An effect is called *shown* only if both intervals exclude zero. The intervals are not corrected for
the number of comparisons: of twenty effects that do not exist, about one interval of each kind
excludes zero by chance. “Not shown” does not mean that there is no effect.

`all` is the mean over all expressions of all benchmarks; the paper's effect beside it is the mean
over the columns of its table. Numbers in parentheses are the paper's. They come from models of 3
billion parameters and public corpora: levels cannot be compared, at most signs and orders can."""


def write_page(folder: Path) -> Path:
    """Write FOLDER/study.md from FOLDER/results.json. Raises InputError."""
    results = read_results(folder)
    if not results.runs:
        raise InputError("has no run", file=folder / RESULTS_FILE, key="runs")
    write_text(folder / PAGE_FILE, study_page(results))
    return folder / PAGE_FILE


def study_page(results: StudyResults) -> str:
    """Return the page as Markdown. `results` has at least one run."""
    study = Study(results)
    main = main_result(study)
    assert main is not None
    seeds = sorted({run.seed for run in results.runs})
    expressions = sum(len(one.clip) for one in results.benchmarks.values())
    clips = sum(len(one.clips) for one in results.benchmarks.values())
    recipes, benchmarks = (
        ", ".join(map(plain, names)) for names in (study.recipes, results.benchmarks)
    )
    facts = (
        f"Recipes: {recipes}. Seeds: {', '.join(map(str, seeds))}. Benchmarks: {benchmarks}, with "
        f"{expressions} expressions of {clips} clips."
    )
    masks, absent = masks_section(study, main), absent_section(study, main)
    tables = table_texts(study)
    rewards = rewards_section(main)
    findings = [*masks.sentences, *rewards.sentences]
    for name, table in tables.items():
        label = f"Table {name.removeprefix('table-')}"
        findings += [f"{label}: {sentence}" for sentence in table.sentences]
    findings += absent.sentences
    sections = [
        ("What the study shows", "\n".join(f"- {sentence}" for sentence in findings)),
        ("How to read the numbers", _METHOD),
        ("Masks before and after GRPO", masks.markdown),
        ("Beside the paper", "\n\n".join(one.markdown for one in tables.values())),
        ("Training with absent targets", absent.markdown),
        ("Masks by kind of expression", kinds_section(study, main).markdown),
        ("Held-out rewards before and after GRPO", rewards.markdown),
        ("Time", minutes_section(study).markdown),
        ("Runs", runs_section(study).markdown),
    ]
    body = [f"## {title}\n\n{text}" for title, text in sections if text]
    return "\n\n".join(["# Study", facts, *body]) + "\n"
