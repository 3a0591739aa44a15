"""``pqk-fast recipes`` and ``doctor``."""

from __future__ import annotations

import argparse

from rich import box
from rich.markup import escape
from rich.table import Table

from pqk_fast import native
from pqk_fast.commands.options import Commands, command, console
from pqk_fast.experiments.tasks import tasks_of
from pqk_fast.recipe_files import load_recipe, recipe_names
from pqk_fast.record import environment


def add(commands: Commands) -> None:
    command(commands, recipes, "recipes", "list the recipes that come with the library")
    command(commands, doctor, "doctor", "what is installed, what runs each operation, and why not something faster")


def recipes(args: argparse.Namespace) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("recipe", no_wrap=True)
    table.add_column("stages and their steps")
    table.add_column("what it is")
    for name in recipe_names():
        recipe = load_recipe(name)
        stages = ", ".join(f"{stage} {task.steps}" for stage, task in tasks_of(recipe).items())
        table.add_row(name, stages, recipe.description)
    console.print(table)


def doctor(args: argparse.Namespace) -> None:
    about = environment()
    table = Table("what", "found", title=f"pqk_fast {about['versions']['pqk_fast']}", box=box.SIMPLE_HEAD)
    for name, value in {**about["versions"], **native.optional_packages(), **about["hardware"]}.items():
        table.add_row(name, "-" if value is None else str(value))
    table.add_row("C++ library", escape(str(native.library())))
    console.print(table)
    table = Table("operation", "device", "runs on", "why not something faster", box=box.SIMPLE_HEAD)
    for row in native.backends():
        table.add_row(row.operation, row.device, row.implementation, row.why_not_faster)
    console.print(table)
