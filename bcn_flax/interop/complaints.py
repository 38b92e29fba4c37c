"""One error for everything that is wrong."""

from collections.abc import Collection, Iterable, Mapping

from bcn_flax.interop.layouts import Shape


def refuse(rule: str, problems: Iterable[str], way_out: str = "") -> None:
    """Raise a `ValueError` that lists all problems, if there are any."""
    lines = [f"  {problem}" for problem in problems]
    if lines:
        raise ValueError("\n".join(filter(None, [rule, *lines, way_out])))


def differences(
    found: Mapping[str, Shape],
    wanted: Mapping[str, Shape],
    spare: Collection[str] = (),
    partial: bool = False,
) -> list[str]:
    """What is missing, unless `partial`, unexpected, unless `spare`, or misshapen."""
    missing = () if partial else [key for key in wanted if key not in found]
    return [
        *(f"missing: {key} {wanted[key]}" for key in missing),
        *(
            f"unexpected: {key} {shape}"
            for key, shape in found.items()
            if key not in wanted and key not in spare
        ),
        *(
            f"misshapen: {key} is {found[key]} and must be {shape}"
            for key, shape in wanted.items()
            if key in found and found[key] != shape
        ),
    ]
