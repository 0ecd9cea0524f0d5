"""Writes the man pages: one for each command, and one for the configuration file.

    python -m tools.man_pages

A page is made of the command's parser and of what docs/man/notes.toml adds to it: texts
that are too long for --help, sections, other pages to see.  A command that is added to the
parser has its page with no more than that.  The pages are kept beside the sources, since a
build has no business with importing the package it builds; a test compares them.

argparse-manpage was tried: its pages have names that `man` cannot find, no examples that
stay as they are, and mandoc's linter objects to them.

What notes.toml holds for a command, all of it optional:

    [COMMAND]
    name = "in the place of the parser's one line"
    calls = ["--needed VALUE [options]", "in the place of the one call that the parser tells"]
    about = "In the place of the parser's description."
    see-also = ["swtpm(8)"]
    [COMMAND.options]
    option = "In the place of the option's help."
    [[COMMAND.sections]]
    title = "FILES"
    text = "Paragraphs; what is indented stands as it is."

A program of its own, such as a toolstack's hook, has no parser of a person's options; it has
the same keys in [scripts.PROGRAM], and a page if pyproject.toml installs it.

The table [general] is of the options that all commands have, [overview] of the page that
names the commands.  An option that is no more is refused, so no text outlives its option.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import re
import tomllib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from qemu_vtpm_bridge import __version__
from qemu_vtpm_bridge.cli import build_parser
from qemu_vtpm_bridge.demo.show import build_parser as build_demo_parser
from tools import roff
from tools.source_text import ROOT, member_texts, one_line

DIRECTORY = ROOT / "docs" / "man"
NOTES = DIRECTORY / "notes.toml"
PROGRAM = "qemu-vtpm-bridge"
GUESTS = "qemu_vtpm_bridge.toolstack.guests"
"""The module of the guests file: `Guest`, `Host`, and the CHOICES of their fields."""
FILES = {"config": f"{PROGRAM}.toml(5)", "guests": "guests.toml(5)"}
"""What the files are that options of these names take."""
GENERAL = "general"
"""The group of options that all commands have (cli.py)."""

Notes = dict[str, Any]

_FORMATTER = argparse.HelpFormatter(PROGRAM)
_SAYS_HOW_OFTEN = re.compile(r"once for each|given again|more than once")


class StaleNote(Exception):
    """notes.toml speaks of something that is no more."""


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return a parser's commands by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def help_texts(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the one-line texts of a parser's commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return {choice.dest: choice.help or "" for choice in action._choices_actions}
    return {}


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    return {**subcommands(build_parser()), "demo": build_demo_parser()}


def long_name(action: argparse.Action) -> str:
    """Return an option's name without dashes, as the configuration file has it."""
    return max(action.option_strings, key=len).lstrip("-")


def is_option(action: argparse.Action) -> bool:
    """Whether this is an option that a page speaks of, as --help does."""
    return (
        bool(action.option_strings)
        and action.help is not argparse.SUPPRESS
        and not isinstance(action, argparse._HelpAction | argparse._VersionAction)
    )


