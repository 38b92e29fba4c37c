"""Render this library's docstrings, Markdown in Google style, with Sphinx's autodoc and napoleon.

- An indented block is an equation or a table, as it stands. A Markdown table is a table.
- Single backticks are code, and a link if they hold the name of an object.
- Types have their public names, and defaults have no addresses.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax.typing
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject, PyXRefRole
from sphinx.environment import BuildEnvironment
from sphinx.util import inspect
from sphinx.util.typing import stringify_annotation

# Sphinx sees a class where it is defined, which is often a private module.
PUBLIC_NAMES = {
    "flax.linen.module.Module": "flax.linen.Module",
    "flax.nnx.module.Module": "flax.nnx.Module",
    "flax.nnx.rnglib.Rngs": "flax.nnx.Rngs",
    "jax.jaxlib._jax.Array": "jax.Array",
    "jaxlib._jax.Array": "jax.Array",
    "optax._src.base.GradientTransformation": "optax.GradientTransformation",
    "torch.nn.modules.module.Module": "torch.nn.Module",
}
# Sphinx sees an alias as what it stands for.
ALIASES = {"ArrayLike": jax.typing.ArrayLike, "DTypeLike": jax.typing.DTypeLike}
# Short names of modules, as the docstrings of each package use them.
SHORT_NAMES = {
    "nnx": "flax.nnx",
    "jnp": "jax.numpy",
    "lax": "jax.lax",
    "partial": "functools.partial",
}
# Names of functions that are also those of variables, which the docstrings mean.
VARIABLES = {"embedding", "kernel"}
SECTION = re.compile(r"(Args|Attributes|Example|Raises|Returns|Yields):$")


class NameRole(PyXRefRole):
    """Code in single backticks; a link if it is the name of an object."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Make a reference of what can be a name, and code of the rest."""
        is_name = re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", self.text)
        if not is_name or self.text in VARIABLES:
            return [nodes.literal(self.rawtext, self.text)], []
        self.name = "py:obj"
        made, messages = super().run()
        package = self.env.ref_context.get("py:module", "").split(".")[0]
        short, _, rest = made[0]["reftarget"].partition(".")
        names = SHORT_NAMES | {"nn": "torch.nn" if package == "bcn_torch" else "flax.linen"}
        if short in names:
            made[0]["reftarget"] = f"{names[short]}.{rest}" if rest else names[short]
        made[0]["optional"] = True
        return made, messages


def use_public_name(app: Sphinx, env: BuildEnvironment, node: Any, text: Any) -> None:
    """Let the inventories of other projects be searched for the public name."""
    node["reftarget"] = PUBLIC_NAMES.get(node["reftarget"], node["reftarget"])


def accept_unknown(app: Sphinx, env: BuildEnvironment, node: Any, text: Any) -> Any:
    """Show a name in backticks that is none of an object as code."""
    return text if node.get("optional") else None


def rewrite_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]
) -> None:
    """From Markdown to reStructuredText, without what Python writes for named tuples."""
    written = (line for line in lines if not line.startswith("Create new instance of "))
    lines[:] = literal_blocks(tables(written))


def literal_blocks(lines: Iterable[str]) -> Iterator[str]:
    """Mark indented blocks as literal, except the text of a section."""
    in_section = in_block = after_blank = False
    for line in lines:
        if line and not line[0].isspace():
            in_section, in_block = bool(SECTION.match(line)), False
        starts = line.startswith("    ") and after_blank and not line.lstrip().startswith(">>>")
        if starts and not in_section and not in_block:
            in_block = True
            yield from ("::", "")
        after_blank = not line
        yield line


def tables(lines: Iterable[str]) -> Iterator[str]:
    """Make each Markdown table a list table."""
    rows: list[str] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            rows.append(line)
            continue
        if rows:
            yield from (".. list-table::", "   :header-rows: 1", "")
            for row in (rows[0], *rows[2:]):
                cells = [cell.strip() for cell in row.strip("|").split("|")]
                yield f"   * - {cells[0]}"
                yield from (f"     - {cell}" for cell in cells[1:])
            yield ""
            rows = []
        yield line


def rewrite_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str] | None:
    """Show aliases and defaults by name, and leave out what Flax adds to every linen module."""

    def rewrite(text: str) -> str:
        for alias, meaning in ALIASES.items():
            written = stringify_annotation(meaning, "smart", short_literals=True)
            text = text.replace(written, f"~jax.typing.{alias}")
        text = re.sub(r"<(?:function|class) '?(?:[\w.]+\.)?(\w+)'?(?: at 0x\w+)?>", r"\1", text)
        return re.sub(r", parent: [^()]*?<[^<>]*_Sentinel[^<>]*>, name: [^()]*?(?=\))", "", text)

    if signature is None:
        return None
    if what == "class" and signature.startswith("(*args"):
        # That of the metaclass of NNX modules, which passes everything on.
        init = inspect.signature(obj.__init__, bound_method=True)  # type: ignore[misc]
        signature = inspect.stringify_signature(
            init, show_return_annotation=False, unqualified_typehints=True, short_literals=True
        )
    return rewrite(signature), rewrite(returns or "")


def skip_member(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: Any
) -> bool | None:
    """Leave out the fields of named tuples, which the docstring of the class describes."""
    return True if str(obj.__doc__).startswith("Alias for field") else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of it."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.add_role("name", NameRole())
    app.connect("missing-reference", use_public_name, priority=100)
    app.connect("missing-reference", accept_unknown, priority=900)
    app.connect("autodoc-process-docstring", rewrite_docstring, priority=400)
    app.connect("autodoc-process-signature", rewrite_signature)
    app.connect("autodoc-skip-member", skip_member)
    return {"parallel_read_safe": True}
