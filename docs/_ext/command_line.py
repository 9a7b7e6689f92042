"""The options of ``python -m flashcute`` as reference, from its argparse parsers.

    ```{commands}
    ```

lists all commands, and

    ```{command} explain
    ```

shows what one does and its options. Both are read from the installed package when the pages are built, so a page says
what the program says. A command that does not exist is an error of the build.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from docutils import nodes
from flashcute.__main__ import command_parser
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

CODE = re.compile(
    r"(--[a-z][\w-]*|FLASHCUTE_\w+|\b[a-z]\w*=[^\s,.;)]+)"
)  # in the words of a help text
# What add_config_arguments says of an option that is that of a configuration class.
OF_A_CONFIGURATION = re.compile(r"\w+Config\.\w+(, \w+Config\.\w+)*")


class Command(NamedTuple):
    parser: argparse.ArgumentParser
    summary: str


def commands_of(parser: argparse.ArgumentParser) -> dict[str, Command]:
    """All commands by their names, in the order of the help."""
    [found] = [x for x in parser._actions if isinstance(x, argparse._SubParsersAction)]
    told = {x.dest: x.help or "" for x in found._choices_actions}
    return {name: Command(sub, told.get(name, "")) for name, sub in found.choices.items()}


def words(text: str) -> Iterator[nodes.Node]:
    """A help text, in which names of options and variables are code."""
    for part in CODE.split(text):
        if part:
            yield nodes.literal(text=part) if CODE.fullmatch(part) else nodes.Text(part)


def argument_of(action: argparse.Action) -> str:
    """What follows an option, or stands for a positional argument: "N", "auto|cpu|cuda"."""
    if action.nargs == 0:
        return ""
    if action.metavar is not None:
        metavar = action.metavar if isinstance(action.metavar, str) else " ".join(action.metavar)
    elif action.choices is not None:
        metavar = "|".join(map(str, action.choices))
    else:
        metavar = action.dest.upper() if action.option_strings else action.dest
    return {"?": f"[{metavar}]", "*": f"[{metavar} ...]", "+": f"{metavar} ..."}.get(
        str(action.nargs), metavar
    )


def names_of(action: argparse.Action) -> list[str]:
    """As they are typed: ["--window LEFT,RIGHT"]."""
    argument = argument_of(action)
    names = action.option_strings or [""]
    return [f"{name} {argument}".strip() for name in names]


def named(action: argparse.Action) -> list[str]:
    """As a reader looks them up: a positional argument without the marks of how many there may be."""
    return [name.strip("[]").removesuffix(" ...") for name in names_of(action)]


def help_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def rivals(parser: argparse.ArgumentParser, action: argparse.Action) -> list[str]:
    """The options that cannot be given beside this one."""
    for group in parser._mutually_exclusive_groups:
        if action in group._group_actions:
            return [x.option_strings[0] for x in group._group_actions if x is not action]
    return []


def shown(actions: Iterable[argparse.Action]) -> list[argparse.Action]:
    hidden = (argparse._HelpAction, argparse._SubParsersAction)
    return [x for x in actions if not isinstance(x, hidden) and x.help is not argparse.SUPPRESS]


def of_a_configuration(action: argparse.Action) -> bool:
    return bool(OF_A_CONFIGURATION.fullmatch(action.help or ""))


class CommandDirective(SphinxDirective):
    """One command: how it is called, what it does, its options."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        known = commands_of(command_parser())
        if name not in known:
            raise self.error(f"no command {name!r}: python -m flashcute has {', '.join(known)}")
        parser = known[name].parser
        call = [parser.prog, "[options]" if any(shown(parser._optionals._group_actions)) else ""]
        call += [names_of(x)[0] for x in shown(parser._positionals._group_actions)]
        usage = nodes.literal_block(text=" ".join(filter(None, call)), language="text")
        found: list[nodes.Node] = [usage]
        for paragraph in re.split(r"\n\s*\n", (parser.description or "").strip()):
            found.append(nodes.paragraph("", "", *words(" ".join(paragraph.split()))))
        for group in parser._action_groups:
            found += self.group(name, parser, group)
        return found

    def group(
        self, command: str, parser: argparse.ArgumentParser, group: argparse._ArgumentGroup
    ) -> list[nodes.Node]:
        actions = shown(group._group_actions)
        if not actions:
            return []
        found: list[nodes.Node] = []
        if group not in (parser._positionals, parser._optionals):
            told = f": {group.description}" if group.description else ""
            title = nodes.strong(text=(group.title or "").capitalize())
            found.append(nodes.paragraph("", "", title, *words(told)))
        entries = nodes.definition_list(classes=["command-options"])
        for action in actions:
            if not of_a_configuration(action):
                text = help_of(parser, action)
                others = rivals(parser, action)
                told = f"not with {', '.join(others)}" if others else ""
                text = "; ".join(filter(None, (text, told)))
                names = [nodes.literal(text=name) for name in named(action)]
                body = nodes.paragraph("", "", *words(text)) if text else None
                entries += self.entry(command, names, body)
        ours = [x for x in actions if of_a_configuration(x)]
        if ours:
            title = nodes.Text("options of a configuration")
            entries += self.entry(command, [title], self.configuration(ours))
        return [*found, entries]

    def entry(self, command: str, names: list[nodes.Node], body: nodes.Node | None) -> nodes.Node:
        first = names[0].astext().partition(" ")[0]
        term = nodes.term(ids=[nodes.make_id(f"{command} {first}")])
        for number, name in enumerate(names):
            term += [nodes.Text(", ")] if number else []
            term += name
        definition = [] if body is None else [nodes.definition("", body)]
        return nodes.definition_list_item("", term, *definition)

    def configuration(self, actions: list[argparse.Action]) -> nodes.Node:
        """The options of the classes, of which the API tells the meaning."""
        classes = sorted({x for a in actions for x in re.findall(r"\w+Config", a.help or "")})
        body = nodes.paragraph("", "each is the option of that name of ")
        for number, name in enumerate(reversed(classes)):
            body += [nodes.Text(" or ")] if number else []
            link = addnodes.pending_xref(
                "", nodes.literal(text=name), refdomain="py", reftype="class",
                reftarget=f"flashcute.{name}", refdoc=self.env.docname, refexplicit=True, refwarn=True,
            )  # fmt: skip
            body += link
        body += nodes.Text(": ")
        for number, action in enumerate(actions):
            body += [nodes.Text(", ")] if number else []
            body += nodes.literal(text=names_of(action)[0])
        return body


class CommandsDirective(SphinxDirective):
    """A table of all commands."""

    def run(self) -> list[nodes.Node]:
        entries = nodes.definition_list()
        for name, command in commands_of(command_parser()).items():
            link = nodes.reference("", "", nodes.literal(text=name), refid=nodes.make_id(name))
            term = nodes.term("", "", link)
            told = nodes.definition("", nodes.paragraph("", "", *words(command.summary)))
            entries += nodes.definition_list_item("", term, told)
        return [entries]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("command", CommandDirective)
    app.add_directive("commands", CommandsDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "version": "1"}