def positionals(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the words that a command takes besides options."""
    return [
        action
        for action in parser._actions
        if not action.option_strings and not isinstance(action, argparse._SubParsersAction)
    ]


def value_of(action: argparse.Action) -> str:
    """Return what stands for an option's value, or "" where it takes none."""
    if action.nargs == 0:
        return ""
    if action.metavar is None and action.choices is not None:
        return "|".join(map(str, action.choices))
    name = action.metavar or action.dest.upper()
    return " ".join(name) if isinstance(name, tuple) else name


def with_count(action: argparse.Action, word: str) -> str:
    """Say how often a word may stand."""
    many = {"+": f"{word} ...", "*": f"[{word} ...]", "?": f"[{word}]"}
    return many.get(str(action.nargs), word)


def sentence(text: str) -> str:
    """Make a help text a sentence: a capital where it begins with a word, and a full stop."""
    text = one_line(text)
    first = text.split(" ")[0].rstrip(",:;")
    if first.isalpha() and first.islower():
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def explained(action: argparse.Action, notes: Notes) -> str:
    """Return the text about an option or a word."""
    key = long_name(action) if action.option_strings else action.dest
    text = notes.get(key)
    if text is None:
        text = sentence(_FORMATTER._expand_help(action)) if action.help else ""
    facts = []
    if action.required and action.option_strings:
        facts.append("Required.")
    default = action.default
    shown = default is not False and default not in (None, "", argparse.SUPPRESS, [])
    if shown and "default" not in text.lower() and action.nargs != 0:
        facts.append(f"Default: {default}.")
    if isinstance(action, argparse._AppendAction) and not _SAYS_HOW_OFTEN.search(text):
        facts.append("May be given more than once.")
    between = "\n\n" if "\n\n" in text else " "
    return between.join(filter(None, (text.strip("\n"), " ".join(facts))))


def entries(actions: list[argparse.Action], notes: Notes) -> Iterator[str]:
    """Yield a tagged paragraph for each option or word."""
    for action in actions:
        value = value_of(action)
        if action.option_strings:
            tag = ", ".join(map(roff.bold, action.option_strings))
            tag += f" {with_count(action, roff.italic(value))}" if value else ""
        else:
            tag = with_count(action, roff.italic(value))
        yield from (".TP", roff.safe(tag))
        yield from roff.body(explained(action, notes) or value, between=".IP")


def synopsis(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield how a command is called: what it needs, then that there are options."""
    yield f".B {roff.literal(name)}"
    words = [
        f"{roff.bold(max(action.option_strings, key=len))} {roff.italic(value_of(action))}"
        for action in parser._actions
        if is_option(action) and action.required
    ]
    if any(is_option(action) and not action.required for action in parser._actions):
        words.append(f"[{roff.italic('options')}]")
    if subcommands(parser):
        words.append(f"{roff.italic('COMMAND')} ...")
    words += [with_count(a, roff.italic(value_of(a))) for a in positionals(parser)]
    yield from words


def noted_calls(name: str, calls: list[str]) -> Iterator[str]:
    """Yield how a command is called, where the parser does not tell."""
    for call in calls:
        if call is not calls[0]:
            yield ".br"
        yield f".B {roff.literal(name)}"
        for word in call.split():
            if word == "[options]":
                yield f"[{roff.italic('options')}]"
            else:
                yield roff.bold(word) if word.startswith("--") else roff.italic(word)


def options(parser: argparse.ArgumentParser, notes: Notes) -> Iterator[str]:
    """Yield a parser's options, a part for each of its groups."""
    for group in parser._action_groups:
        chosen = [action for action in group._group_actions if is_option(action)]
        if not chosen:
            continue
        title = group.title or ""
        if title != "options":
            yield f'.SS "{roff.quoted(title[0].upper() + title[1:])}"'
        yield from entries(chosen, notes)


def head(title: str, section: int, date: str, what: str) -> Iterator[str]:
    """Yield a page's first lines: how it is found, and what it is about in one line."""
    manual = {1: "User Commands", 5: "File Formats"}[section]
    yield '.\\" Written by tools/man_pages.py from the parsers: `make docs`.'
    yield f'.TH {title.upper()} {section} {date} "{PROGRAM} {__version__}" "{manual}"'
    yield from (".nh", ".ad l")  # names and paths are not broken at the line's end
    yield ".SH NAME"
    yield from roff.wrapped(f"{roff.literal(title)} \\- {roff.prose(what.rstrip('.'))}")


def section(title: str, text: str) -> Iterator[str]:
    """Yield a section of text."""
    yield f'.SH "{title}"' if " " in title else f".SH {title}"
    yield from roff.body(text)


def references(pages: list[str]) -> Iterator[str]:
    """Yield the last section, from names such as swtpm(8)."""
    yield ".SH SEE ALSO"
    for page in pages:
        name, _, number = page.rstrip(")").partition("(")
        comma = "" if page is pages[-1] else ","
        yield f".BR {roff.literal(name)} ({number}){comma}"


def is_example(text: str) -> bool:
    """Whether a parser's last words show something."""
    return any(line.startswith(" ") for line in text.splitlines())


def check_notes(command: str, parser: argparse.ArgumentParser, notes: Notes) -> None:
    """Raise StaleNote where a note is of an option that the command does not have."""
    known = {long_name(action) for action in parser._actions if action.option_strings}
    known |= {action.dest for action in positionals(parser)}
    called = re.findall(r"--([a-z-]+)", " ".join(notes.get("calls", [])))
    for name in [*notes.get("options", {}), *called]:
        if name not in known:
            raise StaleNote(f"{NOTES.name}: {command} has no --{name}")


def command_page(command: str, parser: argparse.ArgumentParser, what: str, notes: Notes) -> str:
    """Return one command's page."""
    own = notes.get(command, {})
    check_notes(command, parser, own)
    texts = {**notes.get(GENERAL, {}).get("options", {}), **own.get("options", {})}
    name = f"{PROGRAM} {command}"
    lines = [*head(f"{PROGRAM}-{command}", 1, notes["date"], what)]
    lines.append(".SH SYNOPSIS")
    lines += noted_calls(name, own["calls"]) if "calls" in own else synopsis(name, parser)
    about = own.get("about") or parser.description or sentence(what)
    lines += section("DESCRIPTION", about)
    if words := positionals(parser):
        lines += [".SH ARGUMENTS", *entries(words, texts)]
    inner, inner_texts = subcommands(parser), help_texts(parser)
    if inner:
        lines.append(".SH COMMANDS")
    for inner_name, inner_parser in inner.items():
        lines += [f'.SS "{roff.literal(inner_name)}"']
        lines += [*synopsis(f"{name} {inner_name}", inner_parser), ".PP"]
        lines += roff.body(inner_parser.description or sentence(inner_texts.get(inner_name, "")))
        lines += entries(positionals(inner_parser), texts)
        lines += entries([a for a in inner_parser._actions if is_option(a)], texts)
    if any(is_option(action) for action in parser._actions):
        lines += [".SH OPTIONS", *options(parser, texts)]
    if parser.epilog:
        title = "EXAMPLES" if is_example(parser.epilog) else "NOTES"
        lines += section(title, parser.epilog)
    for extra in own.get("sections", []):
        lines += section(extra["title"], extra["text"])
    see = [f"{PROGRAM}(1)", *own.get("see-also", [])]
    names = {long_name(action) for action in parser._actions if is_option(action)}
    see += [page for option, page in FILES.items() if option in names]
    lines += references(see)
    return "\n".join(lines) + "\n"


def scripts() -> list[str]:
    """Return the programs that the package installs beside the main one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [name for name in project["scripts"] if name != PROGRAM]


def script_notes(notes: Notes) -> dict[str, Notes]:
    """Return what is noted of each of these programs; raises StaleNote for one without."""
    tables = notes.get("scripts", {})
    for name in scripts():
        if name not in tables:
            raise StaleNote(f"{NOTES.name}: a table [scripts.{name}] has to say what it is")
    return {name: tables[name] for name in scripts()}


def script_page(name: str, notes: Notes) -> str:
    """Return the page of a program of its own."""
    own = script_notes(notes)[name]
    lines = [*head(name, 1, notes["date"], own["name"]), ".SH SYNOPSIS"]
    lines += noted_calls(name, own["calls"])
    lines += section("DESCRIPTION", own["about"])
    for extra in own.get("sections", []):
        lines += section(extra["title"], extra["text"])
    lines += references([f"{PROGRAM}(1)", *own.get("see-also", [])])
    return "\n".join(lines) + "\n"


def overview(texts: dict[str, str], notes: Notes) -> str:
    """Return the page that names all commands; `texts` are their lines."""
    own = notes["overview"]
    lines = [*head(PROGRAM, 1, notes["date"], own["name"])]
    lines += [".SH SYNOPSIS", f".B {roff.literal(PROGRAM)}"]
    lines += [f"{roff.italic('COMMAND')} [{roff.italic('options')}]"]
    lines += section("DESCRIPTION", own["about"])
    lines += [".SH COMMANDS"]
    lines += roff.body("Each has a page of its own.")
    script_texts = {name: table["name"] for name, table in script_notes(notes).items()}
    for name, text in {**texts, **script_texts}.items():
        name = name if name in script_texts else f"{PROGRAM}-{name}"
        lines += [".TP", f".BR {roff.literal(name)} (1)"]
        lines += roff.body(sentence(text))
    lines += [".SH OPTIONS", ".TP", roff.bold("--version"), *roff.body("Print the version.")]
    lines += [".TP", roff.bold("--help"), *roff.body("Of each command too: what it takes.")]
    for extra in own["sections"]:
        lines += section(extra["title"], extra["text"])
    lines += references([f"{PROGRAM}.toml(5)", *own["see-also"]])
    return "\n".join(lines) + "\n"


def toml_kind(action: argparse.Action) -> str:
    """Return what a key's value looks like in the file."""
    if action.nargs == 0:
        return "true|false"
    if isinstance(action, argparse._AppendAction):
        return f"[{value_of(action)}, ...]"
    if action.type is int and action.metavar is None:
        return "NUMBER"
    return value_of(action)


def configuration_page(notes: Notes) -> str:
    """Return the page about the configuration file: the options again, as keys."""
    own = notes["configuration"]
    lines = [*head(f"{PROGRAM}.toml", 5, notes["date"], own["name"])]
    lines += section("DESCRIPTION", own["about"])
    lines += [".SH TABLES"]
    for command, parser in command_parsers().items():
        actions = [a for a in parser._actions if is_option(a) and long_name(a) != "config"]
        if len(actions) == len([a for a in parser._actions if is_option(a)]):
            continue  # takes no file
        texts = notes.get(GENERAL, {}).get("options", {})
        texts = {**texts, **notes.get(command, {}).get("options", {})}
        lines.append(f'.SS "[{roff.literal(command)}]"')
        for action in actions:
            lines += [".TP", f"{roff.bold(long_name(action))} = {roff.italic(toml_kind(action))}"]
            lines += roff.body(explained(action, texts), between=".IP")
    for extra in own["sections"]:
        lines += section(extra["title"], extra["text"])
    lines += references([f"{PROGRAM}(1)", *own.get("see-also", [])])
    return "\n".join(lines) + "\n"


FIELD_KINDS = {"int": "NUMBER", "bool": "true|false", "tuple": "[TEXT, ...]", "Path": "PATH"}
"""What a key's value looks like, by the first word of its field's type."""


def guest_key(
    module: ModuleType, field: dataclasses.Field[Any], text: str, run: dict[str, argparse.Action]
) -> Iterator[str]:
    """Yield a key of the guests file; one that is an option of `run` means what that does."""
    key = field.name.replace("_", "-")
    kind = re.split(r"\W", str(field.type))[0]
    value = "|".join(module.CHOICES.get(key, [FIELD_KINDS.get(kind, "TEXT")]))
    yield from (".TP", f"{roff.bold(key)} = {roff.italic(value)}")
    facts = [text] if text else []
    if not text and key in run:
        facts.append(f"As --{key} of `run`.")
    if field.default is dataclasses.MISSING:
        facts.append("Required.")
    elif (
        field.default not in (None, ())
        and field.default is not False
        and "default" not in text.lower()
    ):
        facts.append(f"Default: {field.default}.")
    yield from roff.body(" ".join(facts) or value, between=".IP")


def guests_page(module: ModuleType, notes: Notes) -> str:
    """Return the page about the guests file, from the classes that its tables become."""
    own = notes["guests"]
    run = {long_name(a): a for a in command_parsers()["run"]._actions if is_option(a)}
    lines = [*head("guests.toml", 5, notes["date"], own["name"])]
    lines += section("DESCRIPTION", own["about"])
    lines += [".SH TABLES"]
    for title, kind in (("guest.NAME", module.Guest), ("host", module.Host)):
        lines.append(f'.SS "[{roff.literal(title)}]"')
        lines += roff.body(sentence((kind.__doc__ or "").replace("`", "")))
        texts = {**own.get("options", {}), **member_texts(kind)}
        for field in dataclasses.fields(kind):
            if field.name != "name":
                lines += guest_key(module, field, texts.get(field.name, ""), run)
    for extra in own["sections"]:
        lines += section(extra["title"], extra["text"])
    lines += references([f"{PROGRAM}(1)", f"{PROGRAM}-run(1)", *own.get("see-also", [])])
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Return all pages by their place below docs/man."""
    notes = tomllib.loads(NOTES.read_text(encoding="utf-8"))
    texts = help_texts(build_parser())
    texts |= {name: notes[name]["name"] for name in texts if "name" in notes.get(name, {})}
    found = {f"man1/{PROGRAM}.1": overview(texts, notes)}
    for command, parser in command_parsers().items():
        page = command_page(command, parser, texts[command], notes)
        found[f"man1/{PROGRAM}-{command}.1"] = page
    for name in scripts():
        found[f"man1/{name}.1"] = script_page(name, notes)
    found[f"man5/{PROGRAM}.toml.5"] = configuration_page(notes)
    if importlib.util.find_spec(GUESTS):
        found["man5/guests.toml.5"] = guests_page(importlib.import_module(GUESTS), notes)
    known = {*texts, "overview", "configuration", "guests", "scripts", GENERAL, "date"}
    if unknown := set(notes) - known:
        raise StaleNote(f"{NOTES.name}: there is no command {', '.join(sorted(unknown))}")
    return found


def main() -> None:
    """Write the pages and remove those of commands that are gone."""
    wanted = pages()
    for old in DIRECTORY.glob("man?/*"):
        if str(old.relative_to(DIRECTORY)) not in wanted:
            old.unlink()
    for place, text in wanted.items():
        path = DIRECTORY / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"wrote {len(wanted)} pages below {DIRECTORY}")


if __name__ == "__main__":
    main()
