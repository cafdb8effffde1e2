"""Pages of the site that are no files of `docs`: those that lie elsewhere, files that pages link to, and the reference.

MkDocs calls `on_files` and `on_page_markdown` (https://www.mkdocs.org/dev-guide/plugins/#events). Links in the sources
are those of a checkout, relative to the file that holds them; here they come to lead to pages of the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import flextok_pl
from flextok_pl.cli.commands import COMMANDS
from flextok_pl.cli.front import options_for
from flextok_pl.cli.options import Option

ROOT = Path(__file__).parents[1]

ELSEWHERE = {
    "README.md": "index.md",
    "data/README.md": "data.md",
    "CONTRIBUTING.md": "contributing.md",
    "flextok_pl/assets/README.md": "assets.md",
}
"""Files of the repository -> pages of the site."""

LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)#\s]+)")

LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash", ".sbatch": "bash", ".ipynb": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages."""
    texts = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for source, page in ELSEWHERE.items():
        texts[source] = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=texts[source]))
    files.append(File.generated(config, "commands.md", content=_commands()))
    files.append(File.generated(config, "api.md", content=_api()))
    for source, text in texts.items():
        for _, target in LINK.findall(text):
            place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
            page = _page(place)
            if page.startswith("source/") and files.get_file_from_path(page) is None and (ROOT / place).exists():
                files.append(File.generated(config, page, content=_shown(place)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages."""
    here = page.file.src_uri
    source = next((source for source, each in ELSEWHERE.items() if each == here), f"docs/{here}")
    if here.startswith("source/"):
        return markdown

    def led(match: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        return match[1] + posixpath.relpath(_page(place), posixpath.dirname(here) or ".")

    return LINK.sub(led, markdown)


def _page(place: str) -> str:
    """Where a file or folder of the repository is on the site."""
    if place in ELSEWHERE:
        return ELSEWHERE[place]
    return place.removeprefix("docs/") if place.startswith("docs/") else f"source/{place}.md"


def _shown(place: str) -> str:
    """A file as a page, or the names in a folder."""
    path = ROOT / place
    head = f"---\ntitle: {place}\nsearch: {{exclude: true}}\n---\n\n# `{place}`\n\n"
    if path.is_dir():
        return head + "\n".join(f"- `{each.name}`" for each in sorted(path.iterdir()) if each.is_file())
    language = LANGUAGES.get(path.suffix, "text")
    return f"{head}````{language}\n{path.read_text()}````\n"


def _commands() -> str:
    """Every command with its options, as `--help` has them."""
    parts = ["# Commands\n\nEvery option of `flextok`, from the docstrings of the code.\n"]
    training = options_for("fit")
    for name, command in COMMANDS.items():
        parts.append(f"\n## flextok {name}\n\n{_sentence(command.summary)}\n")
        options = options_for(name)
        if command.groups and name != "fit":
            parts.append("It takes the options of [flextok fit](#flextok-fit), too.\n")
            options = {each: value for each, value in options.items() if each not in training}
        parts += [_described(each, value) for each, value in options.items()]
    return "".join(parts)


def _described(name: str, option: Option) -> str:
    """An option, or those below it, as entries of a definition list."""
    if option.below:
        return "".join(_described(f"{name}.{each}", value) for each, value in option.below.items())
    kind = f" {option.kind}" if option.kind else ""
    default = "" if option.default in (None, "null") else f", default `{option.default}`"
    help_ = " ".join(option.help.split())
    return f"\n`{name if option.positional else f'--{name}'}{kind}`{default}\n:   {help_ or 'See its class.'}\n"


def _api() -> str:
    """The public names."""
    names = [name for name in flextok_pl.__all__ if not name.startswith("DEMO_")]
    homes = {name: f"flextok_pl.{home}" for home, held in flextok_pl._HOMES.items() for name in held}
    return "# Python\n\nWhat `from flextok_pl import ...` gives.\n" + "".join(
        f"\n::: {homes[name]}.{name}\n" for name in names
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
