"""The checks catch every mutant, and mutants are imported as they should be."""

import ast
import sys
from functools import cache
from importlib import import_module

import jax.numpy as jnp
import pytest

from parity_tests import suite
from parity_tests.mutants import EQUIVALENT, MUTANTS, pytest_checks
from parity_tests.mutants.mutant import PACKAGES, ROOT, Mutant, catch, imported_afresh
from parity_tests.mutants.norms import NORMS

pytestmark = pytest.mark.torch

ALL = MUTANTS + EQUIVALENT
SWAPPED = next(mutant for mutant in MUTANTS if mutant.name == "momentum-swapped")


def each(mutants):
    """All of them take minutes, so that three in four of each table are slow."""
    marks = ([], *[[pytest.mark.slow]] * 3)
    return pytest.mark.parametrize(
        "mutant", [pytest.param(m, id=m.name, marks=marks[i % 4]) for i, m in enumerate(mutants)]
    )


def checks_named(hint):
    """The checks with this in their names, of the suite that is imported now."""
    checks = import_module("parity_tests.suite").checks()
    return {name: check for name, check in checks.items() if hint in name}


@pytest.mark.mutants
def test_without_a_mutant_nothing_is_caught():
    """Importing the sources again fails no check: one for each source shows it.

    It takes the longest, so it is the first.
    """
    mutants = {mutant.file: mutant for mutant in MUTANTS}.values()

    def tried_first():
        checks, firsts = checks_named(""), {}
        for mutant in mutants:
            own = pytest_checks.checks(mutant.tests, mutant.hint) if mutant.tests else checks
            name = next(name for name in own if mutant.hint in name)
            firsts[name] = own[name]
        return firsts

    caught = catch(None, tried_first)
    assert caught.check is None, caught.message


@pytest.mark.mutants
@each(MUTANTS)
def test_a_mutant_is_caught(mutant):
    caught = catch(mutant)
    assert caught.check, f"nothing notices {mutant.name} in {mutant.file}: {mutant.why}"


@pytest.mark.mutants
@each(EQUIVALENT)
def test_an_equivalent_mutant_is_not_caught(mutant):
    caught = catch(mutant, lambda: checks_named(mutant.hint))
    assert caught.check is None, f"{caught.message}, though this is said of it: {mutant.why}"


@cache
def source(file):
    return (ROOT / file).read_text()


@cache
def program(text):
    """Whatever its comments and layout are."""
    return ast.dump(ast.parse(text))


def misfit(mutant):
    """What keeps a mutant from being put in, if anything does."""
    try:
        mutant.apply(source(mutant.file))
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def test_the_text_that_a_mutant_replaces_occurs_once_in_its_source():
    misfits = [misfit(mutant) for mutant in ALL if misfit(mutant)]
    assert not misfits, "\n\n".join(misfits)


def test_a_mutant_is_another_program_than_its_source():
    broken = []
    for mutant in ALL:
        if misfit(mutant):
            continue  # the test above fails
        try:
            if program(mutant.apply(source(mutant.file))) == program(source(mutant.file)):
                broken.append(f"{mutant.name} is the same program as {mutant.file}.")
        except SyntaxError as error:
            broken.append(f"{mutant.name} is no program: {error}.")
    assert not broken, "\n".join(broken)


def test_every_hint_is_part_of_the_name_of_a_check():
    """A stale hint costs minutes; without one, the whole suite follows a mutant."""
    names = "\n".join(suite.checks())
    stale = [m.name for m in ALL if m.hint not in (names_of_tests(m.tests) if m.tests else names)]
    assert not [*stale, *(m.name for m in ALL if not m.hint)]


def names_of_tests(files):
    lines = [line for file in files for line in source(f"parity_tests/{file}").splitlines()]
    return "\n".join(line for line in lines if line.startswith("def test_"))


def test_mutants_have_names_of_their_own():
    names = [mutant.name for mutant in ALL]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("old", "count"), [("no such text", 0), ("running", r"\d+")])
def test_a_text_that_does_not_occur_once_is_refused(old, count):
    source = (ROOT / NORMS).read_text()
    with pytest.raises(ValueError, match=rf"once in {NORMS}, it occurs {count} times"):
        Mutant("stale", NORMS, old, "", "").apply(source)


def test_a_mutant_that_no_check_imports_is_refused():
    with pytest.raises(ValueError, match=r"never import bcn_flax\.norms"):
        catch(SWAPPED, dict)


def loaded():
    """The modules that mutants replace, and the finders of imports."""
    ours = {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] in PACKAGES}
    return ours, list(sys.meta_path)


def after_one_batch():
    """The running mean after a batch of mean 1, from 0 and with a momentum of 0.9."""
    norms, affine = (import_module(f"bcn_flax.{name}") for name in ("norms", "affine"))
    zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    return norms.moving_average(affine.Moments(zero, one), affine.Moments(one, one), 0.9).mean


def test_the_mutant_is_what_is_imported_and_nothing_stays_of_it():
    assert after_one_batch() == pytest.approx(0.1)
    before = loaded()
    with imported_afresh(SWAPPED):
        assert after_one_batch() == pytest.approx(0.9)
        assert sys.modules["bcn_flax.norms"] is not before[0]["bcn_flax.norms"]
    assert loaded() == before
    assert after_one_batch() == pytest.approx(0.1)
    with imported_afresh(None):  # from bytecode, if there is any
        assert after_one_batch() == pytest.approx(0.1)


def test_nothing_stays_of_a_mutant_that_crashes():
    def crash():
        with imported_afresh(SWAPPED):
            after_one_batch()
            raise KeyboardInterrupt

    before = loaded()
    with pytest.raises(KeyboardInterrupt):
        crash()
    assert loaded() == before


def test_annotations_are_not_checked_in_mutants():
    """The import hook of jaxtyping checks them elsewhere; it must not stand in for the checks."""
    integers = jnp.ones((2, 3), int)
    with pytest.raises(TypeError, match="moments"):
        import_module("bcn_flax.affine").moments(integers)
    with imported_afresh(None):
        import_module("bcn_flax.affine").moments(integers)


def test_the_first_check_to_fail_is_reported_and_hints_go_first():
    def fails():
        raise AssertionError("\nsome digits\nare wrong")

    def crashes():
        raise KeyError("no digits")

    def checks():
        import_module(SWAPPED.module)
        return {"passes": after_one_batch, "fails": fails, "crashes": crashes}

    assert catch(None, checks)[:2] == ("fails", "some digits are wrong")
    assert catch(SWAPPED._replace(hint="crash"), checks)[:2] == ("crashes", "KeyError: 'no digits'")
    assert catch(SWAPPED, lambda: {"passes": after_one_batch}).check is None
